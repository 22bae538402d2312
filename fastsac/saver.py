"""Writes a run's checkpoints in the background, from copies that training does not touch.

The replay buffer is stored in blocks of rows, one file each. A block is written once when it is full, and linked into
every later checkpoint until the ring has overwritten it. Only new rows, and the block that is not full yet, are copied
and written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from fastsac import checkpoint
from fastsac.config import Config
from fastsac.errors import FastsacError, UsageError
from fastsac.replay import Replay
from fastsac.run_dir import CONFIG, RunLock, newest_step, refuse_if_taken, write_config

#: approximate number of blocks in a full ring, and minimum number of transitions per block
BLOCKS, LEAST = 64, 1024
#: number of newest checkpoints to keep
KEEP = 2
_BLOCK = re.compile(r"replay-([0-9]{1,18})-([0-9]{1,18})")

#: groups of tensors and a state for JSON, neither of them a copy, and the replay buffer if it is stored
Contents = tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, Any], Replay | None]


class _Snapshot(NamedTuple):
    """A copy in memory of a checkpoint's contents."""

    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    unchanged: list[str]  # groups to link from the previous checkpoint


class Ours(NamedTuple):
    """A run that this process may continue to write: its newest known checkpoint, and that checkpoint's identity."""

    checkpoint: Path | None
    identity: str = ""

    @classmethod
    def newest(cls, run_dir: Path) -> Ours:
        """Return the run as it is now."""
        step = newest_step(run_dir)
        path = None if step is None else checkpoint.step_directory(run_dir, step)
        return cls(path, "" if path is None else checkpoint.identity(path))

    def refuse_another(self, run_dir: Path) -> None:
        """Raise UsageError if the directory has changed: another process may have continued the run."""
        now = Ours.newest(run_dir)
        if now.identity == self.identity or (now.checkpoint is None and not (run_dir / CONFIG).exists()):
            return
        raise UsageError(f"{run_dir} has changed since this run was loaded: load it again, or choose another directory")


class Saver:
    """Holds a run directory's lock and writes its checkpoints, one at a time, in a background thread."""

    def __init__(self, run_dir: Path, config: Config, ours: Ours | None, warn_user: Callable[[str], None]) -> None:
        """Store the arguments; nothing is written before the context is entered.

        Args:
            run_dir: the run directory.
            config: the settings to write to it.
            ours: the run that the directory already holds, if any.
            warn_user: shows a warning about a failure that is not an error yet.
        """
        self.run_dir, self.warn_user = run_dir, warn_user
        self._config, self._ours = config, ours
        self.newest: Path | None = None  # checkpoint of this run
        self._saved: int | None = None  # the step of the last checkpoint that was written
        self._written: list[Path] = []  # since the last call of `take_written`
        self._blocks: frozenset[str] = frozenset()
        self._lock: RunLock | None = None
        self._lost = ""  # why the run directory cannot be created again
        self._executor = ThreadPoolExecutor(1, "fastsac-saver")
        self._pending: Future[None] | None = None
        self.best_return = -math.inf
        self._best: _Snapshot | None = None  # not written yet

    def __enter__(self) -> Saver:
        """Lock the run directory.

        Raises:
            UsageError: if it holds another run, or another process is using it.
            FastsacError: if it cannot be written.
        """
        self._take()
        self._remember(self._ours.checkpoint if self._ours is not None else None)
        try:
            _, state = checkpoint.load_checkpoint(checkpoint.best_checkpoint(self.run_dir), groups=())
            self.best_return = float(state["eval_return"])
        except (FastsacError, KeyError, TypeError, ValueError):
            pass  # there is no usable one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown()
        if self._lock is not None:
            self._lock.release()

    def _take(self) -> None:
        self._lock = RunLock(self.run_dir)
        try:
            if self._ours is None:
                refuse_if_taken(self.run_dir)
            else:
                self._ours.refuse_another(self.run_dir)
            checkpoint.remove_temporaries(self.run_dir)
            write_config(self.run_dir, self._config)
        except BaseException:
            self._lock.release()
            raise

    def last_good(self) -> str:
        """Wait until nothing is being written, and return a phrase that names the newest checkpoint."""
        self.wait()
        step = newest_step(self.run_dir)
        if step is None:
            return "no checkpoint was saved before"
        return f"the last good checkpoint is {checkpoint.step_directory(self.run_dir, step)}"

    def save(self, contents: Callable[[], Contents]) -> None:
        """Copy a checkpoint's contents and start writing; a failure becomes a warning before the next checkpoint."""
        self._settle()
        if not self._still_there():
            return
        snapshot = self._snapshot(*contents())
        path = checkpoint.step_directory(self.run_dir, snapshot.state["steps"])
        self._pending = self._executor.submit(self._write, path, snapshot)

    def save_best(self, contents: Callable[[], Contents], best_return: float) -> None:
        """Copy the policy with the highest evaluation so far and start writing it, without the replay buffer."""
        self._settle()
        still_there = self._still_there()
        self.best_return = best_return
        groups, state, _ = contents()
        self._best = self._snapshot(groups, {**state, "envs": None, "eval_return": best_return}, None)
        if still_there:
            self._pending = self._executor.submit(self._write_best)

    def finish(self, contents: Callable[[], Contents], step: int) -> None:
        """Wait for the current write, and write a checkpoint unless that was the one for this step.

        A failed write is retried once.

        Raises:
            FastsacError: if it fails again; earlier checkpoints are kept.
        """
        if not self._settle() and self._saved == step and self._best is None:
            return
        for last in (False, True):
            self.save(contents)
            error = self._failure()
            if error is None and self._saved == step:
                return
            if last:
                raise FastsacError(f"{error or self._lost}; {self.last_good()}") from error

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._pending is not None:
            self._pending.exception()

    def take_written(self) -> list[Path]:
        """Return the checkpoints that have been completed since the last call, without waiting."""
        written = self._written[:]
        del self._written[: len(written)]  # the thread may have added one in the meantime
        return written

    def warn(self) -> None:
        """Warn about a write that has failed, without waiting."""
        if self._pending is not None and self._pending.done():
            self._settle()

    def _still_there(self) -> bool:
        """Create the run directory again if it has been removed; return whether it exists now."""
        if self._lock is not None and self._lock.holds():
            return True
        if self._lock is not None:
            self._lock.release()
        self._ours = self._ours or Ours(None)
        try:
            self._take()
        except UsageError:  # another process has it
            raise
        except FastsacError as error:
            self._lost = str(error)
            self.warn_user(f"{self.run_dir} was removed, and cannot be created again: {error}")
            return False
        self.warn_user(f"{self.run_dir} or its lock was removed; creating it again")
        self._remember(self.newest)
        self.best_return = -math.inf
        return True

    def _settle(self) -> bool:
        """Wait until nothing is being written; warn about a failure, and return whether there was one."""
        if error := self._failure():
            self.warn_user(f"{error}; it will be retried with the next checkpoint")
        return error is not None

    def _failure(self) -> FastsacError | None:
        if self._pending is None:
            return None
        error, self._pending = self._pending.exception(), None
        if error is not None and not isinstance(error, FastsacError):
            raise error
        return error

    def _write_best(self) -> None:
        if self._best is not None:
            path = checkpoint.best_checkpoint(self.run_dir)
            checkpoint.save_checkpoint(path, self._best.groups, self._best.state)
            self._best = None

    def _write(self, path: Path, snapshot: _Snapshot) -> None:
        self._write_best()  # which may have failed before
        try:
            checkpoint.save_checkpoint(path, *snapshot, self.newest if snapshot.unchanged else None)
        except FastsacError:
            self._remember(self.newest)  # it may be gone
            raise
        self._ours, self._saved = Ours(path, checkpoint.identity(path)), snapshot.state["steps"]
        self._remember(path)
        self._written.append(path)
        checkpoint.prune_checkpoints(self.run_dir, KEEP)

    def _remember(self, path: Path | None) -> None:
        """Remember the blocks of the checkpoint; if there is none, the next one is written in full."""
        try:
            groups = checkpoint.groups_of(path) if path is not None else []
        except FastsacError:
            path, groups = None, []
        self.newest, self._blocks = path, frozenset(name for name in groups if _BLOCK.fullmatch(name))

    def _snapshot(
        self, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], replay: Replay | None
    ) -> _Snapshot:
        copies = {group: _copied(tensors) for group, tensors in groups.items()}
        if replay is None:
            return _Snapshot(copies, {**state, "replay": None}, [])
        tensors, counters = replay.state()
        copies["replay"] = _copied(tensors)
        names, unchanged = self._blocks_of(replay)
        for name in names:
            if name not in unchanged:
                copies[name] = replay.rows(*_span(name))
        return _Snapshot(copies, {**state, "replay": {**counters, "blocks": names}}, unchanged)

    def _blocks_of(self, replay: Replay) -> tuple[list[str], list[str]]:
        """Return the names of all blocks of the ring, and of those that are already stored."""
        length = max(-(-replay.num_rows // BLOCKS), -(-LEAST // replay.num_envs))
        stored = {stop: (start, name) for name in self._blocks for start, stop in [_span(name)]}
        names, unchanged = [], []
        for begin in range(replay.oldest // length * length, replay.newest, length):
            start, stop = max(begin, replay.oldest), min(begin + length, replay.newest)
            if stop in stored and stored[stop][0] <= start:
                unchanged.append(stored[stop][1])
                names.append(stored[stop][1])
            else:
                names.append(f"replay-{start:012d}-{stop:012d}")
        return names, unchanged


def first_row(block: str) -> int:
    """Return the first row of a replay block; ValueError if the name is invalid."""
    return _span(block)[0]


def _span(block: str) -> tuple[int, int]:
    match = _BLOCK.fullmatch(block)
    if match is None:
        raise ValueError(f"{block!r} is not a block of the replay buffer")
    return int(match[1]), int(match[2])


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    hosts = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return {name: host.clone() if host.data_ptr() == tensors[name].data_ptr() else host for name, host in hosts.items()}
