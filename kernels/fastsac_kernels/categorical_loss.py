"""The loss of critics that learn the distribution of the return over M fixed values, the atoms.

    z_j  = v_min + j * (v_max - v_min) / (M - 1)
    y_j  = reward + gamma * (1 - terminated) * (z_j - alpha * next_log_prob)
    m    = the projection of the masses softmax(next_logits)_j at y_j onto the atoms
    loss = sum_E mean_B ( -sum_k m_k * log_softmax(logits)_k )

The projection gives each mass to the two atoms beside y_j, in proportion to how near they are, and to the outer one
where y_j is beyond it (Bellemare et al. 2017, arXiv 1707.06887, algorithm 1). So atom k gets
sum_j p_j max(0, 1 - |place_j - k|), with place_j = (y_j - v_min) / (z_1 - z_0) within [0, M - 1]. Each critic learns
from its own target (as in arXiv 2512.01996), or all from the one with the smallest mean. On CUDA one Triton kernel
computes the target, the loss and the gradient, and one more multiplies it by the upstream gradient.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastsac_kernels.launch import TICKET_TAGS, Backend, use_triton
from fastsac_kernels.pathwise_loss import alpha_arguments, constant, scale_op
from fastsac_kernels.squashed_gaussian import wide

#: numbers in one piece of the projection's weights on a GPU
_PIECE = 2**23


def categorical_loss(
    logits: Tensor,
    next_logits: Tensor,
    reward: Tensor,
    terminated: Tensor,
    next_log_prob: Tensor,
    alpha: Tensor | float,
    gamma: Tensor | float,
    v_min: float,
    v_max: float,
    target: Literal["own", "smallest"],
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the scalar loss, differentiable in `logits` only, and the distributions' means q [E, B], detached.

    Args:
        logits: [E, B, M], the critics at the batch's actions.
        next_logits: [E, B, M], the target critics at the policy's next actions.
        reward: [B].
        terminated: [B], bool or uint8; never the truncated flag: the value continues after a truncation.
        next_log_prob: [B], the log-probability of those actions.
        alpha: scalar.
        gamma: discount of the next value: a number, or [B] as `replay_gather` returns it for n-step returns.
        v_min: the first atom.
        v_max: the last one.
        target: whose distribution a critic learns: its "own" target critic's, or that of the target critic with the
            "smallest" mean (the first of equals).
        backend: "auto" takes the Triton kernel for CUDA tensors, PyTorch for others.

    Raises:
        ValueError: if the shapes do not fit, v_min is not below v_max, or for another target or backend.
        TypeError: if alpha is not a number, or for a dtype that the Triton kernel does not support.
        RuntimeError: if Triton cannot run here.
    """
    if logits.dim() != 3 or next_logits.shape != logits.shape:
        found = f"{list(logits.shape)} and {list(next_logits.shape)}"
        raise ValueError(f"logits and next_logits must both be [E, B, M], got {found}")
    if 0 in logits.shape or logits.shape[2] < 2:
        raise ValueError(f"logits [E, B, M] must not be empty, with at least 2 atoms, got {list(logits.shape)}")
    if not v_min < v_max:
        raise ValueError(f"v_min must be below v_max, got {v_min} and {v_max}")
    if target not in ("own", "smallest"):
        raise ValueError(f"target must be 'own' or 'smallest', got {target!r}")
    columns = {"reward": reward, "terminated": terminated, "next_log_prob": next_log_prob}
    if isinstance(gamma, Tensor):
        columns["gamma"] = gamma = gamma.detach()
    for name, value in columns.items():
        if value.shape != logits.shape[1:2]:
            raise ValueError(f"{name} must be [B] = {list(logits.shape[1:2])}, got {list(value.shape)}")
    alpha = constant(alpha)
    if use_triton(backend, logits):
        constants = (each.detach() for each in (next_logits, reward, terminated, next_log_prob))
        discount = (gamma, 0.0) if isinstance(gamma, Tensor) else (None, gamma)
        numbers = *alpha_arguments(alpha), *discount, v_min, v_max
        loss, _, q = categorical_loss_op(logits, *constants, *numbers, target == "smallest")
        return loss, q
    logits = wide(logits)
    atoms = torch.linspace(v_min, v_max, logits.shape[2], dtype=logits.dtype, device=logits.device)
    with torch.no_grad():
        ends = terminated.bool()  # what lies behind the end counts for nothing, whatever it is
        mass = torch.where(ends[:, None], 0.0, wide(next_logits)).softmax(2)
        if target == "smallest":
            lowest = (mass @ atoms).argmin(0)
            mass = mass[lowest, torch.arange(len(lowest), device=mass.device)].expand_as(mass)
        goes_on = torch.where(ends, 0.0, gamma.to(mass.dtype) if isinstance(gamma, Tensor) else gamma)
        bonus = torch.where(ends, 0.0, alpha * next_log_prob.to(mass.dtype))
        value = reward.to(mass.dtype)[:, None] + goes_on.to(mass.dtype)[:, None] * (atoms - bonus[:, None])
        mass = _project(mass, (value - v_min) / ((v_max - v_min) / (len(atoms) - 1)))
        q = logits.softmax(2) @ atoms
    return -(mass * logits.log_softmax(2)).sum(2).mean(1).sum(), q


def _project(mass: Tensor, place: Tensor) -> Tensor:
    """Return the masses [E, B, M] at these places [B, M] on the atoms, [E, B, M].

    On a GPU a product takes the place of the scatter, which would add in a different order each time. It is in float64,
    which no setting rounds to TF32.
    """
    place = place.clamp(0.0, mass.shape[2] - 1)
    return _scatter(mass, place) if mass.device.type == "cpu" else _multiply(mass, place)


def _scatter(mass: Tensor, place: Tensor) -> Tensor:
    below = place.floor().clamp_(max=mass.shape[2] - 2)
    upper = place - below
    index = below.nan_to_num(0.0).long().expand(len(mass), -1, -1)  # NaN stays in `upper`
    onto = torch.zeros_like(mass).scatter_add_(2, index, mass * (1.0 - upper))
    return onto.scatter_add_(2, index + 1, mass * upper)


def _multiply(mass: Tensor, place: Tensor) -> Tensor:
    atoms = mass.shape[2]
    atom = torch.arange(atoms, dtype=place.dtype, device=place.device)
    rows = max(1, _PIECE // atoms**2)
    pieces = zip(torch.split(mass.transpose(0, 1), rows), torch.split(place, rows), strict=True)
    weighted = [
        torch.bmm(m.double(), (1.0 - (p[:, :, None] - atom).abs_()).clamp_(min=0.0).double()) for m, p in pieces
    ]
    return torch.cat(weighted).to(mass.dtype).transpose(0, 1)


@torch.library.custom_op(
    "fastsac_kernels::categorical_loss", mutates_args=(), device_types=("cuda", "cpu"), tags=TICKET_TAGS
)
def categorical_loss_op(
    logits: Tensor,
    next_logits: Tensor,
    reward: Tensor,
    terminated: Tensor,
    next_log_prob: Tensor,
    alpha: Tensor | None,
    alpha_value: float,
    gamma: Tensor | None,
    gamma_value: float,
    v_min: float,
    v_max: float,
    smallest: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: the loss, its gradient for the logits, [E * B * M], and q [E, B]."""
    from fastsac_kernels import categorical_loss_triton

    alpha_, gamma_ = alpha_value if alpha is None else alpha, gamma_value if gamma is None else gamma
    columns = reward, terminated, next_log_prob, alpha_, gamma_
    return categorical_loss_triton.forward(logits, next_logits, *columns, v_min, v_max, smallest)


@categorical_loss_op.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, gradient = logits.new_empty((), dtype=torch.float32), logits.new_empty(logits.numel(), dtype=torch.float32)
    return loss, gradient, logits.new_empty(logits.shape[:2], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    gradient, logits = ctx.saved_tensors
    return (scale_op(gradient, upstream, logits.dtype, [logits]).view(logits.shape), *[None] * 11)


categorical_loss_op.register_autograd(_backward, setup_context=_setup_context)
