"""Measure-valued derivatives (arXiv 2107.09359; Mohamed et al. 2020, arXiv 1906.10652, section 6).

The derivative of a Gaussian with respect to one coordinate's parameters is a difference of two densities, so the
gradient of E[f] is a difference of two expectations, with the other coordinates unchanged. With eps, and its coordinate
j replaced by +-W (W Rayleigh) or M (double-sided Maxwell)::

    d/d mean_j    = (f(eps_j = W) - f(eps_j = -W)) / (sigma_j sqrt(2 pi))
    d/d log_std_j = f(eps_j = M) - f(eps)

All of them come from three normal numbers e1, e2, e3: eps = e3, W^2 = e1^2 + e2^2, M = sign(e3) |e|, a coupling in
which f(M) and f(eps) move together. This takes 3 A + 1 evaluations of the critic, but not its gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsac.estimators.gaussian import log_normal
from fastsac.types import ActorGradient, Draw, Estimate, QFunction


@torch.no_grad()
def _perturbed(noise: Tensor) -> Tensor:
    """Return eps, and eps with W, -W and M in each coordinate: [3 A + 1, K, B, A] for noise [3 K, B, A]."""
    first, second, eps = noise.chunk(3)
    radius = (first.square() + second.square()).sqrt()
    maxwell = torch.copysign((first.square() + second.square() + eps.square()).sqrt(), eps)
    size = noise.shape[-1]
    coordinate = torch.eye(size, dtype=torch.bool, device=noise.device).view(size, 1, 1, size)
    return torch.cat([eps.unsqueeze(0), *(torch.where(coordinate, new, eps) for new in (radius, -radius, maxwell))])


def measure_valued(
    mean: Tensor,
    log_std: Tensor,
    draw: Draw,
    q_function: QFunction,
    alpha: Tensor,
    baseline: str | Tensor,
    entropy_split: float = 0.0,
) -> Estimate:
    """Return the estimate (see `fastsac.types.Estimator`); `draw` has three normal vectors for each sample."""
    samples, (batch, size) = draw.num_samples, mean.shape
    with torch.no_grad():
        noise = _perturbed(draw.noise(mean, 3 * samples)).flatten(0, 1)
        action, log_prob = Draw(noise, len(noise), draw.backend).sample(mean, log_std)
        q = q_function(action)
        f = alpha * (log_prob - (1.0 - entropy_split) * log_normal(noise, log_std)) - q.amin(1)
        at_eps, *others = torch.split(f.view(3 * size + 1, samples, batch), [1, size, size, size])
        plus, minus, maxwell = (each.permute(1, 2, 0) for each in others)  # [K, B, A]
        grad_mean = (plus - minus) / (math.sqrt(2.0 * math.pi) * log_std.exp())
        grad_log_std = maxwell - at_eps.permute(1, 2, 0) - alpha * (1.0 - entropy_split)
    log_prob, q = log_prob[:samples], q[:samples]
    found = ActorGradient(grad_mean, grad_log_std, f.mean)
    return Estimate.of_gradient(mean, log_std, found, alpha * log_prob - q.amin(1), q, log_prob)
