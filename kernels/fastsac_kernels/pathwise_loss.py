"""The actor's loss for the pathwise (reparameterisation) estimator.

    loss = mean_{K,B} [ alpha * log_prob - min_E q ]

(Haarnoja et al. 2018, arXiv 1812.05905, eq. 9.) Its gradient reaches the policy through `log_prob` and, by way of the
action, through `q`.
"""

from __future__ import annotations

from torch import Tensor


def pathwise_loss(log_prob: Tensor, q: Tensor, alpha: Tensor | float) -> Tensor:
    """Return the scalar loss, differentiable in `log_prob` and `q`; `alpha` is taken as a constant.

    Args:
        log_prob: [K, B], log-probability of K action samples for each of B states.
        q: [K, E, B], the E critics at those actions.
        alpha: scalar.

    Raises:
        ValueError: if the shapes do not fit.
    """
    check_loss_shapes(log_prob, q, alpha)
    alpha = alpha.detach() if isinstance(alpha, Tensor) else alpha
    return (alpha * log_prob - q.amin(1)).mean()


def check_loss_shapes(log_prob: Tensor, q: Tensor, alpha: Tensor | float) -> None:
    """Raise ValueError unless log_prob is [K, B], q is [K, E, B] and alpha is a scalar."""
    if isinstance(alpha, Tensor) and alpha.numel() != 1:
        raise ValueError(f"alpha must be a scalar, got {list(alpha.shape)}")
    if log_prob.dim() != 2 or q.dim() != 3 or q.shape[::2] != log_prob.shape:
        raise ValueError(f"log_prob must be [K, B] and q [K, E, B], got {list(log_prob.shape)} and {list(q.shape)}")
