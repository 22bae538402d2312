"""The Triton kernel for `categorical_loss.py`: projected targets, the loss and its gradient in one launch.

A program goes through some rows of the batch, and in each row through the critics. Nothing is scattered: each atom
collects what comes to it from all masses, in pieces of `BLOCK_J` of them, so that the sums have one order.
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
def _softmax(logits, live):
    """The distribution, its logits' largest, and the sum of the exponentials of their differences to it."""
    top = tl.max(tl.where(live, logits, -float("inf")), 0)
    exponentials = tl.where(live, exp(tl.where(live, logits - top, 0.0)), 0.0)
    total = tl.sum(exponentials, 0)
    return tl.div_rn(exponentials, total), top, total


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
    B,
    M,
    ALPHA_IS_TENSOR: tl.constexpr,
    GAMMA_IS_TENSOR: tl.constexpr,
    SMALLEST: tl.constexpr,
    E: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    alpha = load_alpha(alpha, ALPHA_IS_TENSOR)
    k = tl.arange(0, BLOCK_M)
    live = k < M
    atom = v_min + width * k.to(tl.float32)
    loss = tl.zeros([BLOCK_M], tl.float32)
    for row in range(tl.program_id(0), B, tl.num_programs(0)):
        b = tl.cast(row, tl.int64)
        reward = tl.load(reward_ptr + b * stride_reward).to(tl.float32)
        terminated = tl.load(terminated_ptr + b * stride_terminated)
        bonus = alpha * tl.load(next_log_prob_ptr + b * stride_next_log_prob).to(tl.float32)
        discount = gamma
        if GAMMA_IS_TENSOR:
            discount = tl.load(gamma + b * stride_gamma).to(tl.float32)
        discount = tl.where(terminated != 0, 0.0, discount)
        source_ptr = next_ptr + b * stride_next_b
        if SMALLEST:
            lowest = tl.full([], float("inf"), tl.float32)
            chosen_ptr = source_ptr
            for e in tl.static_range(E):
                critic_ptr = source_ptr + tl.cast(stride_next_e, tl.int64) * e
                following = tl.load(critic_ptr + k * stride_next_m, mask=live, other=0.0).to(tl.float32)
                mean = tl.sum(tl.where(live, _softmax(following, live)[0] * atom, 0.0), 0)
                chosen_ptr = tl.where(mean < lowest, critic_ptr, chosen_ptr)
                lowest = tl.minimum(mean, lowest)
            source_ptr = chosen_ptr
        mass = tl.zeros([BLOCK_M], tl.float32)
        for e in tl.static_range(E):
            if not SMALLEST or e == 0:
                following = tl.load(source_ptr + k * stride_next_m, mask=live, other=0.0).to(tl.float32)
                _, top, total = _softmax(following, live)
                mass = tl.zeros([BLOCK_M], tl.float32)
                for start in range(0, M, BLOCK_J):
                    j = start + tl.arange(0, BLOCK_J)
                    piece = tl.load(source_ptr + j * stride_next_m, mask=j < M, other=top).to(tl.float32)
                    p = tl.where(j < M, tl.div_rn(exp(piece - top), total), 0.0)
                    value = reward + discount * (v_min + width * j.to(tl.float32) - bonus)
                    place = tl.minimum(tl.maximum(tl.div_rn(value - v_min, width), 0.0), (M - 1).to(tl.float32))
                    share = tl.maximum(1.0 - tl.abs(place[:, None] - k.to(tl.float32)[None, :]), 0.0)
                    mass += tl.sum(p[:, None] * share, 0)
            critic_ptr = logits_ptr + tl.cast(stride_logits_e, tl.int64) * e + b * stride_logits_b
            logits = tl.load(critic_ptr + k * stride_logits_m, mask=live, other=0.0).to(tl.float32)
            p, top, total = _softmax(logits, live)
            loss -= tl.where(live, mass * (logits - top - tl.log(total)), 0.0)
            place = e * tl.cast(B, tl.int64) + b
            tl.store(gradient_ptr + place * M + k, scale * (p - mass), mask=live)
            tl.store(q_ptr + place, tl.sum(tl.where(live, p * atom, 0.0), 0))
            source_ptr += tl.cast(stride_next_e, tl.int64)
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
    block, interpreted = power_of_two(atoms), logits.device.type != "cuda"
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
        *(1.0 / batch, v_min, (v_max - v_min) / (atoms - 1), batch, atoms),
        ALPHA_IS_TENSOR=isinstance(alpha, Tensor),
        GAMMA_IS_TENSOR=isinstance(gamma, Tensor),
        SMALLEST=smallest,
        E=critics,
        SINGLE=programs == 1,
        BLOCK_M=block,
        BLOCK_J=block if interpreted else min(block, 8),
        num_warps=max(1, min(8, block // 128)),
    )
    return loss, gradient, q
