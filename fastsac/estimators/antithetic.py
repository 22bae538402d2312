"""Antithetic pairs: K / 2 noise vectors eps and their negatives, for both families.

Terms that are odd in eps cancel within a pair. For a quadratic critic, the pathwise gradient for the mean becomes
exact; the score function's loses whatever the baseline left over, since (f - b) eps / sigma keeps only the odd part of
f.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsac.estimators.gaussian import log_normal
from fastsac.estimators.pathwise import pathwise
from fastsac.estimators.score import score
from fastsac.types import ActorGradient, Draw, Estimate, QFunction


def mirrored(draw: Draw, mean: Tensor) -> Draw:
    """Return K samples from K / 2 noise vectors: [eps, -eps]."""
    noise = draw.noise(mean, draw.num_samples // 2)
    return Draw(torch.cat([noise, -noise]), draw.num_samples, draw.backend)


def pathwise_antithetic(
    mean: Tensor,
    log_std: Tensor,
    draw: Draw,
    q_function: QFunction,
    alpha: Tensor,
    baseline: str | Tensor,
    entropy_split: float = 0.0,
) -> Estimate:
    """Return the pathwise estimate from pairs (see `fastsac.types.Estimator`)."""
    return pathwise(mean, log_std, mirrored(draw, mean), q_function, alpha, baseline, entropy_split)


def score_antithetic(
    mean: Tensor,
    log_std: Tensor,
    draw: Draw,
    q_function: QFunction,
    alpha: Tensor,
    baseline: str | Tensor,
    entropy_split: float = 1.0,
) -> Estimate:
    """Return the score-function estimate from pairs (see `fastsac.types.Estimator`).

    With "loo" the baseline is the mean of f over the other pairs. A sample's own mirror image does not count as another
    sample: it would make the mean's gradient twice as large.
    """
    pairs = mirrored(draw, mean)
    if isinstance(baseline, Tensor) or baseline != "loo":
        return score(mean, log_std, pairs, q_function, alpha, baseline, entropy_split)
    assert isinstance(pairs.rng, Tensor)
    with torch.no_grad():
        noise = pairs.rng
        action, log_prob = pairs.sample(mean, log_std)
        q = q_function(action)
        f = alpha * (log_prob - (1.0 - entropy_split) * log_normal(noise, log_std)) - q.amin(1)
        sums = f.view(2, -1, f.shape[1]).sum(0)
        others = ((sums.sum(0) - sums) / (len(f) - 2)).repeat(2, 1)
        weight = (f - others).unsqueeze(-1)
        grad_mean, grad_log_std = weight * noise / log_std.exp(), weight * (noise.square() - 1.0)
        found = ActorGradient(grad_mean, grad_log_std - alpha * (1.0 - entropy_split), f.mean)
    return Estimate.of_gradient(mean, log_std, found, alpha * log_prob - q.amin(1), q, log_prob)
