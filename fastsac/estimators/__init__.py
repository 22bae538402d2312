"""Estimators of the actor's gradient: one file each, one signature (`fastsac.types.Estimator`), one line here."""

from __future__ import annotations

from typing import NamedTuple

from fastsac.config import Config
from fastsac.errors import UsageError, did_you_mean
from fastsac.estimators.pathwise import pathwise, pathwise_gradient
from fastsac.estimators.score import score, score_gradient
from fastsac.types import Estimator, Gradient


class Entry(NamedTuple):
    """An estimator, the baselines that it takes, the default one first (none at all if empty), and its gradient."""

    estimator: Estimator
    baselines: tuple[str, ...] = ()
    gradient: Gradient | None = None  # written out, for the engine `fused`; without it other engines serve


ESTIMATORS: dict[str, Entry] = {
    "pathwise": Entry(pathwise, gradient=pathwise_gradient),
    "score": Entry(score, baselines=("loo", "value", "constant", "none"), gradient=score_gradient),
}


class Choice(NamedTuple):
    """What a configuration comes to: the estimator, its baseline ("none" where it takes none), K, its gradient."""

    estimator: Estimator
    baseline: str
    num_action_samples: int
    gradient: Gradient | None


def choose(config: Config) -> Choice:
    """Resolve the configuration's estimator, baseline and number of action samples.

    Raises:
        UsageError: for an unknown name, a baseline that the estimator does not take, or ``loo`` with K = 1.
    """
    entry = ESTIMATORS.get(config.estimator)
    if entry is None:
        hint = did_you_mean(config.estimator, ESTIMATORS) or f"; known: {', '.join(ESTIMATORS)}"
        raise UsageError(f"unknown --estimator {config.estimator!r}{hint}")
    baseline = config.baseline
    if baseline == "auto":
        baseline = entry.baselines[0] if entry.baselines else "none"
    elif not entry.baselines:
        raise UsageError(f"--estimator {config.estimator} takes no --baseline (it was given {baseline!r})")
    elif baseline not in entry.baselines:
        hint = did_you_mean(baseline, entry.baselines) or f"; known: {', '.join(entry.baselines)}"
        raise UsageError(f"unknown --baseline {baseline!r} for --estimator {config.estimator}{hint}")
    num_action_samples = config.num_action_samples
    if num_action_samples is None:
        num_action_samples = 2 if baseline == "loo" else 1
    if baseline == "loo" and num_action_samples < 2:
        raise UsageError("--baseline loo compares each sample with the others: --num-action-samples must be at least 2")
    return Choice(entry.estimator, baseline, num_action_samples, entry.gradient)
