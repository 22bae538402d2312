"""What is counted of whole updates, what is predicted from it, and how a GPU's figures are held against both."""

from typing import Any

import pytest
import torch

from benchmarks import engines_gpu, report, verdicts, whole_update
from benchmarks.kernel_launches import make_plan
from benchmarks.paper_model import CHIPS, HIGH, LOW
from benchmarks.whole_update import Stage, count, needed_bytes, scaled, stage_us
from tests.pretend_cuda import pretended


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return report.read("whole_update.json")


def small(**changes: Any) -> dict[str, Any]:
    return {"obs_size": 5, "action_size": 3, "hidden_sizes": (64, 64), "batch_size": 32, **changes}


def test_flops_are_those_of_the_layers_with_what_pads_them() -> None:
    stages, _ = count(make_plan(**small()))
    b, h, first, action, tile = 32, 64, 16, 16, 32  # 5 inputs and 8 are padded to 16, 3 actions to 16

    def products(*sizes: tuple[int, int]) -> int:
        return sum(2 * b * i * o for i, o in sizes)

    actor, heads = products((first, h), (h, h)), 2 * products((h, action))
    critic_at_action = products((first, h), (action, h), (h, h))
    assert stages[0].flops == 2 * (actor + heads + critic_at_action)
    assert stages[1].flops == 2 * products((first, h), (h, h), (h, h)) + actor + heads
    assert stages[3].flops == 2 * (critic_at_action + products((h, h), (h, action)))
    assert stages[4].flops == 2 * products((action, h)) + products((h, h))
    batch = 2 * 64  # rows that a tile of weights goes through at a time
    assert stages[2].flops == batch * (h * h + tile * h + h * 16) * 2
    assert 2 * stages[5].flops == batch * (h * h + tile * h + h * 16) * 2
    assert [stage.programs for stage in stages] == [4, 6, 2 * (4 + 2 + 2 + 1), 4, 2, 4 + 2 + 2 + 1]


def test_what_moves_is_at_least_what_an_update_cannot_do_without() -> None:
    plan = make_plan(**small(batch_size=16))
    stages, memory = count(plan)
    assert 0.9 * needed_bytes(plan) < memory < sum(stage.bytes for stage in stages)


@pytest.mark.parametrize(
    "changes",
    [small(batch_size=192), pytest.param(small(batch_size=192, num_action_samples=2), marks=pytest.mark.slow)],
    ids=str,
)
def test_counts_of_large_batches_follow_from_small_ones(changes: dict[str, Any]) -> None:
    whole, scaled_up = count(make_plan(**changes))[0], scaled(changes)
    for found, wanted in zip(scaled_up, whole, strict=True):
        assert found.programs == wanted.programs
        assert found.flops == wanted.flops
        assert found.bytes == pytest.approx(wanted.bytes, rel=0.001)


def test_predictions_make_sense() -> None:
    chip, one = CHIPS["H100"], Stage(132, 10**9, 10**8)
    for end in (LOW, HIGH):
        us = stage_us(one, chip, "tf32", end)
        assert us < stage_us(one._replace(programs=133), chip, "tf32", end)  # another wave
        assert us < stage_us(one._replace(flops=10**11), chip, "tf32", end)
        assert us < stage_us(one._replace(bytes=10**9), chip, "tf32", end)
        assert us < stage_us(one, chip, "fp32", end)
        assert stage_us(one._replace(flops=10**10), chip, "bf16", end) < stage_us(
            one._replace(flops=10**10), chip, "tf32", end
        )
        assert stage_us(Stage(1, 1, 1), chip, "tf32", end) >= 2.0
    assert stage_us(one, chip, "tf32", LOW) < stage_us(one, chip, "tf32", HIGH)


def test_the_targets_on_paper(result: dict[str, Any]) -> None:
    assert result["sources"] == whole_update.sources(), "python -m benchmarks.whole_update counts anew"
    for row in result["rows"]:
        if row["B"] == 256:
            assert row["memory_bytes"] <= 1.5 * row["needed_bytes"]
        if (row["B"], row["hidden"], row["precision"]) == (256, 256, "tf32"):
            low, high = row["chips"]["H100"]
            assert 1e6 / low > 25_000  # at the fast end
            assert 1e6 / high > 10_000


def row(engine: str, precision: str, estimator: str, us: float, **more: Any) -> dict[str, Any]:
    sizes = {"B": 256, "hidden": 256, "learners": 0}
    made = {"engine": engine, "precision": precision, "estimator": estimator, "us": us, "updates_per_s": 1e6 / us}
    return made | sizes | more


def test_verdicts_on_the_fused_engine() -> None:
    times = {("fused", "tf32"): 50.0, ("graphed", "fp32"): 160.0, ("reference", "fp32"): 900.0}
    rows = [row(*engine, name, us) for engine, us in times.items() for name in ("pathwise", "score")]
    rows.append(row("fused", "tf32", "pathwise", 80.0, learners=8))
    tests = {"green": True, "failed": {}}
    found = verdicts.verdicts({"tests": tests, "engines": {"rows": rows}})
    assert [verdict["status"] for verdict in found.values()] == ["reached"] * 3
    assert found["fused 3 times the graphed update"]["least"]["ratio"] == 3.2
    rows[1] = row("fused", "tf32", "score", 70.0)
    found = verdicts.verdicts({"tests": tests, "engines": {"rows": rows}})
    assert [verdict["status"] for verdict in found.values()] == ["reached", "missed", "missed"]
    assert [verdict["status"] for verdict in verdicts.verdicts({"engines": {}}).values()] == ["not measured"] * 3
    red = {"green": False, "failed": {"tests.kernels.test_whole_update::test_one": "off"}}
    assert "doubt" in verdicts.verdicts({"tests": red, "engines": {"rows": rows}})["fused 3 times the graphed update"]
    assert "x 8 learners" in verdicts.engines_table({"engines": {"rows": rows}})[-1]


def test_what_the_targets_compare_is_measured_first() -> None:
    cases = engines_gpu.cases()
    assert len(cases) == len(set(cases)) == 60 + len(engines_gpu.LEARNERS)
    assert {(case.B, case.hidden) for case in cases[:12]} == {(256, 256)}
    assert [case.learners for case in cases[12:17]] == list(engines_gpu.LEARNERS)


def test_a_row_has_its_prediction_and_its_floor() -> None:
    found = engines_gpu.with_floor(row("fused", "tf32", "pathwise", 50.0), "H100")
    assert found["launches"] == 6
    assert 0.1 < found["floor_share"] < 0.2
    assert found["predicted_us"][0] < 50.0 < found["predicted_us"][1]
    for other in (row("graphed", "tf32", "pathwise", 50.0), row("fused", "tf32", "pathwise", 50.0, B=512)):
        assert "floor_share" not in engines_gpu.with_floor(other, "H100")
    names = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA GeForce RTX 4090": "RTX 4090", "Tesla T4": None}
    assert {name: engines_gpu.chip_of(name) for name in names} == names


@pytest.mark.slow
def test_engines_can_be_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [engines_gpu.Case("fused", "tf32", "pathwise", 16, 64), engines_gpu.Case("fused", "tf32", "score", 16, 99)]
    few.append(engines_gpu.Case("fused", "tf32", "pathwise", 16, 64, 2))
    monkeypatch.setattr(engines_gpu, "cases", lambda: few)
    for name, number in {"CALLS": 1, "WARM_UP": 1}.items():
        monkeypatch.setattr(engines_gpu, name, number)
    monkeypatch.setattr("fastsac.learner.engines.graphed_obstacle", lambda: "")
    with pretended():
        found = engines_gpu.run(100.0, torch.device("cuda"), updates=2)
        assert engines_gpu.run(-1.0, torch.device("cuda"))["not_measured"]["budget"][0] == "fused-tf32-pathwise-16-64-0"
    assert [each["learners"] for each in found["rows"]] == [0, 2]
    assert "--hidden-sizes must be two multiples of 64" in found["failed"]["fused-tf32-score-16-99-0"]


def test_without_a_gpu_it_says_so(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engines_gpu.main(["--out", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_tables(result: dict[str, Any]) -> None:
    assert whole_update.updates_table(result).count("\n") == len(result["rows"]) + 1
    assert whole_update.stages_table(result).count("\n") == 7
