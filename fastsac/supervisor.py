"""The parent of a training process. It restarts the process from the last checkpoint when it dies or hangs."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fastsac.run_dir import CONFIG, learners_in, newest_step
from fastsac.signals import BUSY, ENVIRONMENT_FAILED, SUPERVISOR
from fastsac.system import kill_group

#: exit statuses of a process that reports its own error: success, a failed run, invalid arguments
_TOLD = (0, 1, 2)
POLL_SECONDS = 0.2
#: a process has at least this long to start, to restore the environments' state or to save
BUSY_SECONDS = 600.0


class _End(NamedTuple):
    """How a child ended."""

    status: int  # as `subprocess` gives it: negative for a signal
    hung: float  # after how many seconds it was killed, or 0
    environment_failed: bool


class Supervisor:
    """Runs one training process after another until one ends normally."""

    def __init__(self, run_dir: Path, restarts: int, step_timeout: float) -> None:
        """Set up the supervisor.

        Args:
            run_dir: the run directory.
            restarts: give up after this many restarts in a row without a new checkpoint.
            step_timeout: seconds without a step after which a process counts as hung; 0 waits forever. Starting and
                saving may take longer.
        """
        self._run_dir, self._restarts, self._step_timeout = run_dir, restarts, step_timeout
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = 0  # signals received

    def run(self, arguments: Sequence[str]) -> int:
        """Train with these command-line arguments; return the exit status."""
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._run(arguments)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self, arguments: Sequence[str]) -> int:
        failures = 0  # in a row, without progress
        while True:
            begun = (self._run_dir / CONFIG).exists() or learners_in(self._run_dir)
            place, step = "--resume" if begun else "--run-dir", self._step()
            end = self._run_child([*arguments, place, str(self._run_dir)], failures)
            if self._stopped and end.status < 0:
                return 1
            if self._stopped or (end.status in _TOLD and not end.environment_failed):
                return end.status
            reached = self._step()
            failures = failures + 1 if reached == step else 1
            where = "the beginning" if reached is None else f"step {reached:,}"
            if failures > self._restarts:
                told = f"no progress after {self._restarts} of {self._restarts} restarts"
                self._say(f"{self._describe(end)}; gave up at {where}: {told}")
                return 1
            how = ", with new episodes" if failures > 1 else ""
            self._say(f"{self._describe(end)}; continuing from {where}{how} (restart {failures} of {self._restarts})")

    def _step(self) -> int | None:
        """Return the step of the newest checkpoint; with several learners, that of the slowest one."""
        steps = [newest_step(directory) for directory in learners_in(self._run_dir) or [self._run_dir]]
        return None if None in steps else min(step for step in steps if step is not None)

    def _run_child(self, arguments: Sequence[str], failures: int) -> _End:
        listen, tell = os.pipe()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "fastsac", *arguments],
                env={**os.environ, SUPERVISOR: f"{tell},{failures}"},
                pass_fds=[tell],
                process_group=0,  # a signal from the terminal comes through the parent, once
            )
        finally:
            os.close(tell)
        try:
            if self._stopped:  # a signal arrived before the child existed
                self._child.terminate()
            hung, environment_failed = self._watch(listen)
            return _End(self._child.wait(), hung, environment_failed)
        finally:
            os.close(listen)
            self._kill()  # processes that it left behind, and the child itself after an exception

    def _watch(self, listen: int) -> tuple[float, bool]:
        """Listen until the child ends or hangs."""
        environment_failed, busy, heard = False, True, time.monotonic()
        while True:
            ready, _, _ = select.select([listen], [], [], POLL_SECONDS)
            message = os.read(listen, 65536) if ready else b""
            environment_failed = environment_failed or ENVIRONMENT_FAILED in message
            patience = max(self._step_timeout, BUSY_SECONDS) if busy else self._step_timeout
            if message:
                busy, heard = message.endswith(BUSY), time.monotonic()
            elif self._child is None or self._child.poll() is not None:  # its children may still hold the pipe
                return 0.0, environment_failed
            elif self._step_timeout and time.monotonic() - heard > patience:
                self._kill()
                return patience, environment_failed
            elif ready:  # closed, but not ended yet
                time.sleep(POLL_SECONDS)

    def _kill(self) -> None:
        if self._child is not None:
            kill_group(self._child)

    def _forward(self, number: int, frame: Any) -> None:
        """Forward a signal; a second one takes effect at once, whatever the child is doing."""
        self._stopped += 1
        if self._child is not None and self._child.poll() is None:
            if self._stopped > 1:
                self._kill()
            else:
                with suppress(ProcessLookupError):
                    self._child.send_signal(number)

    def _describe(self, end: _End) -> str:
        if end.hung:
            return f"the training process made no step in {end.hung:g} s (--step-timeout) and was killed"
        if end.environment_failed:
            return "an environment failed"
        if end.status >= 0:
            return f"the training process ended with status {end.status}"
        reasons = {
            signal.SIGKILL: "killed, perhaps out of memory (SIGKILL)",
            signal.SIGSEGV: "ended by a segmentation fault (SIGSEGV)",
            signal.SIGABRT: "aborted by an environment or a library (SIGABRT)",
        }
        try:
            name = signal.Signals(-end.status).name
        except ValueError:
            name = f"signal {-end.status}"
        return f"the training process was {reasons.get(-end.status, f'ended by {name}')}"  # type: ignore[call-overload]

    @staticmethod
    def _say(message: str) -> None:
        print(f"fastsac: {message}", file=sys.stderr, flush=True)
