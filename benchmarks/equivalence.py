"""Do the engines learn alike? Two one-sided tests on the returns of `benchmarks.learning`'s engine suites.

    python -m benchmarks.equivalence

Stated before any of these runs: an engine is equivalent to the reference engine if its mean final return
over seeds is within 10 % of the reference's mean, by two one-sided Welch tests (Schuirmann 1987), that is, the
confidence interval of the difference lies within that margin. Not finding a difference would prove nothing: with few
seeds, nothing is found. LOG.md says when and why the second measure and the level for HalfCheetah-v5 were chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from mpmath import betainc, findroot

from benchmarks.learning import results_file

#: the level of each of the two tests; on HalfCheetah-v5 the data may be looked at twice
SUITES = {"engines_pendulum": 0.05, "engines_halfcheetah": 0.025}
REFERENCE = "reference"
MARGIN = 0.10  # of the reference's mean
MEASURES = ("last policy", "second half of training")


class Comparison(NamedTuple):
    """An engine beside the reference; differences are shares of the reference's mean."""

    difference: float
    low: float  # of the interval of confidence 1 - 2 level
    high: float
    p: float  # the larger one of the two tests'


def compare(reference: Sequence[float], other: Sequence[float], level: float) -> Comparison:
    """Return the test of `other`'s mean against `reference`'s, which must not be zero."""
    scale = abs(np.mean(reference))
    a, b = np.asarray(reference) / scale, np.asarray(other) / scale
    variances = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = math.sqrt(sum(variances))
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / (len(a) - 1) + variances[1] ** 2 / (len(b) - 1))
    difference = float(b.mean() - a.mean())
    p = max(upper_tail((difference + MARGIN) / error, freedom), upper_tail((MARGIN - difference) / error, freedom))
    half = error * float(findroot(lambda t: upper_tail(t, freedom) - level, 2.0))
    return Comparison(difference, difference - half, difference + half, float(p))


def upper_tail(t: Any, freedom: float) -> Any:
    """Return the probability that Student's t is above `t`."""
    tail = betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) / 2
    return tail if t >= 0 else 1 - tail


def value_of(run: dict[str, Any], measure: str) -> float:
    """Return a run's final return, or the mean of its evaluations in the second half of training."""
    if measure == "last policy":
        return float(run["final"]["return_mean"])
    half = run["steps"][-1] / 2
    return float(np.mean([value for step, value in zip(run["steps"], run["eval_return"], strict=True) if step > half]))


def table() -> str:
    """Return one row per task, measure and engine: mean, standard deviation, and the comparison with the reference."""
    lines = [
        "| task | return of | engine | seeds | mean | deviation | difference (interval) | within 10 %? |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for suite, level in SUITES.items():
        result = json.loads(results_file(suite).read_text())
        words = result["train"].split()
        task = words[words.index("--env-id") + 1]
        for measure in MEASURES:
            values: dict[str, list[float]] = {}
            for run in result["runs"]:
                values.setdefault(run["variant"], []).append(value_of(run, measure))
            for variant in sorted(values, key=lambda name: name != REFERENCE):
                own = values[variant]
                cells = [
                    task,
                    measure,
                    variant,
                    len(own),
                    f"{np.mean(own):,.0f}",
                    f"{np.std(own, ddof=1):,.0f}",
                    "",
                    "",
                ]
                if variant != REFERENCE:
                    found = compare(values[REFERENCE], own, level)
                    cells[-2] = f"{found.difference:+.1%} ({found.low:+.1%} to {found.high:+.1%})"
                    cells[-1] = f"{'yes' if found.p < level else 'inconclusive'} (p = {found.p:.1g})"
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
