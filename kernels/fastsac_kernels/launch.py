"""Chooses the backend of a call, and launches every Triton kernel of this package."""

from __future__ import annotations

import importlib.util
import threading
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "triton"]
#: macOS and Windows have none of its wheels
HAS_TRITON = importlib.util.find_spec("triton") is not None
NO_TRITON = "these kernels need Triton, which is not installed: pip install triton, or use backend='reference'"

#: tickets of a device: one for each stream, and one for each call that a CUDA graph has captured
TICKETS = 4096


class _Tickets(NamedTuple):
    zeros: Tensor  # [TICKETS, 4], each 16 bytes from the next, so that all are aligned alike
    taken: list[int]  # by which stream; -1 for a graph


_tickets: dict[torch.device, _Tickets] = {}
_tickets_lock = threading.Lock()
#: of operators that take a ticket. torch.compile's own CUDA graphs run an operator once in a memory pool that they fill
#: anew; tickets that were made there would be overwritten. Graphs that a program records itself are not concerned.
TICKET_TAGS = (torch.Tag.cudagraph_unsafe,)


def use_triton(backend: Backend, tensor: Tensor) -> bool:
    """Whether to use the Triton kernel: "auto" does on CUDA, if Triton is installed.

    Raises:
        ValueError: for another name.
        RuntimeError: if Triton is requested but not installed.
    """
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'triton', got {backend!r}")
    if backend == "triton" and not HAS_TRITON:
        raise RuntimeError(NO_TRITON)
    return backend == "triton" or (backend == "auto" and tensor.is_cuda and HAS_TRITON)


def launch(
    kernel: Any,
    programs: int | tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    num_stages: int | None = None,
    max_registers: int | None = None,
    **constants: Any,
) -> None:
    """Launch `kernel` once. Products and sums are never contracted, so that a result is the same on every chip.

    Raises:
        ValueError: if the tensors are on different devices.
        RuntimeError: on a CPU without Triton's interpreter.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"all tensors must be on one device, got {device} and {tensor.device}")
    grid = programs if isinstance(programs, tuple) else (programs,)
    if device.type == "cuda":
        with torch.cuda.device(device):
            given = {"num_stages": num_stages, "maxnreg": max_registers}
            options = {name: value for name, value in given.items() if value is not None}
            kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=False, **options, **constants)
    elif _is_interpreted(kernel):
        kernel[grid](*arguments, **constants)
    else:
        raise RuntimeError(
            f"backend='triton' needs a CUDA GPU, but the tensors are on {device.type!r}: backend='reference' runs "
            "anywhere (TRITON_INTERPRET=1, set before triton is imported, interprets the kernels on a CPU, very slowly)"
        )


def _is_interpreted(kernel: Any) -> bool:
    import triton

    return not isinstance(kernel, triton.JITFunction)


def check_dtypes(**tensors: Tensor) -> None:
    """Raise TypeError unless all are float32 or bfloat16, which is what the kernels compute in and load."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"the Triton kernels take float32 and bfloat16, but {name} is {tensor.dtype}: "
                "backend='reference' takes any"
            )


def row_block(rows: int, lanes: int, device: torch.device) -> tuple[int, int]:
    """Return rows per program and warps per program, for rows that take `lanes` (a power of two) threads each.

    Small problems are spread over many small programs. The interpreter pays by the program, so it gets few.
    """
    if device.type != "cuda":
        return 1024, 1
    num_warps = max(1 if rows * lanes <= 2**15 else 4, min(8, lanes // 32))  # a very wide row takes several
    return max(1, 32 * num_warps // lanes), num_warps


def element_block(size: int) -> tuple[int, int]:
    """Return elements per program and warps per program, for a sum over single elements.

    Up to 2048 elements make one program, which has nothing to wait for; more are spread over the whole GPU.
    """
    block = power_of_two(size) if size <= 2048 else 256 if size <= 2**18 else 1024
    return block, max(1, min(8, block // 128))


def as_bytes(flags: Tensor) -> Tensor:
    """Return bools as bytes, in place: Triton loads no bits."""
    return flags.view(torch.uint8) if flags.dtype == torch.bool else flags


def new_ticket(like: Tensor) -> Tensor:
    """Return a zero with which the programs of one launch find out which of them is the last; it then is zero again.

    Launches that may overlap never share one: each stream has its own, and so has each call that a CUDA graph captures,
    since a graph may be replayed on any stream.
    """
    with _tickets_lock, torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
        if like.device not in _tickets and not capturing:
            zeros = torch.zeros(TICKETS, 4, dtype=torch.int32, device=like.device)
            if like.is_cuda:
                torch.cuda.current_stream(like.device).synchronize()  # once: other streams will use them, too
            _tickets[like.device] = _Tickets(zeros, [])
        tickets = _tickets.get(like.device)
        if tickets is None or len(tickets.taken) == TICKETS:
            return torch.zeros(1, dtype=torch.int32, device=like.device)
        stream = -1 if capturing else torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
        if capturing or stream not in tickets.taken:
            tickets.taken.append(stream)
            return tickets.zeros[len(tickets.taken) - 1]
        return tickets.zeros[tickets.taken.index(stream)]


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
