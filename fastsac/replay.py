"""The replay: a ring of transitions that lives on the learner's device.

Laid out ``[time, env, ...]``. Each observation is stored once: the next observation of row t is row t + 1's. The row
after the newest holds an observation only; writing it is what puts the oldest transition out of reach.

Rows at which an environment was reset are no transitions. They are kept out by a queue of the indices of those that
are: sampling draws positions in the queue, on the device, so it is exactly uniform and never waits for the host.

With n-step returns a drawn transition goes on from row to row: for n steps, until it has terminated, or until the next
row holds no transition. The row after a truncation holds none, since it is a reset; nor does the newest row, nor the
last one before a `begin`. So the device, too, has to know which rows hold a transition.
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
    "the stored replay has another --num-envs, --buffer-size, observation or action size; "
    "--no-checkpoint-replay goes on without it"
)


class Replay:
    """A ring of transitions from `num_envs` environments; only `begin` and `add` write it.

    ``len(replay)`` is the number of transitions that can be drawn, and `transitions` returns all of them::

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
        """Take the memory.

        Args:
            capacity: transitions, rounded up to whole rows of `num_envs`; a row at which an environment was reset
                takes up the room of a transition.
            num_envs: N.
            obs_size: O.
            action_size: A.
            device: where the ring lives.
            generator: draws the samples; on the same device.
            n_step: the most steps whose rewards `sample` sums up.
            gamma: discount per step, for n-step returns.

        Raises:
            UsageError: if it does not fit, with what is needed, what there is, and what would fit.
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
        self._valid = np.zeros(shape, dtype=np.bool_)  # whether there is a transition
        self._valid_on_device = torch.zeros(*shape, dtype=torch.bool, device=self.device) if n_step > 1 else None
        self.newest = 0  # of all rows ever written, the last: an observation without a transition yet
        self._first = 0  # the queue's oldest entry
        self._begun = False
        self.size = 0  # transitions that can be drawn
        self._span = torch.zeros(2, dtype=torch.int64, device=self.device)  # _first and size, for the device to read

    def move(self, moved: Callable[[Tensor], Tensor]) -> None:
        """Go on in other memory.

        Args:
            moved: returns a copy there. It is called for each tensor of `ring`, in this order.
        """
        names = "_obs", "_action", "_reward", "_terminated", "_queue", "_span"
        for name in names:  # one after the other: no more than one lies in both places
            setattr(self, name, moved(getattr(self, name)))

    def begin(self, obs: HostArray) -> Tensor:
        """Take the observations [N, O] after a reset of all environments; they do not join what was before.

        Args:
            obs: on the host.

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
        """Write one step of every environment, from the observations of the last `begin` or `add`.

        What is on the host goes to the device in one copy, and nothing waits for it.

        Args:
            action: [N, A], in the policy's [-1, 1] units, on the device or on the host; the rest is on the host.
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
            raise ValueError("call begin with the observations after the reset before adding steps")
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
        """Go on to the next row; the transition that it held goes with its observation."""
        self.newest += 1
        row = self.newest % self.num_rows
        dropped = int(np.count_nonzero(self._valid[row]))
        self._valid[row] = False
        self._first = (self._first + dropped) % len(self._queue)
        self.size -= dropped

    def _enqueue(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the transitions in; return what the device needs to know: their indices, and the queue's span."""
        self.size += len(indices)
        return np.append(indices, [self._first, self.size])

    def _write(self, indices: Tensor, start: int, obs: Tensor | None) -> None:
        """Write on the device what `_enqueue` returned, from that place of the queue on, and the newest row."""
        if obs is not None:
            row = self.newest % self.num_rows
            self._obs[row] = obs
            if self._valid_on_device is not None:
                self._valid_on_device[row].zero_()  # or the row before would go on with the oldest transition
        number = len(indices) - 2
        head = min(number, len(self._queue) - start)
        if head:
            self._queue[start : start + head] = indices[:head]
        if number > head:
            self._queue[: number - head] = indices[head:number]
        self._span.copy_(indices[number:])

    def sample(self, batch_size: int, rng: PhiloxState | None = None, backend: Backend = "reference") -> Batch:
        """Draw `batch_size` transitions, uniformly and with replacement; nothing waits for the device.

        With n-step returns each of them spans up to n steps, and has its own `discount`.

        Args:
            batch_size: B.
            rng: draws on the device, also inside a CUDA graph that is replayed while the ring fills; None takes the
                generator of the ring's own.
            backend: of the gather.

        Raises:
            ValueError: if nothing was added yet.
        """
        if self.size == 0:
            raise ValueError("the replay is empty: add transitions before sampling")
        draws = rng or torch.randint(self.size, (batch_size,), device=self.device, generator=self.generator)
        n_step = self._valid_on_device, self.n_step, self.gamma
        return Batch(*replay_gather(*self._ring(), self._queue, self._span, draws, batch_size, backend, *n_step))

    def __len__(self) -> int:
        """Return the number of transitions that can be drawn."""
        return self.size

    def transitions(self) -> Batch:
        """Return a copy of all transitions that can be drawn, the oldest first; single steps, whatever `n_step` is."""
        place = torch.arange(self._first, self._first + self.size, device=self.device)
        index = self._queue[place % len(self._queue)]
        return Batch(*transitions_at(*self._ring(), index, index))

    @property
    def oldest(self) -> int:
        """The first row that is still there, counted as `newest` is."""
        return max(1, self.newest - self.num_rows + 1)

    def rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return a copy of the rows from `start` to `stop` - 1, on the CPU, for `load_rows`."""
        index = torch.arange(start, stop, device=self.device) % self.num_rows
        tensors = {name: ring[index].cpu() for name, ring in self._rings().items()}
        return tensors | {"valid": torch.from_numpy(self._valid[index.cpu().numpy()])}

    def newest_obs(self) -> Tensor:
        """Return the observations [N, O] that no action has followed yet."""
        return self._obs[self.newest % self.num_rows].clone()

    def episode(self, env: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return an environment's last `length` actions [L, A] and the observations [L + 1, O] around them.

        None if they are not all there any more.
        """
        if self.newest - length < self.oldest:
            return None
        index = torch.arange(self.newest - length, self.newest + 1, device=self.device) % self.num_rows
        return self._obs[index, env].cpu().numpy(), self._action[index[:-1], env].cpu().numpy()

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return what a copy needs beside the `rows` before the newest: tensors, and counters for JSON."""
        tensors = {"obs": self._obs[self.newest % self.num_rows].cpu()}
        if self.generator is not None:
            tensors["generator"] = self.generator.get_state()
        counters = {"newest": self.newest, "first": self._first, "size": self.size, "num_rows": self.num_rows}
        return tensors, counters

    def load_rows(self, start: int, tensors: dict[str, Tensor]) -> None:
        """Take over what `rows` returned; `load_state` comes last.

        Raises:
            UsageError: if they were stored with other sizes.
        """
        for name, ring in self._rings().items():
            if tensors[name].shape[1:] != ring.shape[1:]:
                raise UsageError(OTHER_SIZES)
        index = torch.arange(start, start + len(tensors["valid"])) % self.num_rows
        for name, ring in self._rings().items():
            ring[index.to(self.device)] = tensors[name].to(self.device)
        self._valid[index.numpy()] = tensors["valid"].numpy()

    def load_state(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Take over what `state` returned, after all rows from the oldest to the one before the newest.

        Raises:
            UsageError: if it was stored with other sizes.
            ValueError: if the rows do not add up to it.
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
        """Return where it lives: obs, action, reward, terminated [time, N, ...], the queue of indices, and its span.

        The span's two numbers are the queue's oldest entry and the number of transitions that can be drawn.
        """
        return *self._ring(), self._queue, self._span

    def _ring(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._obs, self._action, self._reward, self._terminated

    def _rings(self) -> dict[str, Tensor]:
        return dict(zip(("obs", "action", "reward", "terminated"), self._ring(), strict=True))


def restore_generator(generator: torch.Generator, state: Tensor) -> None:
    """Set the generator's state, unless it is another kind of device's, which nothing can be done with."""
    if state.numel() == generator.get_state().numel():
        generator.set_state(state.cpu())


def bytes_needed(num_rows: int, num_envs: int, obs_size: int, action_size: int, n_step: int = 1) -> int:
    """Return the ring's size: float32 numbers, a byte for each flag, eight for the queue's entry."""
    flags = 1 if n_step == 1 else 2
    return num_rows * num_envs * (4 * (obs_size + action_size + 1) + flags + 8)


def check_memory(
    num_rows: int, num_envs: int, obs_size: int, action_size: int, device: torch.device, n_step: int, rings: int = 1
) -> None:
    """Raise UsageError unless so many rings fit, with what is needed, what there is, and what would fit."""
    needed = rings * bytes_needed(num_rows, num_envs, obs_size, action_size, n_step)
    available = available_bytes(device)
    if needed <= available:
        return
    fits = max(0, available * 9 // 10 // (needed // num_rows) - 1) * num_envs
    advice = f"--buffer-size {fits} fits" if fits else "no --buffer-size fits"
    need, free = f"{needed / 2**30:.2f} GiB", f"{available / 2**30:.2f} GiB"
    what = "the replay buffer needs" if rings == 1 else f"{rings} replay buffers need"
    raise UsageError(f"{what} {need} of {device.type} memory and {free} are free: {advice}")


def available_bytes(device: torch.device) -> int:
    """Return the memory that can still be taken: the GPU's, or the machine's within its control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not Path("/proc/meminfo").exists():  # macOS and Windows do not say it in a file: nothing is refused
        return sys.maxsize
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(statistics.get("inactive_file", 0))  # the page cache gives way
    except OSError:  # no second version of control groups here
        return available
    return available if limit == "max" else min(available, int(limit) - used)
