"""The Triton kernel for `score_function_loss.py`: log-probability, advantage, loss and gradients in one launch.

A program owns some states and all their samples. For ``loo``, with h = f - f_0, S = sum_K h and g the sample's score,

    sum_K (f - b) g = (K sum_K h g - S sum_K g) / (K - 1)

(whose divisor is part of `scale`), so one pass over the samples is enough, and no two large numbers are subtracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsac_kernels.launch import check_dtypes, launch, power_of_two, row_block
from fastsac_kernels.pathwise_loss_triton import smallest
from fastsac_kernels.scale_triton import finish_sum, load_alpha, sum_buffers
from fastsac_kernels.squashed_gaussian_triton import (
    HALF_LOG_2PI,
    exp,
    load_tile,
    noise_arguments,
    noise_tile,
    squash,
    store_tile,
)


@triton.jit
def _score_function_loss_fwd_kernel(
    mean_ptr,
    stride_mean_b,
    stride_mean_a,
    log_std_ptr,
    stride_log_std_b,
    stride_log_std_a,
    rng_ptr,
    stride_noise_k,
    stride_noise_b,
    stride_noise_a,
    stream,
    q_ptr,
    stride_q_k,
    stride_q_e,
    stride_q_b,
    alpha,
    baseline_ptr,
    stride_baseline,
    log_prob_ptr,
    stride_log_prob_k,
    stride_log_prob_b,
    loss_ptr,
    partials_ptr,
    ticket_ptr,
    grad_mean_ptr,
    scale,
    K,
    B,
    A,
    HAS_NOISE: tl.constexpr,
    HAS_LOG_PROB: tl.constexpr,
    ALPHA_IS_TENSOR: tl.constexpr,
    BASELINE: tl.constexpr,
    E: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    alpha = load_alpha(alpha, ALPHA_IS_TENSOR)
    grad_log_std_ptr = grad_mean_ptr + tl.cast(B, tl.int64) * A
    total = tl.zeros([BLOCK_B], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_B, B, tl.num_programs(0) * BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        in_batch = b < B
        live = in_batch[:, None] & (tl.arange(0, BLOCK_A)[None, :] < A)
        mean = load_tile(mean_ptr, b, stride_mean_b, stride_mean_a, live, BLOCK_A)
        log_std = load_tile(log_std_ptr, b, stride_log_std_b, stride_log_std_a, live, BLOCK_A)
        sigma = exp(log_std)
        constant = tl.zeros([BLOCK_B], tl.float32)
        if BASELINE == "constant":
            constant -= alpha
        if BASELINE == "tensor":
            offsets = b.to(tl.int64) * stride_baseline
            constant += tl.load(baseline_ptr + offsets, mask=in_batch, other=0.0).to(tl.float32)
        sum_h = tl.zeros([BLOCK_B], tl.float32)
        sum_log_normal = tl.zeros([BLOCK_B], tl.float32)
        sum_h_log_normal = tl.zeros([BLOCK_B], tl.float32)
        sum_mean = tl.zeros([BLOCK_B, BLOCK_A], tl.float32)
        sum_log_std = tl.zeros([BLOCK_B, BLOCK_A], tl.float32)
        sum_h_mean = tl.zeros([BLOCK_B, BLOCK_A], tl.float32)
        sum_h_log_std = tl.zeros([BLOCK_B, BLOCK_A], tl.float32)
        for k in range(K):
            eps = noise_tile(
                rng_ptr, stride_noise_k, stride_noise_b, stride_noise_a, stream, k, b, B, live, HAS_NOISE, BLOCK_A
            )
            score = eps * eps - 1.0
            log_normal = tl.sum(tl.where(live, -0.5 * eps * eps - log_std - HALF_LOG_2PI, 0.0), 1)
            if HAS_LOG_PROB:
                offsets = tl.cast(k, tl.int64) * stride_log_prob_k + b.to(tl.int64) * stride_log_prob_b
                log_prob = tl.load(log_prob_ptr + offsets, mask=in_batch, other=0.0).to(tl.float32)
            else:
                log_slope = squash(mean + sigma * eps)[2]
                log_prob = log_normal - tl.sum(tl.where(live, log_slope, 0.0), 1)
            sample_ptr = q_ptr + tl.cast(k, tl.int64) * stride_q_k + b.to(tl.int64) * stride_q_b
            lowest = smallest(sample_ptr, stride_q_e, in_batch, E)[0]
            f = alpha * log_prob - lowest
            if BASELINE == "loo":
                constant = tl.where(k == 0, f, constant)
                sum_h += f - constant
                sum_log_normal += log_normal
                sum_mean += eps
                sum_log_std += score
            h = f - constant
            sum_h_log_normal += h * log_normal
            sum_h_mean += h[:, None] * eps
            sum_h_log_std += h[:, None] * score
        if BASELINE == "loo":
            sum_h_log_normal = K * sum_h_log_normal - sum_h * sum_log_normal
            sum_h_mean = K * sum_h_mean - sum_h[:, None] * sum_mean
            sum_h_log_std = K * sum_h_log_std - sum_h[:, None] * sum_log_std
        total += tl.where(in_batch, sum_h_log_normal, 0.0)
        store_tile(grad_mean_ptr, b, A, tl.div_rn(scale * sum_h_mean, sigma), live, BLOCK_A)
        store_tile(grad_log_std_ptr, b, A, scale * sum_h_log_std, live, BLOCK_A)
    finish_sum(tl.sum(total, 0), loss_ptr, partials_ptr, ticket_ptr, scale, SINGLE)


def forward(
    mean: Tensor,
    log_std: Tensor,
    rng: Tensor,
    stream: int,
    q: Tensor,
    alpha: Tensor | float,
    baseline: str,
    baseline_value: Tensor | None,
    log_prob: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradients in one tensor: that of mean [B, A], then that of log_std."""
    check_dtypes(mean=mean, log_std=log_std, q=q, **({} if log_prob is None else {"log_prob": log_prob}))
    (batch, size), (num_samples, critics) = mean.shape, q.shape[:2]
    block_a = max(4, power_of_two(size))
    block_b, num_warps = row_block(batch, block_a // 4, mean.device)
    # one program has nothing to wait for, which is worth about so much work on one of the GPU's many processors
    if num_samples * batch * block_a // 4 <= 1024:
        block_b = power_of_two(batch)
        num_warps = min(8, max(1, block_b * block_a // 128))
    gradient = torch.empty(2 * batch * size, dtype=torch.float32, device=mean.device)
    programs, loss, partials, ticket = sum_buffers(triton.cdiv(batch, block_b), mean)
    scale = 1.0 / (num_samples * batch * (num_samples - 1 if baseline == "loo" else 1))
    launch(
        _score_function_loss_fwd_kernel,
        programs,
        *(mean, *mean.stride()),
        *(log_std, *log_std.stride()),
        *noise_arguments(rng, stream),
        *(q, *q.stride()),
        alpha,
        *((loss, 0) if baseline_value is None else (baseline_value, *baseline_value.stride())),
        *((loss, 0, 0) if log_prob is None else (log_prob, *log_prob.stride())),
        *(loss, partials, ticket, gradient, scale, num_samples, batch, size),
        HAS_NOISE=rng.dim() == 3,
        HAS_LOG_PROB=log_prob is not None,
        ALPHA_IS_TENSOR=isinstance(alpha, Tensor),
        BASELINE=baseline,
        E=critics,
        SINGLE=programs == 1,
        BLOCK_B=block_b,
        BLOCK_A=block_a,
        num_warps=num_warps,
    )
    return loss, gradient
