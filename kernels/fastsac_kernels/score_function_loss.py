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

On CUDA one Triton kernel draws the noise again and computes the advantage, the loss and both gradients (and log_prob,
unless it is passed in); one more multiplies them by the upstream gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsac_kernels.launch import TICKET_TAGS, Backend, use_triton
from fastsac_kernels.pathwise_loss import alpha_arguments, check_loss_shapes, constant, scale_op
from fastsac_kernels.philox import PhiloxState
from fastsac_kernels.squashed_gaussian import (
    check_sample_shapes,
    noise_of,
    rng_arguments,
    sample_squashed_gaussian,
    wide,
)


def score_function_loss(
    mean: Tensor,
    log_std: Tensor,
    rng: PhiloxState | Tensor,
    q: Tensor,
    alpha: Tensor | float,
    baseline: str | Tensor,
    backend: Backend = "auto",
    log_prob: Tensor | None = None,
) -> Tensor:
    """Return the scalar loss, differentiable in `mean` and `log_std` only; q, alpha and the baseline are constants.

    Args:
        mean: [B, A], the Gaussian's mean before squashing.
        log_std: [B, A], the logarithm of its standard deviation.
        rng: the generator as it was when the actions were sampled (not yet advanced; this cannot be checked), or the
            noise [K, B, A] that they were sampled with.
        q: [K, E, B], the E critics at those actions.
        alpha: scalar.
        baseline: a name, or b(s) as a tensor [B] that is subtracted from f (so a soft value V is passed as -V).
        backend: "auto" takes the Triton kernel for CUDA tensors, PyTorch for others.
        log_prob: [K, B], as `sample_squashed_gaussian` returned it; a constant. Without it, it is computed again.

    Raises:
        ValueError: if the shapes do not fit, the baseline's name is unknown, ``"loo"`` gets a single sample, or for
            another backend.
        TypeError: for an `rng` or alpha of another type, or a dtype that the Triton kernel does not support.
        RuntimeError: if Triton cannot run here.
    """
    check_sample_shapes(mean, log_std, rng)
    num_samples = rng.shape[0] if isinstance(rng, Tensor) else q.shape[0] if q.dim() else 0
    check_loss_shapes([num_samples, mean.shape[0]] if log_prob is None else list(log_prob.shape), q)
    if list(q.shape[::2]) != [num_samples, mean.shape[0]]:
        raise ValueError(f"q must be [K, E, B] with [K, B] = {[num_samples, mean.shape[0]]}, got {list(q.shape)}")
    alpha = constant(alpha)
    log_prob = None if log_prob is None else log_prob.detach()
    _check_baseline(baseline, num_samples, mean.shape[0])
    if use_triton(backend, mean):
        name, value = ("tensor", baseline.detach()) if isinstance(baseline, Tensor) else (baseline, None)
        arguments = *rng_arguments(rng), q.detach(), *alpha_arguments(alpha), name, value, log_prob
        loss: Tensor = score_function_loss_op(mean, log_std, *arguments)[0]
        return loss
    mean, log_std = wide(mean), wide(log_std)
    with torch.no_grad():
        noise = noise_of(rng, (num_samples, *mean.shape), mean.dtype)
        if log_prob is None:
            _, log_prob = sample_squashed_gaussian(mean, log_std, noise, backend="reference")
        f = alpha * log_prob - wide(q).amin(1)
        advantage = f - baseline_values(f, alpha, baseline)
        deviation = log_std.exp() * noise  # u - mean; taking the difference would cancel at small sigma
    z = (deviation + (mean.detach() - mean)) * torch.exp(-log_std)
    log_normal = (-0.5 * z.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)
    return (log_normal * advantage).mean()


def _check_baseline(baseline: str | Tensor, num_samples: int, batch: int) -> None:
    if isinstance(baseline, Tensor):
        if list(baseline.shape) != [batch]:
            raise ValueError(f"a baseline tensor must be [B] = {[batch]}, got {list(baseline.shape)}")
    elif baseline not in ("none", "constant", "loo"):
        raise ValueError(f"unknown baseline {baseline!r}; known: none, constant, loo, or a tensor [B]")
    elif baseline == "loo" and num_samples < 2:
        raise ValueError("baseline 'loo' needs at least 2 action samples per state, got 1")


def baseline_values(f: Tensor, alpha: Tensor | float, baseline: str | Tensor) -> Tensor | float:
    """Return what to subtract from f [K, B]."""
    if isinstance(baseline, Tensor):
        return baseline.to(f.dtype)
    if baseline == "constant":
        return -alpha
    return (f.sum(0) - f) / (f.shape[0] - 1) if baseline == "loo" else 0.0


@torch.library.custom_op(
    "fastsac_kernels::score_function_loss", mutates_args=(), device_types=("cuda", "cpu"), tags=TICKET_TAGS
)
def score_function_loss_op(
    mean: Tensor,
    log_std: Tensor,
    rng: Tensor,
    stream: int,
    q: Tensor,
    alpha: Tensor | None,
    alpha_value: float,
    baseline: str,
    baseline_value: Tensor | None,
    log_prob: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One launch: the loss, and its gradients for mean [B, A] and log_std [B, A] in one tensor."""
    from fastsac_kernels import score_function_loss_triton

    alpha_ = alpha_value if alpha is None else alpha
    arguments = q, alpha_, baseline, baseline_value, log_prob
    return score_function_loss_triton.forward(mean, log_std, rng, stream, *arguments)


@score_function_loss_op.register_fake
def _(mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return mean.new_empty((), dtype=torch.float32), mean.new_empty(2 * mean.numel(), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:2])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
    gradient, mean, log_std = ctx.saved_tensors
    dtype = torch.promote_types(mean.dtype, log_std.dtype)
    scaled = scale_op(gradient, upstream, dtype, [mean, log_std]).view(2, *mean.shape)
    return (scaled[0].to(mean.dtype), scaled[1].to(log_std.dtype), *[None] * 8)


score_function_loss_op.register_autograd(_backward, setup_context=_setup_context)
