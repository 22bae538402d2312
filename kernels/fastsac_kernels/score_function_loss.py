"""The actor's loss for the score-function estimator (REINFORCE on the soft advantage, with a baseline).

With u = mean + exp(log_std) * eps held fixed (the sample carries no gradient) and f = alpha * log_prob - min_E q::

    loss = mean_{K,B} [ log N(u; mean, log_std) * stopgrad(f - b) ]

    d/d mean    = (f - b) * eps / sigma
    d/d log_std = (f - b) * (eps^2 - 1)

The log-Jacobian of tanh does not depend on the parameters at fixed u, so only log N carries gradient. The expectation
is that of the pathwise gradient for every b that does not depend on the sample it corrects (Williams 1992). Baselines::

    none       0
    constant   -alpha                                     the "+1" that the derivation of the gradient leaves over
    loo        mean of f over the other K - 1 samples     unbiased, no extra network (Kool et al. 2019)
    a tensor   b(s) [B], e.g. -V(s) for a soft value V    f is close to -V, so f - b is close to 0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsac_kernels.pathwise_loss import check_loss_shapes
from fastsac_kernels.squashed_gaussian import sample_squashed_gaussian


def score_function_loss(
    mean: Tensor,
    log_std: Tensor,
    noise: Tensor,
    q: Tensor,
    alpha: Tensor | float,
    baseline: str | Tensor,
) -> Tensor:
    """Return the scalar loss, differentiable in `mean` and `log_std` only; q, alpha and the baseline are constants.

    Args:
        mean: [B, A], the Gaussian's mean before squashing.
        log_std: [B, A], the logarithm of its standard deviation.
        noise: [K, B, A], the standard normal numbers that the actions were sampled with.
        q: [K, E, B], the E critics at those actions.
        alpha: scalar.
        baseline: a name, or b(s) as a tensor [B] that is subtracted from f (so a soft value V is passed as -V).

    Raises:
        ValueError: if the shapes do not fit, the baseline's name is unknown, or ``"loo"`` gets a single sample.
    """
    with torch.no_grad():
        _, log_prob = sample_squashed_gaussian(mean, log_std, noise)
        check_loss_shapes(log_prob, q, alpha)
        f = alpha * log_prob - q.amin(1)
        advantage = f - _baseline(f, alpha, baseline)
        deviation = log_std.exp() * noise  # u - mean; taking the difference would cancel at small sigma
    z = (deviation + (mean.detach() - mean)) * torch.exp(-log_std)
    log_normal = (-0.5 * z.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)
    return (log_normal * advantage).mean()


def _baseline(f: Tensor, alpha: Tensor | float, baseline: str | Tensor) -> Tensor | float:
    """What to subtract from f [K, B]."""
    if isinstance(baseline, Tensor):
        if baseline.shape != f.shape[1:]:
            raise ValueError(f"a baseline tensor must be [B] = {list(f.shape[1:])}, got {list(baseline.shape)}")
        return baseline
    if baseline == "none":
        return 0.0
    if baseline == "constant":
        return -alpha
    if baseline == "loo":
        num_samples = f.shape[0]
        if num_samples < 2:
            raise ValueError("baseline 'loo' needs at least 2 action samples per state, got 1")
        return (f.sum(0) - f) / (num_samples - 1)
    raise ValueError(f"unknown baseline {baseline!r}; known: none, constant, loo, or a tensor [B]")
