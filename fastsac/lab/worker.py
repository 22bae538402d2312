"""Trains the runs of a comparison on this machine: one per process, or several that differ only in their seeds.

`python -m fastsac.lab.worker PARENT RUN_DIR ...` resumes the runs if it can, and stops when the process PARENT has
died. It reads each `RUN_DIR.config.json`, writes its output to the first run's `RUN_DIR.log`, and leaves a
`machine.json` in each run directory and a `RUN_DIR.outcome.json` beside it. Exit statuses: 0 when a run is complete, 75
when a signal has stopped it, 76 when training has diverged, otherwise that of `fastsac train`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from fastsac.callbacks import Callback
from fastsac.config import Config
from fastsac.errors import Divergence, FastsacError
from fastsac.lab.arguments import Compare
from fastsac.lab.plan import Run, in_groups, jobs
from fastsac.lab.watch import Outcome, Watch
from fastsac.machine import describe_machine, write_json
from fastsac.run_dir import CONFIG, LOCK, config_from_dict
from fastsac.seeds import Seeds
from fastsac.system import kill_group, lock
from fastsac.train import SAC

#: exit statuses of a run that can be continued, and of one that has diverged
STOPPED, DIVERGED = 75, 76
MACHINE = "machine.json"
POLL_SECONDS, ORPHAN_SECONDS = 0.5, 60.0


class Failure(NamedTuple):
    """A run that has failed."""

    run: Run
    reason: str  # in one line
    diverged: bool


#: called for each complete run; raises FastsacError if something is wrong with it
Done = Callable[[Run], None]


class WithParent(Callback):
    """Ends the run when the comparison has died."""

    def __init__(self, parent: int) -> None:
        """Remember the parent process: it may have died before this one could ask."""
        self.parent, self.orphaned = parent, False

    def on_step(self, agent: Any) -> bool:
        """Return whether the parent is still there."""
        self.orphaned = os.getppid() != self.parent
        return not self.orphaned


def config_file(run_dir: Path) -> Path:
    """Return where a run's process finds its configuration."""
    return run_dir.with_name(f"{run_dir.name}.config.json")


def outcome_file(run_dir: Path) -> Path:
    """Return where a run's process writes how it ended."""
    return run_dir.with_name(f"{run_dir.name}.outcome.json")


def train(run_dir: Path, config: Config, *callbacks: Callback) -> SAC:
    """Train to the end, from the newest checkpoint if there is one; return the agent.

    Raises:
        FastsacError: as `SAC.resume` and `SAC.learn` do.
    """
    together = train_each([(run_dir, config)], *callbacks)
    for error in together.failures.values():
        raise error
    return together.learners[0].agent


def train_each(runs: Sequence[tuple[Path, Config]], *callbacks: Callback) -> Seeds:
    """Train runs that differ only in their seeds to the end, from their newest checkpoints.

    Raises:
        FastsacError: as `SAC.resume` and `Seeds.learn` do; later errors of single runs are in `failures`.
    """
    together = Seeds(len(runs))
    for run_dir, config in runs:
        _wait_for_orphan(run_dir)
        agent = together.add(config, run_dir, resume=(run_dir / CONFIG).exists())
        if agent is None:
            continue
        run_dir.mkdir(parents=True, exist_ok=True)
        setup = {"engine": agent.engine, "precision": agent.setup.precision, "num_learners": len(runs)}
        told = {**setup, "machine": describe_machine(), "resumed_at": _resumed_at(run_dir, agent.steps)}
        write_json(run_dir / MACHINE, told)
    together.learn(lambda: callbacks)
    return together


def _wait_for_orphan(run_dir: Path) -> None:
    """Wait for the process of a killed comparison: it ends after its current step or evaluation."""
    end = time.monotonic() + ORPHAN_SECONDS
    with suppress(FileNotFoundError), (run_dir / LOCK).open("rb") as file:
        while not lock(file.fileno()) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)


def _resumed_at(run_dir: Path, step: int) -> list[int]:
    """Return the steps at which the run was resumed, this time included."""
    before: list[int] = []
    with suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or it was cut short
        before = list(json.loads((run_dir / MACHINE).read_text())["resumed_at"])
    return [*before, step] if step else before


def main() -> None:
    """Train the runs that the command line names."""
    parent, run_dirs = WithParent(int(sys.argv[1])), [Path(argument) for argument in sys.argv[2:]]
    unfinished, failures = set[Path](), dict[Path, FastsacError]()
    try:
        configs = [config_from_dict(json.loads(config_file(run_dir).read_text())) for run_dir in run_dirs]
        together = train_each(list(zip(run_dirs, configs, strict=True)), parent)
        failures = together.failures
        unfinished = {run_dir for agent, run_dir in together.learners if agent.stopped_by_signal or parent.orphaned}
    except FastsacError as error:
        failures = dict.fromkeys(run_dirs, error)
    statuses = []
    for run_dir in run_dirs:
        failure, status = failures.get(run_dir), STOPPED if run_dir in unfinished else 0
        if failure is not None:
            print(f"{run_dir}: {failure}", file=sys.stderr)
            status = DIVERGED if isinstance(failure, Divergence) else failure.exit_status
        write_json(outcome_file(run_dir), {"status": status, "reason": str(failure or "")})
        statuses.append(status)
    sys.exit(max(statuses))


def train_here(options: Compare, runs: list[Run], done: Done, watch: Watch, stop: list[int]) -> list[Failure]:
    """Train runs in parallel processes, one or several in each; return those that failed.

    Args:
        options: of the command.
        runs: to train.
        done: called for each complete run.
        watch: shows their progress.
        stop: signals received; then the processes save, and stop. An exception kills them.
    """
    failed, processes = list[Failure](), _Processes(options.out, watch)
    with ThreadPoolExecutor(jobs(options)) as pool:
        groups = in_groups(runs, options.num_learners)
        waiting: dict[Future[int | None], list[Run]] = {pool.submit(processes.train, group): group for group in groups}
        try:
            while waiting:
                complete, _ = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                if stop:
                    processes.stop()
                for future in complete:
                    group, status = waiting.pop(future), future.result()
                    if status is None:
                        continue
                    log = log_file(options.out / group[0].run_dir)
                    for run in group:
                        told, failure = _outcome(options.out / run.run_dir, run, status, log, done, stop)
                        failed += [failure] if failure is not None else []
                        watch.end(run, told)
                watch.show()
        finally:
            processes.kill()
    return failed


class _Processes:
    """The processes of the runs in progress."""

    def __init__(self, out: Path, watch: Watch) -> None:
        self._out, self._watch = out, watch
        self._lock, self._ended = Lock(), False
        self._under_way: list[subprocess.Popen[bytes]] = []

    def train(self, runs: list[Run]) -> int | None:
        """Wait for the runs' process; return its exit status, or None if it was too late to start."""
        run_dirs = [self._out / run.run_dir for run in runs]
        with self._lock:
            if self._ended:
                return None
            for run, run_dir in zip(runs, run_dirs, strict=True):
                run_dir.parent.mkdir(parents=True, exist_ok=True)
                outcome_file(run_dir).unlink(missing_ok=True)
                log_file(run_dir).unlink(missing_ok=True)
                write_json(config_file(run_dir), dataclasses.asdict(run.config))
            command = [sys.executable, "-m", "fastsac.lab.worker", str(os.getpid()), *map(str, run_dirs)]
            with log_file(run_dirs[0]).open("wb") as log:
                # Its own process group: Ctrl-C reaches only the comparison, which forwards it once. Not its own
                # session: Linux divides the CPU among sessions, so `nice` on the comparison would have no effect.
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
            self._under_way.append(process)
        for run in runs:
            self._watch.begin(run)
        status = process.wait()
        with self._lock:
            self._under_way.remove(process)
        return status

    def stop(self) -> None:
        """Start no more, and send SIGTERM to those in progress, once."""
        with self._lock:
            for process in self._under_way if not self._ended else ():
                with suppress(ProcessLookupError, PermissionError):
                    process.terminate()
            self._ended = True

    def kill(self) -> None:
        """Start no more, and kill those in progress with all that they have started."""
        with self._lock:
            self._ended = True
            for process in self._under_way:
                kill_group(process)


def _outcome(
    run_dir: Path, run: Run, status: int, log: Path, done: Done, stop: list[int]
) -> tuple[Outcome, Failure | None]:
    """Report a complete run; return how a run ended, and its failure. `status` is used if it wrote no outcome."""
    reason = ""
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(outcome_file(run_dir).read_text())
        status, reason = int(told["status"]), str(told["reason"])
    if status == 0:
        try:
            done(run)
        except FastsacError as error:
            return "failed", Failure(run, str(error), False)
        return "complete", None
    if stop and (status == STOPPED or status < 0):
        return "stopped", None
    return "failed", Failure(run, reason or last_line(log, status), status == DIVERGED)


def log_file(run_dir: Path) -> Path:
    """Return where a run's process writes its output."""
    return run_dir.with_name(f"{run_dir.name}.log")


def last_line(path: Path, status: int) -> str:
    """Return the last line of a run's log, and how its process ended unless it said so itself."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    told = [line.strip()[:500] for line in lines if line.strip()][-1:]
    if status == STOPPED:
        return "its process was stopped by a signal; it can be continued"
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        told.insert(0, f"its process was killed by {name}")
    return ": ".join(told) or f"exit status {status}"


if __name__ == "__main__":
    main()
