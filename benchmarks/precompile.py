"""Compiles what a run of `benchmarks.gpu` measures, in several processes while its tests run.

    TORCHINDUCTOR_CACHE_DIR=DIR TRITON_CACHE_DIR=DIR python -m benchmarks.precompile INDEX NUMBER

Compiles every NUMBER-th item from INDEX on: torch.compile's versions of the operations, the Triton kernels, and
those of whole updates. Otherwise, all of it would be compiled where it is measured, at the expense of that part's time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import bench_update
from benchmarks.op_cases import GPU_MEASUREMENTS, Case, build


class Piece(NamedTuple):
    """What one process compiles at a time: an operation or a learner, with the passes or steps that are measured."""

    case: Case | bench_update.Case
    backend: str
    which: tuple[str, ...]


def pieces() -> list[Piece]:
    """All work, that which takes longest first; eager PyTorch has nothing to compile."""
    found: dict[tuple[Case | bench_update.Case, str], list[str]] = {}
    for step, what in bench_update.GPU_STEPS:
        found.setdefault((step, step.engine), []).append(what)
    for case, backend, which in GPU_MEASUREMENTS:
        found.setdefault((case, backend), []).append(which)
    work = [Piece(*key, tuple(which)) for key, which in found.items() if key[1] != "reference"]
    return sorted(work, key=lambda piece: (piece.backend != "compile", isinstance(piece.case, Case)))


def run(piece: Piece, device: torch.device) -> None:
    """Make each pass or step once."""
    if isinstance(piece.case, Case):
        operation = build(piece.case, piece.backend, device)
        for which in piece.which:
            operation.call(piece.case, which)()
    else:
        for what in piece.which:
            bench_update.prepare(piece.case, what, device)


def compile_all(work: list[Piece], device: torch.device) -> int:
    """Compile and run the pieces; return how many failed."""
    failed = 0
    for piece in work:
        try:
            run(piece, device)
        except Exception as error:  # it fails again where it is measured, and is reported there
            print(f"{piece.case.id} {piece.backend}: {type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
    return failed


def forget_tuning(cache: Path) -> None:
    """Drop launch settings that were tuned while other processes used the GPU: they are tuned anew when measured."""
    for path in cache.rglob("*.best_config"):
        path.unlink()


if __name__ == "__main__":
    index, number = map(int, sys.argv[1:])
    sys.exit(bool(compile_all(pieces()[index::number], torch.device("cuda"))))
