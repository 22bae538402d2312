"""What the losses share: the sum over all programs in one launch, and the backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsac_kernels.launch import launch, new_ticket

#: the most programs that one launch sums over
MAX_PROGRAMS = 1024
_MAX_PROGRAMS: tl.constexpr = tl.constexpr(MAX_PROGRAMS)


@triton.jit
def finish_sum(total, result_ptr, partials_ptr, ticket_ptr, scale, SINGLE: tl.constexpr):
    """Write scale * (the sum of `total` over all programs); the last program to arrive adds them up in their order."""
    if SINGLE:
        tl.store(result_ptr, total * scale)
    else:
        programs = tl.num_programs(0)
        tl.store(partials_ptr + tl.program_id(0), total)
        tl.debug_barrier()
        arrived = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
        if arrived == programs - 1:
            index = tl.arange(0, _MAX_PROGRAMS)
            # from L2, where the others' stores are: this processor's own L1 may hold something older
            partials = tl.load(partials_ptr + index, mask=index < programs, other=0.0, cache_modifier=".cg")
            tl.store(result_ptr, tl.sum(partials, 0) * scale)
            tl.store(ticket_ptr, 0)


@triton.jit
def load_alpha(alpha, IS_TENSOR: tl.constexpr):
    """The temperature from a device tensor or from the launch itself."""
    if IS_TENSOR:
        return tl.load(alpha).to(tl.float32)
    else:
        return alpha


@triton.jit
def _scale_bwd_kernel(gradient_ptr, upstream_ptr, out_ptr, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(gradient_ptr + index, mask=index < size)
    tl.store(out_ptr + index, gradient * tl.load(upstream_ptr).to(tl.float32), mask=index < size)


def backward(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the loss's saved gradient [n] times the gradient of what came out of the loss, a scalar on the device."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    size = gradient.numel()
    block = 256 if size <= 2**18 else 1024
    programs = triton.cdiv(size, block)
    launch(_scale_bwd_kernel, programs, gradient, upstream, out, size, BLOCK=block, num_warps=block // 128)
    return out


def sum_buffers(blocks: int, like: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return how many programs sum over so many blocks, the loss, a scalar, and what `finish_sum` needs beside it."""
    loss = torch.empty((), dtype=torch.float32, device=like.device)
    if blocks == 1:
        return 1, loss, loss, loss
    programs = min(blocks, MAX_PROGRAMS)
    return programs, loss, torch.empty(programs, dtype=torch.float32, device=like.device), new_ticket(like)
