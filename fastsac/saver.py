"""Writes a run's checkpoints beside the training, from copies that training does not touch.

The replay is stored in blocks of rows: a file each, written once when it is full, and linked into every later
checkpoint until the ring has passed it. Only rows that came since, and the block that is not full yet, are copied and
written.
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
from fastsac.errors import FastsacError
from fastsac.replay import Replay
from fastsac.run_dir import RunLock, newest_step, refuse_if_taken, write_config

#: blocks of a full ring, about, and the fewest transitions in one
BLOCKS, LEAST = 64, 1024
#: newest checkpoints that stay
KEEP = 2
_BLOCK = re.compile(r"replay-([0-9]{1,18})-([0-9]{1,18})")

#: groups of tensors and a state for JSON, neither of them a copy, and the replay if it is to be stored
Contents = tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, Any], Replay | None]


class _Snapshot(NamedTuple):
    """What a checkpoint holds, in memory of its own."""

    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    unchanged: list[str]  # groups to be taken over from the checkpoint before


class Saver:
    """Holds a run directory's lock and writes its checkpoints, one at a time, in a thread of its own."""

    def __init__(
        self, run_dir: Path, config: Config, ours: bool, before: Path | None = None, say: Callable[[str], None] = print
    ) -> None:
        """Say where checkpoints go; nothing is written before the context is entered.

        Args:
            run_dir: the run directory.
            config: goes into it.
            ours: whether it may hold a run already.
            before: its checkpoint that training goes on from, whose blocks need not be written again.
            say: tells the user what went wrong without being an error yet.
        """
        self.run_dir, self.say = run_dir, say
        self._config, self._ours = config, ours
        self.newest: Path | None = None  # checkpoint of this run
        self._blocks: frozenset[str] = frozenset()
        self._remember(before)
        self._lock: RunLock | None = None
        self._executor = ThreadPoolExecutor(1, "fastsac-saver")
        self._pending: Future[None] | None = None
        self.best_return = -math.inf

    def __enter__(self) -> Saver:
        """Take the run directory.

        Raises:
            UsageError: if it holds another run, or another process writes it.
            FastsacError: if it cannot be written.
        """
        self._take()
        try:
            _, state = checkpoint.load_checkpoint(checkpoint.best_checkpoint(self.run_dir), groups=())
            self.best_return = float(state["eval_return"])
        except (FastsacError, KeyError, TypeError, ValueError):
            pass  # there is none that could be used
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
            if not self._ours:
                refuse_if_taken(self.run_dir)
            checkpoint.remove_temporaries(self.run_dir)
            write_config(self.run_dir, self._config)
        except BaseException:
            self._lock.release()
            raise
        self._ours = True

    @property
    def last_good(self) -> str:
        """Words that name the newest checkpoint."""
        step = newest_step(self.run_dir)
        if step is None:
            return "no checkpoint was saved before"
        return f"the last good checkpoint is {checkpoint.step_directory(self.run_dir, step)}"

    def save(self, contents: Callable[[], Contents]) -> None:
        """Copy what a checkpoint holds and begin to write it; a failure becomes a warning, before the next one."""
        if self._lock is not None and not self._lock.holds():
            self.say(f"warning: {self.run_dir} was removed; it is made anew")
            self._lock.release()
            self._take()
            self._remember(None)
        self._settle()
        snapshot = self._snapshot(*contents())
        path = checkpoint.step_directory(self.run_dir, snapshot.state["steps"])
        self._pending = self._executor.submit(self._write, path, snapshot)

    def save_best(self, contents: Callable[[], Contents], best_return: float) -> None:
        """Copy the policy with the highest evaluation so far and begin to write it, without the replay."""
        self._settle()
        self.best_return = best_return
        groups, state, _ = contents()
        snapshot = self._snapshot(groups, {**state, "envs": None, "eval_return": best_return}, None)
        path = checkpoint.best_checkpoint(self.run_dir)
        self._pending = self._executor.submit(checkpoint.save_checkpoint, path, snapshot.groups, snapshot.state)

    def finish(self, contents: Callable[[], Contents], saved: bool) -> None:
        """Wait for what is being written, and write what was not `saved`; a failure is tried twice again.

        Raises:
            FastsacError: if that does not help either; what was saved before stays.
        """
        if not self._settle() and saved:
            return
        for last in (False, True):
            self.save(contents)
            error = self._failure()
            if error is None:
                return
            if last:
                raise FastsacError(f"{error}; {self.last_good}") from error

    def warn(self) -> None:
        """Tell of a write that has failed since, without waiting."""
        if self._pending is not None and self._pending.done():
            self._settle()

    def _settle(self) -> bool:
        """Wait until nothing is being written; warn of a failure, and return whether there was one."""
        if error := self._failure():
            self.say(f"warning: {error}; it is tried again with the next checkpoint")
        return error is not None

    def _failure(self) -> FastsacError | None:
        if self._pending is None:
            return None
        error, self._pending = self._pending.exception(), None
        if error is not None and not isinstance(error, FastsacError):
            raise error
        return error

    def _write(self, path: Path, snapshot: _Snapshot) -> None:
        try:
            checkpoint.save_checkpoint(path, *snapshot, self.newest if snapshot.unchanged else None)
        except FastsacError:
            self._remember(self.newest)  # it may be gone
            raise
        self._remember(path)
        checkpoint.prune_checkpoints(self.run_dir, KEEP)

    def _remember(self, path: Path | None) -> None:
        """Take over the blocks of the checkpoint; if there is none, the next one is written in full."""
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
        """Return the names of the blocks that make up the ring, and of those that are stored already."""
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
    """Return the first row that a block of the replay holds; ValueError if that is no block's name."""
    return _span(block)[0]


def _span(block: str) -> tuple[int, int]:
    match = _BLOCK.fullmatch(block)
    if match is None:
        raise ValueError(f"{block!r} is no block of the replay")
    return int(match[1]), int(match[2])


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    hosts = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return {name: host.clone() if host.data_ptr() == tensors[name].data_ptr() else host for name, host in hosts.items()}
