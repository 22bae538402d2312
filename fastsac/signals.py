"""Signals that stop a run, and the heartbeat that tells a supervising parent that it goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

#: what the parent tells its child: the descriptor that it listens to, and how often the same steps have been tried
SUPERVISOR = "FASTSAC_SUPERVISOR"
ALIVE, BUSY, ENVIRONMENT_FAILED = b".", b"B", b"E"


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that SIGINT and SIGTERM are added to; a second one acts at once."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.signal(number, receive)
    except ValueError:  # only the main thread may; elsewhere the caller stops its own way
        pass
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Heartbeat:
    """Tells the parent, if there is one, that the run goes on."""

    def __init__(self) -> None:
        """Find out whether there is a parent."""
        descriptor, _, tries = os.environ.get(SUPERVISOR, "").partition(",")
        self._descriptor = int(descriptor) if descriptor else None
        self.tries = int(tries or 0)
        if self._descriptor is not None:
            os.set_blocking(self._descriptor, False)

    @property
    def supervised(self) -> bool:
        """Whether a parent listens."""
        return self._descriptor is not None

    def beat(self, stop: list[int]) -> bool:
        """Send a sign of life, and return whether the run is to stop: a parent that is gone counts as a signal."""
        if not stop and not self.send(ALIVE):
            stop.append(signal.SIGHUP)
        return bool(stop)

    def send(self, message: bytes) -> bool:
        """Send a message; return whether there is a parent to hear it, or there never was one."""
        if self._descriptor is not None:
            with suppress(BlockingIOError):  # the parent is slow, and has enough to read
                try:
                    os.write(self._descriptor, message)
                except BrokenPipeError:
                    return False
        return True
