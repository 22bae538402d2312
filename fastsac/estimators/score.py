"""The score-function estimator (REINFORCE on the soft advantage), with baselines.

The sample is fixed and its log-probability is weighted by f - b, with f = alpha * log_prob - min_E q::

    d/d mean    = (f - b) * eps / sigma
    d/d log_std = (f - b) * (eps^2 - 1)

The critic is evaluated forward only. See `fastsac_kernels.score_function_loss` for the baselines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsac.types import Draw, Estimate, QFunction
from fastsac_kernels import score_function_loss


def score(
    mean: Tensor, log_std: Tensor, draw: Draw, q_function: QFunction, alpha: Tensor, baseline: str | Tensor
) -> Estimate:
    """Return the score-function estimate (see `fastsac.types.Estimator`)."""
    with torch.no_grad():  # a sample that kept its graph would cancel the mean's gradient without a word
        action, log_prob = draw.sample(mean, log_std)
        q = q_function(action)
    loss = score_function_loss(mean, log_std, draw.rng, q, alpha, baseline, draw.backend)
    return Estimate(loss, log_prob, q)
