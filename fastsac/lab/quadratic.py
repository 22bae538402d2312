"""A problem with known answers: a Gaussian policy without squashing, and a quadratic critic.

With Q(u) = q0 - (u - c)' H (u - c) / 2 and u = mean + D eps, D = diag(sigma), f is quadratic in eps:
f = E[f] + w' eps + eps' M eps - tr M, with w = D H (mean - c) and M = (D H D - lambda alpha I) / 2, lambda being the
entropy split. So every moment of every estimator is known (`closed_form`).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastsac.config import AS_PRINTED
from fastsac.estimators import ESTIMATORS, Choice
from fastsac.lab.arms import Arm
from fastsac.types import Draw

ALPHA = torch.tensor(0.2, dtype=torch.float64)
#: gradient estimates at a time
ROWS = 50_000
#: the most gradient estimates
MOST = 4_000_000


class Moments(NamedTuple):
    """Moments of a gradient estimate in (mean, log_std), [2 A] each."""

    mean: Tensor
    variance: Tensor


class Quadratic(NamedTuple):
    """The problem: a Gaussian policy and a quadratic critic."""

    mean: Tensor  # [A]
    log_std: Tensor  # [A]
    H: Tensor  # [A, A]
    c: Tensor  # [A]
    q0: float = 1.7

    @classmethod
    def random(cls, seed: int, dimension: int, distance: float, sigma: float) -> Quadratic:
        """Return a problem of this size, with the mean at a distance from the optimum and deviations around sigma."""
        rng = torch.Generator().manual_seed(seed)
        normal = functools.partial(torch.randn, generator=rng, dtype=torch.float64)
        root = normal(dimension, dimension)
        H = root @ root.T / dimension + 0.5 * torch.eye(dimension, dtype=torch.float64)
        c, direction = 0.3 * normal(dimension), normal(dimension)
        log_std = math.log(sigma) + 0.2 * normal(dimension)
        return cls(c + distance * direction / direction.norm(), log_std, H, c)

    def q_function(self, action: Tensor) -> Tensor:
        """Return q [K, 1, B]; it undoes the squashing, so that alpha log_prob - q is alpha log N - Q."""
        d = torch.atanh(action) - self.c
        q = self.q0 - 0.5 * torch.einsum("...i,ij,...j", d, self.H, d) - ALPHA * torch.log1p(-action.square()).sum(-1)
        return q.unsqueeze(1)

    def terms(self, split: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return w [A], M [A, A] and E[f], with a share `split` of log N in f."""
        sigma, size = self.log_std.exp(), len(self.mean)
        DHD = sigma[:, None] * self.H * sigma
        w = sigma * (self.H @ (self.mean - self.c))
        M = 0.5 * (DHD - split * ALPHA * torch.eye(size, dtype=torch.float64))
        d = self.mean - self.c
        log_normal = -self.log_std.sum() - 0.5 * size * (1.0 + math.log(2.0 * math.pi))
        expected = ALPHA * split * log_normal - self.q0 + 0.5 * (d @ self.H @ d + DHD.diag().sum())
        return w, M, expected

    def gradient(self) -> Tensor:
        """Return the gradient of E[f] in (mean, log_std), [2 A]."""
        w, M, _ = self.terms(0.0)
        return torch.cat([w * torch.exp(-self.log_std), 2.0 * M.diag() - ALPHA])

    def value(self) -> Tensor:
        """Return the soft value V, a scalar."""
        return -self.terms(1.0)[2]


def closed_form(problem: Quadratic, choice: Choice, name: str) -> Moments | None:
    """Return the moments of an estimator's gradient, or None where they are not known.

    The mean of K independent samples has 1 / K of one sample's variance; `loo` makes the samples dependent.
    """
    split = 1.0 if choice.entropy_split is None else choice.entropy_split
    w, M, expected = problem.terms(split)
    precision = torch.exp(-2.0 * problem.log_std)
    mean = problem.gradient()
    m, m2, samples = M.diag(), (M @ M).diag(), choice.num_action_samples
    pairs = samples / 2 if ESTIMATORS[name].pairs else samples
    off = m2 - m.square()
    if name in ("pathwise", "pathwise-stl"):
        variance = torch.cat([4 * m2 * precision, w**2 + 4 * m**2 + 4 * m2]) / samples
    elif name == "pathwise-antithetic":
        variance = torch.cat([torch.zeros_like(w), 4 * m**2 + 4 * m2]) / pairs
    elif name == "measure-valued":
        of_mean = (4 / math.pi * (w**2 + 4 * off) - w**2) * precision
        variance = torch.cat([of_mean, w**2 + 4 * off + 4 * m**2]) / samples
    elif name == "score":
        beta = (
            torch.zeros((), dtype=torch.float64) if choice.baseline == "loo" else expected - _baseline(problem, choice)
        )
        variance = _score(beta, w, M, precision) / samples
        if choice.baseline == "loo":
            of_f = w.square().sum() + 2 * M.square().sum()
            variance += _others(mean + _exact(w, split), of_f, precision) / (samples * (samples - 1))
    elif name == "score-antithetic":
        loo = choice.baseline == "loo"
        beta = 0.0 * expected if loo else expected - _baseline(problem, choice)
        odd = (w.square().sum() + w**2) * precision
        even = _score(beta, torch.zeros_like(w), M, precision)[len(w) :]
        if loo:  # the mean's gradient has no baseline left in it; log_std's has those of the other pairs
            of_even = 2 * M.square().sum()
            even = even + _others(mean + _exact(w, split), of_even, precision)[len(w) :] / (pairs - 1)
        variance = torch.cat([odd, even]) / pairs
    else:
        return None
    return Moments(mean, variance)


def _exact(w: Tensor, split: float) -> Tensor:
    """Return what the exact gradient of the entropy takes from the sampled part, [2 A]."""
    return torch.cat([torch.zeros_like(w), ALPHA * (1.0 - split) * torch.ones_like(w)])


def _others(sampled: Tensor, of_f: Tensor, precision: Tensor) -> Tensor:
    """Return g^2 + Var[f] Var[score]: what the baseline's own noise adds, times K (K - 1)."""
    return sampled.square() + of_f * torch.cat([precision, torch.full_like(precision, 2.0)])


def _score(beta: Tensor, w: Tensor, M: Tensor, precision: Tensor) -> Tensor:
    """Return the variance of one sample of the score function, with beta = E[f] - b."""
    m, m2, frobenius, ww = M.diag(), (M @ M).diag(), M.square().sum(), w.square().sum()
    of_mean = (beta**2 + 4 * beta * m + ww + w**2 + 2 * frobenius + 8 * m2) * precision
    return torch.cat([of_mean, 2 * beta**2 + 16 * beta * m + 2 * ww + 8 * w**2 + 4 * frobenius + 20 * m**2 + 32 * m2])


def _baseline(problem: Quadratic, choice: Choice) -> Tensor:
    """Return b for an f with the choice's share of log N: as the estimators shift it."""
    split = 1.0 if choice.entropy_split is None else choice.entropy_split
    if choice.baseline in ("none", "constant"):
        return torch.zeros(()) if choice.baseline == "none" else -ALPHA
    if choice.baseline == "mean-action":
        d, size = problem.mean - problem.c, len(problem.mean)
        log_normal = -problem.log_std.sum() - 0.5 * size * (1.0 + math.log(2.0 * math.pi))
        return ALPHA * split * log_normal - problem.q0 + 0.5 * d @ problem.H @ d
    entropy = problem.log_std.sum() + 0.5 * len(problem.mean) * (1.0 + math.log(2.0 * math.pi))
    return choice.value_sign * problem.value() + ALPHA * (1.0 - split) * entropy


class Measured(NamedTuple):
    """Sample moments of a gradient estimate, [2 A] each, with their standard errors."""

    mean: Tensor
    mean_error: Tensor
    variance: Tensor
    variance_error: Tensor

    @property
    def trace(self) -> float:
        """The sum of the variances."""
        return self.variance.sum().item()


def measure(problem: Quadratic, choice: Choice, num_samples: int, seed: int, error: float = math.inf) -> Measured:
    """Return the moments of gradient estimates, each from its own noise.

    Args:
        problem: the problem to measure on.
        choice: the estimator.
        num_samples: the smallest number of estimates.
        seed: of the noise.
        error: more estimates are made until the trace of the covariance has this relative standard error, up to `MOST`.
    """
    rng, size, parts = torch.Generator().manual_seed(seed), len(problem.mean), list[Tensor]()
    while True:
        while sum(map(len, parts)) < num_samples:
            left = num_samples - sum(map(len, parts))
            rows = -(-left // -(-left // ROWS))  # even batches: `mix` has no weights where a batch is one row
            noise = torch.randn(choice.num_noise, rows, size, generator=rng, dtype=torch.float64)
            parts.append(gradients(problem, choice, noise))
        found = torch.cat(parts)
        mean = found.mean(0)
        squares = (found - mean).square()
        variance, spread, root = squares.mean(0), squares.std(0), math.sqrt(num_samples)
        off = squares.sum(1).std().item() / root / max(variance.sum().item(), 1e-300)
        if off <= error or num_samples >= MOST:
            return Measured(mean, variance.sqrt() / root, variance, spread / root)
        num_samples = min(MOST, math.ceil(num_samples * max(1.5, 1.2 * (off / error) ** 2)))


def gradients(problem: Quadratic, choice: Choice, noise: Tensor) -> Tensor:
    """Return the gradient estimates [rows, 2 A] for noise [vectors, rows, A]."""
    rows = noise.shape[1]
    mean, log_std = (each.expand(rows, -1).clone().requires_grad_() for each in (problem.mean, problem.log_std))
    baseline: str | Tensor = choice.baseline
    if choice.value_sign:
        baseline = (choice.value_sign * problem.value()).expand(rows)
    draw = Draw(noise, choice.num_action_samples)
    estimate = choice.estimator(mean, log_std, draw, problem.q_function, ALPHA, baseline)
    return rows * torch.cat(torch.autograd.grad(estimate.loss, (mean, log_std)), 1)


def every_arm() -> list[Arm]:
    """Return every estimator with every baseline, pathwise with the K of `loo`, and the sign that the note prints."""
    arms = [Arm(name, baseline) for name, entry in ESTIMATORS.items() for baseline in entry.baselines or ("auto",)]
    return [arms[0], Arm("pathwise", num_action_samples=2), *arms[1:], Arm("score", AS_PRINTED)]
