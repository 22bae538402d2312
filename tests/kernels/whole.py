"""One whole update by the kernels, and by the reference engine in float32 and in float64, from one state."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton.language as tl

from fastsac.config import Config
from fastsac.learner.compare import Errors, SameNumbers, _float64, _numbers
from fastsac.learner.fused_cuda import FusedCudaLearner
from fastsac.replay import Replay

RATES = {"actor_lr": 1e-3, "critic_lr": 1e-3, "value_lr": 1e-3, "alpha_lr": 1e-3}


class Problem(NamedTuple):
    """Sizes, and settings that differ from the defaults."""

    obs_size: int = 5
    action_size: int = 3
    batch_size: int = 33
    hidden_sizes: tuple[int, int] = (64, 64)
    settings: tuple[tuple[str, Any], ...] = ()

    def config(self, **more: Any) -> Config:
        sizes = {"batch_size": self.batch_size, "hidden_sizes": self.hidden_sizes}
        return Config(**{**RATES, **sizes, "precision": "fp32", **dict(self.settings), **more})


def problem(*sizes: Any, **settings: Any) -> Problem:
    return Problem(*sizes, settings=tuple(settings.items()))


def filled(obs_size: int, action_size: int, device: torch.device | str = "cpu") -> Replay:
    """A replay whose ring and queue have both gone round, with gaps."""
    rng = np.random.default_rng(0)
    replay = Replay(150, 8, obs_size, action_size, device)
    replay.begin(rng.standard_normal((8, obs_size), np.float32))
    for _ in range(42):
        action = rng.uniform(-1.0, 1.0, (8, action_size)).astype(np.float32)
        ends, valid = rng.random(8) < 0.2, rng.random(8) < 0.8
        next_obs = rng.standard_normal((8, obs_size), np.float32)
        replay.add(action, rng.standard_normal(8, np.float32), ends, next_obs, valid)
    assert replay.newest > replay.num_rows
    first, size = replay.ring()[5].tolist()
    assert first + size > len(replay.ring()[4])
    return replay


def odd_state(learner: SameNumbers) -> None:
    """Make targets that lag, and equal critics in some units."""
    with torch.no_grad():
        for weight in learner.target_critic.parameters():
            weight.mul_(0.5)


def one_update(case: Problem, device: str = "cpu", kind: Any = FusedCudaLearner, seed: int = 1) -> str:
    """Return what the kernels' update has otherwise than the float64 rule allows, or nothing."""
    config, sizes = case.config(), (case.obs_size, case.action_size, torch.device(device))
    replay = filled(*sizes)
    engine, reference = kind(config, *sizes, seed), SameNumbers(config, *sizes, seed)
    with _float64():
        exact = SameNumbers(config, *sizes, seed)
    odd_state(reference)
    reference.update(replay, 3)
    for learner in (engine, exact):
        learner.load_state(*reference.state())
        learner.rng.state[1] = reference.updates
    for learner in (engine, reference, exact):
        learner.update(replay)
    errors = Errors()
    errors.note(*(_numbers(learner) for learner in (engine, reference, exact)))
    assert engine.rng.state.tolist() == reference.rng.state.tolist()
    return errors.problem()


def as_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the interpreter's products take factors of bfloat16, or of TF32 without what its 10 bits do not hold."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    seen: list[str] = []

    def factor(data: Any, kind: str) -> Any:
        if kind == "bf16":
            return (data.astype(np.uint32) << 16).view(np.float32)
        return (data.view(np.uint32) & 0xFFFFE000).view(np.float32) if kind == "tf32" else data

    def create_dot(_: Any, a: Any, b: Any, total: Any, input_precision: Any, __: Any) -> Any:
        kind = "bf16" if a.dtype == tl.bfloat16 else input_precision.name.lower()
        seen.append(kind)
        left, right = (factor(np.ascontiguousarray(each.data), kind) for each in (a, b))
        return TensorHandle(np.matmul(left, right) + total.data, total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return seen
