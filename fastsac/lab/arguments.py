"""The lab's part of the command line: `fastsac compare`, `fastsac report` and `fastsac lab toy | gradients | cost`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Compare:
    """Train every arm on every environment with every random seed, and compare them.

    To continue an interrupted comparison, run the same command again.
    """

    env_ids: tuple[str, ...]
    """Environment ids."""
    arms: tuple[str, ...]
    """Estimators to compare, as `estimator[:baseline[:K]]`: `pathwise score:loo:2 score:none`. The others are tested
    against the first."""
    out: Path
    """Directory for the runs, `comparison.json`, and the report with its pictures."""
    seeds: str = "0:5"
    """Random seeds: a range such as `0:5` (0 to 4), or a list such as `0,3,7`."""
    total_steps: int = 100_000
    """Environment steps of each run."""
    set: tuple[str, ...] = ()
    """Other settings of the runs, as `name=value`. Repeat a name to compare values: `tau=0.005 tau=0.01`.
    Write lists as in JSON: `hidden_sizes=[64,64]`."""
    jobs: int | None = None
    """Number of parallel processes. Default: the number of CPU cores."""
    num_learners: int = 1
    """Runs per process, which then differ only in their random seed; each trains exactly as it would alone. On a GPU,
    one launch updates all of them."""
    margin: float = 0.05
    """Equivalence test: differences within this fraction of the normalised return count as no difference."""
    ray: str | None = None
    """Run on the Ray cluster at this address (`auto`: the one that this machine belongs to)."""
    gpus_per_run: float = 0.0
    """With --ray: the fraction of a GPU that each run uses."""


@dataclass(frozen=True)
class Report:
    """Write a self-contained page, `report.html`, from the results of comparisons and lab commands in a directory."""

    directory: tyro.conf.Positional[Path]
    """The directory that was given as --out."""


@dataclass(frozen=True)
class Toy:
    """Measure every estimator's bias and variance on a problem with known answers."""

    arms: tuple[str, ...] | None = None
    """Arms to measure, written as for `fastsac compare`. Default: all."""
    num_samples: int = 200_000
    """Gradient estimates for each measured value."""
    seed: int | None = None
    """Random seed for the problem and its noise. Default: a new one, which is printed."""
    out: Path | None = None
    """Directory for toy.json and the pictures."""


@dataclass(frozen=True)
class Gradients:
    """Measure the estimators' noise and bias on the networks of a trained run."""

    run_dir: tyro.conf.Positional[Path]
    """The run directory."""
    arms: tuple[str, ...] | None = None
    """Arms to measure, written as for `fastsac compare`. Default: all."""
    num_states: int = 64
    """Number of states, sampled from the run's replay buffer."""
    num_replicates: int = 200
    """Gradient estimates per arm."""
    oracle_samples: int = 100_000
    """Action samples per state for the reference gradient that the estimates are compared with."""
    seed: int = 0
    """Random seed for states and noise."""
    out: Path | None = None
    """Directory for gradients.json and its picture."""


@dataclass(frozen=True)
class Cost:
    """Time the actor's step and the whole update of each arm, interleaved in one run."""

    arms: tuple[str, ...] | None = None
    """Arms to measure, written as for `fastsac compare`. Default: all. The others are compared with the first."""
    batch_size: int = 256
    """Transitions per update."""
    rounds: int = 20
    """Measurements per arm."""
    out: Path | None = None
    """Directory for cost.json."""


@dataclass(frozen=True)
class Lab:
    """Study the estimators themselves: on a toy problem, on a trained run, and what they cost."""

    what: tyro.conf.OmitArgPrefixes[
        Annotated[Toy, tyro.conf.subcommand("toy", prefix_name=False)]
        | Annotated[Gradients, tyro.conf.subcommand("gradients", prefix_name=False)]
        | Annotated[Cost, tyro.conf.subcommand("cost", prefix_name=False)]
    ]
