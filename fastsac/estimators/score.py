"""The score-function estimator (REINFORCE on the soft advantage), with baselines.

The sample is fixed and its log-probability is weighted by f - b, with f = alpha * log_prob - min_E q::

    d/d mean    = (f - b) * eps / sigma
    d/d log_std = (f - b) * (eps^2 - 1)

The critic is evaluated forward only. See `fastsac_kernels.score_function_loss` for the baselines, and
`fastsac.estimators.gaussian.mean_action_baseline` for "mean-action". With `entropy_split` lambda < 1, f has only that
share of log N, and the rest enters by the exact gradient of the Gaussian's entropy: -alpha (1 - lambda) for log_std.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsac.estimators.gaussian import log_normal, mean_action, shifted
from fastsac.types import ActorGradient, Draw, Estimate, QFunction, Sample
from fastsac_kernels import score_function_loss
from fastsac_kernels.score_function_loss import baseline_values


def score(
    mean: Tensor,
    log_std: Tensor,
    draw: Draw,
    q_function: QFunction,
    alpha: Tensor,
    baseline: str | Tensor,
    entropy_split: float = 1.0,
) -> Estimate:
    """Return the score-function estimate (see `fastsac.types.Estimator`)."""
    with torch.no_grad():  # a sample that kept its graph would silently cancel the mean's gradient
        action, log_prob = draw.sample(mean, log_std)
        q = q_function(action)
        if isinstance(baseline, str) and baseline == "mean-action":
            baseline = mean_action(mean, log_std, draw, q_function, alpha)
        baseline, weighed = shifted(baseline, log_std, alpha, entropy_split), log_prob
        if entropy_split != 1.0:
            weighed = log_prob - (1.0 - entropy_split) * log_normal(draw.noise(mean), log_std)
    loss = score_function_loss(mean, log_std, draw.rng, q, alpha, baseline, draw.backend, weighed)
    if entropy_split != 1.0:
        loss = loss - alpha.detach() * (1.0 - entropy_split) * log_std.sum(-1).mean()
    return Estimate(loss, log_prob, q)


def score_gradient(
    sample: Sample,
    f: Tensor,
    q_gradient: Callable[[], Tensor],
    alpha: Tensor,
    baseline: str | Tensor,
    entropy_split: float = 1.0,
) -> ActorGradient:
    """Return the same, written out (see `fastsac.types.Gradient`); no backward pass through the critics."""
    exact = alpha * (1.0 - entropy_split)
    if entropy_split != 1.0:
        f = f - exact * log_normal(sample.noise, sample.log_std)
        baseline = shifted(baseline, sample.log_std[0], alpha, entropy_split)
    advantage = f - baseline_values(f, alpha, baseline)
    weight = advantage.unsqueeze(-1)
    grad_mean = (sample.noise / sample.sigma).mul_(weight)
    grad_log_std = sample.noise.square().sub_(1.0).mul_(weight)
    if entropy_split != 1.0:
        grad_log_std.sub_(exact)

    def loss() -> Tensor:
        value = (log_normal(sample.noise, sample.log_std) * advantage).mean()
        return value if entropy_split == 1.0 else value - exact * sample.log_std.sum(-1).mean()

    return ActorGradient(grad_mean, grad_log_std, loss)
