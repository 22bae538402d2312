"""The parts of `benchmarks.gpu`, each in its own processes, each with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.precompile import forget_tuning

ROOT = Path(__file__).resolve().parents[1]
TEST_PATHS = ("tests/kernels", "tests/test_graphed.py", "tests/test_fused_cuda.py")
# a GPU host has its own versions of pytest and of everything that might warn
PYTEST_OPTIONS = "-q --tb=short -o minversion=8.0 -o filterwarnings=default -p no:cacheprovider"
PYTEST = ["-m", "pytest", *PYTEST_OPTIONS.split()]
TRAIN = "train --env-id HalfCheetah-v5 --total-steps 100000000 --device cuda --eval-every 0"
TAIL = 3000


def environment(work: Path, **more: str) -> dict[str, str]:
    """Return the environment of a part: this checkout importable, kernels not interpreted, caches that all parts share.

    Triton's is named, too: where it is not, torch.compile moves it into its own as soon as it is used in a process.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton")}
    caches["XDG_CACHE_HOME"] = str(work / "cache")  # of the engine's check, which is to run here
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | caches
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | settings | more


def start(arguments: list[str], log: IO[str], environ: dict[str, str]) -> subprocess.Popen[str]:
    """Start Python in the checkout, in a process group of its own."""
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> None:
    """Kill the process and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(arguments: list[str], log: Path, environ: dict[str, str], timeout: float) -> dict[str, Any]:
    """Run Python to its end, or to the limit; a failure keeps the end of what it printed."""
    with log.open("w") as file:
        process = start(arguments, file, environ)
        try:
            status: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = f"stopped after {timeout:.0f} s"
        finally:
            end(process)
    return {"exit_status": status} | ({} if status == 0 else {"output": tail(log)})


def tail(log: Path) -> str:
    """Return the end of a log without this machine's folders."""
    text = log.read_text(errors="replace").replace(f"{ROOT}{os.sep}", "")
    return re.sub(r"(?<![\w.])/[^\s:'\"]*/(?=[^\s:'\"/]+)", "", text)[-TAIL:]


class Precompilers:
    """Processes that fill torch.compile's cache and Triton's, so that all can be measured in time."""

    def __init__(self, work: Path) -> None:
        self.work = work
        number = max(1, min(8, (os.cpu_count() or 1) // 2))
        environ = environment(work, TORCHINDUCTOR_COMPILE_THREADS="1", OMP_NUM_THREADS="1")
        self.log = (work / "precompile.log").open("w")
        modules = [["-m", "benchmarks.precompile", str(index), str(number)] for index in range(number)]
        self.processes = [start(arguments, self.log, environ) for arguments in modules]

    def finish(self, elapsed: float, limit: float) -> dict[str, int]:
        """Wait for them up to the limit, counted from the start; return how many got through all their cases."""
        deadline = time.monotonic() + limit - elapsed
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        done = sum(process.poll() == 0 for process in self.processes)
        self.stop()
        forget_tuning(self.work)
        return {"processes": len(self.processes), "completed": done}

    def stop(self) -> None:
        for process in self.processes:
            end(process)
        self.log.close()


def package_obstacle(*packages: str) -> str | None:
    """Return which of the packages cannot be imported, None if all can."""
    for package in packages:
        command = [sys.executable, "-c", f"import {package}"]
        if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode:
            return f"no {package}"
    return None


def run_tests(work: Path, timeout: float, marker: str = "gpu", paths: Sequence[str] = TEST_PATHS) -> dict[str, Any]:
    """Run the tests of the marker; green only if all that were collected ran and none failed.

    In several processes, each with every so many-th test: Triton compiles hundreds of kernels for them.
    """
    deadline = time.monotonic() + timeout
    collected = work / "collected.log"
    done = run([*PYTEST, "-m", marker, "--collect-only", *paths], collected, environment(work), timeout)
    names = [line for line in collected.read_text().splitlines() if "::" in line and not line.startswith("ERROR")]
    number = max(1, min(8, (os.cpu_count() or 1) // 2, len(names)))
    files = [work / f"tests{index}.xml" for index in range(number)]
    logs = [xml.with_suffix(".log") for xml in files]
    statuses: list[int | str] = [done["exit_status"]]
    with contextlib.ExitStack() as stack:
        processes = []
        for index, (xml, log) in enumerate(zip(files, logs, strict=True)):
            arguments = [*PYTEST, "-m", marker, f"--junitxml={xml}", *names[index::number]]
            processes.append(start(arguments, stack.enter_context(log.open("w")), environment(work)))
            stack.callback(end, processes[-1])
        for process in processes:
            try:
                statuses.append(process.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                statuses.append(f"stopped after {timeout:.0f} s")
    counts = read_junit(files)
    ran = counts["passed"] + counts["skipped"] + len(counts["failed"])
    green = set(statuses) == {0} and counts["passed"] > 0 and ran == len(names)
    output = {} if green else {"output": "\n".join(tail(log) for log in (collected, *logs))[-4 * TAIL :]}
    summary = {"ok": green, "green": green, "paths": list(paths), "collected": len(names), "exit_statuses": statuses}
    return summary | counts | output


def read_junit(files: Iterable[Path]) -> dict[str, Any]:
    """Return how many tests passed and were skipped (for which reasons), and the failures' names and messages."""
    result: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": {}, "skipped_because": {}}
    for case in (case for xml in files if xml.exists() for case in ET.parse(xml).iter("testcase")):
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        skipped = case.find("skipped")
        if problem is not None:
            name = f"{case.get('classname')}::{case.get('name')}"
            result["failed"][name] = (problem.get("message") or "").split("\n")[0][:300]
        elif skipped is not None:
            reason = skipped.get("message") or ""
            result["skipped"] += 1
            result["skipped_because"][reason] = result["skipped_because"].get(reason, 0) + 1
        else:
            result["passed"] += 1
    return result


def benchmark_part(name: str, work: Path, budget: float, grace: float) -> dict[str, Any]:
    """Run `bench_<name>.py` within the budget; what it measured is there also if it was stopped."""
    path = work / f"{name}.json"
    options = ["--benchmark-only", "--benchmark-quiet", f"--bench-json={path}", f"--bench-budget={budget:.0f}"]
    arguments = [*PYTEST, f"benchmarks/bench_{name}.py", *options]
    done = run(arguments, work / f"{name}.log", environment(work), budget + grace)
    measured = {"rows": [], "not_measured": {}, "failed": {}}
    if path.exists():
        measured = json.loads(path.read_text())
    machine = measured.pop("machine", {})
    loads = {key: machine.get(key) for key in ("load_average", "load_average_at_end")}
    ok = done["exit_status"] == 0 and bool(measured["rows"])
    return {"ok": ok, "budget_s": round(budget)} | measured | loads | done


def engines_part(work: Path, budget: float, grace: float) -> dict[str, Any]:
    """Time every engine, and several learners in the launches of one, within the budget."""
    path = work / "engines.json"
    arguments = ["-m", "benchmarks.engines_gpu", "--out", str(path), "--budget", f"{budget:.0f}"]
    done = run(arguments, work / "engines.log", environment(work), budget + grace)
    measured = json.loads(path.read_text()) if path.exists() else {"rows": [], "not_measured": {}, "failed": {}}
    return {"ok": done["exit_status"] == 0 and bool(measured["rows"]), "budget_s": round(budget)} | measured | done


def training_part(work: Path, seconds: float) -> dict[str, Any]:
    """Train for so long from the command line; return its median rates once it is under way."""
    run_dir, log = work / "run", work / "training.log"
    arguments = ["-m", "fastsac", *TRAIN.split(), "--run-dir", str(run_dir)]
    with log.open("w") as file:
        process = start(arguments, file, environment(work))
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it finishes its step, saves, and exits with 0
        try:
            status: int | str = process.wait(15)
        except subprocess.TimeoutExpired:
            status = "did not stop within 15 s"
        finally:
            end(process)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
    rows = [row for row in map(json.loads, lines) if "updates_per_s" in row and row.get("updates", 0) > 0][2:]
    rates = {key: statistics.median(row[key] for row in rows) for key in ("steps_per_s", "updates_per_s") if rows}
    if "steps_per_s" in rates:  # as this rate would take; not run to its end
        rates["million_steps_s"] = 1e6 / rates["steps_per_s"]
    last = {key: rows[-1][key] for key in ("step", "updates", "episode_return") if rows and key in rows[-1]}
    result = {"ok": status == 0 and bool(rates), "command": f"fastsac {TRAIN}", "exit_status": status} | rates | last
    return result if result["ok"] else result | {"output": tail(log)}
