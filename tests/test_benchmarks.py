"""What the benchmarks conclude from their rows, without running them."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_table,
    bench_update,
    equivalence,
    gpu,
    gpu_parts,
    op_cases,
    precompile,
    report,
    step_time,
    update_sizes,
    verdicts,
)
from benchmarks.measure import quantiles
from benchmarks.op_cases import CASES, GPU_CASES, GPU_MEASUREMENTS, GPU_UPDATES, Measurement, build, bytes_moved

NAMES = list(verdicts.verdicts({}))
TIMES = {"reference": 5.0, "compile": 2.0}


def op_row(measurement: Measurement, time: float) -> dict[str, Any]:
    case, backend, which = measurement
    row = {"pass": which, "backend": backend} | case._asdict() | {"bytes": 1, "copy_share": 0.1}
    row |= {key: [time] * 3 for key in ("wall_us", "device_us", "cold_us")}
    if measurement.counted:
        row["launches"] = {"forward": 1}
    return row


def run(green: bool = True, triton: float = 1.0, graphed: float = 1.0, failed: tuple[str, ...] = ()) -> dict[str, Any]:
    times = TIMES | {"triton": triton}
    ops = [op_row(measurement, times[measurement.backend]) for measurement in GPU_MEASUREMENTS]
    steps = {"reference": 4.0, "graphed": graphed}
    updates = [
        dict(zip(("estimator", "baseline", "K"), estimator, strict=True))
        | {"what": what, "B": 256, "A": a, "engine": engine, "wall_us": [time] * 3}
        for estimator, a in GPU_UPDATES
        for what in ("actor", "update")
        for engine, time in steps.items()
    ]
    machine = {"gpu": {"name": "GPU"}, "versions": {"torch": "2", "triton": "3"}, "date": "2026-01-01"}
    part = {"ok": True, "not_measured": {}, "failed": {}, "seconds": 1.0}
    return {
        "machine": machine,
        "tests": {
            "ok": green,
            "green": green,
            "passed": 1,
            "failed": dict.fromkeys(failed, "off by 1"),
            "skipped": 0,
            "seconds": 1.0,
        },
        "ops": part | {"rows": ops},
        "updates": part | {"rows": updates},
        "training": {"ok": True, "skipped": "no envpool", "seconds": 0.0},
    }


def statuses(result: dict[str, Any]) -> list[str]:
    return [verdict["status"] for verdict in verdicts.verdicts(result).values()]


def test_verdicts():
    assert statuses(run()) == ["reached"] * 4
    assert statuses(run(triton=1.6)) == ["reached", "missed", "reached", "reached"]
    assert statuses(run(triton=2.1, graphed=2.0)) == ["missed", "missed", "missed", "reached"]
    assert statuses({}) == ["not measured"] * 4


@pytest.mark.parametrize(
    ("failed", "doubt", "marked"),
    [
        ((), "the GPU tests did not finish", set()),
        (("tests.kernels.test_parity::test_td_loss[cuda-1]",), "1 GPU test failed (td, update)", {"td"}),
        (("tests.kernels.test_parity::test_the_sampler_is[1]",), "1 GPU test failed (sample, update)", {"sample"}),
        (("tests.test_graphed::test_memory_stays",), "1 GPU test failed (update)", set()),
        (
            ("tests.kernels.test_philox::test_bits", "tests.test_graphed::test_it[{'estimator': 'score'}]"),
            "2 GPU tests failed (gather, sample, score, update)",
            {"sample", "score", "gather"},
        ),
        (
            ("tests.kernels.test_parity::test_mixed_dtypes[cuda]",),
            "1 GPU test failed (categorical, gather, pathwise, sample, score, td, update)",
            set(verdicts.WORDS),
        ),
    ],
)
def test_red_tests_cast_doubt_on_speedups_and_hide_none(capsys, failed, doubt, marked):
    result, green = run(False, triton=1.6, failed=failed), run(triton=1.6)
    assert statuses(result) == statuses(green) == ["reached", "missed", "reached", "reached"]
    gpu.report(result)
    lines = capsys.readouterr().out.split("\n")
    for name in NAMES[:3]:
        assert f"IN DOUBT: {doubt}" in next(line for line in lines if name in line)
    times = {line.split("-")[0] for line in lines if re.search(r" 1\.6! ", line)}
    assert times == marked
    assert any(line.startswith("! its own tests failed") for line in lines) == bool(marked)
    ratios = [entry for entry in verdicts.op_ratios(result["ops"]["rows"]) if entry["op"] in marked]
    assert verdicts.verdicts(result)[NAMES[0]]["suspect"] == len(ratios)
    assert verdicts.verdicts(result)[NAMES[2]]["suspect"] == (len(GPU_UPDATES) if failed else 0)
    gpu.report(green)
    assert "DOUBT" not in capsys.readouterr().out


def test_published_tables_state_no_speedup_of_what_failed():
    assert "tests are not green" in bench_table.table([run(green=False)])


def test_the_table_states_speeds_relative_to_eager():
    assert "| score-function loss | 2.50 to 2.50 | 5.00 to 5.00 |" in bench_table.table([run()])
    assert "| score-function loss | 2.50 to 2.50 | not reported: tests are not green |" in bench_table.table(
        [run(False)]
    )
    slower = run()
    rows = [row for row in slower["ops"]["rows"] if row["op"] == "sample" and row["pass"] == "fwd+bwd"]
    next(row for row in rows if row["backend"] == "compile")["device_us"] = [10.0] * 3
    assert "| sample and log-probability | 0.50 to 2.50 | 5.00 to 5.00 |" in bench_table.table([slower])


def test_what_is_missing_is_no_success():
    result = run()
    result["ops"]["rows"] = [row for row in result["ops"]["rows"] if row["B"] != 4096]
    assert statuses(result) == ["incomplete", "reached", "reached", "reached"]
    counted = next(row for row in result["ops"]["rows"] if row["backend"] == "triton" and "launches" in row)
    del counted["launches"], result["updates"]
    assert statuses(result)[2:] == ["not measured", "incomplete"]


@pytest.mark.parametrize("op", ["sample", "pathwise", "score", "td", "categorical", "gather"])
def test_operations_run_and_move_bytes(op):
    case = next(case for case in CASES if case.op == op and case.B == 256)
    operation = build(case, "reference", torch.device("cpu"))
    for which in case.passes:
        operation.call(case, which)()
    assert min(bytes_moved(case)[: len(case.passes)]) > 0


def test_the_work_on_a_gpu_fits_its_time():
    assert sum(gpu.PLAN.values()) + gpu.GRACE_S * (len(gpu.PLAN) - 1) <= gpu.TOTAL_S < 9 * 60
    assert op_cases.seconds(GPU_MEASUREMENTS) <= 0.85 * gpu.PLAN["ops"]
    assert bench_update.seconds(bench_update.GPU_STEPS) <= 0.85 * gpu.PLAN["updates"]
    everything = [
        Measurement(case, backend, which) for case in CASES for backend in op_cases.BACKENDS for which in case.passes
    ]
    assert op_cases.seconds(everything) > 2.0 * gpu.PLAN["ops"]  # what it was before less was asked for


@pytest.mark.parametrize("spent", [0.0, 60.0, gpu.PLAN["tests"], gpu.PLAN["tests"] + gpu.PLAN["ops"]])
def test_later_parts_have_their_time_and_the_run_an_end(spent):
    for training in (True, False):
        left = gpu.TOTAL_S - spent
        for name in ("ops", "updates", "training")[: 3 if training else 2]:
            seconds = gpu.budget(name, left, training)
            if spent <= gpu.PLAN["tests"]:
                assert seconds >= gpu.PLAN[name]
            left -= seconds + gpu.GRACE_S
        assert left >= 0.0


def test_what_is_measured_on_a_gpu_is_what_the_targets_compare():
    assert {case.B for case in GPU_CASES} == set(op_cases.BATCHES)
    for op in ("sample", "score"):
        sizes = {case.size for case in GPU_CASES if case.op == op}
        assert sizes == {(b, a) for b in op_cases.BATCHES for a in op_cases.ACTIONS}
    kinds = {(case.op, case.B) for case in GPU_CASES}
    assert kinds == {(op, b) for op in verdicts.WORDS for b in op_cases.BATCHES}
    updates = {(case[:3], case.A) for case, what in bench_update.GPU_STEPS if what == "update" and case.B == 256}
    assert updates == set(GPU_UPDATES)
    assert {estimator for estimator, _ in GPU_UPDATES} == set(op_cases.ESTIMATORS)


def test_all_that_is_measured_is_compiled_before(monkeypatch, capsys):
    pieces = precompile.pieces()
    found = {(piece.case, piece.backend, which) for piece in pieces for which in piece.which}
    ops = {tuple(measurement) for measurement in GPU_MEASUREMENTS if measurement.backend != "reference"}
    assert found == ops | {
        (case, case.engine, what) for case, what in bench_update.GPU_STEPS if case[-1] != "reference"
    }
    assert {"compile", "triton", "graphed"} == {piece.backend for piece in pieces}
    done = []
    monkeypatch.setattr(bench_update, "prepare", lambda case, what, device: done.append((case, case.engine, what)))
    monkeypatch.setattr(precompile, "build", lambda case, backend, device: Noting(backend, done))
    parts = [precompile.compile_all(pieces[index::3], torch.device("cpu")) for index in range(3)]
    assert sorted(map(str, done)) == sorted(map(str, found))
    assert parts == [0, 0, 0]
    monkeypatch.setattr(bench_update, "prepare", lambda *_: 1 / 0)
    graphed = [piece for piece in pieces if piece.backend == "graphed"]
    assert precompile.compile_all(graphed, torch.device("cpu")) == len(graphed)
    assert "ZeroDivisionError" in capsys.readouterr().err


class Noting:
    def __init__(self, backend, done):
        self.backend, self.done = backend, done

    def call(self, case, which):
        return lambda: self.done.append((case, self.backend, which))


def test_all_processes_of_a_run_share_their_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    settings = gpu_parts.environment(tmp_path)
    assert "TRITON_INTERPRET" not in settings
    assert settings["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert settings["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")


def test_what_a_gpu_host_imports_needs_no_private_names_of_triton():
    """Another version of Triton may not have them, and then all tests of a file are lost."""
    root = Path(__file__).resolve().parents[1]
    todo = [*(root / "tests/kernels").glob("test_*.py"), root / "tests/test_graphed.py", root / "tests/conftest.py"]
    todo += [root / f"benchmarks/{name}.py" for name in ("gpu", "precompile", "bench_ops", "bench_update", "conftest")]
    seen, private = set(), set()
    while todo:
        path = todo.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        for node in ast.parse(path.read_text()).body:  # not what is imported only when a function is called
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            todo += [root / folder / f"{name.replace('.', '/')}.py" for name in names for folder in ("", "kernels")]
            if any(re.match(r"triton\.(?!language\b)[a-z_]", name) for name in names):
                private.add(path.relative_to(root).as_posix())
    assert len(seen) > 30
    assert not private


def test_quantiles_are_microseconds():
    assert quantiles([index * 1e-6 for index in range(101)]) == [20.0, 50.0, 80.0]


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_page_without_markers_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- bench -->\nold\n<!-- /bench -->\n")
    assert "new" in report.rewritten(page, {"bench": lambda: "new"})
    with pytest.raises(ValueError, match="has no lines"):
        report.rewritten(page, {"other": lambda: "new"})


@pytest.mark.slow
def test_the_gpu_tests_are_shared_out_and_all_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_parts.os, "cpu_count", lambda: 4)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    test = tmp_path / "test_some.py"
    test.write_text("import pytest\n\n\n@pytest.mark.parametrize('i', range(7))\ndef test_it(i):\n    assert i != 3\n")
    found = gpu_parts.run_tests(tmp_path, 60.0, "not gpu", ["test_some.py"])
    assert (found["collected"], found["passed"], found["skipped"], found["green"]) == (7, 6, 0, False)
    assert [name.rpartition("::")[2] for name in found["failed"]] == ["test_it[3]"]
    assert len(found["exit_statuses"]) == 3  # the collection, and two processes
    test.write_text(test.read_text().replace("i != 3", "True"))
    assert gpu_parts.run_tests(tmp_path, 60.0, "not gpu", ["test_some.py"])["green"]
    assert not gpu_parts.run_tests(tmp_path, 60.0, "gpu", ["test_some.py"])["green"]  # none at all


def test_students_tail_is_the_tables():
    for t, freedom, p in ((1.8595, 8, 0.05), (2.2281, 10, 0.025), (0.0, 3, 0.5), (-1.8595, 8, 0.95)):
        assert float(equivalence.upper_tail(t, freedom)) == pytest.approx(p, rel=1e-3)


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ([98.0, 100.0, 103.0, 101.0], True),
        ([90.0, 92.0, 91.0, 93.0], False),  # a difference within the margin, too close to it
        ([60.0, 140.0, 80.0, 120.0], False),  # no difference at all, and no knowing
        ([120.0, 121.0, 119.0, 122.0], False),
    ],
)
def test_equivalence_has_to_be_shown(other, shown):
    for sign in (1.0, -1.0):  # returns may be negative
        reference = [sign * value for value in (99.0, 101.0, 100.0, 102.0)]
        found = equivalence.compare(reference, [sign * value for value in other], 0.05)
        assert (found.p < 0.05) == shown == (found.low > -equivalence.MARGIN and found.high < equivalence.MARGIN)
        assert found.low < found.difference < found.high


def test_the_measures_of_a_run():
    run = {"steps": [10, 20, 30, 40], "eval_return": [1.0, 2.0, 5.0, 7.0], "final": {"return_mean": 9.0}}
    assert [equivalence.value_of(run, measure) for measure in equivalence.MEASURES] == [9.0, 6.0]


def test_where_the_time_goes_is_a_table_and_a_picture(tmp_path):
    row = {"num_envs": 16, "threads": 2, "steps_per_s": 321.0, "us_per_step": dict.fromkeys(step_time.PARTS, 1234.0)}
    rows = [row | {"engine": engine} for engine in step_time.ENGINES]
    result = {"rows": rows, "machine": {"cpu": {"model": "CPU", "cores_allowed": 2}}}
    assert "| reference | 16 | 2 | 321 | 1,234 |" in step_time.table(result)
    step_time.draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_an_engine_is_compared_at_its_own_number_of_threads():
    times = {"reference": {1: [6.0, 8.0], 2: [4.0, 5.0]}, "fused, fp32": {1: [2.0, 2.0], 2: [3.0, 3.0]}}
    row = update_sizes.row_of((17, 6, 256, 64), times)
    assert row["fused, fp32"] == {"ms": 2.0, "threads": 1, "of_reference": 0.45}
    assert "| 17, 6 | 256, 256 | 64 | 4.5 | 2 (0.45) | not measured |" in update_sizes.table({"rows": [row]})


@pytest.mark.parametrize("engine", ["reference", "graphed"])
def test_updates_can_be_measured_on_a_gpu(engine):
    from benchmarks import bench_update
    from tests.pretend_cuda import pretended

    case = next(case for case in bench_update.CASES if (case.engine, case.B, case.A) == (engine, 256, 6))
    bench_update.filled_replay.cache_clear()
    with pretended():
        ring = bench_update.filled_replay(case.A, torch.device("cuda"))
        assert ring.size > 1000
        assert bench_update.learner(case._replace(B=8), torch.device("cuda")).engine == engine
    bench_update.filled_replay.cache_clear()
    bench_update.learner.cache_clear()
