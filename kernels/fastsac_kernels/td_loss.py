"""The critics' loss: squared error to the soft Bellman target.

    y    = reward + gamma * (1 - terminated) * (min_E next_q - alpha * next_log_prob)
    loss = sum_E mean_B (q - y)^2

(Haarnoja et al. 2018, arXiv 1812.05905, eq. 5 and 7, with the minimum of Fujimoto et al. 2018.) With n-step returns
gamma differs from transition to transition. On CUDA one Triton kernel computes the target, the loss and the gradient,
and one more multiplies it by the upstream gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsac_kernels.launch import TICKET_TAGS, Backend, use_triton
from fastsac_kernels.pathwise_loss import alpha_arguments, constant, scale_op
from fastsac_kernels.squashed_gaussian import wide


def td_loss(
    q: Tensor,
    reward: Tensor,
    terminated: Tensor,
    next_q: Tensor,
    next_log_prob: Tensor,
    alpha: Tensor | float,
    gamma: Tensor | float,
    backend: Backend = "auto",
) -> Tensor:
    """Return the scalar loss, differentiable in `q` only.

    Args:
        q: [E, B], the critics at the batch's actions.
        reward: [B].
        terminated: [B], bool or uint8; never the truncated flag: the value continues after a truncation.
        next_q: [E, B], the target critics at the policy's next actions.
        next_log_prob: [B], the log-probability of those actions.
        alpha: scalar.
        gamma: discount of the next value: a number, or [B] as `replay_gather` returns it for n-step returns.
        backend: "auto" takes the Triton kernel for CUDA tensors, PyTorch for others.

    Raises:
        ValueError: if the shapes do not fit, or the backend is unknown.
        TypeError: if alpha is not a number, or for a dtype that the Triton kernel does not support.
        RuntimeError: if Triton cannot run here.
    """
    if q.dim() != 2 or next_q.shape != q.shape:
        raise ValueError(f"q and next_q must both be [E, B], got {list(q.shape)} and {list(next_q.shape)}")
    if 0 in q.shape:
        raise ValueError(f"q [E, B] must not be empty, got {list(q.shape)}")
    columns = {"reward": reward, "terminated": terminated, "next_log_prob": next_log_prob}
    if isinstance(gamma, Tensor):
        columns["gamma"] = gamma = gamma.detach()
    for name, value in columns.items():
        if value.shape != q.shape[1:]:  # a [B, 1] here would broadcast to [B, B] silently
            raise ValueError(f"{name} must be [B] = {list(q.shape[1:])}, got {list(value.shape)}")
    alpha = constant(alpha)
    if use_triton(backend, q):
        constants = (each.detach() for each in (reward, terminated, next_q, next_log_prob))
        discount = (gamma, 0.0) if isinstance(gamma, Tensor) else (None, gamma)
        loss: Tensor = td_loss_op(q, *constants, *alpha_arguments(alpha), *discount)[0]
        return loss
    with torch.no_grad():
        next_value = wide(next_q).amin(0) - alpha * wide(next_log_prob)
        gamma = gamma.to(next_value.dtype) if isinstance(gamma, Tensor) else gamma
        target = reward.to(next_value.dtype) + gamma * torch.where(terminated.bool(), 0.0, next_value)
    return (wide(q) - target).square().mean(1).sum()


@torch.library.custom_op("fastsac_kernels::td_loss", mutates_args=(), device_types=("cuda", "cpu"), tags=TICKET_TAGS)
def td_loss_op(
    q: Tensor,
    reward: Tensor,
    terminated: Tensor,
    next_q: Tensor,
    next_log_prob: Tensor,
    alpha: Tensor | None,
    alpha_value: float,
    gamma: Tensor | None,
    gamma_value: float,
) -> tuple[Tensor, Tensor]:
    """One launch: the loss, and its gradient for q, [E * B]."""
    from fastsac_kernels import td_loss_triton

    alpha_, gamma_ = alpha_value if alpha is None else alpha, gamma_value if gamma is None else gamma
    return td_loss_triton.forward(q, reward, terminated, next_q, next_log_prob, alpha_, gamma_)


@td_loss_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((), dtype=torch.float32), q.new_empty(q.numel(), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
    gradient, q = ctx.saved_tensors
    return (scale_op(gradient, upstream, q.dtype, [q]).view(q.shape), *[None] * 8)


td_loss_op.register_autograd(_backward, setup_context=_setup_context)
