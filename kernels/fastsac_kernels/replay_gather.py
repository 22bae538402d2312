"""Drawing a batch of transitions from a ring in which each observation is stored once.

The ring is laid out ``[rows, N, ...]``; the next observation of row t is row t + 1's. A queue lists the flat indices
(row * N + environment) of the transitions that may be drawn, its oldest entry at ``first``::

    position   = floor(w * size / 2^64)                  w: 64 random bits, so every entry is as likely to within 2^-34
    index      = queue[(first + position) mod length]
    next index = (index + N) mod length

With n-step returns the transition goes on, row by row, up to n steps: m of them, until one has terminated or the row
after it holds no transition::

    reward     = r_0 + gamma r_1 + ... + gamma^(m-1) r_(m-1)         discount = gamma^m
    next_obs, terminated: of the last of the m steps

On CUDA one Triton kernel draws and copies everything. `first` and `size` are read on the device: a CUDA graph that was
captured when the ring was nearly empty draws from all of it later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsac_kernels.launch import Backend, use_triton
from fastsac_kernels.philox import MASK, PhiloxState, philox_words
from fastsac_kernels.squashed_gaussian import wide

#: obs [B, O], action [B, A], reward [B], next_obs [B, O], terminated [B], and for n-step returns discount [B]
Transitions = tuple[Tensor, ...]


def replay_gather(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    queue: Tensor,
    span: Tensor,
    rng: PhiloxState | Tensor,
    batch_size: int,
    backend: Backend = "auto",
    valid: Tensor | None = None,
    n_step: int = 1,
    gamma: float = 1.0,
) -> Transitions:
    """Return B transitions, drawn uniformly and with replacement.

    Args:
        obs: [rows, N, O], contiguous, as are all parts of the ring.
        action: [rows, N, A].
        reward: [rows, N].
        terminated: [rows, N] bool.
        queue: [rows * N] int64, flat indices of transitions.
        span: [2] int64, the place of the queue's oldest entry, and the number of entries: at least 1, at most 2^30.
        rng: the generator, which stays as it is, or positions in the queue [B] int64, counted from the oldest, at least
            0 and below the number of entries.
        batch_size: B.
        backend: "auto" takes the Triton kernel for CUDA tensors, PyTorch for others.
        valid: [rows, N] bool, which rows hold a transition; the newest row, which holds only an observation, must be
            False, or else old rows would be taken for its continuation. Read for n-step returns only.
        n_step: the most steps of a transition, n.
        gamma: discount per step, for n-step returns.

    Returns:
        obs [B, O], action [B, A], reward [B], next_obs [B, O] and terminated [B]; with n above 1 also discount [B], and
        reward is a sum in float32 (in float64 of a ring in float64, by PyTorch).

    Raises:
        ValueError: if the shapes do not fit, n is below 1, `valid` is missing, or the backend is unknown.
        TypeError: for an `rng` of another type, or a dtype of rewards that the Triton kernel cannot add up.
        RuntimeError: if Triton cannot run here.
    """
    _check(obs, action, reward, terminated, queue, span, rng, batch_size, valid, n_step)
    if use_triton(backend, obs):
        state, stream = (rng.state, rng.stream) if isinstance(rng, PhiloxState) else (rng, -1)
        arguments = obs, action, reward, terminated, queue, span, state, stream, batch_size
        batch: Transitions = (
            replay_gather_n_step_op(*arguments, valid, n_step, gamma) if n_step > 1 else replay_gather_op(*arguments)
        )
        return batch
    first, size = span.unbind()
    position: Tensor = (
        uniform_positions_op(rng.state, rng.stream, batch_size, size) if not isinstance(rng, Tensor) else rng
    )
    index = queue[(position + first) % len(queue)]
    if valid is None or n_step == 1:
        return transitions_at(obs, action, reward, terminated, index, index)
    total, last, discount = n_step_return(reward, terminated, valid, index, n_step, gamma)
    batch = transitions_at(obs, action, reward, terminated, index, last)
    return (*batch[:2], total, *batch[3:], discount)


def _check(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    queue: Tensor,
    span: Tensor,
    rng: PhiloxState | Tensor,
    batch_size: int,
    valid: Tensor | None,
    n_step: int,
) -> None:
    ring = obs.shape[:2]
    if obs.dim() != 3 or action.dim() != 3 or {action.shape[:2], reward.shape, terminated.shape} != {ring}:
        shapes = [list(each.shape) for each in (obs, action, reward, terminated)]
        raise ValueError(
            f"obs, action, reward, terminated must be [rows, N, O], [rows, N, A], [rows, N], [rows, N], got {shapes}"
        )
    if queue.shape != (ring.numel(),) or span.shape != (2,) or batch_size < 1:
        raise ValueError(
            f"queue must be [{ring.numel()}], span [2] and batch_size at least 1, "
            f"got {list(queue.shape)}, {list(span.shape)} and {batch_size}"
        )
    if not isinstance(rng, PhiloxState | Tensor):
        raise TypeError(f"rng must be a PhiloxState or positions [B], got {type(rng).__name__}")
    if isinstance(rng, Tensor) and rng.shape != (batch_size,):
        raise ValueError(f"positions must be [{batch_size}], got {list(rng.shape)}")
    if n_step < 1 or (n_step > 1 and (valid is None or valid.shape != ring)):
        found = None if valid is None else list(valid.shape)
        raise ValueError(
            f"n_step must be at least 1, and above 1 valid must be [rows, N] = {list(ring)}, got {n_step} and {found}"
        )


def transitions_at(
    obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, index: Tensor, last: Tensor
) -> Transitions:
    """Return the ring's transitions from flat indices [B], with next_obs and terminated of the steps at `last` [B]."""
    observations = obs.flatten(0, 1)
    next_index = (last + obs.shape[1]) % len(observations)
    return (
        observations.index_select(0, index),
        action.flatten(0, 1).index_select(0, index),
        reward.flatten().index_select(0, index),
        observations.index_select(0, next_index),
        terminated.flatten().index_select(0, last),
    )


def n_step_return(
    reward: Tensor, terminated: Tensor, valid: Tensor, index: Tensor, n_step: int, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the discounted sum of rewards from `index` on, the index of the last step, and the discount, each [B]."""
    ring, num_envs = (reward.flatten(), terminated.flatten(), valid.flatten()), reward.shape[1]
    total = wide(ring[0].index_select(0, index))
    discount, going = torch.full_like(total, gamma), torch.ones_like(index, dtype=torch.bool)
    here = last = index
    for _ in range(1, n_step):
        ended = ring[1].index_select(0, here)
        here = (here + num_envs) % len(ring[0])
        going = going & ~ended & ring[2].index_select(0, here)
        last = torch.where(going, here, last)
        total = total + torch.where(going, discount * wide(ring[0].index_select(0, here)), 0.0)
        discount = torch.where(going, discount * gamma, discount)
    return total, last, discount


@torch.library.custom_op("fastsac_kernels::uniform_positions", mutates_args=())
def uniform_positions_op(state: Tensor, stream: int, batch_size: int, size: Tensor) -> Tensor:
    """Return the positions [B] in [0, size) that the kernel draws; not to be taken apart by torch.compile."""
    words = philox_words(state, stream, batch_size, 1)[:, 0]
    return (words[:, 1] * size + ((words[:, 0] * size >> 32) & MASK)) >> 32


@uniform_positions_op.register_fake
def _(state: Tensor, stream: int, batch_size: int, size: Tensor) -> Tensor:
    return state.new_empty(batch_size)


@torch.library.custom_op("fastsac_kernels::replay_gather", mutates_args=(), device_types=("cuda", "cpu"))
def replay_gather_op(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    queue: Tensor,
    span: Tensor,
    rng: Tensor,
    stream: int,
    batch_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One launch: the transitions, for a generator's state [2], or for positions [B] where stream is -1."""
    from fastsac_kernels import replay_gather_triton

    drawn = queue, span, rng, stream, batch_size
    batch: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = replay_gather_triton.forward(
        obs, action, reward, terminated, *drawn
    )
    return batch


@torch.library.custom_op("fastsac_kernels::replay_gather_n_step", mutates_args=(), device_types=("cuda", "cpu"))
def replay_gather_n_step_op(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    queue: Tensor,
    span: Tensor,
    rng: Tensor,
    stream: int,
    batch_size: int,
    valid: Tensor,
    n_step: int,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One launch: the same with n-step returns, and each transition's discount."""
    from fastsac_kernels import replay_gather_triton

    drawn = queue, span, rng, stream, batch_size
    batch: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = replay_gather_triton.forward(
        obs, action, reward, terminated, *drawn, valid, n_step, gamma
    )
    return batch


@replay_gather_op.register_fake
def _fake(
    obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch_size = rest[4]
    return (
        obs.new_empty((batch_size, obs.shape[2])),
        action.new_empty((batch_size, action.shape[2])),
        reward.new_empty(batch_size),
        obs.new_empty((batch_size, obs.shape[2])),
        terminated.new_empty(batch_size),
    )


@replay_gather_n_step_op.register_fake
def _(obs: Tensor, action: Tensor, reward: Tensor, *rest: Any) -> Transitions:
    batch, total = _fake(obs, action, reward, *rest), reward.new_empty(rest[5], dtype=torch.float32)
    return (*batch[:2], total, *batch[3:], torch.empty_like(total))
