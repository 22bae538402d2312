"""Loads Minari datasets into a replay buffer: `fastsac train --offline`.

The episodes are distributed over the buffer's N columns as if N environments played them: when an episode ends, its
column gets the next one, after a row that is not a transition. The buffer therefore looks as if environments had filled
it, and episodes never join. All columns end at the same row; those with fewer steps start later.
"""

from __future__ import annotations

import heapq
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsac.errors import UsageError, did_you_mean
from fastsac.normalize import Normalizer
from fastsac.replay import Replay
from fastsac.spaces import Bools, Floats, Spaces, read_spaces
from fastsac.transfer import to_device

#: rows that are collected before they are written
MOST_ROWS = 1024


class Rows(NamedTuple):
    """T rows of the replay buffer, or part of an episode in one of its columns (without N)."""

    obs: Floats  # [T, N, O]: the observation after the action
    action: Floats  # [T, N, A] in [-1, 1]
    reward: Floats  # [T, N]
    terminated: Bools  # [T, N]
    valid: Bools  # [T, N]: whether it is a transition; the first row of an episode is its reset
    present: Bools  # [T, N]: whether there is an observation

    @classmethod
    def empty(cls, shape: tuple[int, ...], obs_size: int, action_size: int) -> Rows:
        """Return rows without transitions or observations."""
        numbers = [np.zeros((*shape, *more), np.float32) for more in ((obs_size,), (action_size,), ())]
        return cls._make([*numbers, *(np.zeros(shape, np.bool_) for _ in range(3))])


def require_minari() -> Any:
    """Import Minari.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import h5py  # noqa: F401
        import minari
    except ImportError as error:
        raise UsageError(
            f"Minari datasets need a package that is missing ({error.name}): pip install 'minari[hdf5]'"
        ) from error
    return minari


class Dataset:
    """A local Minari dataset whose episodes fit an environment."""

    def __init__(self, name: str, env_id: str, spaces: Spaces) -> None:
        """Open the dataset.

        Args:
            name: the dataset's id or directory.
            env_id: the environment's id.
            spaces: the environment's spaces.

        Raises:
            UsageError: if the dataset cannot be found or read, or does not fit the environment.
        """
        minari = require_minari()
        self.name, self._spaces = name, spaces
        path = _find(name)
        try:
            metadata = json.loads((path / "metadata.json").read_text())
            if not {"observation_space", "action_space"} <= metadata.keys():  # Minari would run its environment's code
                raise ValueError("its metadata.json does not contain its spaces")
            self._data = minari.MinariDataset(path)
            self.num_episodes = int(self._data.total_episodes)
            self.num_steps = int(self._data.total_steps)
        except Exception as error:
            raise self._unreadable(error) from error
        self._refuse_misfit(env_id)
        if not self.num_steps:
            raise UsageError(f"the Minari dataset {name} has no transitions")
        spec = json.loads(metadata.get("env_spec") or "{}")
        #: the id of the environment that it was collected in, if known
        self.env_id = str(spec.get("id") or "")

    def _refuse_misfit(self, env_id: str) -> None:
        try:
            found = read_spaces("it", self._data.observation_space, self._data.action_space)
        except UsageError as error:
            raise UsageError(f"the Minari dataset {self.name} does not fit {env_id}: {error}") from error
        if found.obs_shapes != self._spaces.obs_shapes:
            kind, theirs, ours = "observations", _obs(found), _obs(self._spaces)
        elif not _same_bounds(found, self._spaces):
            kind, theirs, ours = "actions", _actions(found), _actions(self._spaces)
        else:
            return
        raise UsageError(f"the Minari dataset {self.name} has {kind} {theirs}, but {env_id} has {ours}")

    def _unreadable(self, error: Exception) -> UsageError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return UsageError(f"the Minari dataset {self.name} cannot be read: {reason[:200]}")

    def arrange(self, num_rows: int, num_envs: int, rank: int = 0, num_ranks: int = 1) -> tuple[list[int], list[int]]:
        """Plan which episodes to place in N columns, from the last episode backwards.

        Args:
            num_rows: stop adding episodes once every column has this many rows.
            num_envs: N.
            rank: which share of the episodes to use.
            num_ranks: the number of shares.

        Returns:
            The indices of the episodes in the order in which they start, and each column's number of empty rows [N]
            before its first episode.
        """
        indices = self._data.episode_indices[rank::num_ranks]
        try:
            lengths = [int(each["total_steps"]) for each in self._data.storage.get_episode_metadata(indices)]
        except Exception as error:
            raise self._unreadable(error) from error
        columns, ends = [(0, column) for column in range(num_envs)], list[tuple[int, int, int]]()
        for index, length in zip(indices[::-1].tolist(), lengths[::-1], strict=True):
            height, column = columns[0]
            if height >= num_rows:
                break
            heapq.heapreplace(columns, (height + length + 1, column))
            ends.append((-height - length - 1, column, index))
        total = max(height for height, _ in columns)
        delays = [total - height for height, _ in sorted(columns, key=lambda each: each[1])]
        return [index for *_, index in sorted(ends)], delays

    def episodes(self, indices: list[int]) -> Iterator[Rows]:
        """Read the episodes one by one, [L + 1, ...] each; an episode is split where it is done before its end.

        Raises:
            UsageError: if an episode is damaged, or contains a number that is not finite.
        """
        episodes = self._data.iterate_episodes(indices)
        while True:
            try:
                episode = next(episodes, None)
                if episode is None:
                    return
                rows = self._read(episode)
                done = np.flatnonzero(np.asarray(episode.terminations) | np.asarray(episode.truncations)) + 1
            except UsageError:
                raise
            except Exception as error:
                raise self._unreadable(error) from error
            ends = [*done[done < len(episode)], len(episode)]
            for start, end in zip([0, *ends], ends, strict=False):
                if start < end:
                    part = Rows._make(each[start : end + 1].copy() for each in rows)
                    part.action[0], part.reward[0], part.terminated[0], part.valid[0] = 0.0, 0.0, False, False
                    yield part

    def _read(self, episode: Any) -> Rows:
        length = len(episode.rewards)
        obs = self._spaces.flatten(episode.observations)
        action = np.asarray(episode.actions)
        shape = self._spaces.action_low.shape
        flags = {len(episode.terminations), len(episode.truncations)}
        if len(obs) != length + 1 or action.shape != (length, *shape) or flags != {length}:
            raise ValueError(
                f"episode {episode.id} has {length} rewards, {len(obs)} observations and actions {list(action.shape)}"
            )
        with np.errstate(over="ignore"):
            reward = np.asarray(episode.rewards, dtype=np.float32).reshape(length)
        for what, numbers in (("observations", obs), ("actions", action), ("rewards", reward)):
            if not np.isfinite(numbers).all():
                raise UsageError(
                    f"the Minari dataset {self.name} has {what} that are not finite in episode {episode.id}"
                )
        terminated = np.asarray(episode.terminations, dtype=np.bool_)
        there = np.ones(length + 1, dtype=np.bool_)
        rest = map(_one_later, (self._spaces.unscale(action), reward, terminated))
        return Rows._make([obs, *rest, there, there])


def _one_later(array: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([np.zeros_like(array[:1], shape=(1, *array.shape[1:])), array])


def _obs(spaces: Spaces) -> str:
    return ", ".join(f"{key} {list(shape)}".strip() for key, shape in spaces.obs_shapes.items())


def _actions(spaces: Spaces) -> str:
    low, high = (", ".join(f"{each:g}" for each in np.unique(bound)) for bound in spaces[1:])
    return f"{list(spaces.action_low.shape)} from {low} to {high}"


def _same_bounds(ours: Spaces, theirs: Spaces) -> bool:
    pairs = (ours.action_low, theirs.action_low), (ours.action_high, theirs.action_high)
    return all(one.shape == other.shape and np.allclose(one, other, rtol=1e-5) for one, other in pairs)


def deal(episodes: Iterator[Rows], delays: Sequence[int], obs_size: int, action_size: int) -> Iterator[Rows]:
    """Distribute the episodes over N columns; yield several rows at a time, the very first being a reset of all.

    At most N episodes are in memory at once.
    """
    columns = [Rows.empty((delay,), obs_size, action_size) if delay else next(episodes, None) for delay in delays]
    places = [0] * len(columns)
    while left := [len(each.obs) - place for each, place in zip(columns, places, strict=True) if each is not None]:
        number = min(MOST_ROWS, *left)
        rows = Rows.empty((number, len(columns)), obs_size, action_size)
        for index, (episode, place) in enumerate(zip(columns, places, strict=True)):
            if episode is None:
                continue
            for whole, part in zip(rows, episode, strict=True):
                whole[:, index] = part[place : place + number]
            places[index] += number
            if places[index] == len(episode.obs):
                columns[index], places[index] = next(episodes, None), 0
        yield rows


def fill(replay: Replay, rows: Iterator[Rows], normalizer: Normalizer | None = None) -> None:
    """Write the rows from `deal` to an empty replay buffer.

    If they do not all fit, the newest overwrite the oldest, as always.

    Args:
        replay: a buffer with N columns.
        rows: rows with N columns.
        normalizer: also updated with these rows.
    """
    for some in rows:
        for obs, action, reward, terminated, valid, present in zip(*some, strict=True):
            begins = replay.newest == 0
            on_device = replay.begin(obs) if begins else replay.add(action, reward, terminated, obs, valid)
            if normalizer is None:
                continue
            *rest, where = to_device([reward, valid, present], replay.device)
            there = None if present.all() else where
            if begins:
                normalizer.begin(on_device, there)
            else:
                normalizer.add(on_device, rest[0], rest[1], there)


def _find(name: str) -> Path:
    """Return the directory with the dataset's files; UsageError if it does not exist."""
    import minari

    for path in (Path(name), Path(name) / "data"):
        if (path / "metadata.json").is_file():
            return path
    from minari.dataset.minari_dataset import DATASET_ID_RE
    from minari.storage import get_dataset_path

    if not DATASET_ID_RE.fullmatch(name):
        raise UsageError(
            f"no Minari dataset at {name}: --offline takes a directory, or an id such as D4RL/door/human-v2"
        )
    kept: Path = get_dataset_path(name) / "data"
    if (kept / "metadata.json").is_file():
        return kept
    with warnings.catch_warnings():  # about directories that are not datasets
        warnings.simplefilter("ignore")
        known = minari.list_local_datasets()
    raise UsageError(
        f"the Minari dataset {name} is not in {get_dataset_path()}{did_you_mean(name, known) or ':'} "
        f"`minari download {name}` downloads it"
    )
