"""Estimators of the actor's gradient: one file each, one signature (`fastsac.types.Estimator`), one line here.

`register` adds one from outside the package; `--estimator module:name` imports the module that does so.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

from fastsac.config import AS_PRINTED, Config
from fastsac.errors import UsageError, did_you_mean, told
from fastsac.estimators.antithetic import pathwise_antithetic, score_antithetic
from fastsac.estimators.measure_valued import measure_valued
from fastsac.estimators.mix import mix, mix_gradient
from fastsac.estimators.own import Own
from fastsac.estimators.pathwise import pathwise, pathwise_gradient
from fastsac.estimators.score import score, score_gradient
from fastsac.types import Estimator, Gradient


class Entry(NamedTuple):
    """An estimator and its options."""

    estimator: Estimator
    baselines: tuple[str, ...] = ()  # the default first; empty if it takes none
    gradient: Gradient | None = None  # written out, for the engine `fused`; without it, other engines are used
    #: the default of `--entropy-split`, a keyword of both functions with this default; None: they have no such keyword
    entropy_split: float | None = None
    least_samples: int = 1  # the smallest number of action samples per state (K), and the default
    pairs: bool = False  # whether samples come in pairs, each from one normal vector
    normals: int = 1  # normal vectors per sample or pair

    def least(self, baseline: str) -> int:
        """Return the smallest K for a baseline: `loo` compares independent draws."""
        return max(self.least_samples, (4 if self.pairs else 2) if baseline == "loo" else 1)

    def num_noise(self, num_action_samples: int) -> int:
        """Return the number of normal vectors [B, A] in `Draw.rng` for K samples."""
        return self.normals * (num_action_samples // 2 if self.pairs else num_action_samples)


_BASELINES = ("loo", "value", "mean-action", "constant", "none")
ESTIMATORS: dict[str, Entry] = {
    "pathwise": Entry(pathwise, (), pathwise_gradient, entropy_split=0.0),
    "pathwise-stl": Entry(
        functools.partial(pathwise, entropy_split=1.0), (), functools.partial(pathwise_gradient, entropy_split=1.0)
    ),
    "score": Entry(score, _BASELINES, score_gradient, entropy_split=1.0),
    "pathwise-antithetic": Entry(pathwise_antithetic, entropy_split=0.0, least_samples=2, pairs=True),
    "score-antithetic": Entry(score_antithetic, _BASELINES, entropy_split=1.0, least_samples=2, pairs=True),
    "mix": Entry(mix, _BASELINES, mix_gradient, entropy_split=0.0, least_samples=2),
    "measure-valued": Entry(measure_valued, entropy_split=0.0, normals=3),
}


def register(name: str, entry: Entry) -> None:
    """Add an estimator under a name; its errors and results are checked (see `Own`).

    Raises:
        ValueError: if the name is taken, or contains a colon or white space.
    """
    if not name or ":" in name or any(map(str.isspace, name)):
        raise ValueError(f"an estimator's name must not contain a colon or white space, got {name!r}")
    entry = entry._replace(estimator=Own(name, entry.estimator))
    if ESTIMATORS.setdefault(name, entry) != entry:
        raise ValueError(f"there is already an estimator {name!r}")


class Choice(NamedTuple):
    """What a configuration resolves to: the estimator, its baseline ("none" where it takes none), K, its gradient."""

    estimator: Estimator
    baseline: str
    num_action_samples: int
    gradient: Gradient | None
    num_noise: int  # normal vectors for the samples
    entropy_split: float | None
    takes_baseline: bool
    least_samples: int

    @property
    def value_sign(self) -> float:
        """The factor of V(s) in b(s); 0 if the baseline is not a learned soft value."""
        return {"value": -1.0, AS_PRINTED: 1.0}.get(self.baseline, 0.0)


def find(name: str) -> Entry:
    """Return an estimator's entry; for `module:name` the module is imported first.

    Raises:
        UsageError: if there is no estimator of this name.
    """
    module, colon, own = name.partition(":")
    if colon:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name == module and (hint := did_you_mean(module, ESTIMATORS)):
                raise UsageError(f"unknown --estimator {module!r}{hint}") from error
            raise UsageError(f"cannot import {error.name!r} for --estimator {name}: is it on PYTHONPATH?") from error
        except Exception as error:
            raise UsageError(f"--estimator {name} cannot be imported: {told(error, __file__)}") from error
        if own not in ESTIMATORS:
            raise UsageError(f"{module} registers no estimator {own!r}: fastsac.estimators.register({own!r}, ...)")
        return ESTIMATORS[own]
    if name not in ESTIMATORS:
        hint = did_you_mean(name, ESTIMATORS) or f"; known: {', '.join(ESTIMATORS)}"
        raise UsageError(f"unknown --estimator {name!r}{hint}")
    return ESTIMATORS[name]


def choose(config: Config) -> Choice:
    """Resolve the configuration's estimator, baseline, number of action samples and entropy split.

    Raises:
        UsageError: for an unknown name, or settings that cannot be combined.
    """
    entry, flag = find(config.estimator), f"--estimator {config.estimator}"
    baseline = config.baseline
    if baseline == "auto":
        baseline = entry.baselines[0] if entry.baselines else "none"
    elif not entry.baselines:
        raise UsageError(f"{flag} takes no --baseline (it was given {baseline!r})")
    elif baseline not in entry.baselines and not (baseline == AS_PRINTED and "value" in entry.baselines):
        hint = did_you_mean(baseline, entry.baselines) or f"; known: {', '.join(entry.baselines)}"
        raise UsageError(f"unknown --baseline {baseline!r} for {flag}{hint}")
    least = entry.least(baseline)
    samples = least if config.num_action_samples is None else config.num_action_samples
    if samples < least:
        what = "--baseline loo compares samples" if least > entry.least_samples else f"{flag} needs several samples"
        raise UsageError(f"{what} of one state: --num-action-samples must be at least {least}, got {samples}")
    if entry.pairs and samples % 2:
        raise UsageError(f"{flag} takes its samples in pairs: --num-action-samples must be even, got {samples}")
    estimator: Any = entry.estimator
    gradient: Any = entry.gradient
    split = entry.entropy_split
    if config.entropy_split != "auto":
        if split is None:
            raise UsageError(f"{flag} takes no --entropy-split (it was given {config.entropy_split:g})")
        if config.entropy_split != split:
            split = config.entropy_split
            estimator = functools.partial(estimator, entropy_split=split)
            gradient = None if gradient is None else functools.partial(gradient, entropy_split=split)
    if config.batch_size < 2 and config.estimator == "mix":
        raise UsageError("--estimator mix takes its weights from other states: --batch-size must be at least 2")
    noise = entry.num_noise(samples)
    return Choice(estimator, baseline, samples, gradient, noise, split, bool(entry.baselines), least)
