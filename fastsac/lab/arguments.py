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
    """Environments."""
    arms: tuple[str, ...]
    """What is compared, as `estimator[:baseline[:K]]`: `pathwise score:loo:2 score:none`. The others are tested
    against the first."""
    out: Path
    """Directory for the runs, `comparison.json`, and the report with its pictures."""
    seeds: str = "0:5"
    """Random seeds: `0:5` is 0 to 4; `0,3,7`."""
    total_steps: int = 100_000
    """Environment steps of each run."""
    set: tuple[str, ...] = ()
    """Other settings of the runs, as `name=value`. A name that is given again is varied: `tau=0.005 tau=0.01`.
    Lists are written as in JSON: `hidden_sizes=[64,64]`."""
    jobs: int | None = None
    """Processes side by side. Default: as many as there are CPU cores."""
    num_learners: int = 1
    """Runs in each process, which then differ in their seeds only; each is what it would be alone. On a GPU, one launch
    updates all of them."""
    margin: float = 0.05
    """Differences within this share of the normalised return count as none in the test of equivalence."""
    ray: str | None = None
    """Run on a Ray cluster, at this address (`auto`: the one that this machine belongs to)."""
    gpus_per_run: float = 0.0
    """With --ray: the share of a GPU that a run takes."""


@dataclass(frozen=True)
class Report:
    """Write one self-contained page, `report.html`, from what comparisons and the lab have left in a directory."""

    directory: tyro.conf.Positional[Path]
    """What was given as --out."""


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
    """States, drawn from the run's replay buffer."""
    num_replicates: int = 200
    """Gradient estimates of each arm."""
    oracle_samples: int = 100_000
    """Action samples per state of the gradient that they are held against."""
    seed: int = 0
    """Random seed for states and noise."""
    out: Path | None = None
    """Directory for gradients.json and its picture."""


@dataclass(frozen=True)
class Cost:
    """Time the actor's step and a whole update of each arm, interleaved in one run."""

    arms: tuple[str, ...] | None = None
    """Arms to measure, written as for `fastsac compare`. Default: all. The others are compared with the first."""
    batch_size: int = 256
    """Transitions per update."""
    rounds: int = 20
    """Measurements of each arm."""
    out: Path | None = None
    """Directory for cost.json."""


@dataclass(frozen=True)
class Lab:
    """Look at the estimators themselves: on a toy problem, on a trained run, and what they cost."""

    what: tyro.conf.OmitArgPrefixes[
        Annotated[Toy, tyro.conf.subcommand("toy", prefix_name=False)]
        | Annotated[Gradients, tyro.conf.subcommand("gradients", prefix_name=False)]
        | Annotated[Cost, tyro.conf.subcommand("cost", prefix_name=False)]
    ]
