"""The cost of each arm; no time is asserted."""

import json

import pytest

from fastsac.cli import main
from fastsac.errors import UsageError
from fastsac.lab import cost
from fastsac.lab.arguments import Cost


def test_rounds_are_interleaved_and_ratios_are_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])

    def call(name: str, seconds: float) -> None:
        order.append(name)
        clock[0] += seconds * (1 + len(order) // 2)  # slower in later rounds

    calls = {("a", "update"): lambda: call("a", 0.8), ("b", "update"): lambda: call("b", 1.6)}
    times = cost.interleaved(calls, 5)
    rounds = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert all(sorted(each) == ["a", "b"] for each in rounds)
    assert len(rounds) == 6  # one to warm up
    assert ["b", "a"] in rounds
    assert ["a", "b"] in rounds
    assert [len(each) for each in times.values()] == [5, 5]
    assert times["b", "update"][0] > times["a", "update"][0]


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
