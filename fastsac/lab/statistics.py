"""Statistics of comparisons with few seeds: interquartile means, stratified bootstrap intervals, tests of equivalence.

Interquartile means and intervals are those that Agarwal et al. 2021 (arXiv 2108.13264) recommend for few runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Numbers = NDArray[np.float64]
RESAMPLES = 2000
#: arrays of this many resampled numbers at a time
CHUNK = 4_000_000


def iqm(values: Numbers, axis: int = 0) -> Any:
    """Return the mean of the middle half of the values along an axis; for fewer than four, the mean of all."""
    return stats.trim_mean(values, 0.25, axis=axis)


class Interval(NamedTuple):
    """An interquartile mean with its 95 % interval; each a number, or an array over steps."""

    iqm: Any
    low: Any
    high: Any

    def json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {name: np.asarray(value).tolist() for name, value in self._asdict().items()}


@np.errstate(over="ignore", invalid="ignore")  # returns may be enormous, or NaN
def bootstrap(strata: Sequence[Numbers], seed: int = 0) -> Interval:
    """Return the interquartile mean over all seeds, and its percentile interval from the stratified bootstrap.

    A single seed says nothing about others: the ends are NaN if an environment has only one.

    Args:
        strata: for each environment [seeds] or [seeds, steps]; seeds are resampled within each environment.
        seed: of the resampling.
    """
    middle = iqm(np.concatenate(strata))
    if min(map(len, strata)) < 2:
        return Interval(middle, *(np.full_like(middle, math.nan) for _ in range(2)))
    from arch.bootstrap import IndependentSamplesBootstrap

    resamples = IndependentSamplesBootstrap(*strata, seed=np.random.default_rng(seed)).bootstrap(RESAMPLES)
    part = max(1, CHUNK // sum(stratum.size for stratum in strata))
    found = []
    # an interquartile mean of many resamples at once: arch's conf_int takes one at a time, and ten times as long
    while drawn := [np.concatenate(each) for each, _ in itertools.islice(resamples, part)]:
        found.append(iqm(np.stack(drawn), axis=1))
    return Interval(middle, *np.percentile(np.concatenate(found), [2.5, 97.5], axis=0))


def area(steps: Numbers, values: Numbers) -> float:
    """Return the area under a learning curve over its range: the mean return over training."""
    if len(steps) < 2:
        return float(values[-1])
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


class Equivalence(NamedTuple):
    """A mean compared with a reference's, in shares of `scale`."""

    difference: float
    low: float  # of the interval with confidence 1 - 2 level
    high: float
    p: float  # the larger p-value of the two one-sided tests
    verdict: str  # "equivalent", "different", "inconclusive" or "not tested"
    reason: str = ""  # why it was not tested


def untestable(reason: str) -> Equivalence:
    """Return a result without a test, and the reason."""
    return Equivalence(math.nan, math.nan, math.nan, math.nan, "not tested", reason)


@np.errstate(over="ignore", invalid="ignore")
def equivalence(
    reference: Sequence[float], other: Sequence[float], scale: float, margin: float, level: float = 0.05
) -> Equivalence:
    """Test whether two means are within a margin of each other: two one-sided paired t-tests (Schuirmann 1987).

    Runs with the same seed are evaluated from the same start states, so their differences are tested. Not finding a
    difference would prove nothing: with few seeds, nothing is found. "equivalent": both tests reject at `level`, that
    is, the interval lies within the margin. "different": they do not, and a two-sided test at `level` finds a
    difference. "inconclusive": neither.

    Args:
        reference: a return for each seed.
        other: the same, with the same seeds in the same order.
        scale: the difference in return that counts as 1.
        margin: the largest share of `scale` that counts as no difference.
        level: of each test.
    """
    if len(reference) < 2:
        return untestable("fewer than two random seeds are complete in both arms")
    if not math.isfinite(scale):
        return untestable("the first arm's gain over random actions is not known")
    if scale <= 0.0:
        return untestable("the first arm did not score above random actions, so there is no gain to measure against")
    differences = (np.asarray(other, dtype=np.float64) - np.asarray(reference, dtype=np.float64)) / scale
    difference, error = float(differences.mean()), float(stats.sem(differences))
    if not math.isfinite(error):
        return untestable("a return is not finite")
    if error == 0.0:
        verdict = "equivalent" if abs(difference) < margin else "different"
        return Equivalence(difference, difference, difference, 0.0 if verdict == "equivalent" else 1.0, verdict)
    t = stats.t(len(differences) - 1)
    p = float(max(t.sf((difference + margin) / error), t.sf((margin - difference) / error)))
    half = float(error * t.isf(level))
    differs = 2.0 * t.sf(abs(difference) / error) < level
    verdict = "equivalent" if p < level else "different" if differs else "inconclusive"
    return Equivalence(difference, difference - half, difference + half, p, verdict)


def finite_json(value: Any) -> Any:
    """Return the same for JSON, with null in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
