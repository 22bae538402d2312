"""Sampling from a tanh-squashed diagonal Gaussian, with its log-probability.

For noise eps ~ N(0, I)::

    u        = mean + exp(log_std) * eps
    action   = tanh(u)
    log_prob = sum_A [ -eps^2 / 2 - log_std - log(2 pi) / 2 - log(1 - tanh(u)^2) ]

(Haarnoja et al. 2018, arXiv 1812.05905, appendix C.) With e = exp(-2 |u|), which never overflows::

    1 - tanh(u)^2      = 4 e / (1 + e)^2
    log(1 - tanh(u)^2) = 2 (log 2 - |u| - log1p(e))

Both stay accurate for any |u|. The common ``log(1 - action^2 + 1e-6)`` is off by 0.27 at u = 7 and by 4.8 at u = 10,
and has no gradient left there to pull a saturated policy back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class _Squash(torch.autograd.Function):
    """u -> (tanh(u), log(1 - tanh(u)^2)), elementwise, with derivatives that survive saturation."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor]:
        action = torch.tanh(u)
        abs_u = u.abs()
        e = torch.exp(-2.0 * abs_u)
        ctx.save_for_backward(action, e)
        return action, 2.0 * (math.log(2.0) - abs_u - torch.log1p(e))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad_action, grad_log_jacobian = grads
        action, e = ctx.saved_tensors
        # autograd's own 1 - action^2 is exactly zero in float32 from |u| = 9 on
        grad: Tensor = grad_action * (4.0 * e / (1.0 + e) ** 2) - 2.0 * action * grad_log_jacobian
        return grad


def squash(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``tanh(u)`` and ``log(1 - tanh(u)^2)``, both of u's shape."""
    action, log_jacobian = _Squash.apply(u)  # type: ignore[no-untyped-call]
    return action, log_jacobian


def sample_squashed_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample actions in [-1, 1] and their log-probabilities, differentiable in `mean` and `log_std`.

    Args:
        mean: [B, A], the Gaussian's mean before squashing.
        log_std: [B, A], the logarithm of its standard deviation.
        noise: [K, B, A], standard normal numbers; K samples for each of the B states.

    Returns:
        ``action`` [K, B, A] in the policy's own units, and ``log_prob`` [K, B], its log-density in those units.

    Raises:
        ValueError: if the shapes do not fit.
    """
    check_sample_shapes(mean, log_std, noise)
    u = mean + log_std.exp() * noise
    action, log_jacobian = squash(u)
    log_prob = (-0.5 * noise.square() - log_std - _HALF_LOG_2PI - log_jacobian).sum(-1)
    return action, log_prob


def check_sample_shapes(mean: Tensor, log_std: Tensor, noise: Tensor) -> None:
    """Raise ValueError unless mean and log_std are [B, A] and noise is [K, B, A] with K >= 1."""
    if mean.dim() != 2 or log_std.shape != mean.shape:
        raise ValueError(f"mean and log_std must both be [B, A], got {list(mean.shape)} and {list(log_std.shape)}")
    if noise.dim() != 3 or noise.shape[1:] != mean.shape or noise.shape[0] < 1:
        raise ValueError(f"noise must be [K, B, A] with [B, A] = {list(mean.shape)}, got {list(noise.shape)}")
