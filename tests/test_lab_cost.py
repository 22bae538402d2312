"""The cost of each arm; no time is asserted."""

import json

import pytest
import torch

from fastsac.cli import main
from fastsac.errors import UsageError
from fastsac.lab import cost
from fastsac.lab.arguments import Cost
from fastsac.lab.arms import parse_arm


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])

    def call(name: str, seconds: float) -> None:
        order.append(name)
        clock[0] += seconds * (1 + len(order) // 2)  # slower in later rounds

    calls = {("a", "update"): lambda: call("a", 0.8), ("b", "update"): lambda: call("b", 1.6)}
    times = cost.interleaved(calls, 5)
    rounds = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert all(sorted(each) == ["a", "b"] for each in rounds)
    assert len(rounds) == 5 + cost.WARM_UPS
    assert ["b", "a"] in rounds
    assert ["a", "b"] in rounds
    assert [len(each) for each in times.values()] == [5, 5]
    assert times["b", "update"][0] > times["a", "update"][0]


def test_ratios_are_within_a_round() -> None:
    """A machine that is ten times as slow in one round makes no difference to them."""
    first, other = parse_arm("pathwise"), parse_arm("score:loo:4")
    slow = [1.0, 10.0, 1.0, 1.0, 10.0]
    times = {("pathwise", kind): slow for kind in ("actor_step", "update", "reference_update")}
    times |= {("score:loo:4", "actor_step"): [2.0 * each for each in slow]}
    times |= {("score:loo:4", kind): [1.2, 13.0, 1.4, 1.1, 15.0] for kind in ("update", "reference_update")}
    row = cost._row(other, first, "fused", times)
    assert (row["arm"], row["engine"], row["K"]) == ("score:loo:4", "fused", 4)
    assert row["actor_step_ms"] == {"median": 2.0, "low": 2.0, "high": 20.0}
    assert row["actor_step_ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    for kind in ("update", "reference_update"):
        assert row[f"{kind}_ratio"] == pytest.approx({"median": 1.3, "low": 1.2, "high": 1.4})
    printed = cost.table({"rows": [cost._row(first, first, "fused", times), row], "batch_size": 8}).splitlines()
    assert printed[2].split() == [
        "score:loo:4",
        "4",
        "2.00",
        "ms",
        "(2.00x)",
        "1.40",
        "ms",
        "(1.30x)",
        "1.40",
        "ms",
        "(1.30x)",
        "fused",
    ]


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole updates by both engines, and the actor's step, which leaves the critics alone."""
    found: dict[tuple[str, str], tuple[str, list[str]]] = {}

    def looking(calls, rounds, synchronize):
        for (arm, kind), call in calls.items():
            learner = call.args[0] if kind == "actor_step" else call.func.__self__
            before = {name: tensor.clone() for name, tensor in learner.state()[0].items()}
            call()
            after = learner.state()[0]
            changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
            found[arm, kind] = learner.engine, sorted(changed & {"actor", "critic", "target_critic", "value"})
        return {key: [1.0, 1.0] for key in calls}

    monkeypatch.setattr(cost, "interleaved", looking)
    monkeypatch.setattr(cost, "UPDATES", 2)
    cost.run(Cost(("score:value", "measure-valued"), batch_size=8, rounds=2))
    everything = ["actor", "critic", "target_critic"]
    assert found == {
        ("score:value", "update"): ("fused", [*everything, "value"]),
        ("score:value", "reference_update"): ("reference", [*everything, "value"]),
        ("score:value", "actor_step"): ("reference", ["actor", "value"]),
        ("measure-valued", "update"): ("reference", everything),
        ("measure-valued", "reference_update"): ("reference", everything),
        ("measure-valued", "actor_step"): ("reference", ["actor"]),
    }


def test_a_gpu_is_waited_for_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: events.append("clock") or 0.0)
    cost.interleaved({("a", "update"): lambda: events.append("call")}, 3, synchronize=True)
    assert events == ["call"] * cost.WARM_UPS + ["wait", "clock", "call", "wait", "clock"] * 3


def test_the_command(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "UPDATES", 1)
    arms = ["pathwise", "score:loo:2", "measure-valued"]
    main(["lab", "cost", "--arms", *arms, "--batch-size", "8", "--rounds", "2", "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert [row["arm"] for row in result["rows"]] == arms
    assert [row["engine"] for row in result["rows"]] == ["fused", "fused", "reference"]
    for kind in ("actor_step", "update", "reference_update"):
        assert result["rows"][0][f"{kind}_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert all(row[f"{kind}_ms"]["median"] > 0.0 for row in result["rows"])
    printed = capsys.readouterr().out
    assert "measure-valued" in printed
    assert "(1.00x)" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Cost(rounds=1), "--rounds must be"),
        (Cost(batch_size=1), "--batch-size must be"),
        (Cost(("a",)), "unknown --est"),
    ],
)
def test_wrong_options(options: Cost, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cost.run(options)
