"""Where updates run, and the settings that PyTorch keeps per process."""

from __future__ import annotations

import os
import time

import torch

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.learner.reference import Learner
from fastsac.types import Batch
from fastsac_kernels import PhiloxState
from fastsac_kernels.launch import Backend


def resolve_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Raises:
        UsageError: if CUDA is asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA GPU here; --device cpu or auto works")
    return torch.device(name)


def set_up_torch(config: Config, device: torch.device, obs_size: int, action_size: int) -> int:
    """Set precision and threads for this process; return the number of CPU threads."""
    torch.set_float32_matmul_precision("medium" if config.precision == "bf16" else "highest")
    torch.set_flush_denormal(True)  # Adam's moments of dead units decay into numbers that are slow to multiply
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    elif device.type == "cpu":
        torch.set_num_threads(fastest_num_threads(config, obs_size, action_size))
    return torch.get_num_threads()


class _FixedBatch:
    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def sample(self, batch_size: int, rng: PhiloxState | None = None, backend: Backend = "reference") -> Batch:
        return self._batch


def fastest_num_threads(config: Config, obs_size: int, action_size: int, rounds: int = 4) -> int:
    """Time a learner of the configuration's shape, thrown away afterwards, at 1, 2, 4, ... threads in turn.

    Takes some tenths of a second, and leaves PyTorch's setting as it found it.
    """
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    candidates = sorted({min(1 << power, cores) for power in range(cores.bit_length() + 1)})
    learner = Learner(config, obs_size, action_size)
    size, generator = config.batch_size, torch.Generator().manual_seed(0)
    batch = _FixedBatch(
        Batch(
            obs=torch.randn(size, obs_size, generator=generator),
            action=torch.rand(size, action_size, generator=generator) * 2.0 - 1.0,
            reward=torch.randn(size, generator=generator),
            next_obs=torch.randn(size, obs_size, generator=generator),
            terminated=torch.zeros(size, dtype=torch.bool),
        )
    )
    best: dict[int, float] = dict.fromkeys(candidates, float("inf"))
    try:
        for _ in range(rounds):
            for threads in candidates:
                torch.set_num_threads(threads)
                learner.update(batch, 2)
                start = time.perf_counter()
                learner.update(batch, 5)
                best[threads] = min(best[threads], time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return min(candidates, key=lambda threads: best[threads])
