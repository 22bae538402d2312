"""The Triton kernel for `td_loss.py`: the soft target, the loss and its gradient in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsac_kernels.launch import as_bytes, check_dtypes, element_block, launch
from fastsac_kernels.pathwise_loss_triton import smallest
from fastsac_kernels.scale_triton import finish_sum, load_alpha, sum_buffers


@triton.jit
def _td_loss_fwd_kernel(
    q_ptr,
    stride_q_e,
    stride_q_b,
    reward_ptr,
    stride_reward,
    terminated_ptr,
    stride_terminated,
    next_q_ptr,
    stride_next_q_e,
    stride_next_q_b,
    next_log_prob_ptr,
    stride_next_log_prob,
    alpha,
    gamma,
    stride_gamma,
    loss_ptr,
    partials_ptr,
    ticket_ptr,
    gradient_ptr,
    scale,
    B,
    ALPHA_IS_TENSOR: tl.constexpr,
    GAMMA_IS_TENSOR: tl.constexpr,
    E: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    alpha = load_alpha(alpha, ALPHA_IS_TENSOR)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, B, tl.num_programs(0) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        live = index < B
        b = index.to(tl.int64)
        reward = tl.load(reward_ptr + b * stride_reward, mask=live, other=0.0).to(tl.float32)
        terminated = tl.load(terminated_ptr + b * stride_terminated, mask=live, other=0)
        log_prob = tl.load(next_log_prob_ptr + b * stride_next_log_prob, mask=live, other=0.0).to(tl.float32)
        lowest = smallest(next_q_ptr + b * stride_next_q_b, stride_next_q_e, live, E)[0]
        discount = gamma
        if GAMMA_IS_TENSOR:
            discount = tl.load(gamma + b * stride_gamma, mask=live, other=0.0).to(tl.float32)
        target = reward + discount * tl.where(terminated != 0, 0.0, lowest - alpha * log_prob)
        for e in tl.static_range(E):
            q = tl.load(q_ptr + tl.cast(stride_q_e, tl.int64) * e + b * stride_q_b, mask=live, other=0.0).to(tl.float32)
            error = tl.where(live, q - target, 0.0)
            total += error * error
            tl.store(gradient_ptr + e * tl.cast(B, tl.int64) + b, 2.0 * scale * error, mask=live)
    finish_sum(tl.sum(total, 0), loss_ptr, partials_ptr, ticket_ptr, scale, SINGLE)


def forward(
    q: Tensor,
    reward: Tensor,
    terminated: Tensor,
    next_q: Tensor,
    next_log_prob: Tensor,
    alpha: Tensor | float,
    gamma: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradient for q, [E * B] in float32."""
    check_dtypes(q=q, reward=reward, next_q=next_q, next_log_prob=next_log_prob)
    critics, batch = q.shape
    block, num_warps = element_block(batch)
    gradient = torch.empty(critics * batch, dtype=torch.float32, device=q.device)
    programs, loss, partials, ticket = sum_buffers(triton.cdiv(batch, block), q)
    flag = as_bytes(terminated)
    stride_gamma = None
    if isinstance(gamma, Tensor):
        check_dtypes(gamma=gamma)
        stride_gamma = gamma.stride(0)
    launch(
        _td_loss_fwd_kernel,
        programs,
        *(q, *q.stride()),
        *(reward, *reward.stride()),
        *(flag, *flag.stride()),
        *(next_q, *next_q.stride()),
        *(next_log_prob, *next_log_prob.stride()),
        *(alpha, gamma, stride_gamma, loss, partials, ticket, gradient, 1.0 / batch, batch),
        ALPHA_IS_TENSOR=isinstance(alpha, Tensor),
        GAMMA_IS_TENSOR=isinstance(gamma, Tensor),
        E=critics,
        SINGLE=programs == 1,
        BLOCK=block,
        num_warps=num_warps,
    )
    return loss, gradient
