"""The pathwise (reparameterisation) estimator, arXiv 1312.6114 and 1812.05905.

The sample moves with the parameters, u = mean + sigma * eps, so with g = dQ/da * (1 - a^2)::

    d/d mean    = 2 alpha a - g
    d/d log_std = alpha (2 a sigma eps - 1) - g sigma eps

The critic is evaluated forward and backward. Here log N, the Gaussian's part of log_prob, has its exact gradient, that
of minus its entropy. With `entropy_split` lambda, a share of it is differentiated through the sample alone, which adds
-alpha lambda eps / sigma and -alpha lambda (eps^2 - 1), whose expectation is zero. lambda = 1 is "sticking the landing"
(arXiv 1703.09194): its noise vanishes where the policy is proportional to exp(Q / alpha).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastsac.types import ActorGradient, Draw, Estimate, QFunction, Sample
from fastsac_kernels import pathwise_loss, score_function_loss


def pathwise(
    mean: Tensor,
    log_std: Tensor,
    draw: Draw,
    q_function: QFunction,
    alpha: Tensor,
    baseline: str | Tensor,
    entropy_split: float = 0.0,
) -> Estimate:
    """Return the pathwise estimate; there is nothing for a baseline to correct (see `fastsac.types.Estimator`)."""
    action, log_prob = draw.sample(mean, log_std)
    q = q_function(action)
    loss = pathwise_loss(log_prob, q, alpha, draw.backend)
    if entropy_split:
        # alpha * log N at fixed samples: the score function's loss for an advantage of alpha
        constant = log_prob.new_ones(log_prob.shape), q.new_zeros(log_prob.shape[0], 1, log_prob.shape[1])
        score = score_function_loss(mean, log_std, draw.rng, constant[1], alpha, "none", draw.backend, constant[0])
        loss = loss - entropy_split * (score - score.detach())
    return Estimate(loss, log_prob.detach(), q.detach())


def pathwise_gradient(
    sample: Sample,
    f: Tensor,
    q_gradient: Callable[[], Tensor],
    alpha: Tensor,
    baseline: str | Tensor,
    entropy_split: float = 0.0,
) -> ActorGradient:
    """Return the same, written out (see `fastsac.types.Gradient`); 1 - a^2 is 4 e / (1 + e)^2."""
    one_plus_e = sample.decay + 1.0
    minus_g = (-4.0 * sample.decay).div_(one_plus_e).div_(one_plus_e).mul_(q_gradient())
    grad_mean = minus_g.addcmul_(alpha, sample.action, value=2.0)
    grad_log_std = (grad_mean * sample.deviation).sub_(alpha)
    if entropy_split:
        share = alpha * entropy_split
        grad_mean.sub_(share * sample.noise / sample.sigma)
        grad_log_std.sub_(share * (sample.noise.square() - 1.0))
    return ActorGradient(grad_mean, grad_log_std, f.mean)
