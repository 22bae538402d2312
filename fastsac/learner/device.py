"""Chooses the device, precision and number of threads for updates, and sets PyTorch up for them."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.learner.engines import choose_engine, make_learner
from fastsac.own_networks import STANDARD, OwnNetworks
from fastsac.system import allowed_cores
from fastsac.types import Batch
from fastsac_kernels import PhiloxState
from fastsac_kernels.launch import Backend

Precision = Literal["fp32", "tf32", "bf16"]
#: compute capabilities of chips whose TF32 peak is several times their float32 peak: A100, H100, B200, B300
FAST_TF32 = ((8, 0), (9, 0), (10, 0), (10, 3))
#: rounding must pay off: bfloat16 is used if an update takes at most this share of its time in float32
WORTH_ROUNDING = 0.95
#: no new round of measurements starts after this time
MEASURE_SECONDS = 0.5


class Setup(NamedTuple):
    """The settings of this process, and the reason for them."""

    precision: Precision
    precision_reason: str
    num_threads: int  # of the CPU


def resolve_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Raises:
        UsageError: if CUDA is requested but not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA GPU here; --device cpu or auto works")
    return torch.device(name)


def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in hardware: AVX512-BF16 or AMX on x86, BF16 on Arm."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def precisions(
    config: Config,
    device: torch.device,
    own: OwnNetworks = STANDARD,
) -> list[Precision]:
    """Return the precisions that `--precision` allows; on CUDA the first one is used.

    Raises:
        UsageError: if the requested precision is not available here.
    """
    engine, _ = choose_engine(config, device, own)
    asked = config.precision
    if asked == "tf32" and device.type != "cuda":
        raise UsageError("--precision tf32 needs a CUDA GPU: use --precision fp32")
    if asked == "bf16" and engine != "fused":
        raise UsageError(f"--precision bf16 needs --engine fused, but this run uses {engine}: use --precision fp32")
    if asked == "bf16" and device.type == "cpu" and not has_bfloat16_products():
        raise UsageError(
            "--precision bf16: this CPU has no bfloat16 products (AVX512-BF16, AMX or Arm's BF16), "
            "so it would be slow: use --precision fp32 or auto"
        )
    if asked != "auto":
        return [asked]
    if device.type == "cuda" and engine == "fused":
        return ["tf32", "fp32"] if torch.cuda.get_device_capability() in FAST_TF32 else ["fp32", "tf32"]
    if device.type == "cuda":
        return ["fp32"]
    return ["fp32", "bf16"] if engine == "fused" and has_bfloat16_products() else ["fp32"]


def set_up_torch(
    config: Config,
    device: torch.device,
    obs_size: int,
    action_size: int,
    own: OwnNetworks = STANDARD,
) -> Setup:
    """Set PyTorch's threads and precision for this process; measure what the configuration leaves open.

    Raises:
        UsageError: if the precision is not available here.
    """
    choices = precisions(config, device, own)
    engine, _ = choose_engine(config, device, own)
    set_products(config.precision == "tf32" and engine != "fused")  # fused has its own products, and acts in float32
    torch.set_flush_denormal(True)  # Adam's moments of dead units decay into denormals, slow to multiply
    counts = [config.num_threads] if config.num_threads else thread_counts()
    without = engine == "fused" and device.type == "cpu"
    reason = "no bfloat16 products on this CPU" if without else "the default"
    if config.precision != "auto":
        reason = "requested"
    if device.type != "cpu":
        return Setup(choices[0], reason, torch.get_num_threads())
    chosen, num_threads = choices[0], counts[0]
    if len(choices) * len(counts) > 1:
        times = measure_updates(config, obs_size, action_size, choices, counts, own=own)
        fastest = {choice: min(counts, key=lambda count: times[choice, count]) for choice in choices}
        best = {choice: times[choice, count] for choice, count in fastest.items()}
        if len(choices) > 1:
            chosen = "bf16" if best["bf16"] <= WORTH_ROUNDING * best["fp32"] else "fp32"
            reason = ", ".join(f"{choice} {1e3 * seconds:.1f}" for choice, seconds in best.items()) + " ms per update"
        num_threads = fastest[chosen]
    torch.set_num_threads(num_threads)
    return Setup(chosen, reason, num_threads)


def set_products(in_tf32: bool) -> None:
    """Let PyTorch compute matrix products on CUDA in TF32, or in float32."""
    torch.set_float32_matmul_precision("high" if in_tf32 else "highest")


def thread_counts() -> list[int]:
    """Return 1, 2, 4, ... and the number of cores."""
    cores = allowed_cores()
    return sorted({min(1 << power, cores) for power in range(cores.bit_length() + 1)})


class FixedBatch:
    """Random transitions of the right shape, always the same ones for the same batch size."""

    def __init__(self, obs_size: int, action_size: int) -> None:
        self._sizes = obs_size, action_size
        self._batches: dict[int, Batch] = {}

    def sample(self, batch_size: int, rng: PhiloxState | None = None, backend: Backend = "reference") -> Batch:
        """Return the batch; the generator and the backend are ignored."""
        if batch_size not in self._batches:
            obs_size, action_size = self._sizes
            generator = torch.Generator().manual_seed(0)
            with torch.inference_mode(False):  # another engine may differentiate through it
                self._batches[batch_size] = Batch(
                    obs=torch.randn(batch_size, obs_size, generator=generator),
                    action=torch.rand(batch_size, action_size, generator=generator) * 2.0 - 1.0,
                    reward=torch.randn(batch_size, generator=generator),
                    next_obs=torch.randn(batch_size, obs_size, generator=generator),
                    terminated=torch.zeros(batch_size, dtype=torch.bool),
                )
        return self._batches[batch_size]


def measure_updates(
    config: Config,
    obs_size: int,
    action_size: int,
    choices: Sequence[Precision],
    counts: Sequence[int],
    rounds: int = 8,
    own: OwnNetworks = STANDARD,
) -> dict[tuple[Precision, int], float]:
    """Return the seconds per update for each precision and number of threads: the minimum over several rounds.

    The combinations take turns, on temporary learners of the configuration's shape. Takes about half a second where an
    update takes milliseconds, and restores PyTorch's number of threads.
    """
    before, batch = torch.get_num_threads(), FixedBatch(obs_size, action_size)
    learners = {
        choice: make_learner(
            dataclasses.replace(config, precision=choice), obs_size, action_size, own=copy.deepcopy(own)
        )
        for choice in choices
    }
    times = {(choice, count): float("inf") for choice in choices for count in counts}
    started = time.perf_counter()
    try:
        for _ in range(rounds):
            for choice, count in times:
                torch.set_num_threads(count)
                learners[choice].update(batch, 4)
                start = time.perf_counter()
                learners[choice].update(batch, 4)
                times[choice, count] = min(times[choice, count], (time.perf_counter() - start) / 4)
            if time.perf_counter() - started > MEASURE_SECONDS:
                break
    finally:
        torch.set_num_threads(before)
    return times


class ThreadTrial:
    """Finds the number of threads with which training is fastest, environments included, by training with each.

    Timing updates alone is not enough: environments have their own threads, which need cores, too.
    """

    ROUNDS = 3

    def __init__(self, num_envs: int, utd: float) -> None:
        """Start with the current number of threads.

        Args:
            num_envs: number of environments; each number of threads is tried for at least two steps of all of them.
            utd: updates per step; each number of threads is tried for at least eight updates.
        """
        first = torch.get_num_threads()
        counts = [first, *(count for count in thread_counts() if count != first)]
        self._least_steps = max(2 * num_envs, math.ceil(8 / utd))
        self._turns = counts * self.ROUNDS
        self.best = dict.fromkeys(counts, 0.0)  # steps per second
        self.begin_turn()

    def begin_turn(self) -> None:
        """Set the number of threads whose turn it is, and restart the measurement; call this on resume, too."""
        torch.set_num_threads(self._turns[0])
        self._seconds, self._steps, self._settled = 0.0, 0, False

    def record(self, seconds: float, steps: int) -> int | None:
        """Record the time of one step of the training loop, and the number of environment steps in it.

        Returns:
            The fastest number of threads, which is then set, once every number has had its turns; None until then.
        """
        if not self._settled:  # threads start and stop
            self._settled = True
            return None
        self._seconds, self._steps = self._seconds + seconds, self._steps + steps
        if self._steps < self._least_steps:
            return None
        count = self._turns.pop(0)
        self.best[count] = max(self.best[count], self._steps / self._seconds)
        if self._turns:
            self.begin_turn()
            return None
        fastest = max(self.best, key=lambda count: self.best[count])
        torch.set_num_threads(fastest)
        return fastest
