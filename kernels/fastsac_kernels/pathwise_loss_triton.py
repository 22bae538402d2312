"""The Triton kernel for `pathwise_loss.py`: the loss and both gradients in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsac_kernels.launch import check_dtypes, element_block, launch
from fastsac_kernels.scale_triton import finish_sum, load_alpha, sum_buffers


@triton.jit
def smallest(q_ptr, stride_e, live, E: tl.constexpr):
    """The smallest of the E critics, NaN if one of them is, and how many share that place."""
    lowest = tl.load(q_ptr, mask=live, other=0.0).to(tl.float32)
    ties = tl.where(live, 1.0, 1.0)  # ones of q's shape, which is a pointer's here
    for e in tl.static_range(1, E):
        q = tl.load(q_ptr + tl.cast(stride_e, tl.int64) * e, mask=live, other=0.0).to(tl.float32)
        ties = tl.where(q < lowest, 1.0, tl.where(q == lowest, ties + 1.0, ties))
        lowest = tl.minimum(lowest, q, propagate_nan=tl.PropagateNan.ALL)
    return lowest, ties


@triton.jit
def _pathwise_loss_fwd_kernel(
    log_prob_ptr,
    stride_log_prob_k,
    stride_log_prob_b,
    q_ptr,
    stride_q_k,
    stride_q_e,
    stride_q_b,
    alpha,
    loss_ptr,
    partials_ptr,
    ticket_ptr,
    gradient_ptr,
    scale,
    size,
    B,
    ALPHA_IS_TENSOR: tl.constexpr,
    E: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    alpha = load_alpha(alpha, ALPHA_IS_TENSOR)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        live = index < size
        k, b = (index // B).to(tl.int64), (index % B).to(tl.int64)
        offsets = k * stride_log_prob_k + b * stride_log_prob_b
        log_prob = tl.load(log_prob_ptr + offsets, mask=live, other=0.0).to(tl.float32)
        sample_ptr = q_ptr + k * stride_q_k + b * stride_q_b
        lowest, ties = smallest(sample_ptr, stride_q_e, live, E)
        total += tl.where(live, alpha * log_prob - lowest, 0.0)
        share = tl.where(lowest == lowest, -scale / ties, lowest)  # as in autograd: equal critics share, NaN stays NaN
        for e in tl.static_range(E):
            q = tl.load(sample_ptr + tl.cast(stride_q_e, tl.int64) * e, mask=live, other=0.0).to(tl.float32)
            tl.store(
                gradient_ptr + e * tl.cast(size, tl.int64) + index,
                tl.where((q == lowest) | (share != share), share, 0.0),
                mask=live,
            )
        tl.store(gradient_ptr + E * tl.cast(size, tl.int64) + index, tl.where(live, alpha * scale, 0.0), mask=live)
    finish_sum(tl.sum(total, 0), loss_ptr, partials_ptr, ticket_ptr, scale, SINGLE)


def forward(log_prob: Tensor, q: Tensor, alpha: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradients in one tensor: that of q as [E, K, B], then that of log_prob as [K, B]."""
    check_dtypes(log_prob=log_prob, q=q)
    num_samples, critics, batch = q.shape
    size = num_samples * batch
    block, num_warps = element_block(size)
    gradient = torch.empty((critics + 1) * size, dtype=torch.float32, device=q.device)
    programs, loss, partials, ticket = sum_buffers(triton.cdiv(size, block), q)
    launch(
        _pathwise_loss_fwd_kernel,
        programs,
        *(log_prob, *log_prob.stride()),
        *(q, *q.stride()),
        *(alpha, loss, partials, ticket, gradient, 1.0 / size, size, batch),
        ALPHA_IS_TENSOR=isinstance(alpha, Tensor),
        E=critics,
        SINGLE=programs == 1,
        BLOCK=block,
        num_warps=num_warps,
    )
    return loss, gradient
