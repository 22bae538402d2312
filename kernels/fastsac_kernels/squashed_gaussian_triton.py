"""Triton kernels for `squashed_gaussian.py`: one launch forward, one backward, in which the noise is drawn again.

A program owns some rows and all their columns. A row of the forward pass is a sample of a state (row k * B + b); a row
of the backward pass is a state, whose samples are summed in their order, so the result repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsac_kernels.launch import check_dtypes, launch, power_of_two, row_block
from fastsac_kernels.philox_triton import normal_tile

_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
#: log 2 in two parts: whole numbers below 2^15 times the first one are exact
_LN2_HIGH: tl.constexpr = tl.constexpr(0.693359375)
_LN2_LOW: tl.constexpr = tl.constexpr(-2.12194440e-4)
#: adding 1.5 * 2^23 rounds to a whole number
_ROUNDING: tl.constexpr = tl.constexpr(12582912.0)
_ROUNDING_BITS: tl.constexpr = tl.constexpr(0x4B400000)
#: e^r = 1 + r + r^2 P(r), for |r| up to log(2) / 2 (Cephes)
_EXP: tl.constexpr = tl.constexpr(
    (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
HALF_LOG_2PI: tl.constexpr = tl.constexpr(0.9189385332046727)
#: tanh(x) = x + x^3 P(x^2), for |x| below 0.625 (Cephes)
_TANH: tl.constexpr = tl.constexpr(
    (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
)
#: log(1 + e) = e P(e), for e from 0 to 1 (Chebyshev's nodes, degree 8: 1.3e-7)
_LOG_1P: tl.constexpr = tl.constexpr(
    (
        5.253458e-3,
        -2.9588507e-2,
        7.836167e-2,
        -1.367477e-1,
        1.911143e-1,
        -2.484437e-1,
        3.331927e-1,
        -4.9999502e-1,
        1.0,
    )
)


@triton.jit
def horner(x, coefficients: tl.constexpr, NUMBER: tl.constexpr):
    """A polynomial, the highest power's coefficient first, with one rounding a step."""
    value = tl.fma(x, coefficients[0], coefficients[1])
    for i in tl.static_range(2, NUMBER):
        value = tl.fma(value, x, coefficients[i])
    return value


@triton.jit
def exp(x):
    """The exponential function to within 1 ulp: x = n log 2 + r, and e^r by a polynomial (Cephes).

    The chip's own power of two (``ex2.approx.ftz.f32``) is off by up to 2 ulp, which is too much for sigma.
    """
    x = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))  # beyond them infinity and 0; NaN stays
    shifted = x * _LOG2_E + _ROUNDING  # its last bits are the nearest whole number n
    n = shifted - _ROUNDING
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    value = horner(r, _EXP, 6) * (r * r) + r + 1.0
    power = shifted.to(tl.int32, bitcast=True) - _ROUNDING_BITS
    half = power >> 1  # 2^n need not be a float32: in two steps
    return value * power_of_two_of(half) * power_of_two_of(power - half)


@triton.jit
def power_of_two_of(n):
    """2^n for whole numbers from -126 to 127, by the exponent's bits."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def squash(u):
    """Tanh(u), its derivative 1 - tanh(u)^2, and that one's logarithm; accurate for every u."""
    magnitude = tl.abs(u)
    e = tl.exp2(magnitude * (-2.0 * _LOG2_E))
    inverse = 1.0 / (1.0 + e)
    square = magnitude * magnitude
    small = tl.fma(horner(square, _TANH, 5) * square, magnitude, magnitude)  # 1 - e would cancel
    action = tl.where(magnitude < 0.625, small, (1.0 - e) * inverse)
    log_slope = 2.0 * (_LN2 - magnitude - horner(e, _LOG_1P, 9) * e)
    return tl.where(u < 0.0, -action, action), 4.0 * e * inverse * inverse, log_slope


@triton.jit
def load_tile(pointer, row, stride_row, stride_column, live, BLOCK_A: tl.constexpr):
    """The rows' columns in float32; zero where not live."""
    offsets = (row.to(tl.int64) * stride_row)[:, None] + tl.arange(0, BLOCK_A).to(tl.int64)[None, :] * stride_column
    return tl.load(pointer + offsets, mask=live, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, row, A, value, live, BLOCK_A: tl.constexpr):
    """Write the live columns of the rows of a contiguous [rows, A]."""
    tl.store(pointer + (row.to(tl.int64) * A)[:, None] + tl.arange(0, BLOCK_A)[None, :], value, mask=live)


@triton.jit
def noise_tile(
    rng_ptr, stride_k, stride_b, stride_a, stream, k, b, B, live, HAS_NOISE: tl.constexpr, BLOCK_A: tl.constexpr
):
    """The noise of sample k of the states b: loaded, or drawn."""
    if HAS_NOISE:
        offsets = (tl.cast(k, tl.int64) * stride_k + b.to(tl.int64) * stride_b)[:, None]
        offsets += tl.arange(0, BLOCK_A).to(tl.int64)[None, :] * stride_a
        return tl.load(rng_ptr + offsets, mask=live, other=0.0).to(tl.float32)
    else:
        return normal_tile(rng_ptr, stream, k * B + b, BLOCK_A)


@triton.jit
def _squashed_gaussian_fwd_kernel(
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
    action_ptr,
    log_prob_ptr,
    blocks,
    B,
    A,
    HAS_NOISE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    k = tl.program_id(0) // blocks  # one dimension: the others end at 65,535 programs
    b = tl.program_id(0) % blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    in_batch = b < B
    live = in_batch[:, None] & (tl.arange(0, BLOCK_A)[None, :] < A)
    mean = load_tile(mean_ptr, b, stride_mean_b, stride_mean_a, live, BLOCK_A)
    log_std = load_tile(log_std_ptr, b, stride_log_std_b, stride_log_std_a, live, BLOCK_A)
    eps = noise_tile(rng_ptr, stride_noise_k, stride_noise_b, stride_noise_a, stream, k, b, B, live, HAS_NOISE, BLOCK_A)
    sigma = exp(log_std)
    squashed = squash(mean + sigma * eps)
    log_prob = -0.5 * eps * eps - log_std - HALF_LOG_2PI - squashed[2]
    row = tl.cast(k, tl.int64) * B + b
    store_tile(action_ptr, row, A, squashed[0], live, BLOCK_A)
    tl.store(log_prob_ptr + row, tl.sum(tl.where(live, log_prob, 0.0), 1), mask=in_batch)


@triton.jit
def _squashed_gaussian_bwd_kernel(
    grad_action_ptr,
    stride_grad_action_k,
    stride_grad_action_b,
    stride_grad_action_a,
    grad_log_prob_ptr,
    stride_grad_log_prob_k,
    stride_grad_log_prob_b,
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
    grad_mean_ptr,
    grad_log_std_ptr,
    K,
    B,
    A,
    HAS_NOISE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_batch = b < B
    live = in_batch[:, None] & (tl.arange(0, BLOCK_A)[None, :] < A)
    mean = load_tile(mean_ptr, b, stride_mean_b, stride_mean_a, live, BLOCK_A)
    sigma = exp(load_tile(log_std_ptr, b, stride_log_std_b, stride_log_std_a, live, BLOCK_A))
    grad_mean = tl.zeros([BLOCK_B, BLOCK_A], tl.float32)
    grad_log_std = tl.zeros([BLOCK_B, BLOCK_A], tl.float32)
    for k in range(K):
        eps = noise_tile(
            rng_ptr, stride_noise_k, stride_noise_b, stride_noise_a, stream, k, b, B, live, HAS_NOISE, BLOCK_A
        )
        scaled = sigma * eps
        squashed = squash(mean + scaled)
        sample_ptr = grad_action_ptr + tl.cast(k, tl.int64) * stride_grad_action_k
        grad_action = load_tile(sample_ptr, b, stride_grad_action_b, stride_grad_action_a, live, BLOCK_A)
        offsets = tl.cast(k, tl.int64) * stride_grad_log_prob_k + b.to(tl.int64) * stride_grad_log_prob_b
        grad_log_prob = tl.load(grad_log_prob_ptr + offsets, mask=in_batch, other=0.0).to(tl.float32)[:, None]
        grad_u = grad_action * squashed[1] + grad_log_prob * (2.0 * squashed[0])
        grad_mean += grad_u
        grad_log_std += grad_u * scaled - grad_log_prob
    store_tile(grad_mean_ptr, b, A, grad_mean, live, BLOCK_A)
    store_tile(grad_log_std_ptr, b, A, grad_log_std, live, BLOCK_A)


def noise_arguments(rng: Tensor, stream: int) -> tuple[Tensor, int, int, int, int]:
    """The kernel's arguments for a generator's state [2], or for noise [K, B, A]."""
    stride_k, stride_b, stride_a = rng.stride() if rng.dim() == 3 else (0, 0, 0)
    return rng, stride_k, stride_b, stride_a, stream


def forward(mean: Tensor, log_std: Tensor, rng: Tensor, stream: int, num_samples: int) -> tuple[Tensor, Tensor]:
    """Return action [K, B, A] in the dtype of `mean`, and log_prob [K, B] in float32."""
    check_dtypes(mean=mean, log_std=log_std)
    batch, size = mean.shape
    action = torch.empty((num_samples, batch, size), dtype=mean.dtype, device=mean.device)
    log_prob = torch.empty((num_samples, batch), dtype=torch.float32, device=mean.device)
    block_a = max(4, power_of_two(size))
    block_b, num_warps = row_block(num_samples * batch, block_a // 4, mean.device)
    blocks = triton.cdiv(batch, block_b)
    launch(
        _squashed_gaussian_fwd_kernel,
        blocks * num_samples,
        *(mean, *mean.stride()),
        *(log_std, *log_std.stride()),
        *noise_arguments(rng, stream),
        *(action, log_prob, blocks, batch, size),
        HAS_NOISE=rng.dim() == 3,
        BLOCK_B=block_b,
        BLOCK_A=block_a,
        num_warps=num_warps,
    )
    return action, log_prob


def backward(
    grad_action: Tensor, grad_log_prob: Tensor, mean: Tensor, log_std: Tensor, rng: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients [B, A] of mean and log_std, in their dtypes."""
    num_samples, batch, size = grad_action.shape
    grad_mean = torch.empty((batch, size), dtype=mean.dtype, device=mean.device)
    grad_log_std = torch.empty((batch, size), dtype=log_std.dtype, device=mean.device)
    block_a = max(4, power_of_two(size))
    block_b, num_warps = row_block(batch, block_a // 4, mean.device)
    launch(
        _squashed_gaussian_bwd_kernel,
        triton.cdiv(batch, block_b),
        *(grad_action, *grad_action.stride()),
        *(grad_log_prob, *grad_log_prob.stride()),
        *(mean, *mean.stride()),
        *(log_std, *log_std.stride()),
        *noise_arguments(rng, stream),
        *(grad_mean, grad_log_std, num_samples, batch, size),
        HAS_NOISE=rng.dim() == 3,
        BLOCK_B=block_b,
        BLOCK_A=block_a,
        num_warps=num_warps,
    )
    return grad_mean, grad_log_std
