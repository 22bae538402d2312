"""A run directory: which run it belongs to, which process writes it, and its config.json."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastsac.config import Config
from fastsac.errors import FastsacError, UsageError
from fastsac.system import WINDOWS, lock

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TRACKING = "tracking.json"
VIDEO = "last_evaluation.mp4"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
NO_LINK, NO_WAIT = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK"))  # which Windows lacks
LONGEST_CONFIG = 2**20  # bytes
#: seconds before a lock held by another process is tried again, once: `is_held` takes it for a moment
PATIENCE = 0.05
#: a learner's run directory, within that of a run with several
SEED = re.compile(r"seed-([0-9]{1,20})")
#: settings of older runs by their present names
RENAMED = {"actor_every": "policy_delay"}
#: the name of a checkpoint
STEP = re.compile(r"step-([0-9]{1,18})")

#: a line of metrics.jsonl
Row = dict[str, float | int]


class RunLock:
    """Locks a run directory for this process; the system releases the lock when the process ends, however it ends."""

    def __init__(self, directory: Path) -> None:
        """Create the directory if necessary, and lock it.

        Raises:
            UsageError: if another process holds it, or a part of it is a symbolic link, which may lead anywhere.
            FastsacError: if it cannot be written.
        """
        self.directory = directory
        self._descriptor = -1
        names = [CONFIG, METRICS, TRACKING, TENSORBOARD, "wandb", CHECKPOINTS, LOCK]
        for name in [*names, *(f"{CHECKPOINTS}/{path.name}" for path in (directory / CHECKPOINTS).glob("*"))]:
            if (directory / name).is_symlink():
                raise UsageError(
                    f"{directory / name} is a symbolic link, and a run is written to its own directory only"
                )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            while not self.holds():  # the previous owner removes the file
                self.release()
                self._descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
                self._lock()
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, _this_process().encode())
        except OSError as error:
            self.release()
            raise FastsacError(f"cannot write to the run directory {directory}: {error.strerror}") from error

    def _lock(self) -> None:
        if lock(self._descriptor):
            return
        time.sleep(PATIENCE)
        if not lock(self._descriptor):
            owner = os.read(self._descriptor, 300).decode(errors="replace") or "another process"
            ours = owner == _this_process()
            os.close(self._descriptor)
            self._descriptor = -1
            advice = "this process itself: choose another directory" if ours else f"{owner}: wait for it, or stop it"
            raise UsageError(f"{self.directory} is being written by {advice}")

    def holds(self) -> bool:
        """Whether the directory still exists, and is ours."""
        if WINDOWS:  # which never removes an open file
            return self._descriptor >= 0
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.directory / LOCK))
        return False

    def release(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            if not WINDOWS and self.holds():
                with suppress(OSError):
                    (self.directory / LOCK).unlink()
            os.close(self._descriptor)
            self._descriptor = -1
            if WINDOWS:
                with suppress(OSError):  # another process has opened it since
                    (self.directory / LOCK).unlink()


def is_held(directory: Path) -> bool:
    """Return whether a process holds the run directory now; False if that cannot be determined."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | NO_LINK | NO_WAIT)
    except OSError:
        return False
    try:
        return not lock(descriptor, shared=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def refuse_if_taken(directory: Path) -> None:
    """Raise UsageError if the directory already holds a run, or is a file."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file: choose another --run-dir")
    if any((directory / name).exists() for name in (CONFIG, METRICS, CHECKPOINTS)):
        advice = "choose another directory, or continue it (--resume, SAC.load)"
        raise UsageError(f"{directory} already holds a run: {advice}")
    if learners_in(directory):
        raise UsageError(
            f"{directory} already holds several runs: choose another directory, or continue them (--resume)"
        )


def give_up(directory: Path) -> None:
    """Remove what makes a run directory of it, where nothing has been trained yet."""
    for name in (METRICS, CONFIG):
        with suppress(OSError):
            (directory / name).unlink()


def learners_in(directory: Path) -> list[Path]:
    """Return the run directories of the learners in a directory, sorted by seed."""
    found = [(int(match[1]), path) for path in directory.glob("seed-*") if (match := SEED.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / CONFIG).exists()]


def newest_step(directory: Path) -> int | None:
    """Return the step of the newest checkpoint, or None if there is none."""
    names = [path.parent.name for path in (directory / CHECKPOINTS).glob("*/manifest.json")]
    steps = [
        int(match[1]) for name in names if (match := STEP.fullmatch(name.removeprefix(".").removesuffix(".replaced")))
    ]
    return max(steps, default=None)


def temporary_sibling(path: Path) -> Path:
    """Return a temporary name next to `path` that `checkpoint.remove_temporaries` recognises."""
    return path.with_name(f".{path.name}.tmp-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}")


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically; OSError if that fails, and then the old one is still there."""
    temporary = temporary_sibling(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_config(directory: Path, config: Config) -> None:
    """Write config.json atomically.

    Raises:
        FastsacError: if it cannot be written.
    """
    try:
        replace_text(directory / CONFIG, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    except OSError as error:
        raise FastsacError(f"cannot write to the run directory {directory}: {error.strerror}") from error


def read_config(directory: Path) -> Config:
    """Read config.json.

    Raises:
        UsageError: if it is missing or cannot be read.
    """
    path = directory / CONFIG
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError("it is not a regular file")
        if path.stat().st_size > LONGEST_CONFIG:
            raise ValueError("it is too large")
        values = parse_json(path.read_bytes())
    except OSError as error:
        if learners := learners_in(directory):
            names = ", ".join(each.name for each in learners)
            raise UsageError(f"{directory} holds several run directories: choose one of {names}") from error
        raise UsageError(f"{directory} is not a run directory: {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is damaged: {reason}") from error
    try:
        return config_from_dict(values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def parse_json(encoded: bytes) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys or non-finite numbers; raise ValueError for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    parsed = json.loads(encoded.decode(), object_pairs_hook=unique)
    json.dumps(parsed, allow_nan=False)
    if not isinstance(parsed, dict):
        raise ValueError("it is not an object")
    return parsed


def first_config(directory: Path) -> Config:
    """Return a run's configuration, or its first learner's; UsageError if it is missing or cannot be read."""
    learners = [] if (directory / CONFIG).exists() else learners_in(directory)
    return read_config(learners[0] if learners else directory)


def config_from_dict(values: Any) -> Config:
    """Return the configuration for a dict that `dataclasses.asdict` made.

    Raises:
        UsageError: if a setting is unknown or out of range.
    """
    if not isinstance(values, dict):
        raise UsageError("the stored configuration is not a JSON object")
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    unknown = set(values) - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise UsageError(f"the stored configuration has unknown settings: {', '.join(map(repr, sorted(unknown)))}")
    return Config(**values)


def read_rows(path: Path, having: str = "") -> list[Row]:
    """Return the complete lines of a metrics.jsonl: all of them, or those with the metric `having`.

    Lines without that metric are not parsed, which is much faster.
    """
    key = json.dumps(having).encode() if having else b""
    rows = [row for line in read_lines(path) if key in line and (row := parse_row(line)) is not None]
    return [row for row in rows if having in row] if having else rows


def read_lines(path: Path) -> list[bytes]:
    """Return a file's lines; none if it does not exist, is a symbolic link or is not a regular file."""
    return path.read_bytes().splitlines() if path.is_file() and not path.is_symlink() else []


def parse_row(line: bytes) -> Row | None:
    """Return a line of metrics.jsonl, or None if it is cut short or not ours."""
    with suppress(ValueError, TypeError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and row.get("step", -1) >= 0 and all(abs(value) < 1e38 for value in row.values()):
            return row
    return None
