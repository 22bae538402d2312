"""The output of a run: metrics.jsonl, its trackers, and a progress bar or plain lines."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastsac.envs import Step
from fastsac.errors import FastsacError
from fastsac.metrics import MetricsFile
from fastsac.run_dir import METRICS, Row
from fastsac.trackers import BY_DEFAULT, Trackers, Tracking


class Logger:
    """Writes one line of metrics at a time.

    A line that cannot be written, for example because the disk is full, is written with the next one.
    """

    def __init__(
        self,
        run_dir: Path | None,
        total_steps: int,
        step: int = 0,
        time_s: float = 0.0,
        progress: bool = True,
        name: str = "",
        tracking: Tracking = BY_DEFAULT,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the files, and start the trackers.

        Args:
            run_dir: the run directory; None writes no files.
            total_steps: for the progress display.
            step: where a resumed run continues; later lines are dropped from metrics.jsonl.
            time_s: seconds that the run had taken by then.
            progress: whether to show progress.
            name: prefix of all messages, if a process has several runs.
            tracking: the trackers.
            settings: the run's settings, for the trackers.

        Raises:
            FastsacError: if a file cannot be opened, or a tracker cannot be started.
        """
        self._started = time.perf_counter() - time_s
        self._name = name
        self._total_steps = total_steps
        self._file: MetricsFile | None = None
        self._trackers: Trackers | None = None
        self._problem = ""
        self._last = (time.perf_counter(), step, 0)
        if run_dir is not None:
            try:
                self._file = MetricsFile(run_dir, step)
            except OSError as error:
                raise FastsacError(f"cannot write {run_dir / METRICS}: {error.strerror}") from error
            try:
                self._trackers = Trackers(run_dir, tracking, settings or {}, self.warn)
            except BaseException:
                self._file.close()
                raise
        self.wants_video = tracking.video
        self.stopped = False  # by a signal
        self._display = _make_display(total_steps, step) if progress else None
        for place in [] if self._trackers is None else self._trackers.places:
            self.say(place)

    @property
    def time_s(self) -> float:
        """Seconds of training so far, including earlier parts of a resumed run."""
        return time.perf_counter() - self._started

    def start_rates(self, step: int, updates: int) -> None:
        """Start a new interval for steps/s and updates/s."""
        self._last = (time.perf_counter(), step, updates)

    def log(self, step: int, updates: int, values: Mapping[str, float]) -> None:
        """Write one line: `step`, `updates`, `time_s`, the rates since the last line, and `values`."""
        now = time.perf_counter()
        since, step_before, updates_before = self._last
        seconds = max(now - since, 1e-9)
        row: Row = {"step": step, "updates": updates, "time_s": round(self.time_s, 3)}
        if step > step_before:
            row["steps_per_s"] = (step - step_before) / seconds
            row["updates_per_s"] = (updates - updates_before) / seconds
            self._last = (now, step, updates)
        row |= values
        # JSON has no NaN
        row = {key: value for key, value in row.items() if math.isfinite(value)}
        written, problem = self._file.add(row) if self._file is not None else ([], "")
        if self._trackers is not None:
            self._trackers.log(written)
        if problem and problem != self._problem:
            self.warn(f"{problem}; training continues, and the line is retried with the next one")
        self._problem = problem
        if self._display is not None:
            self._display.show(row)

    def video(self, step: int, path: Path) -> None:
        """Send a video to the trackers."""
        if self._trackers is not None:
            self._trackers.video(step, path)

    def say(self, message: str) -> None:
        """Show a message to the user."""
        if self._display is not None:
            self._display.say(f"{self._name}: {message}" if self._name else message)
        elif self._name:
            print(f"{self._name}: {message}", file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        """Show a warning to the user, even if progress is not shown."""
        message = f"{self._name}: {message}" if self._name else message
        if self._display is not None:
            self._display.say(f"warning: {message}")
        else:
            logging.getLogger("fastsac").warning(message)

    def __enter__(self) -> Logger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close()
        written, problem = self._file.close() if self._file is not None else ([], "")
        if self._trackers is not None:
            self._trackers.log(written)
            self._trackers.close("failed" if error is not None else "stopped" if self.stopped else "finished")
        if problem and error is None:
            raise FastsacError(problem)


class EpisodeStatistics:
    """Returns and lengths of the training episodes."""

    def __init__(self, num_envs: int) -> None:
        self._return = np.zeros(num_envs)
        self._length = np.zeros(num_envs, dtype=np.int64)
        self._finished: list[tuple[float, int]] = []

    def add(self, step: Step) -> None:
        """Count one step of every environment."""
        self._return += np.where(step.valid, step.reward, 0.0)
        self._length += step.valid
        for index in np.flatnonzero((step.terminated | step.truncated) & step.valid):
            self._finished.append((float(self._return[index]), int(self._length[index])))
            self._return[index], self._length[index] = 0.0, 0

    def take(self) -> dict[str, float]:
        """Return the means over the episodes that ended since the last call; empty if none did."""
        if not self._finished:
            return {}
        returns, lengths = np.mean(self._finished, axis=0)
        self._finished.clear()
        return {"episode_return": float(returns), "episode_length": float(lengths)}

    def restart(self) -> None:
        """Forget the current episodes, because all environments were reset."""
        self._return[:], self._length[:] = 0.0, 0

    def state(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {
            "returns": self._return.tolist(),
            "lengths": self._length.tolist(),
            "finished": [list(episode) for episode in self._finished],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        if not len(state["returns"]) == len(state["lengths"]) == len(self._return):
            raise ValueError("it has a different number of environments")
        self._return[:], self._length[:] = state["returns"], state["lengths"]
        self._finished = [(float(returns), int(length)) for returns, length in state["finished"]]


def _make_display(total_steps: int, step: int) -> Any:
    return _Live(total_steps, step) if sys.stderr.isatty() else _Lines(total_steps)


_SHOWN = ("eval_return", "episode_return", "critic_loss", "alpha", "entropy")


def _describe(row: Mapping[str, float]) -> str:
    rates = [f"{row[key]:,.0f} {key.split('_')[0]}/s" for key in ("steps_per_s", "updates_per_s") if key in row]
    return "  ".join(rates + [f"{key.replace('_', ' ')} {row[key]:.3g}" for key in _SHOWN if key in row])


class _Lines:
    """Plain lines, for a file or a pipe."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def show(self, row: Mapping[str, float]) -> None:
        left = ""
        if row.get("steps_per_s"):
            left = f"  {_duration((self._total_steps - row['step']) / row['steps_per_s'])} left"
        print(f"step {row['step']:,}/{self._total_steps:,}  {_describe(row)}{left}", file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Live:
    """A progress bar with the latest figures."""

    def __init__(self, total_steps: int, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            speed_estimate_period=60.0,
        )
        self._latest: dict[str, float] = {}
        self._task = self._progress.add_task("starting", total=total_steps, completed=step)
        self._progress.start()

    def show(self, row: Mapping[str, float]) -> None:
        self._latest |= row
        self._progress.update(self._task, completed=int(row["step"]), description=_describe(self._latest))
        if "eval_return" in row:
            self._progress.console.print(f"step {int(row['step']):,}: evaluation return {row['eval_return']:.1f}")

    def say(self, message: str) -> None:
        self._progress.console.print(message)

    def close(self) -> None:
        self._progress.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
