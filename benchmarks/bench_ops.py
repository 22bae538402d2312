"""Times every operation of `fastsac_kernels` against PyTorch's eager mode and torch.compile.

make bench ARGS="-k 'bench_ops and B4096-A6'"
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.measure import Call, launched, measure
from benchmarks.op_cases import (
    BACKENDS,
    BOTH,
    CASES,
    GPU_MEASUREMENTS,
    Case,
    Measurement,
    Runner,
    build,
    bytes_moved,
)

pytestmark = pytest.mark.filterwarnings("ignore")
CUDA = torch.cuda.is_available()

EVERYTHING = [Measurement(case, backend, which) for case in CASES for backend in BACKENDS for which in case.passes]
PARAMETERS = GPU_MEASUREMENTS if CUDA else EVERYTHING


@lru_cache(1)  # the passes of one case follow one another
def runner(case: Case, backend: str, device: torch.device) -> Runner:
    return build(case, backend, device)


@pytest.mark.parametrize(
    ("case", "backend", "which"),
    PARAMETERS,
    ids=[f"{case.id}-{backend}-{which}" for case, backend, which in PARAMETERS],
)
def test_op(
    benchmark: Any,
    device: torch.device,
    flush: Call,
    record: Callable[[dict[str, Any]], None],
    require: Callable[[str, torch.device], None],
    case: Case,
    backend: str,
    which: str,
) -> None:
    require(backend, device)
    operation = runner(case, backend, device)
    row: dict[str, Any] = {"pass": which, "backend": backend} | case._asdict()
    forward, backward = bytes_moved(case)
    row["bytes"] = forward + backward * (which == BOTH)
    row |= measure(benchmark, operation.call(case, which), device, flush, 0.1 if CUDA else 0.3)
    if CUDA and Measurement(case, backend, which).counted:
        names = launches(operation, which)
        row["launches"] = {name: len(kernels) for name, kernels in names.items()}
        row |= {"kernels": names} if backend == "triton" else {}
    record(row)


def launches(operation: Runner, which: str) -> dict[str, list[str]]:
    """Return what the forward and, if there is one, the backward pass start on the GPU."""
    outputs: list[Any] = []
    launched(lambda: None)  # the first look costs the profiler its own start
    names = {"forward": launched(lambda: outputs.append(operation.forward()))}
    if which == BOTH:
        names["backward"] = launched(lambda: operation.backward(outputs.pop()))
    return names
