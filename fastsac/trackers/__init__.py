"""Experiment trackers besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio and MLflow, one module each.

Every tracker gets the same tags, in the groups that users expect::

    rollout/  episode_return, episode_length
    train/    critic_loss, q, actor_loss, alpha, entropy, ...
    time/     updates, elapsed_s, steps_per_s, updates_per_s
    eval/     return, return_std

by environment step; the settings and a description of the machine; and, on request, a video.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, Protocol

from fastsac.errors import FastsacError, UsageError, did_you_mean
from fastsac.run_dir import SEED, TRACKING, Row, parse_json, replace_text

PROJECT = "fastsac"
LONGEST = 200  # characters of a client's message
#: seconds that trackers may take to finish a run before the user is told
PATIENCE = 5.0
#: what a run has if nothing else is said
DEFAULT = ("tensorboard",)
#: the trackers, each with the name of the package that it needs
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
_GROUPS = {
    **{name: f"rollout/{name}" for name in ("episode_return", "episode_length")},
    **{name: f"time/{name}" for name in ("updates", "steps_per_s", "updates_per_s")},
    "time_s": "time/elapsed_s",
    "eval_return": "eval/return",
    "eval_return_std": "eval/return_std",
}


#: how a run ends; `stopped` by a signal
Outcome = Literal["finished", "failed", "stopped"]
#: a step, and values by tag
Line = tuple[int, dict[str, float]]


class Tracking(NamedTuple):
    """The trackers that a user requests."""

    names: tuple[str, ...] | None = None  # None: the run's trackers so far, or TensorBoard
    project: str | None = None  # None: the one so far, or PROJECT
    video: bool = False

    @classmethod
    def of(cls, track: str | None, project: str | None, video: bool) -> Tracking:
        """Parse tracker names separated by commas, or "none".

        Raises:
            UsageError: if a name is unknown, or its package is not installed.
        """
        if track is None:
            return cls(None, project, video)
        names = [] if track.strip() == "none" else [name.strip() for name in track.split(",")]
        for name in names:
            if name not in TRACKERS:
                known = ", ".join(TRACKERS)
                raise UsageError(
                    f"--track must be none, or any of {known}, separated by commas; got {name!r}"
                    + did_you_mean(name, TRACKERS)
                )
        _refuse_missing(names)
        return cls(tuple(dict.fromkeys(names)), project, video)


def _refuse_missing(names: Sequence[str]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--track {name} needs a package that is not installed: pip install {name}")


#: TensorBoard, or the run's trackers so far
BY_DEFAULT = Tracking()


class Run(NamedTuple):
    """What a tracker is told about a run."""

    directory: Path
    project: str
    name: str
    settings: Mapping[str, Any]  # for JSON
    system: Mapping[str, Any]  # for JSON
    stored: str | None  # the tracker's own id of the run, if it is resumed


class Tracker(Protocol):
    """A tracker's run; `Trackers` catches any exception of its client."""

    stored: str  # the id by which the tracker finds the run again
    place: str  # where the user can see the run

    def log(self, lines: Sequence[Line]) -> None:
        """Log lines that have been written to metrics.jsonl."""

    def video(self, step: int, path: Path) -> None:
        """Log an .mp4 file."""

    def close(self, outcome: Outcome) -> None:
        """Finish the run."""


def by_tag(row: Row) -> Line:
    """Return the step of a line of metrics.jsonl, and its values by the common tags of all trackers."""
    values = {_GROUPS.get(name, f"train/{name}"): value for name, value in row.items() if name != "step"}
    return int(row["step"]), values


class _Worker:
    """Calls a tracker in a thread, so that a server that does not answer cannot hold up training."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="fastsac-tracker")
        self._thread.start()

    def _run(self) -> None:
        while (call := self.calls.get()) is not None:
            call()

    def finish(self) -> None:
        """Wait until all calls have been made."""
        self.calls.put(None)
        self._thread.join()


class Trackers:
    """The trackers of a run. If one fails, the user is warned and training continues."""

    def __init__(
        self,
        run_dir: Path,
        tracking: Tracking,
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Start the trackers.

        Raises:
            FastsacError: if one of them cannot be started.
        """
        from fastsac.machine import describe_machine  # which imports PyTorch; Tracking.of must not

        self._warn = warn
        self._trackers: dict[str, Tracker] = {}
        self._workers: dict[str, _Worker] = {}
        self._problems: dict[str, str] = {}
        active, project, stored = _read(run_dir)
        names, project = active if tracking.names is None else tracking.names, tracking.project or project
        _refuse_missing(names)
        run_name = f"{run_dir.resolve().parent.name}-{run_dir.name}" if SEED.fullmatch(run_dir.name) else run_dir.name
        run_name = run_name or run_dir.resolve().name
        system = describe_machine()
        try:
            for name in names:
                run = Run(run_dir, project, run_name, settings, system, stored.get(name) or None)
                self._trackers[name] = _start(name, run)
                if name != "tensorboard":  # which writes files
                    self._workers[name] = _Worker()
            told = stored | {name: tracker.stored for name, tracker in self._trackers.items()}
            _write(run_dir, names, project, told)
        except BaseException:
            self.close("failed")
            raise

    @property
    def places(self) -> list[str]:
        """Where the user can see the run, for trackers that know."""
        return [f"{name}: {tracker.place}" for name, tracker in self._trackers.items() if tracker.place]

    def log(self, rows: Sequence[Row]) -> None:
        """Send lines that have been written to metrics.jsonl to all trackers."""
        lines = list(map(by_tag, rows))
        if lines:
            self._each(lambda tracker: tracker.log(lines))

    def video(self, step: int, path: Path) -> None:
        """Send a video to all trackers."""
        self._each(lambda tracker: tracker.video(step, path))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name in self._trackers:
            if name in self._workers:
                self._workers[name].calls.put(functools.partial(self._call, name, call))
            else:
                self._call(name, call)

    def _call(self, name: str, call: Callable[[Tracker], None]) -> None:
        try:
            call(self._trackers[name])
            self._problems.pop(name, None)
        except Exception as error:
            problem = _told(error)
            if problem != self._problems.get(name):
                self._warn(f"{name}: {problem}; training continues")
            self._problems[name] = problem

    def close(self, outcome: Outcome) -> None:
        """Finish the run in every tracker."""
        self._each(lambda tracker: tracker.close(outcome))
        for name, worker in self._workers.items():
            waiting = f"still waiting for {name} to finish: another Ctrl-C ends the process at once"
            timer = threading.Timer(PATIENCE, self._warn, [waiting])
            timer.daemon = True
            timer.start()
            try:
                worker.finish()
            finally:
                timer.cancel()
        self._trackers.clear()
        self._workers.clear()


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    told = " ".join(str(error).split()) or type(error).__name__
    return told if len(told) <= LONGEST else f"{told[:LONGEST]} ..."


def _start(name: str, run: Run) -> Tracker:
    try:
        started: Tracker = importlib.import_module(f"fastsac.trackers.{name}").start(run)
    except Exception as error:
        leave_out = ", or leave it out: --track none" if run.stored else ""
        raise FastsacError(f"--track {name} could not be started: {_told(error)}{leave_out}") from error
    return started


def _write(run_dir: Path, names: Sequence[str], project: str, stored: Mapping[str, str]) -> None:
    """Store which trackers are active, and every tracker's own name of the run, also of those that are not active."""
    if (tuple(names), project) == (DEFAULT, PROJECT) and not (run_dir / TRACKING).exists():  # the default is not stored
        return
    runs = {name: run for name, run in stored.items() if run}
    try:
        replace_text(run_dir / TRACKING, json.dumps({"active": list(names), "project": project, "runs": runs}) + "\n")
    except OSError as error:
        raise FastsacError(f"cannot write {run_dir / TRACKING}: {error.strerror}") from error


def _read(run_dir: Path) -> tuple[tuple[str, ...], str, dict[str, str]]:
    """Return the trackers that are active so far, their project, and each one's own name of the run."""
    path = run_dir / TRACKING
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if path.is_file() and path.stat().st_size < 2**16:  # a FIFO would never end
            found = parse_json(path.read_bytes())
            active = tuple(name for name in dict.fromkeys(found["active"]) if name in TRACKERS)
            runs = {name: run for name, run in found["runs"].items() if name in TRACKERS and isinstance(run, str)}
            return active, str(found["project"]), runs
    return DEFAULT, PROJECT, {}
