"""Drawing a batch of transitions from a ring in which each observation is stored once.

The ring is laid out ``[rows, N, ...]``; the next observation of row t is row t + 1's. A queue lists the flat indices
(row * N + environment) of the transitions that may be drawn, its oldest entry at ``first``::

    position   = floor(w * size / 2^64)                  w: 64 random bits, so every entry is as likely to within 2^-34
    index      = queue[(first + position) mod length]
    next index = (index + N) mod length

On CUDA one Triton kernel draws and copies everything. `first` and `size` are read on the device: a CUDA graph that was
captured when the ring was nearly empty draws from all of it later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsac_kernels.launch import Backend, use_triton
from fastsac_kernels.philox import MASK, PhiloxState, philox_words

#: obs [B, O], action [B, A], reward [B], next_obs [B, O], terminated [B]
Transitions = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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

    Returns:
        obs [B, O], action [B, A], reward [B], next_obs [B, O] and terminated [B].

    Raises:
        ValueError: if the shapes do not fit, or for another backend.
        TypeError: for an `rng` of another kind.
        RuntimeError: if Triton cannot run here.
    """
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
    if use_triton(backend, obs):
        state, stream = (rng.state, rng.stream) if isinstance(rng, PhiloxState) else (rng, -1)
        ring_and_queue = obs, action, reward, terminated, queue, span
        batch: Transitions = replay_gather_op(*ring_and_queue, state, stream, batch_size)
        return batch
    first, size = span.unbind()
    position: Tensor = (
        uniform_positions_op(rng.state, rng.stream, batch_size, size) if not isinstance(rng, Tensor) else rng
    )
    index = queue[(position + first) % len(queue)]
    next_index = (index + ring[1]) % len(queue)
    observations = obs.flatten(0, 1)
    return (
        observations.index_select(0, index),
        action.flatten(0, 1).index_select(0, index),
        reward.flatten().index_select(0, index),
        observations.index_select(0, next_index),
        terminated.flatten().index_select(0, index),
    )


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

    return replay_gather_triton.forward(obs, action, reward, terminated, queue, span, rng, stream, batch_size)


@replay_gather_op.register_fake
def _(obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, *rest: Any) -> Transitions:
    batch_size = rest[-1]
    return (
        obs.new_empty((batch_size, obs.shape[2])),
        action.new_empty((batch_size, action.shape[2])),
        reward.new_empty(batch_size),
        obs.new_empty((batch_size, obs.shape[2])),
        terminated.new_empty(batch_size),
    )
