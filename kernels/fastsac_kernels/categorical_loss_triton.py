"""The Triton kernel for `categorical_loss.py`: projected targets, the loss and its gradient in one launch.

A program goes through some rows of the batch, and in each row through the critics. Nothing is scattered: each atom
collects what comes to it from all masses, in pieces of `BLOCK_J` of them, so that the sums have one order. As the atoms
are equally far from each other, so are their places: (y_j - v_min) / width = (y_0 - v_min) / width + j * gamma.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsac_kernels.launch import as_bytes, check_dtypes, launch, power_of_two
from fastsac_kernels.scale_triton import finish_sum, load_alpha, sum_buffers
from fastsac_kernels.squashed_gaussian_triton import exp


@triton.jit
def _reciprocal(x):
    """1 / x for x in [1, 2^100] to within 1 ulp; a division that is right for all x calls a function."""
    y = 1.0 / x
    return tl.fma(y, tl.fma(-x, y, 1.0), y)


@triton.jit
def _softmax(logits, live):
    """The distribution, its logits' largest, and the sum of the exponentials of their differences to it."""
    top = tl.max(tl.where(live, logits, -float("inf")), 0)
    exponentials = tl.where(live, exp(tl.where(live, logits - top, 0.0)), 0.0)
    total = tl.sum(exponentials, 0)
    return exponentials * _reciprocal(total), top, total


@triton.jit
def _project(logits_ptr, stride, first, step, goes_on, M, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr):
    """The masses of one distribution on the atoms, if that of atom j moves to the place first + j * step."""
    k = tl.arange(0, BLOCK_M)
    logits = tl.load(logits_ptr + k * stride, mask=(k < M) & goes_on, other=0.0).to(tl.float32)
    _, top, total = _softmax(logits, k < M)
    share = _reciprocal(total)
    mass = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)  # neighbouring threads have other j: each exponential is theirs
    for start in range(0, M, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        piece = tl.load(logits_ptr + j * stride, mask=(j < M) & goes_on, other=0.0).to(tl.float32)
        p = tl.where(j < M, exp(tl.where(j < M, piece - top, 0.0)) * share, 0.0)
        place = tl.maximum(first + j.to(tl.float32) * step, 0.0, propagate_nan=tl.PropagateNan.ALL)
        place = tl.minimum(place, (M - 1).to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
        near = 1.0 - tl.abs(place[None, :] - k.to(tl.float32)[:, None])
        mass += p[None, :] * tl.maximum(near, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.sum(mass, 1)


@triton.jit
def _categorical_loss_fwd_kernel(
    logits_ptr,
    stride_logits_e,
    stride_logits_b,
    stride_logits_m,
    next_ptr,
    stride_next_e,
    stride_next_b,
    stride_next_m,
    reward_ptr,
    stride_reward,
    terminated_ptr,
    stride_terminated,
    next_log_prob_ptr,
    stride_next_log_prob,
    alpha,
    gamma,
    stride_gamma,
    loss_ptr,
    partials_ptr,
    ticket_ptr,
    gradient_ptr,
    q_ptr,
    scale,
    v_min,
    width,
    atoms_per_unit,
    B,
    E,
    M,
    ALPHA_IS_TENSOR: tl.constexpr,
    GAMMA_IS_TENSOR: tl.constexpr,
    SMALLEST: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    alpha = load_alpha(alpha, ALPHA_IS_TENSOR)
    stride_logits_m, stride_next_m = tl.cast(stride_logits_m, tl.int64), tl.cast(stride_next_m, tl.int64)
    k = tl.arange(0, BLOCK_M)
    live = k < M
    atom = v_min + width * k.to(tl.float32)
    loss = tl.zeros([BLOCK_M], tl.float32)
    for row in range(tl.program_id(0), B, tl.num_programs(0)):
        b = tl.cast(row, tl.int64)
        reward = tl.load(reward_ptr + b * stride_reward).to(tl.float32)
        goes_on = tl.load(terminated_ptr + b * stride_terminated) == 0
        bonus = alpha * tl.load(next_log_prob_ptr + b * stride_next_log_prob, mask=goes_on, other=0.0).to(tl.float32)
        discount = gamma
        if GAMMA_IS_TENSOR:
            discount = tl.load(gamma + b * stride_gamma).to(tl.float32)
        discount = tl.where(goes_on, discount, 0.0)
        first = (reward + discount * (v_min - bonus) - v_min) * atoms_per_unit
        row_ptr = next_ptr + b * stride_next_b
        mass = tl.zeros([BLOCK_M], tl.float32)
        if SMALLEST:
            lowest = tl.full([], float("inf"), tl.float32)
            chosen = tl.full([], 0, tl.int64)
            for e in range(E):
                critic = tl.cast(e, tl.int64) * stride_next_e
                following = tl.load(row_ptr + critic + k * stride_next_m, mask=live & goes_on, other=0.0)
                mean = tl.sum(tl.where(live, _softmax(following.to(tl.float32), live)[0] * atom, 0.0), 0)
                lower = (mean < lowest) | (mean != mean)  # NaN must be seen
                chosen = tl.where(lower, critic, chosen)
                lowest = tl.where(lower, mean, lowest)
            mass = _project(row_ptr + chosen, stride_next_m, first, discount, goes_on, M, BLOCK_M, BLOCK_J)
        for e in range(E):
            critic = tl.cast(e, tl.int64)
            if not SMALLEST:
                source_ptr = row_ptr + critic * stride_next_e
                mass = _project(source_ptr, stride_next_m, first, discount, goes_on, M, BLOCK_M, BLOCK_J)
            critic_ptr = logits_ptr + critic * stride_logits_e + b * stride_logits_b
            logits = tl.load(critic_ptr + k * stride_logits_m, mask=live, other=0.0).to(tl.float32)
            p, top, total = _softmax(logits, live)
            loss -= tl.where(live, mass * (logits - top - tl.log(total)), 0.0)
            slot = critic * B + b
            tl.store(gradient_ptr + slot * M + k, scale * (p - mass), mask=live)
            tl.store(q_ptr + slot, tl.sum(tl.where(live, p * atom, 0.0), 0))
    finish_sum(tl.sum(loss, 0), loss_ptr, partials_ptr, ticket_ptr, scale, SINGLE)


def forward(
    logits: Tensor,
    next_logits: Tensor,
    reward: Tensor,
    terminated: Tensor,
    next_log_prob: Tensor,
    alpha: Tensor | float,
    gamma: Tensor | float,
    v_min: float,
    v_max: float,
    smallest: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, its gradient for the logits, [E * B * M], and q [E, B], in float32."""
    check_dtypes(logits=logits, next_logits=next_logits, reward=reward, next_log_prob=next_log_prob)
    critics, batch, atoms = logits.shape
    block = power_of_two(atoms)
    warps = 4 if block >= 64 else 1
    gradient = torch.empty(logits.numel(), dtype=torch.float32, device=logits.device)
    q = torch.empty(critics, batch, dtype=torch.float32, device=logits.device)
    programs, loss, partials, ticket = sum_buffers(batch, logits)
    flag = as_bytes(terminated)
    stride_gamma = None
    if isinstance(gamma, Tensor):
        check_dtypes(gamma=gamma)
        stride_gamma = gamma.stride(0)
    launch(
        _categorical_loss_fwd_kernel,
        programs,
        *(logits, *logits.stride()),
        *(next_logits, *next_logits.stride()),
        *(reward, *reward.stride()),
        *(flag, *flag.stride()),
        *(next_log_prob, *next_log_prob.stride()),
        *(alpha, gamma, stride_gamma, loss, partials, ticket, gradient, q),
        *(1.0 / batch, v_min, (v_max - v_min) / (atoms - 1), (atoms - 1) / (v_max - v_min), batch, critics, atoms),
        ALPHA_IS_TENSOR=isinstance(alpha, Tensor),
        GAMMA_IS_TENSOR=isinstance(gamma, Tensor),
        SMALLEST=smallest,
        SINGLE=programs == 1,
        BLOCK_M=block,
        BLOCK_J=max(1, min(block, 16 * 32 * warps // block)),  # 16 numbers of a piece for each thread
        num_warps=warps,
        max_registers=80,  # left alone, the assembler takes 64 and spills two, for more programs at a time
    )
    return loss, gradient, q
