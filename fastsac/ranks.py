"""Distributed training of one agent with `torchrun`: gradients are averaged over all processes (ranks).

Every rank steps its own environments, fills its own replay buffer and draws its own batches. Gradients are averaged
before each Adam step, so the parameters of all ranks stay equal, bit for bit. Rank 0 evaluates, logs and saves.
"""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastsac.config import Config
from fastsac.errors import FastsacError, UsageError
from fastsac.system import allowed_cores

T = TypeVar("T")
#: an evaluation may take long; a rank that ends is noticed at once, because its connections close
PATIENCE = datetime.timedelta(hours=2)


class RankLost(FastsacError):
    """Another rank has ended: this one cannot continue, and does not know the reason."""


def _or_lost(method: Callable[..., T]) -> Callable[..., T]:
    """Turn a failed exchange into a one-line error."""

    @functools.wraps(method)
    def guarded(self: Ranks, *arguments: Any) -> T:
        try:
            return method(self, *arguments)
        except RuntimeError as error:
            raise RankLost(f"rank {self.rank} of {self.size} ends because another one has: {_line(error)}") from error

    return guarded


def _line(error: RuntimeError) -> str:
    words = str(error).strip().splitlines() or ["no reason given"]
    return words[0].partition(". This ")[0].strip()[:160]


class Ranks:
    """This process's rank, counted from 0, and the number of ranks."""

    def __init__(self, rank: int = 0, size: int = 1, on_this_machine: int = 1) -> None:
        self.rank, self.size, self.on_this_machine = rank, size, on_this_machine

    @staticmethod
    @functools.cache
    def join() -> Ranks:
        """Return the ranks that `torchrun` has started, once they are connected; or this process alone.

        Raises:
            UsageError: if this build of PyTorch does not support it.
        """
        if not under_torchrun():
            return Ranks()
        size = int(os.environ["WORLD_SIZE"])
        if not dist.is_available():
            raise UsageError("this build of PyTorch has no torch.distributed: train without torchrun")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
            atexit.register(_leave)  # the group's threads must not outlive the interpreter
        return Ranks(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))

    @property
    def alone(self) -> bool:
        """Whether there is only one process."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that logs, evaluates and saves."""
        return self.rank == 0

    def average(self, tensor: Tensor) -> None:
        """Replace the tensor with its mean over all ranks."""
        self._add(tensor)
        tensor.div_(self.size)

    def sum(self, number: int) -> int:
        """Return the sum over all ranks; in a single process, the number itself."""
        if self.alone:
            return number
        total = torch.tensor(number)
        self._add(total)
        return int(total.item())

    def of_leader(self, numbers: list[float]) -> list[float]:
        """Return rank 0's numbers; every rank must pass the same number of values."""
        if self.alone:
            return numbers
        shared = self._broadcast(torch.tensor(numbers, dtype=torch.float64))
        return [float(number) for number in shared.tolist()]

    @_or_lost
    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0)
        return tensor

    def refuse_differences(self, tensors: dict[str, Tensor]) -> None:
        """Compare the tensors' bits with rank 0's.

        Raises:
            FastsacError: if one differs on some rank.
        """
        if name := self._first_difference({name: _checksum(tensor) for name, tensor in tensors.items()}):
            raise FastsacError(
                f"the ranks have different parameters ({name}); your own networks must start with the same ones: "
                "call torch.manual_seed(0) before you create them"
            )

    def refuse_other_settings(self, settings: dict[str, Any]) -> None:
        """Compare settings with rank 0's.

        Raises:
            UsageError: if one differs on some rank.
        """
        if self.alone:
            return
        sums = {name: _checksum(torch.tensor([*repr(value).encode()])) for name, value in settings.items()}
        if name := self._first_difference(sums):
            raise UsageError(f"--{name.replace('_', '-')} must be the same on all ranks")

    def _first_difference(self, numbers: dict[str, Tensor]) -> str:
        """Return the name of the first number that differs from rank 0's on any rank, or an empty string.

        The result is the same on all ranks.
        """
        if self.alone or not numbers:
            return ""
        own = torch.stack(list(numbers.values()))
        different = (own != self._broadcast(own.clone())).to(torch.int64)
        self._add(different)
        return next((name for name, count in zip(numbers, different.tolist(), strict=True) if count), "")

    @_or_lost
    def _add(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)


def for_ranks(config: Config, ranks: Ranks, device: torch.device) -> Config:
    """Return the settings for one of several processes: nothing is measured, since each could get another result.

    Raises:
        UsageError: for settings that several processes do not support.
    """
    if ranks.alone:
        return config
    refused = {
        "--checkpoint-replay stores a single replay buffer": config.checkpoint_replay,
        "--normalize-obs uses the moments of a single process": config.normalize_obs,
        "--normalize-reward uses the moments of a single process": config.normalize_reward,
        f"--buffer-size {config.buffer_size} may be empty on one rank": config.buffer_size < 3 * config.num_envs,
        f"--engine {config.engine} does not average gradients on CUDA": device.type == "cuda"
        and config.engine in ("graphed", "fused"),
    }
    for why, asked in refused.items():
        if asked:
            raise UsageError(f"{why}, but torchrun has started {ranks.size}: leave it out")
    threads = max(1, allowed_cores() // ranks.on_this_machine)
    return dataclasses.replace(
        config,
        engine="reference" if device.type == "cuda" else config.engine,
        precision="fp32" if config.precision == "auto" else config.precision,
        num_threads=config.num_threads or threads,
    )


def under_torchrun() -> bool:
    """Whether `torchrun` has started this process, with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def first_to_end() -> bool:
    """Return whether this rank is the first to report why all of them end; before they connect, that is rank 0."""
    if not under_torchrun():
        return True
    if not (dist.is_available() and dist.is_initialized()):
        return os.environ.get("RANK") == "0"
    try:
        return int(dist.distributed_c10d._get_default_store().add("fastsac: ended", 1)) == 1
    except RuntimeError:  # the store is gone with the process that held it
        return True


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _checksum(tensor: Tensor) -> Tensor:
    """Return a number that changes if any bit does, and most likely if the order does."""
    bits = tensor.detach().cpu().flatten().view(torch.uint8).to(torch.int64)
    place = torch.arange(bits.numel()) % 1_000_003 + 1
    return (bits * place).sum()
