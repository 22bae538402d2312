"""What each estimator costs: one whole update (batch 256, hidden layers 256 and 256, HalfCheetah's sizes).

    make bench

On CUDA the timed call includes the synchronisation.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsac.config import Config
from fastsac.learner import Learner, resolve_device, set_up_torch
from fastsac.replay import Replay

OBS_SIZE, ACTION_SIZE, NUM_ENVS = 17, 6, 16
CASES = [
    ("pathwise", "auto", 1),
    ("pathwise", "auto", 2),
    ("score", "none", 1),
    ("score", "constant", 1),
    ("score", "value", 1),
    ("score", "loo", 2),
    ("score", "loo", 4),
    ("score", "loo", 8),
]


@pytest.fixture(scope="module")
def replay() -> Replay:
    device = resolve_device("auto")
    ring = Replay(4096, NUM_ENVS, OBS_SIZE, ACTION_SIZE, device, torch.Generator(device).manual_seed(0))
    ring.begin(torch.randn(NUM_ENVS, OBS_SIZE, device=device))
    for _ in range(256):
        action = torch.rand(NUM_ENVS, ACTION_SIZE, device=device) * 2.0 - 1.0
        reward, terminated = torch.randn(NUM_ENVS, device=device), torch.zeros(NUM_ENVS, dtype=torch.bool)
        next_obs = torch.randn(NUM_ENVS, OBS_SIZE, device=device)
        ring.add(action, reward, terminated.to(device), next_obs, torch.ones(NUM_ENVS, dtype=torch.bool).numpy())
    return ring


@pytest.mark.parametrize(("estimator", "baseline", "num_action_samples"), CASES)
def test_update(benchmark: Any, replay: Replay, estimator: str, baseline: str, num_action_samples: int) -> None:
    config = Config(estimator=estimator, baseline=baseline, num_action_samples=num_action_samples)
    set_up_torch(config, replay.device, OBS_SIZE, ACTION_SIZE)
    learner = Learner(config, OBS_SIZE, ACTION_SIZE, replay.device)

    def update() -> None:
        learner.update(replay)
        if replay.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(update, rounds=100, warmup_rounds=20)
