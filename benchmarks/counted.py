"""Counts an update launch by launch while an engine's code runs on a CPU: FLOPs, bytes and working memory."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.launches import Eager, count_update, size_of
from fastsac.learner import Learner
from fastsac.types import Sampler

PRODUCTS = ("mm", "bmm", "mv", "addmm", "baddbmm")


class Kernel(NamedTuple):
    """One launch. FLOPs and output [E, M, N] are those of a matrix product; other arithmetic is left out."""

    name: str
    bytes: int
    flops: int = 0
    output: tuple[int, int, int] = (1, 1, 1)
    dtype: str = "fp32"


class Counted(Eager):
    """Keeps every launch."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def kernel(self, name: str, args: Any, tensors: list[tuple[Tensor, int]]) -> None:
        before = self.bytes
        super().kernel(name, args, tensors)
        kernel = Kernel(name, self.bytes - before)
        if name in PRODUCTS:
            left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            columns = 1 if right.dim() == 1 else right.shape[-1]
            output = (left.shape[0] if left.dim() == 3 else 1, left.shape[-2], columns)
            dtype = "bf16" if left.dtype == torch.bfloat16 else "fp32"
            kernel = kernel._replace(flops=2 * left.numel() * columns, output=output, dtype=dtype)
        self.kernels.append(kernel)

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)

    def totals(self) -> dict[str, int]:
        return {"launches": self.launches, "flops": self.flops, "bytes": self.bytes}


def counted(learner: Learner, sampler: Sampler) -> Counted:
    """Count one whole update."""
    counter = Counted()
    count_update(learner, sampler, counter)
    return counter


def working_set(learner: Learner, sampler: Sampler) -> int:
    """Return the bytes that a new learner's state and all other tensors take where an update needs most."""
    learner.update(sampler)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner.update(sampler)  # leaves its gradients
        learner.update(sampler)
    events = sorted((e for e in profiler.events() if e.cpu_parent is None), key=lambda event: event.time_range.start)
    state, _ = learner.state()
    held = sum(size_of(tensor) for name, tensor in state.items() if name not in ("generator", "philox"))
    return held + max(accumulate(event.cpu_memory_usage for event in events))
