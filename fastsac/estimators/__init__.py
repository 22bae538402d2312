"""Estimators of the actor's gradient: one file each, one signature (`fastsac.types.Estimator`), one line here."""

from __future__ import annotations

from typing import NamedTuple

from fastsac.config import Config
from fastsac.errors import UsageError, did_you_mean
from fastsac.estimators.pathwise import pathwise
from fastsac.estimators.score import score
from fastsac.types import Estimator


class Entry(NamedTuple):
    """An estimator and the baselines that it takes, the default one first; none at all if empty."""

    estimator: Estimator
    baselines: tuple[str, ...] = ()


ESTIMATORS: dict[str, Entry] = {
    "pathwise": Entry(pathwise),
    "score": Entry(score, baselines=("loo", "value", "constant", "none")),
}


class Choice(NamedTuple):
    """What a configuration comes to: the estimator, its baseline ("none" where it takes none) and K."""

    estimator: Estimator
    baseline: str
    num_action_samples: int


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
    return Choice(entry.estimator, baseline, num_action_samples)
