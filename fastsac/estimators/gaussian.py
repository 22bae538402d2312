"""What estimators share: the Gaussian's log-density and entropy, its part in the advantage, and the mean action."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsac.types import Draw, QFunction

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def log_normal(noise: Tensor, log_std: Tensor) -> Tensor:
    """Return log N(mean + sigma * noise; mean, sigma) [...] for noise and log_std [..., A]."""
    return (-0.5 * noise.square() - log_std - _HALF_LOG_2PI).sum(-1)


def entropy(log_std: Tensor) -> Tensor:
    """Return the Gaussian's entropy before squashing, -E[log N] [...], for log_std [..., A]."""
    return (log_std + (0.5 + _HALF_LOG_2PI)).sum(-1)


def shifted(baseline: str | Tensor, log_std: Tensor, alpha: Tensor, entropy_split: float) -> str | Tensor:
    """Return b(s) [B] for an advantage without a share of log N: b then lacks that share's expectation, too."""
    if not isinstance(baseline, Tensor) or entropy_split == 1.0:
        return baseline
    return baseline + alpha * (1.0 - entropy_split) * entropy(log_std)


def mean_action_baseline(log_prob: Tensor, q: Tensor, action_size: int, alpha: Tensor) -> Tensor:
    """Return f at the mean action with log N replaced by its expectation, [B].

    Args:
        log_prob: [B], of the mean action tanh(mean).
        q: [B], the smallest critic there.
        action_size: A; at the mean log N is A / 2 above its expectation.
        alpha: scalar tensor.
    """
    return alpha * (log_prob - 0.5 * action_size) - q


@torch.no_grad()
def mean_action(mean: Tensor, log_std: Tensor, draw: Draw, q_function: QFunction, alpha: Tensor) -> Tensor:
    """Evaluate the critics at the mean action [B, A] and return `mean_action_baseline` [B]."""
    action, log_prob = Draw(torch.zeros_like(mean).unsqueeze(0), 1, draw.backend).sample(mean, log_std)
    return mean_action_baseline(log_prob[0], q_function(action)[0].amin(0), mean.shape[1], alpha)
