"""The Triton kernel for `replay_gather.py`: indices drawn, transitions copied, in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsac_kernels.launch import as_bytes, check_dtypes, launch, power_of_two, row_block
from fastsac_kernels.philox_triton import words


@triton.jit
def copy_rows(from_ptr, from_row, to_ptr, to_row, size, column, live):
    """Copy some columns of rows of `size`."""
    inside = live[:, None] & (column < size)[None, :]
    values = tl.load(from_ptr + (from_row * size)[:, None] + column[None, :], mask=inside)
    tl.store(to_ptr + (to_row * size)[:, None] + column[None, :], values, mask=inside)


@triton.jit
def next_row(index, N, length):
    """The same environment's place in the row after."""
    return tl.where(index + N >= length, index + N - length, index + N)


@triton.jit
def uniform_position(rng_ptr, stream, b, size):
    """A whole number below `size` for each row: the high 64 bits of size times 64 random ones."""
    low, high, _, _ = words(rng_ptr, stream, b, b * 0)
    return (high.to(tl.int64) * size + ((low.to(tl.int64) * size >> 32) & 0xFFFFFFFF)) >> 32


@triton.jit
def queued(queue_ptr, first, position, live, length):
    """The index in the ring at so many places behind the queue's first entry."""
    slot = first + position
    return tl.load(queue_ptr + tl.where(slot >= length, slot - length, slot), mask=live, other=0)


@triton.jit
def _replay_gather_fwd_kernel(
    obs_ptr,
    action_ptr,
    reward_ptr,
    terminated_ptr,
    queue_ptr,
    span_ptr,
    rng_ptr,
    stream,
    valid_ptr,
    gamma,
    out_obs_ptr,
    out_action_ptr,
    out_reward_ptr,
    out_next_obs_ptr,
    out_terminated_ptr,
    out_discount_ptr,
    length,
    N,
    B,
    obs_size,
    action_size,
    N_STEP: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < B
    first = tl.load(span_ptr)
    if HAS_POSITIONS:
        position = tl.load(rng_ptr + b, mask=live, other=0)
    else:
        size = tl.load(span_ptr + 1)
        position = uniform_position(rng_ptr, stream, b, size)
    index = queued(queue_ptr, first, position, live, length)
    last = index
    if N_STEP > 1:  # what the loads read is known beforehand: none waits for another
        total = tl.load(reward_ptr + index, mask=live, other=0.0).to(tl.float32)
        discount = tl.zeros([BLOCK_B], tl.float32) + gamma
        here, going = index, live
        for _ in range(1, N_STEP):
            ended = tl.load(terminated_ptr + here, mask=live, other=1)
            here = next_row(here, N, length)
            going = going & (ended == 0) & (tl.load(valid_ptr + here, mask=live, other=0) != 0)
            last = tl.where(going, here, last)
            reward = tl.load(reward_ptr + here, mask=live, other=0.0).to(tl.float32)
            total += tl.where(going, discount * reward, 0.0)
            discount = tl.where(going, discount * gamma, discount)
    following = next_row(last, N, length)
    row = b.to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    copy_rows(obs_ptr, index, out_obs_ptr, row, obs_size, column, live)
    copy_rows(obs_ptr, following, out_next_obs_ptr, row, obs_size, column, live)
    copy_rows(action_ptr, index, out_action_ptr, row, action_size, column, live)
    if tl.program_id(1) == 0:
        if N_STEP > 1:
            tl.store(out_reward_ptr + b, total, mask=live)
            tl.store(out_discount_ptr + b, discount, mask=live)
        else:
            tl.store(out_reward_ptr + b, tl.load(reward_ptr + index, mask=live), mask=live)
        tl.store(out_terminated_ptr + b, tl.load(terminated_ptr + last, mask=live), mask=live)


def forward(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    queue: Tensor,
    span: Tensor,
    rng: Tensor,
    stream: int,
    batch_size: int,
    valid: Tensor | None = None,
    n_step: int = 1,
    gamma: float | None = None,
) -> Any:
    """Return obs, action, reward, next_obs and terminated of `batch_size` transitions; for n steps discount, too."""
    ring = {"obs": obs, "action": action, "reward": reward, "terminated": terminated}
    if valid is not None:
        check_dtypes(reward=reward)
        ring["valid"] = valid
    for name, part in ring.items():
        if not part.is_contiguous():
            raise ValueError(f"the ring must be contiguous, {name} is not")
    (_, num_envs, obs_size), action_size = obs.shape, action.shape[2]
    device = obs.device
    out_obs = torch.empty((batch_size, obs_size), dtype=obs.dtype, device=device)
    out_action = torch.empty((batch_size, action_size), dtype=action.dtype, device=device)
    out_reward = torch.empty(batch_size, dtype=reward.dtype if valid is None else torch.float32, device=device)
    out_next_obs = torch.empty((batch_size, obs_size), dtype=obs.dtype, device=device)
    out_terminated = torch.empty(batch_size, dtype=terminated.dtype, device=device)
    out_discount = None if valid is None else torch.empty(batch_size, dtype=torch.float32, device=device)
    columns = max(obs_size, action_size)
    block_c = min(128, power_of_two(columns))
    block_b, num_warps = row_block(batch_size, block_c // 4 or 1, device)
    launch(
        _replay_gather_fwd_kernel,
        (triton.cdiv(batch_size, block_b), triton.cdiv(columns, block_c)),
        *(obs, action, reward, as_bytes(terminated), queue.contiguous(), span.contiguous(), rng.contiguous(), stream),
        *(None if valid is None else as_bytes(valid), gamma),
        *(out_obs, out_action, out_reward, out_next_obs, as_bytes(out_terminated), out_discount),
        *(len(queue), num_envs, batch_size, obs_size, action_size),
        N_STEP=n_step,
        HAS_POSITIONS=stream < 0,
        BLOCK_B=block_b,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    batch = out_obs, out_action, out_reward, out_next_obs, out_terminated
    return batch if out_discount is None else (*batch, out_discount)
