"""Gradients of an agent's actor loss at the policy head, the reference for them, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.estimators import Choice, choose
from fastsac.train import SAC
from fastsac.types import Draw

#: the most action samples per state, and over all states, in one pass through the critics
CHUNK, ROWS = 100, 2**14
#: parts of the oracle; their spread gives its standard error
PARTS = 100
#: action samples per state for the value without lag
VALUE_SAMPLES = 1000
#: replaces a zero divisor
TINY = 1e-200


class Counted:
    """The critics as a function of the action, which counts evaluations per state: 1 forward, 1 more backward."""

    def __init__(self, q_function: Callable[[Tensor], Tensor]) -> None:
        """Count from zero."""
        self._q_function, self.evaluations = q_function, 0

    def __call__(self, action: Tensor) -> Tensor:
        """Return q [K, E, B] for actions [K, B, A]."""
        self.evaluations += len(action)
        q = self._q_function(action)
        if q.requires_grad:
            q.register_hook(lambda _: self._back(len(action)))  # type: ignore[no-untyped-call]
        return q

    def _back(self, number: int) -> None:
        self.evaluations += number


class Head:
    """Gradients of an agent's actor loss at the policy head for fixed states, and through the actor from there."""

    def __init__(self, agent: SAC, obs: Tensor, seed: int) -> None:
        """Freeze the networks' outputs for obs [B, O]."""
        self.learner = learner = agent.learner
        self.obs = learner.normalizer.obs(obs)
        self.rng = torch.Generator(obs.device).manual_seed(seed)
        self.parameters = list(learner.actor.parameters())
        self.outputs = tuple(learner.actor(self.obs))
        self.mean, self.log_std = (output.detach() for output in self.outputs)
        self.q_function = Counted(lambda action: learner._q_of_samples(self.obs, action))

    def noise(self, number: int) -> Tensor:
        """Return normal numbers [number, B, A]."""
        shape = (number, *self.mean.shape)
        return torch.randn(shape, generator=self.rng, device=self.mean.device, dtype=self.mean.dtype)

    def gradient(self, choice: Choice, baseline: str | Tensor) -> Tensor:
        """Return one estimate of the minibatch's gradient at the head, [2, B, A]."""
        mean, log_std = (each.clone().requires_grad_() for each in (self.mean, self.log_std))
        draw = Draw(self.noise(choice.num_noise), choice.num_action_samples)
        estimate = choice.estimator(mean, log_std, draw, self.q_function, self.learner.alpha, baseline)
        return torch.stack(torch.autograd.grad(estimate.loss, (mean, log_std)))

    def through(self, head: Tensor) -> Tensor:
        """Return the gradient in all of the actor's parameters, flat, for one at the head [2, B, A]."""
        found = torch.autograd.grad(self.outputs, self.parameters, list(head), retain_graph=True, allow_unused=True)
        return torch.cat([each.flatten() for each in found if each is not None])

    def at(self, name: str, head: Tensor) -> Tensor:
        """Return a gradient at the head, or its counterpart in the parameters, flat."""
        return head.flatten() if name == "head" else self.through(head)

    def chunks(self, samples: int) -> list[int]:
        """Split a number of samples into parts that fit into one pass each."""
        chunk = max(1, min(CHUNK, ROWS // len(self.obs)))
        return [chunk] * (samples // chunk) + [samples % chunk] * (samples % chunk > 0)

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return V(s) [B] from many samples."""
        total = torch.zeros_like(self.mean[:, 0])
        for chunk in self.chunks(VALUE_SAMPLES):
            action, log_prob = Draw(self.noise(chunk), chunk).sample(self.mean, self.log_std)
            total += (self.q_function(action).amin(1) - self.learner.alpha * log_prob).sum(0)
        return total / VALUE_SAMPLES


class Oracle(NamedTuple):
    """A gradient, and its standard errors along its own direction and a random one."""

    gradient: Tensor  # [n], float64
    directions: Tensor  # [2, n], of length 1
    errors: Tensor  # [2], standard errors along them


def oracles(head: Head, samples: int, seed: int = 0) -> dict[str, Oracle]:
    """Return the pathwise gradient from at least this many samples per state, at the head and in the parameters."""
    choice, per_part, parts = choose(Config()), math.ceil(samples / PARTS), list[Tensor]()
    for _ in range(PARTS):
        part = torch.zeros(2, *head.mean.shape, dtype=torch.float64, device=head.mean.device)
        for chunk in head.chunks(per_part):
            of_chunk = choice._replace(num_action_samples=chunk, num_noise=chunk)
            part += head.gradient(of_chunk, "none") * (chunk / per_part)
        parts.append(part)
    rng, found = torch.Generator().manual_seed(seed), dict[str, Oracle]()
    for name in ("head", "parameters"):
        gradient = head.at(name, torch.stack(parts).mean(0).to(head.mean.dtype)).double()
        anywhere = torch.randn(len(gradient), generator=rng, dtype=torch.float64).to(gradient.device)
        directions = torch.nn.functional.normalize(torch.stack([gradient, anywhere]), dim=1)
        along = torch.stack([directions @ head.at(name, part.to(head.mean.dtype)).double() for part in parts])
        found[name] = Oracle(gradient, directions, along.std(0) / math.sqrt(PARTS))
    return found


class Moments:
    """Statistics of an arm's estimates around the oracle's gradient; the estimates are not kept."""

    def __init__(self, truth: Oracle) -> None:
        """Start without estimates."""
        self._truth, self._off = truth, torch.zeros_like(truth.gradient)
        self._squares, self._along, self._cosines = list[Tensor](), list[Tensor](), list[Tensor]()

    def add(self, estimates: Tensor) -> None:
        """Add estimates [R, n]."""
        estimates = estimates.double()
        off = estimates - self._truth.gradient
        self._off += off.sum(0)
        self._squares.append(off.square().sum(1))
        self._along.append(off @ self._truth.directions.T)
        self._cosines.append(estimates @ self._truth.directions[0] / estimates.norm(dim=1).clamp_min(TINY))

    def statistics(self) -> dict[str, float]:
        """Return the statistics of the estimates.

        `variance` is the trace of their covariance over the gradient's squared norm, `cosine` the mean over estimates.
        `signal_to_noise` is the norm of their mean over the root of the trace; what noise adds to the squared norm is
        subtracted first, and 0 means that no signal was found. `bias_sigmas` and `bias_random_sigmas` are the mean's
        distance from the gradient, along it and along a random direction, in standard errors of both.
        """
        along, squares = torch.cat(self._along), torch.cat(self._squares)
        count, off = len(squares), self._off / len(squares)
        trace = ((squares.sum() - count * off.square().sum()) / (count - 1)).clamp_min(0.0).item()
        signal = (self._truth.gradient + off).square().sum().item() - trace / count
        errors = (along.var(0) / count + self._truth.errors.square()).sqrt()
        bias = (along.mean(0) / errors.clamp_min(TINY)).tolist()
        return {
            "variance": trace / self._truth.gradient.square().sum().item(),
            "signal_to_noise": math.sqrt(max(signal, 0.0) / max(trace, TINY)),
            "cosine": torch.cat(self._cosines).mean().item(),
            **dict(zip(("bias_sigmas", "bias_random_sigmas"), bias, strict=True)),
        }
