"""Philox inside Triton kernels: the numbers of `philox.py`, bit for bit.

Kernels that call these functions must be launched with ``enable_fp_fusion=False``: a product and a sum contracted to
one instruction round once instead of twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsac_kernels import philox

_LN2_HIGH: tl.constexpr = tl.constexpr(philox.LN2_HIGH)
_LN2_LOW: tl.constexpr = tl.constexpr(philox.LN2_LOW)
_SQRT_HALF_BITS: tl.constexpr = tl.constexpr(philox.SQRT_HALF_BITS)
_EIGHTH_TURN: tl.constexpr = tl.constexpr(philox.EIGHTH_TURN)
_LOG: tl.constexpr = tl.constexpr(philox.LOG)
_SIN: tl.constexpr = tl.constexpr(philox.SIN)
_COS: tl.constexpr = tl.constexpr(philox.COS)


@triton.jit
def polynomial(x, coefficients: tl.constexpr, NUMBER: tl.constexpr):
    """Evaluate by Horner's rule, the highest power's coefficient first."""
    value = x * coefficients[0] + coefficients[1]
    for i in tl.static_range(2, NUMBER):
        value = value * x + coefficients[i]
    return value


@triton.jit
def log_1p(f, exponent):
    """log((1 + f) * 2^exponent), for f between sqrt(1/2) - 1 and sqrt(2) - 1 and a whole number as a float."""
    square = f * f
    tail = polynomial(f, _LOG, 9) * f * square + exponent * _LN2_LOW - square * 0.5
    return f + tail + exponent * _LN2_HIGH


@triton.jit
def box_muller(first, second):
    """Two normal numbers for two uint32 words."""
    uniform = first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32 and 2^-33
    bits = uniform.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    radius = tl.sqrt_rn(log_1p(f, exponent.to(tl.float32)) * -2.0)

    t = ((second & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * _EIGHTH_TURN
    square = t * t
    sin = polynomial(square, _SIN, 3) * square * t + t
    cos = polynomial(square, _COS, 3) * square * square - square * 0.5 + 1.0
    quarter = second >> 30
    odd = (quarter & 1) == 1
    x, y = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    x = tl.where((quarter == 1) | (quarter == 2), -x, x)
    y = tl.where(quarter >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def words(state_ptr, stream, row, column_block):
    """The four uint32 words of each (row, column block), int32 tensors of one shape."""
    seed = tl.load(state_ptr)
    offset = tl.load(state_ptr + 1)
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = (((offset >> 32) & 0xFFFF) | (stream << 16)).to(tl.uint32)
    zero = (row * 0).to(tl.uint32)
    return tl.philox(seed, row.to(tl.uint32), column_block.to(tl.uint32), low + zero, high + zero)


@triton.jit
def normal_tile(state_ptr, stream, row, BLOCK_A: tl.constexpr):
    """Normal numbers [rows, BLOCK_A] for the rows [rows]; BLOCK_A is a power of two, 4 at least."""
    rows: tl.constexpr = row.shape[0]
    blocks: tl.constexpr = BLOCK_A // 4
    c0 = tl.broadcast_to(row[:, None], rows, blocks)
    c1 = tl.broadcast_to(tl.arange(0, blocks)[None, :], rows, blocks)
    w0, w1, w2, w3 = words(state_ptr, stream, c0, c1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (rows, BLOCK_A))
