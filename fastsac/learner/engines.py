"""Which engine makes the updates."""

from __future__ import annotations

import torch

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.estimators import choose
from fastsac.learner.fused import FusedLearner
from fastsac.learner.graphed import GraphedLearner
from fastsac.learner.reference import Learner

ENGINES: dict[str, type[Learner]] = {"reference": Learner, "graphed": GraphedLearner, "fused": FusedLearner}


def make_learner(
    config: Config, obs_size: int, action_size: int, device: torch.device | str = "cpu", seed: int = 0
) -> Learner:
    """Return a learner of the engine that the configuration asks for; see `choose_engine`."""
    engine, _ = choose_engine(config, torch.device(device))
    return ENGINES[engine](config, obs_size, action_size, device, seed)


def choose_engine(config: Config, device: torch.device) -> tuple[str, str]:
    """Return the engine's name, and in a few words why.

    Raises:
        UsageError: if it cannot run on the device.
    """
    written_out = choose(config).gradient is not None
    if config.engine == "graphed" and device.type != "cuda":
        raise UsageError(
            f"--engine graphed records CUDA graphs, which needs a GPU, and this runs on the {device.type}: "
            "use --engine auto"
        )
    if config.engine == "fused" and device.type != "cpu":
        raise UsageError(f"--engine fused runs on a CPU so far, and this runs on {device.type}: use --engine graphed")
    if config.engine == "fused" and not written_out:
        raise UsageError(f"--engine fused: --estimator {config.estimator} has no written-out gradient")
    if config.engine != "auto":
        return config.engine, "asked for"
    if device.type == "cuda":
        return "graphed", "a CUDA GPU"
    if not written_out:
        return "reference", f"no CUDA GPU, and --estimator {config.estimator} has no written-out gradient"
    return "fused", "no CUDA GPU"
