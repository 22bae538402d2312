"""Fills torch.compile's cache with its versions of the operations, in several processes while other things run.

    TORCHINDUCTOR_CACHE_DIR=DIR python -m benchmarks.precompile INDEX NUMBER     every NUMBER-th case from INDEX on

They are compiled once each anyway; this only keeps a GPU host's other cores busy (see `benchmarks/gpu.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.op_cases import CASES, Case, build


def compile_all(cases: list[Case], device: torch.device) -> int:
    """Compile and run every pass of the cases; return how many failed."""
    failed = 0
    for case in cases:
        try:
            operation = build(case, "compile", device)
            for which in case.passes:
                operation.call(case, which)()
        except Exception as error:  # it fails again where it is measured, and is reported there
            print(f"{case.id}: {type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
    return failed


def forget_tuning(cache: Path) -> None:
    """Drop launch settings that were tuned while other processes used the GPU: they are tuned anew when measured."""
    for path in cache.rglob("*.best_config"):
        path.unlink()


if __name__ == "__main__":
    index, number = map(int, sys.argv[1:])
    sys.exit(bool(compile_all(CASES[index::number], torch.device("cuda"))))
