"""Differences between Linux, macOS and Windows."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import subprocess
from contextlib import suppress
from typing import Any

#: Windows is the one without fcntl
WINDOWS = importlib.util.find_spec("fcntl") is None
_locks: Any = importlib.import_module("msvcrt" if WINDOWS else "fcntl")
#: the byte of a file that is locked on Windows, far beyond its end, because locked bytes cannot be read
_LOCKED_BYTE = 2**30


def lock(descriptor: int, shared: bool = False) -> bool:
    """Lock an open file for this process; return False if another process holds it, True without lock support.

    A `shared` lock needs no write permission, and others may share it, but not on Windows.
    """
    try:
        if WINDOWS:
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            try:
                _locks.locking(descriptor, _locks.LK_NBLCK, 1)
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            _locks.flock(descriptor, (_locks.LOCK_SH if shared else _locks.LOCK_EX) | _locks.LOCK_NB)
    except OSError as error:
        if isinstance(error, PermissionError if WINDOWS else BlockingIOError):
            return False
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
            raise
    return True


def allowed_cores() -> int:
    """Return the number of CPU cores that this process may use; if unknown, the number of all cores."""
    if hasattr(os, "sched_getaffinity"):  # a container may be allowed fewer than the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process and its children, if it has its own process group; on Windows only the process."""
    with suppress(ProcessLookupError, PermissionError):
        if WINDOWS:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
