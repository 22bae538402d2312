"""The progress of a run, apart from the state of the learner, the replay buffer and the environments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fastsac.logger import EpisodeStatistics


@dataclass
class Progress:
    """Counters, random numbers and sums of the training loop."""

    env_seed: int  # of the training environments
    exploration: np.random.Generator  # draws the actions before the first update
    warm_up_left: int  # steps until the next update
    episodes: EpisodeStatistics
    steps: int = 0
    updates_due: float = 0.0
    time_s: float = 0.0
    evaluation_due: bool = False  # a signal interrupted the evaluation
    reached: float | None = None  # the target return that an evaluation has reached
    metrics: dict[str, Tensor | float] = field(default_factory=dict)  # the latest ones

    def state(self) -> dict[str, Any]:
        """Return everything for JSON, except the metrics, which may be on a device."""
        return {
            "env_seed": self.env_seed,
            "exploration": self.exploration.bit_generator.state,
            "warm_up_left": self.warm_up_left,
            "episodes": self.episodes.state(),
            "steps": self.steps,
            "updates_due": self.updates_due,
            "time_s": self.time_s,
            "evaluation_due": self.evaluation_due,
            "reached": self.reached,
        }

    def load_state(self, state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Load what `state` returned, and the metrics, but not the episodes, which may start again.

        Raises:
            ValueError: if the state is invalid.
        """
        self.steps, self.warm_up_left, self.env_seed = state["steps"], state["warm_up_left"], state["env_seed"]
        self.updates_due, self.time_s = float(state["updates_due"]), float(state["time_s"])
        if not 0.0 <= self.updates_due < 1e12 or self.time_s < 0.0:
            raise ValueError(f"updates_due is {self.updates_due}, and time_s {self.time_s}")
        self.evaluation_due, self.reached = state["evaluation_due"], state["reached"]
        self.metrics = {name: float(value) for name, value in metrics.items()}
        self.exploration.bit_generator.state = state["exploration"]
