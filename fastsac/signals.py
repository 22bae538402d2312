"""Signals that stop a run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
