"""The pathwise (reparameterisation) estimator, arXiv 1312.6114 and 1812.05905.

The sample moves with the parameters, u = mean + sigma * eps, so with g = dQ/da * (1 - a^2)::

    d/d mean    = 2 alpha a - g
    d/d log_std = alpha (2 a sigma eps - 1) - g sigma eps

The critic is evaluated forward and backward.
"""

from __future__ import annotations

from torch import Tensor

from fastsac.types import Draw, Estimate, QFunction
from fastsac_kernels import pathwise_loss


def pathwise(
    mean: Tensor, log_std: Tensor, draw: Draw, q_function: QFunction, alpha: Tensor, baseline: str | Tensor
) -> Estimate:
    """Return the pathwise estimate; there is nothing for a baseline to correct (see `fastsac.types.Estimator`)."""
    action, log_prob = draw.sample(mean, log_std)
    q = q_function(action)
    loss = pathwise_loss(log_prob, q, alpha, draw.backend)
    return Estimate(loss, log_prob.detach(), q.detach())
