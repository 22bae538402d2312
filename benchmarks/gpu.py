"""Everything that needs a GPU, in two commands of under nine minutes each.

    python -m benchmarks.gpu --out DIR
    python -m benchmarks.gpu --out DIR --engines

Runs the GPU tests (while compiling what will be measured), times the operations and the updates, trains for most of a
minute if EnvPool is installed, and writes DIR/gpu.json: all rows, what is missing and why, the machine, and a verdict
on each target. With --engines it times every engine, and several learners that share launches, instead of operations
and updates (see `engines_gpu.py`), and writes DIR/gpu_engines.json. Needs torch, triton, numpy, pytest and
pytest-benchmark; it runs from a checkout and installs nothing. Each part runs in its own process, so a part that fails
does not affect the others.

Exit status: 0 if the tests pass and every part ran, 1 if not, 2 without a GPU. A missed target is printed, but is not a
failure of the run. Speedups are printed even if tests failed, but marked as doubtful.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import Precompilers, benchmark_part, engines_part, package_obstacle, run_tests, training_part
from benchmarks.machine import describe_machine, write_json
from benchmarks.verdicts import describe, engines_table, table, verdicts

TOTAL_S = 520.0
#: seconds that the tests and the training take at most, and that the others have at least: they share what is left over
PLAN = {"tests": 190.0, "ops": 140.0, "updates": 75.0, "training": 45.0}
ENGINES_PLAN = {"tests": 190.0, "engines": 200.0, "training": 60.0}
#: what a part may take beyond that, except for the tests: its start, and its last case or saving
GRACE_S = 20.0
#: failures printed of each part
SHOWN = 10

Part = Callable[[], dict[str, Any]]
Plan = dict[str, float]


def budget(name: str, left: float, training: bool = True, plan: Plan = PLAN) -> float:
    """Return the seconds of a part for which so many are left, with itself and all that follow."""
    following = list(plan)[list(plan).index(name) + 1 : None if training else -1]
    free = left - GRACE_S - sum(plan[part] + GRACE_S for part in following)
    return max(plan[name] / 4, free if name in ("ops", "updates", "engines") else min(plan[name], free))


def run_parts(file: Path, work: Path, plan: Plan = PLAN) -> dict[str, Any]:
    """Run one part after the other and write what is known after each."""
    started = time.monotonic()

    def left() -> float:
        return TOTAL_S - (time.monotonic() - started)

    obstacle = package_obstacle("envpool", "tyro", "rich")
    precompilers = Precompilers(work) if "ops" in plan else None

    def tests() -> dict[str, Any]:
        return run_tests(work, plan["tests"])

    def ops() -> dict[str, Any]:
        assert precompilers is not None
        precompiled = precompilers.finish(TOTAL_S - left(), PLAN["tests"])
        seconds = budget("ops", left(), not obstacle)
        return benchmark_part("ops", work, seconds, GRACE_S) | {"precompiled": precompiled}

    def updates() -> dict[str, Any]:
        return benchmark_part("update", work, budget("updates", left(), not obstacle), GRACE_S)

    def engines() -> dict[str, Any]:
        return engines_part(work, budget("engines", left(), not obstacle, plan), GRACE_S)

    def training() -> dict[str, Any]:
        if obstacle:
            return {"ok": True, "skipped": obstacle}
        return training_part(work, budget("training", left(), plan=plan))

    machine = describe_machine()
    command = "python -m benchmarks.gpu --out DIR" + (" --engines" if "engines" in plan else "")
    result: dict[str, Any] = {"command": command, "machine": machine}
    parts: dict[str, Part] = {"tests": tests, "ops": ops, "updates": updates, "engines": engines, "training": training}
    try:
        for name, part in ((name, parts[name]) for name in plan):
            before = time.monotonic()
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                result[name] = part()
            except Exception as error:  # a fault of this script's must not lose what the other parts gathered
                result[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            result[name]["seconds"] = round(time.monotonic() - before, 1)
            print(f"{name}: {summary(name, result[name])}", file=sys.stderr, flush=True)
            keep(file, result)
    finally:
        if precompilers is not None:
            precompilers.stop()
        keep(file, result)
    return result


def keep(file: Path, result: dict[str, Any]) -> None:
    """Write the file, with the verdicts on what is there."""
    write_json(file, result | {"verdicts": verdicts(result)})


def summary(name: str, part: dict[str, Any]) -> str:
    """Return a part's outcome in a line."""
    seconds = f"{part['seconds']:.0f} s"
    if "error" in part:
        return f"FAILED after {seconds}: {part['error']}"
    if name == "tests":
        counts = f"{part['passed']} passed, {len(part['failed'])} failed, {part['skipped']} skipped"
        state = "green" if part["green"] else "RED" if part["failed"] else "NOT FINISHED"
        return f"{state}: {counts} in {seconds}"
    if "skipped" in part:
        return f"skipped: {part['skipped']}"
    if name == "training":
        keys = ("steps_per_s", "updates_per_s", "million_steps_s")
        rates = ", ".join(f"{part[key]:,.0f} {key}" for key in keys if part.get(key))
        return f"{rates or 'nothing logged'} in {seconds}"
    missing = sum(len(names) if isinstance(names, list) else names for names in part["not_measured"].values())
    return f"{len(part['rows'])} measured, {missing} not measured, {len(part['failed'])} failed in {seconds}"


def report(result: dict[str, Any]) -> None:
    """Print every verdict, and the operations at the targets' sizes."""
    gpu, versions = result["machine"]["gpu"] or {"name": "no GPU"}, result["machine"]["versions"]
    print(f"\n{gpu['name']}, torch {versions['torch']}, triton {versions['triton']}")
    for name in (name for name in dict.fromkeys((*PLAN, *ENGINES_PLAN)) if name in result):
        print(f"  {name:34}{summary(name, result[name])}")
        failed = list(result[name].get("failed", {}).items())
        for case, error in failed[:SHOWN]:
            print(f"    {case}: {error[:160]}")
        if len(failed) > SHOWN:
            print(f"    and {len(failed) - SHOWN} more, in gpu.json")
    for name, verdict in verdicts(result).items():
        print(f"  {name:34}{verdict['status']}  {describe(verdict)}")
    print("\n" + "\n".join(table(result) if "ops" in result else engines_table(result)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder for the results; made if need be"
    )
    parser.add_argument("--engines", action="store_true", help="every engine, in place of operations and updates")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: benchmarks.gpu needs a CUDA GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        file = options.out.resolve() / ("gpu_engines.json" if options.engines else "gpu.json")
        result = run_parts(file, Path(work), ENGINES_PLAN if options.engines else PLAN)
    report(result)
    return int(
        not all(part.get("ok") for part in (result[name] for name in (ENGINES_PLAN if options.engines else PLAN)))
    )


if __name__ == "__main__":
    sys.exit(main())
