"""The pathwise (reparameterisation) estimator, arXiv 1312.6114 and 1812.05905.

The sample moves with the parameters, u = mean + sigma * eps, so with g = dQ/da * (1 - a^2)::

    d/d mean    = 2 alpha a - g
    d/d log_std = alpha (2 a sigma eps - 1) - g sigma eps

The critic is evaluated forward and backward.
"""

from __future__ import annotations

from torch import Tensor

from fastsac.types import Estimate, QFunction
from fastsac_kernels import pathwise_loss, sample_squashed_gaussian


def pathwise(
    mean: Tensor, log_std: Tensor, noise: Tensor, q_function: QFunction, alpha: Tensor, baseline: str | Tensor
) -> Estimate:
    """Return the pathwise estimate; there is nothing for a baseline to correct (see `fastsac.types.Estimator`)."""
    action, log_prob = sample_squashed_gaussian(mean, log_std, noise)
    q = q_function(action)
    loss = pathwise_loss(log_prob, q, alpha)
    log_prob = log_prob.detach()
    return Estimate(loss, log_prob, (q.detach().amin(1) - alpha.detach() * log_prob).mean(0))
