"""The critics' loss: squared error to the soft Bellman target.

    y    = reward + gamma * (1 - terminated) * (min_E next_q - alpha * next_log_prob)
    loss = sum_E mean_B (q - y)^2

(Haarnoja et al. 2018, arXiv 1812.05905, eq. 5 and 7, with the minimum of Fujimoto et al. 2018.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def td_loss(
    q: Tensor,
    reward: Tensor,
    terminated: Tensor,
    next_q: Tensor,
    next_log_prob: Tensor,
    alpha: Tensor | float,
    gamma: float,
) -> Tensor:
    """Return the scalar loss, differentiable in `q` only.

    Args:
        q: [E, B], the critics at the batch's actions.
        reward: [B].
        terminated: [B], bool or uint8; never the truncated flag, behind which the value goes on.
        next_q: [E, B], the target critics at the policy's next actions.
        next_log_prob: [B], the log-probability of those actions.
        alpha: scalar.
        gamma: discount per step.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if q.dim() != 2 or next_q.shape != q.shape:
        raise ValueError(f"q and next_q must both be [E, B], got {list(q.shape)} and {list(next_q.shape)}")
    for name, value in (("reward", reward), ("terminated", terminated), ("next_log_prob", next_log_prob)):
        if value.shape != q.shape[1:]:  # a [B, 1] here would broadcast to [B, B] without a word
            raise ValueError(f"{name} must be [B] = {list(q.shape[1:])}, got {list(value.shape)}")
    with torch.no_grad():
        next_value = next_q.amin(0) - alpha * next_log_prob
        target = reward + gamma * torch.where(terminated.bool(), 0.0, next_value)
    return (q - target).square().mean(1).sum()
