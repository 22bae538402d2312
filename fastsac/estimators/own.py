"""Estimators from outside the package."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsac.errors import FastsacError, UsageError, told
from fastsac.types import Draw, Estimate, Estimator, QFunction


class Own(NamedTuple):
    """A user's own estimator: its errors are reported in one line, and its results are checked."""

    name: str
    estimator: Estimator

    def __call__(
        self,
        mean: Tensor,
        log_std: Tensor,
        draw: Draw,
        q_function: QFunction,
        alpha: Tensor,
        baseline: str | Tensor,
        **choices: Any,
    ) -> Estimate:
        """Return its estimate, with `log_prob` and `q` detached.

        Raises:
            UsageError: if it raises an exception, or returns anything else.
        """
        try:
            found = self.estimator(mean, log_std, draw, q_function, alpha, baseline, **choices)
        except (FastsacError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UsageError(f"estimator {self.name} failed: {told(error, __file__)}") from error
        shape, wrong = (draw.num_samples, len(mean)), ""
        if not isinstance(found, Estimate):
            wrong = f"a {type(found).__name__}, not a fastsac.types.Estimate"
        elif not isinstance(found.loss, Tensor) or found.loss.ndim or not found.loss.requires_grad:
            wrong = "a loss that is not a scalar tensor differentiable in mean and log_std"
        elif not isinstance(found.log_prob, Tensor) or found.log_prob.shape != shape:
            wrong = f"a log_prob that is not a tensor of shape [K, B], here {list(shape)}"
        elif not isinstance(found.q, Tensor) or found.q.ndim != 3 or found.q.shape[::2] != shape:
            wrong = f"a q that is not a tensor of shape [K, E, B], here [{shape[0]}, E, {shape[1]}]"
        if wrong:
            raise UsageError(f"estimator {self.name} returned {wrong}")
        return Estimate(found.loss, found.log_prob.detach(), found.q.detach())
