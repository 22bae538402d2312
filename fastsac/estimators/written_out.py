"""Turns the gradient that the fused engine uses into an estimator for every other engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsac.estimators.gaussian import mean_action
from fastsac.types import ActorGradient, Draw, Estimate, QFunction, Sample


def from_gradient(
    gradient: Callable[..., ActorGradient],
    mean: Tensor,
    log_std: Tensor,
    draw: Draw,
    q_function: QFunction,
    alpha: Tensor,
    baseline: str | Tensor,
    entropy_split: float,
) -> Estimate:
    """Return the estimate with the gradient that `gradient` computes; its loss has the value of mean f."""
    with torch.no_grad():
        action, log_prob = draw.sample(mean, log_std)
        noise = draw.noise(mean)
        if isinstance(baseline, str) and baseline == "mean-action":
            baseline = mean_action(mean, log_std, draw, q_function, alpha)
    with torch.enable_grad():
        action.requires_grad_()
        q = q_function(action)
        smallest = q.amin(1)

    def q_gradient() -> Tensor:
        return torch.autograd.grad(smallest, action, torch.ones_like(smallest))[0]

    with torch.no_grad():
        sigma, spread = log_std.exp(), log_std.expand_as(noise)
        deviation = sigma * noise
        decay = (-2.0 * (mean + deviation).abs()).exp()
        sample = Sample(noise, spread, sigma.expand_as(noise), deviation, action.detach(), decay, log_prob)
        f = alpha * log_prob - smallest
        found = gradient(sample, f, q_gradient, alpha, baseline, entropy_split=entropy_split)
    return Estimate.of_gradient(mean, log_std, found, f, q.detach(), log_prob)
