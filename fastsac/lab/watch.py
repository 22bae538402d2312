"""The progress display of a comparison: all runs, and those in progress."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, track

from fastsac.lab.plan import Run
from fastsac.run_dir import METRICS

T = TypeVar("T")
Outcome = Literal["complete", "stopped", "failed"]


class Watch:
    """One bar for all runs and one for each in progress; without a terminal, one line for each that ends."""

    def __init__(self, directory: Path, runs: list[Run], missing: list[Run]) -> None:
        """Show nothing yet.

        Args:
            directory: of the comparison.
            runs: all of them.
            missing: those still to train.
        """
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %")
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self._directory, self._lock = directory, threading.Lock()
        self._bars: dict[tuple[str, str, int], tuple[Run, TaskID]] = {}
        self._total, self._done = len(runs), len(runs) - len(missing)
        self._all = self._progress.add_task("all runs", total=max(1, self._total), completed=self._done)

    def __enter__(self) -> Watch:
        """Start the display."""
        self._progress.start()
        return self

    def __exit__(self, *args: object) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()

    def begin(self, run: Run) -> None:
        """Add a run that has started."""
        with self._lock:
            bar = self._progress.add_task(run.name(), total=run.config.total_steps)
            self._bars[run.key] = run, bar

    def end(self, run: Run, outcome: Outcome) -> None:
        """Remove a run that has ended."""
        with self._lock:
            _, bar = self._bars.pop(run.key, (run, None))
            if bar is not None:
                self._progress.remove_task(bar)
        self._done += outcome == "complete"
        if self._progress.disable:
            print(f"{run.name()}: {outcome} ({self._done} of {self._total})", file=sys.stderr, flush=True)

    def show(self, steps: dict[tuple[str, str, int], int] | None = None) -> None:
        """Show how far the runs are, from their files or from `steps`."""
        if self._progress.disable:
            return
        with self._lock:
            shares = 0.0
            for key, (run, bar) in self._bars.items():
                step = steps.get(key, 0) if steps is not None else newest_logged_step(self._directory / run.run_dir)
                shares += step / run.config.total_steps
                self._progress.update(bar, completed=step)
            self._progress.update(self._all, completed=self._done + shares)


def tracked(each: Iterable[T], description: str) -> Iterable[T]:
    """Return the same, with a progress bar if stderr is a terminal."""
    console = Console(stderr=True)
    return track(list(each), description, console=console, transient=True, disable=not console.is_terminal)


def newest_logged_step(run_dir: Path) -> int:
    """Return the step of the last whole line of metrics.jsonl; 0 where there is none."""
    try:
        with (run_dir / METRICS).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
