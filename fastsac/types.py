"""What flows between the parts, and the shape letters.

B batch, N environments, K action samples per state, E critics, O observation size, A action size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

#: actions [K, B, A] -> the critics there, [K, E, B]
QFunction = Callable[[Tensor], Tensor]


class Batch(NamedTuple):
    """Transitions drawn from replay, on the learner's device."""

    obs: Tensor  # [B, O] float32
    action: Tensor  # [B, A] float32, in the policy's [-1, 1] units
    reward: Tensor  # [B] float32
    next_obs: Tensor  # [B, O] float32; at an episode's end the true last observation
    terminated: Tensor  # [B] bool


class Sampler(Protocol):
    """Where a learner gets its batches from: the replay, or a fixed batch in a test."""

    def sample(self, batch_size: int) -> Batch:
        """Return a batch of `batch_size` transitions."""


class Estimate(NamedTuple):
    """What an estimator of the actor's gradient returns."""

    loss: Tensor  # scalar; differentiable in mean and log_std
    log_prob: Tensor  # [K, B], detached
    soft_value: Tensor  # [B], detached: mean over K of min_E q - alpha * log_prob, an unbiased estimate of V(s)


class Estimator(Protocol):
    """One way to estimate the gradient of E[alpha * log_prob - min_E q] in the policy's parameters."""

    def __call__(
        self, mean: Tensor, log_std: Tensor, noise: Tensor, q_function: QFunction, alpha: Tensor, baseline: str | Tensor
    ) -> Estimate:
        """Return the loss whose gradient is the estimate.

        Args:
            mean: [B, A], of the Gaussian before squashing.
            log_std: [B, A].
            noise: [K, B, A], standard normal.
            q_function: the critics as a function of the action, differentiable in it.
            alpha: scalar tensor, a constant here.
            baseline: the baseline's name, or its values b(s) [B] where a network supplies them.
        """
