"""Signals that stop a run, and the heartbeat that tells a supervising parent that it is alive."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

#: what the parent passes to its child: the descriptor it listens on, and how often the same steps have been tried
SUPERVISOR = "FASTSAC_SUPERVISOR"
ALIVE, BUSY, ENVIRONMENT_FAILED = b".", b"B", b"E"


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list to which SIGINT and SIGTERM are added; a second signal takes effect at once."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.signal(number, receive)
    except ValueError:  # only the main thread may; in other threads, the caller stops in its own way
        pass
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Heartbeat:
    """Tells the parent process, if there is one, that the run is alive."""

    def __init__(self) -> None:
        """Find out whether there is a parent."""
        descriptor, _, tries = os.environ.get(SUPERVISOR, "").partition(",")
        self._descriptor = int(descriptor) if descriptor else None
        self.tries = int(tries or 0)
        if self._descriptor is not None:
            os.set_blocking(self._descriptor, False)

    @property
    def supervised(self) -> bool:
        """Whether a parent is listening."""
        return self._descriptor is not None

    def beat(self, stop: list[int]) -> bool:
        """Send a heartbeat, and return whether the run should stop: a parent that is gone counts as a signal."""
        if not stop and not self.send(ALIVE):
            stop.append(signal.SIGHUP)
        return bool(stop)

    def send(self, message: bytes) -> bool:
        """Send a message; return False only if there was a parent and it is gone."""
        if self._descriptor is not None:
            with suppress(BlockingIOError):  # the parent is slow, and has enough to read
                try:
                    os.write(self._descriptor, message)
                except BrokenPipeError:
                    return False
        return True
