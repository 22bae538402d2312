"""An inverse-variance mix of the score function and the pathwise estimator.

    gradient = w * score + (1 - w) * pathwise,  w = Var[pathwise] / (Var[score] + Var[pathwise])

for each coordinate of mean and log_std. The variances are taken over a state's K samples and averaged over the *other*
half of the states: weights computed from the samples that they weight would be correlated with them, and biased. So the
weights, and the noise with them, depend on the batch; the expectation does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsac.estimators.pathwise import pathwise_gradient
from fastsac.estimators.score import score_gradient
from fastsac.estimators.written_out import from_gradient
from fastsac.types import ActorGradient, Draw, Estimate, QFunction, Sample


def mix(
    mean: Tensor,
    log_std: Tensor,
    draw: Draw,
    q_function: QFunction,
    alpha: Tensor,
    baseline: str | Tensor,
    entropy_split: float = 0.0,
) -> Estimate:
    """Return the mix; it needs at least two states and two samples of each (see `fastsac.types.Estimator`)."""
    return from_gradient(mix_gradient, mean, log_std, draw, q_function, alpha, baseline, entropy_split)


def mix_gradient(
    sample: Sample,
    f: Tensor,
    q_gradient: Callable[[], Tensor],
    alpha: Tensor,
    baseline: str | Tensor,
    entropy_split: float = 0.0,
) -> ActorGradient:
    """Return the same, written out (see `fastsac.types.Gradient`)."""
    score = score_gradient(sample, f, q_gradient, alpha, baseline, entropy_split)
    pathwise = pathwise_gradient(sample, f, q_gradient, alpha, baseline, entropy_split)
    return ActorGradient(_mixed(score.mean, pathwise.mean), _mixed(score.log_std, pathwise.log_std), f.mean)


def _mixed(score: Tensor, pathwise: Tensor) -> Tensor:
    """Return the mix [K, B, A] of two estimates [K, B, A]."""
    half = score.shape[1] // 2
    mixed = []
    for part, others in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        of_score, of_pathwise = (each[:, others].var(0).mean(0) for each in (score, pathwise))
        weight = of_pathwise / (of_score + of_pathwise).clamp_min(torch.finfo(score.dtype).tiny)
        mixed.append(torch.lerp(pathwise[:, part], score[:, part], weight))
    return torch.cat(mixed, 1)
