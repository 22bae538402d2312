"""Do the engines learn alike? Two one-sided tests on the final returns of `benchmarks.learning`'s engine suites.

    python -m benchmarks.equivalence

Stated before any of these runs was made: an engine is equivalent to the reference engine if its mean final return
over seeds is within 10 % of the reference's mean, by two one-sided Welch tests at the 5 % level each (Schuirmann
1987), which is to say that the 90 % confidence interval of the difference lies within that margin. Not finding a
difference would be no proof: with few seeds nothing is found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from mpmath import betainc, findroot

from benchmarks.learning import results_file

SUITES = ("engines_pendulum", "engines_halfcheetah")
REFERENCE = "reference"
MARGIN = 0.10  # of the reference's mean
LEVEL = 0.05  # of each of the two tests


class Comparison(NamedTuple):
    """An engine beside the reference; differences are shares of the reference's mean."""

    difference: float
    low: float  # of the interval of 1 - 2 LEVEL
    high: float
    p: float  # the larger one of the two tests'

    @property
    def equivalent(self) -> bool:
        return self.p < LEVEL


def compare(reference: Sequence[float], other: Sequence[float]) -> Comparison:
    """Return the test of `other`'s mean against `reference`'s, which must not be zero."""
    scale = abs(np.mean(reference))
    a, b = np.asarray(reference) / scale, np.asarray(other) / scale
    variances = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = math.sqrt(sum(variances))
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / (len(a) - 1) + variances[1] ** 2 / (len(b) - 1))
    difference = float(b.mean() - a.mean())
    p = max(upper_tail((difference + MARGIN) / error, freedom), upper_tail((MARGIN - difference) / error, freedom))
    half = error * float(findroot(lambda t: upper_tail(t, freedom) - LEVEL, 1.8))
    return Comparison(difference, difference - half, difference + half, p)


def upper_tail(t: Any, freedom: float) -> Any:
    """Return the probability that Student's t is above `t`."""
    tail = betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) / 2
    return tail if t >= 0 else 1 - tail


def finals(suite: str) -> dict[str, list[float]]:
    """Return the final returns of each variant, by seed."""
    runs = json.loads(results_file(suite).read_text())["runs"]
    return {
        variant: [run["final"]["return_mean"] for run in runs if run["variant"] == variant]
        for variant in dict.fromkeys(run["variant"] for run in runs)
    }


def table() -> str:
    """Return one row per task and engine: mean, standard deviation, and the comparison with the reference."""
    lines = [
        "| task | engine | seeds | mean return | standard deviation | difference, 90 % interval | within 10 %? |",
        "|---|---|---|---|---|---|---|",
    ]
    for suite in SUITES:
        if not results_file(suite).exists():
            continue
        words = json.loads(results_file(suite).read_text())["train"].split()
        task, returns = words[words.index("--env-id") + 1], finals(suite)
        for variant in sorted(returns, key=lambda name: name != REFERENCE):
            values = returns[variant]
            cells = [task, variant, len(values), f"{np.mean(values):,.0f}", f"{np.std(values, ddof=1):,.0f}"]
            if variant == REFERENCE:
                cells += ["", ""]
            else:
                found = compare(returns[REFERENCE], values)
                interval = f"{found.difference:+.1%} ({found.low:+.1%} to {found.high:+.1%})"
                cells += [interval, f"{'yes' if found.equivalent else 'not shown'} (p = {float(found.p):.2g})"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
