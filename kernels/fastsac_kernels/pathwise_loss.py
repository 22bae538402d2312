"""The actor's loss for the pathwise (reparameterisation) estimator.

    loss = mean_{K,B} [ alpha * log_prob - min_E q ]

(Haarnoja et al. 2018, arXiv 1812.05905, eq. 9.) Its gradient reaches the policy through `log_prob` and, by way of the
action, through `q`; equal critics share it. On CUDA one Triton kernel computes the loss and both gradients, and the
backward pass is one more that multiplies them by the upstream gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsac_kernels.launch import TICKET_TAGS, Backend, use_triton
from fastsac_kernels.squashed_gaussian import wide


def pathwise_loss(log_prob: Tensor, q: Tensor, alpha: Tensor | float, backend: Backend = "auto") -> Tensor:
    """Return the scalar loss, differentiable in `log_prob` and `q`; `alpha` is taken as a constant.

    Args:
        log_prob: [K, B], log-probability of K action samples for each of B states.
        q: [K, E, B], the E critics at those actions.
        alpha: scalar.
        backend: "auto" takes the Triton kernel for CUDA tensors, PyTorch for others.

    Raises:
        ValueError: if the shapes do not fit, or the backend is unknown.
        TypeError: if alpha is not a number, or for a dtype that the Triton kernel does not support.
        RuntimeError: if Triton cannot run here.
    """
    check_loss_shapes(list(log_prob.shape), q)
    alpha = constant(alpha)
    if use_triton(backend, q):
        loss: Tensor = pathwise_loss_op(log_prob, q, *alpha_arguments(alpha))[0]
        return loss
    return (alpha * wide(log_prob) - wide(q).amin(1)).mean()


def constant(alpha: Tensor | float) -> Tensor | float:
    """Return the temperature as a detached scalar tensor or a number.

    Raises:
        ValueError: for a tensor of another size.
        TypeError: for anything else.
    """
    if not isinstance(alpha, Tensor | float | int):
        raise TypeError(f"alpha must be a number or a scalar tensor, got {alpha!r}")
    if not isinstance(alpha, Tensor):
        return float(alpha)
    if alpha.numel() != 1:
        raise ValueError(f"alpha must be a scalar, got {list(alpha.shape)}")
    return alpha.detach().reshape(())


def check_loss_shapes(shape: list[int], q: Tensor) -> None:
    """For log_prob's shape: raise ValueError unless log_prob is [K, B] and q is [K, E, B]."""
    if len(shape) != 2 or q.dim() != 3 or list(q.shape[::2]) != shape:
        raise ValueError(f"log_prob must be [K, B] and q [K, E, B], got {shape} and {list(q.shape)}")
    if 0 in q.shape:
        raise ValueError(f"q [K, E, B] must not be empty, got {list(q.shape)}")


def alpha_arguments(alpha: Tensor | float) -> tuple[Tensor | None, float]:
    """Return the temperature as the registered operators take it: a device tensor, or else a number."""
    return (alpha, 0.0) if isinstance(alpha, Tensor) else (None, alpha)


@torch.library.custom_op("fastsac_kernels::scale", mutates_args=(), device_types=("cuda", "cpu"))
def scale_op(gradient: Tensor, upstream: Tensor, dtype: torch.dtype, leaves: list[Tensor]) -> Tensor:
    """One launch: a loss's gradient [n], saved by its forward pass, times the upstream gradient, a scalar.

    The leaves are not looked at; they make autograd refuse a second derivative, of which the saved gradient knows
    nothing.
    """
    from fastsac_kernels import scale_triton

    return scale_triton.backward(gradient, upstream, dtype)


@scale_op.register_fake
def _(gradient: Tensor, upstream: Tensor, dtype: torch.dtype, *_: Any) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


@torch.library.custom_op(
    "fastsac_kernels::pathwise_loss", mutates_args=(), device_types=("cuda", "cpu"), tags=TICKET_TAGS
)
def pathwise_loss_op(log_prob: Tensor, q: Tensor, alpha: Tensor | None, alpha_value: float) -> tuple[Tensor, Tensor]:
    """One launch: the loss, and the gradients of q as [E, K, B] and of log_prob as [K, B] in one tensor."""
    from fastsac_kernels import pathwise_loss_triton

    return pathwise_loss_triton.forward(log_prob, q, alpha_value if alpha is None else alpha)


@pathwise_loss_op.register_fake
def _(log_prob: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    gradient = q.new_empty(q.numel() + log_prob.numel(), dtype=torch.float32)
    return q.new_empty((), dtype=torch.float32), gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:2])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
    gradient, log_prob, q = ctx.saved_tensors
    scaled = scale_op(gradient, upstream, torch.promote_types(log_prob.dtype, q.dtype), [log_prob, q])
    grad_q, grad_log_prob = scaled.split([q.numel(), log_prob.numel()])
    grad_q = grad_q.view(q.transpose(0, 1).shape).transpose(0, 1)
    return grad_log_prob.view(log_prob.shape).to(log_prob.dtype), grad_q.to(q.dtype), None, None


pathwise_loss_op.register_autograd(_backward, setup_context=_setup_context)
