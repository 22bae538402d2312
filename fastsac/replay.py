"""The replay buffer: a ring of transitions on the learner's device.

The layout is ``[time, env, ...]``. Each observation is stored once: the next observation of row t is that of row t + 1.
The row after the newest transition holds only an observation; writing it overwrites the oldest transition.

Rows in which an environment was reset are not transitions. A queue holds the indices of all valid transitions: sampling
draws positions in this queue, on the device, so it is exactly uniform and never waits for the host.

With n-step returns, a sampled transition extends from row to row: for n steps, until it terminates, or until the next
row holds no transition. The row after a truncation holds none, since it is a reset; neither do the newest row and the
last row before a `begin`. The device must therefore also know which rows hold a transition.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsac.errors import UsageError
from fastsac.transfer import HostArray, to_device
from fastsac.types import Batch
from fastsac_kernels import PhiloxState, replay_gather
from fastsac_kernels.launch import Backend
from fastsac_kernels.replay_gather import transitions_at

OTHER_SIZES = (
    "the stored replay buffer has a different --num-envs, --buffer-size, observation or action size; "
    "--no-checkpoint-replay continues without it"
)


class Replay:
    """A replay buffer of transitions from `num_envs` environments; only `begin` and `add` write to it.

    ``len(replay)`` is the number of transitions that can be sampled, and `transitions` returns all of them::

        batch = agent.replay.transitions()  # batch.obs [len(replay), O], batch.action, batch.reward, ...
        batch.reward.mean(), batch.obs.cpu().numpy()
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        obs_size: int,
        action_size: int,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        n_step: int = 1,
        gamma: float = 0.99,
    ) -> None:
        """Allocate the memory.

        Args:
            capacity: number of transitions, rounded up to whole rows of `num_envs`; an environment's reset takes up
                the space of a transition.
            num_envs: N.
            obs_size: O.
            action_size: A.
            device: the device of the buffer.
            generator: random number generator for sampling, on the same device.
            n_step: maximum number of steps whose rewards `sample` adds up.
            gamma: discount factor per step, for n-step returns.

        Raises:
            UsageError: if it does not fit into memory; the message says how much is needed, is free, and would fit.
        """
        self.num_envs = num_envs
        self.num_rows = -(-capacity // num_envs) + 1
        self.device = torch.device(device)
        self.generator = generator
        self.n_step, self.gamma = n_step, gamma
        check_memory(self.num_rows, num_envs, obs_size, action_size, self.device, n_step)
        shape = (self.num_rows, num_envs)
        self._obs = torch.zeros(*shape, obs_size, device=self.device)
        self._action = torch.zeros(*shape, action_size, device=self.device)
        self._reward = torch.zeros(*shape, device=self.device)
        self._terminated = torch.zeros(*shape, dtype=torch.bool, device=self.device)
        self._queue = torch.zeros(self.num_rows * num_envs, dtype=torch.int64, device=self.device)
        self._valid = np.zeros(shape, dtype=np.bool_)  # whether the row holds a transition
        self._valid_on_device = torch.zeros(*shape, dtype=torch.bool, device=self.device) if n_step > 1 else None
        self.newest = 0  # the last of all rows ever written: an observation without a transition yet
        self._first = 0  # the queue's oldest entry
        self._begun = False
        self.size = 0  # transitions that can be sampled
        self._span = torch.zeros(2, dtype=torch.int64, device=self.device)  # _first and size, for the device

    def move(self, moved: Callable[[Tensor], Tensor]) -> None:
        """Move the buffer to other memory.

        Args:
            moved: returns a copy of a tensor in the new memory. It is called for each tensor of `ring`, in this order.
        """
        names = "_obs", "_action", "_reward", "_terminated", "_queue", "_span"
        for name in names:  # one at a time: at most one tensor exists in both places
            setattr(self, name, moved(getattr(self, name)))

    def begin(self, obs: HostArray) -> Tensor:
        """Store the observations [N, O] after a reset of all environments; they do not continue earlier transitions.

        Args:
            obs: [N, O], on the host.

        Returns:
            The observations on the device.
        """
        self._advance()
        indices, on_device = to_device([self._enqueue(np.empty(0, np.int64)), obs], self.device)
        self._write(indices, 0, on_device)
        self._begun = True
        return on_device

    def add(
        self,
        action: HostArray,
        reward: HostArray,
        terminated: HostArray,
        next_obs: HostArray,
        valid: NDArray[np.bool_],
    ) -> Tensor:
        """Store one step of every environment, starting from the observations of the last `begin` or `add`.

        Host arrays are copied to the device in one asynchronous transfer.

        Args:
            action: [N, A], in the policy's [-1, 1] units, on the device or on the host; all others are on the host.
            reward: [N].
            terminated: [N].
            next_obs: [N, O].
            valid: [N]: False where the environment was reset instead of stepped.

        Returns:
            `next_obs` on the device.

        Raises:
            ValueError: if `begin` was not called first.
        """
        if not self._begun:
            raise ValueError("call begin with the observations after a reset before adding steps")
        row = self.newest % self.num_rows
        self._advance()
        self._valid[row] = valid
        start = (self._first + self.size) % len(self._queue)
        indices = self._enqueue(row * self.num_envs + np.flatnonzero(valid))
        arrays: list[HostArray] = [indices, next_obs, reward, terminated]
        rings = [self._reward, self._terminated]
        if self._valid_on_device is not None:
            arrays.append(valid)
            rings.append(self._valid_on_device)
        if isinstance(action, Tensor) and action.device.type == self.device.type:
            queued, on_device, *parts = [*to_device(arrays, self.device), action]
        else:
            queued, on_device, *parts = to_device([*arrays, action], self.device)
        for ring, part in zip((*rings, self._action), parts, strict=True):
            ring[row] = part
        self._write(queued, start, on_device)
        return on_device

    def _advance(self) -> None:
        """Advance to the next row; the transition that it held is dropped with its observation."""
        self.newest += 1
        row = self.newest % self.num_rows
        dropped = int(np.count_nonzero(self._valid[row]))
        self._valid[row] = False
        self._first = (self._first + dropped) % len(self._queue)
        self.size -= dropped

    def _enqueue(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count new transitions; return what the device needs: their indices, and the queue's span."""
        self.size += len(indices)
        return np.append(indices, [self._first, self.size])

    def _write(self, indices: Tensor, start: int, obs: Tensor | None) -> None:
        """Write to the device what `_enqueue` returned, from position `start` of the queue, and the newest row."""
        if obs is not None:
            row = self.newest % self.num_rows
            self._obs[row] = obs
            if self._valid_on_device is not None:
                self._valid_on_device[row].zero_()  # otherwise the row before would continue into the oldest one
        number = len(indices) - 2
        head = min(number, len(self._queue) - start)
        if head:
            self._queue[start : start + head] = indices[:head]
        if number > head:
            self._queue[: number - head] = indices[head:number]
        self._span.copy_(indices[number:])

    def sample(self, batch_size: int, rng: PhiloxState | None = None, backend: Backend = "reference") -> Batch:
        """Sample `batch_size` transitions, uniformly and with replacement, without waiting for the device.

        With n-step returns, each of them spans up to n steps and has its own `discount`.

        Args:
            batch_size: B.
            rng: random numbers drawn on the device, also inside a CUDA graph that is replayed while the buffer fills;
                None uses the buffer's own generator.
            backend: implementation of the gather.

        Raises:
            ValueError: if the buffer is empty.
        """
        if self.size == 0:
            raise ValueError("the replay buffer is empty: add transitions before sampling")
        draws = rng or torch.randint(self.size, (batch_size,), device=self.device, generator=self.generator)
        n_step = self._valid_on_device, self.n_step, self.gamma
        return Batch(*replay_gather(*self._ring(), self._queue, self._span, draws, batch_size, backend, *n_step))

    def __len__(self) -> int:
        """Return the number of transitions that can be sampled."""
        return self.size

    def transitions(self) -> Batch:
        """Return a copy of all transitions, oldest first; they are single steps, whatever `n_step` is."""
        place = torch.arange(self._first, self._first + self.size, device=self.device)
        index = self._queue[place % len(self._queue)]
        return Batch(*transitions_at(*self._ring(), index, index))

    @property
    def oldest(self) -> int:
        """The oldest row that is still stored, counted like `newest`."""
        return max(1, self.newest - self.num_rows + 1)

    def rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return a copy of the rows from `start` to `stop` - 1, on the CPU, for `load_rows`."""
        index = torch.arange(start, stop, device=self.device) % self.num_rows
        tensors = {name: ring[index].cpu() for name, ring in self._rings().items()}
        return tensors | {"valid": torch.from_numpy(self._valid[index.cpu().numpy()])}

    def newest_obs(self) -> Tensor:
        """Return the latest observations [N, O], which no action has followed yet."""
        return self._obs[self.newest % self.num_rows].clone()

    def episode(self, env: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return an environment's last `length` actions [L, A] and the observations [L + 1, O] around them.

        None if some of them have been overwritten.
        """
        if self.newest - length < self.oldest:
            return None
        index = torch.arange(self.newest - length, self.newest + 1, device=self.device) % self.num_rows
        return self._obs[index, env].cpu().numpy(), self._action[index[:-1], env].cpu().numpy()

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return what a copy needs besides the `rows` before the newest: tensors, and counters for JSON."""
        tensors = {"obs": self._obs[self.newest % self.num_rows].cpu()}
        if self.generator is not None:
            tensors["generator"] = self.generator.get_state()
        counters = {"newest": self.newest, "first": self._first, "size": self.size, "num_rows": self.num_rows}
        return tensors, counters

    def load_rows(self, start: int, tensors: dict[str, Tensor]) -> None:
        """Load what `rows` returned; call `load_state` last.

        Raises:
            UsageError: if they were stored with different sizes.
        """
        for name, ring in self._rings().items():
            if tensors[name].shape[1:] != ring.shape[1:]:
                raise UsageError(OTHER_SIZES)
        index = torch.arange(start, start + len(tensors["valid"])) % self.num_rows
        for name, ring in self._rings().items():
            ring[index.to(self.device)] = tensors[name].to(self.device)
        self._valid[index.numpy()] = tensors["valid"].numpy()

    def load_state(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Load what `state` returned, after all rows from the oldest to the one before the newest.

        Raises:
            UsageError: if it was stored with different sizes.
            ValueError: if it does not match the loaded rows.
        """
        if counters["num_rows"] != self.num_rows:
            raise UsageError(OTHER_SIZES)
        self.newest = counters["newest"]
        row = self.newest % self.num_rows
        self._obs[row], self._valid[row] = tensors["obs"].to(self.device), False
        if self._valid_on_device is not None:
            self._valid_on_device.copy_(torch.from_numpy(self._valid))
        index = np.arange(self.oldest, self.newest) % self.num_rows
        self._first, self.size = counters["first"] % len(self._queue), 0
        indices = self._enqueue((index[:, None] * self.num_envs + np.arange(self.num_envs))[self._valid[index]])
        self._write(torch.from_numpy(indices).to(self.device), self._first, None)
        if self.size != counters["size"]:
            raise ValueError(f"{self.size} transitions instead of {counters['size']}")
        if self.generator is not None and "generator" in tensors:
            restore_generator(self.generator, tensors["generator"])
        self._begun = True

    def ring(self) -> tuple[Tensor, ...]:
        """Return the buffer's tensors: obs, action, reward, terminated [time, N, ...], the queue of indices, its span.

        The span's two numbers are the queue's oldest entry and the number of transitions that can be sampled.
        """
        return *self._ring(), self._queue, self._span

    def _ring(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._obs, self._action, self._reward, self._terminated

    def _rings(self) -> dict[str, Tensor]:
        return dict(zip(("obs", "action", "reward", "terminated"), self._ring(), strict=True))


def restore_generator(generator: torch.Generator, state: Tensor) -> None:
    """Set the generator's state, unless it comes from another kind of device and cannot be used."""
    if state.numel() == generator.get_state().numel():
        generator.set_state(state.cpu())


def bytes_needed(num_rows: int, num_envs: int, obs_size: int, action_size: int, n_step: int = 1) -> int:
    """Return the buffer's size: float32 numbers, one byte per flag and eight per queue entry."""
    flags = 1 if n_step == 1 else 2
    return num_rows * num_envs * (4 * (obs_size + action_size + 1) + flags + 8)


def check_memory(
    num_rows: int, num_envs: int, obs_size: int, action_size: int, device: torch.device, n_step: int, rings: int = 1
) -> None:
    """Raise UsageError unless this many buffers fit; the message says how much is needed, is free, and would fit."""
    needed = rings * bytes_needed(num_rows, num_envs, obs_size, action_size, n_step)
    available = available_bytes(device)
    if needed <= available:
        return
    fits = max(0, available * 9 // 10 // (needed // num_rows) - 1) * num_envs
    advice = f"--buffer-size {fits} fits" if fits else "no --buffer-size fits"
    need, free = f"{needed / 2**30:.2f} GiB", f"{available / 2**30:.2f} GiB"
    what = "the replay buffer needs" if rings == 1 else f"{rings} replay buffers need"
    raise UsageError(f"{what} {need} of {device.type} memory, but {free} are free: {advice}")


def available_bytes(device: torch.device) -> int:
    """Return the free memory in bytes: the GPU's, or the machine's within its control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not Path("/proc/meminfo").exists():  # macOS and Windows have no such file: accept any size
        return sys.maxsize
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(statistics.get("inactive_file", 0))  # the page cache can be reclaimed
    except OSError:  # no control groups v2 here
        return available
    return available if limit == "max" else min(available, int(limit) - used)
