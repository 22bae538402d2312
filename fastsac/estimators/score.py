"""The score-function estimator (REINFORCE on the soft advantage), with baselines.

The sample is fixed and its log-probability is weighted by f - b, with f = alpha * log_prob - min_E q::

    d/d mean    = (f - b) * eps / sigma
    d/d log_std = (f - b) * (eps^2 - 1)

The critic is evaluated forward only. See `fastsac_kernels.score_function_loss` for the baselines.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastsac.types import ActorGradient, Draw, Estimate, QFunction, Sample
from fastsac_kernels import score_function_loss
from fastsac_kernels.score_function_loss import baseline_values


def score(
    mean: Tensor, log_std: Tensor, draw: Draw, q_function: QFunction, alpha: Tensor, baseline: str | Tensor
) -> Estimate:
    """Return the score-function estimate (see `fastsac.types.Estimator`)."""
    with torch.no_grad():  # a sample that kept its graph would cancel the mean's gradient without a word
        action, log_prob = draw.sample(mean, log_std)
        q = q_function(action)
    loss = score_function_loss(mean, log_std, draw.rng, q, alpha, baseline, draw.backend, log_prob)
    return Estimate(loss, log_prob, q)


def score_gradient(
    sample: Sample, f: Tensor, q_gradient: Callable[[], Tensor], alpha: Tensor, baseline: str | Tensor
) -> ActorGradient:
    """Return the same, written out (see `fastsac.types.Gradient`); the critics are not gone back through."""
    advantage = f - baseline_values(f, alpha, baseline)
    weight = advantage.unsqueeze(-1)
    grad_mean = (sample.noise / sample.sigma).mul_(weight)
    grad_log_std = sample.noise.square().sub_(1.0).mul_(weight)

    def loss() -> Tensor:
        log_normal = (-0.5 * sample.noise.square() - sample.log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)
        return (log_normal * advantage).mean()

    return ActorGradient(grad_mean, grad_log_std, loss)
