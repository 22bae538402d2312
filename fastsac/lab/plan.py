"""What a comparison consists of: its runs, their configurations and their directories."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastsac.config import AS_PRINTED, Config
from fastsac.errors import UsageError, did_you_mean
from fastsac.lab.arguments import Compare
from fastsac.lab.arms import Arm, parse_arms
from fastsac.system import allowed_cores

#: settings with their own options of this command, and one with which runs would end at different steps
OWN = {
    **{"env_id": "--env-ids sets it", "seed": "--seeds sets it", "total_steps": "--total-steps sets it"},
    **dict.fromkeys(("estimator", "baseline", "num_action_samples"), "--arms sets it"),
    "target_return": "runs of different lengths cannot be compared",
}
#: settings that define the return: where they differ, returns cannot be compared
TASK = ("max_episode_steps", "env_backend", "env_kwargs", "env_wrappers", "eval_every", "eval_episodes")
#: settings that change a run's speed, but not its results
IGNORED = ("num_threads",)


class Run(NamedTuple):
    """One run of a comparison."""

    label: str  # the arm's, with the settings that vary
    arm: Arm
    varied: dict[str, Any]
    config: Config
    run_dir: Path  # relative to the comparison's directory

    @property
    def key(self) -> tuple[str, str, int]:
        """What distinguishes it from the others."""
        return self.config.env_id, self.label, self.config.seed

    def name(self) -> str:
        """Return it in words."""
        return f"{self.config.env_id} {self.label} seed {self.config.seed}"


class Plan(NamedTuple):
    """All runs, and the settings that they share."""

    runs: list[Run]
    settings: dict[str, Any]  # for comparison.json


def make_plan(options: Compare) -> Plan:
    """Return the runs that a command asks for.

    Raises:
        UsageError: if something is unknown, out of range, or cannot be combined.
    """
    arms, seeds = parse_arms(options.arms), parse_seeds(options.seeds)
    env_ids = list(dict.fromkeys(options.env_ids))
    if not env_ids:
        raise UsageError("name at least one environment: --env-ids Pendulum-v1")
    if not 0.0 < options.margin < 1.0:
        raise UsageError(f"--margin must be above 0 and below 1, got {options.margin}")
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs must be a whole number of at least 1, got {options.jobs}")
    if options.num_learners < 1:
        raise UsageError(f"--num-learners must be a whole number of at least 1, got {options.num_learners}")
    if options.num_learners > 1 and options.ray is not None:
        raise UsageError("--num-learners is for runs on this machine: with --ray, each run is its own task")
    if not 0.0 <= options.gpus_per_run <= 1.0:
        raise UsageError(f"--gpus-per-run must be from 0 to 1, got {options.gpus_per_run}")
    if options.jobs is not None and options.ray is not None:
        raise UsageError("--jobs is for runs on this machine: with --ray, as many run as the cluster has cores for")
    settings = parse_settings(options.set)
    names = list(settings)
    variants = [dict(zip(names, values, strict=True)) for values in itertools.product(*settings.values())]
    varying = [name for name in names if len(settings[name]) > 1]
    if apart := [name for name in varying if name in TASK]:
        raise UsageError(f"--set {apart[0]}: all runs of a comparison need the same value; use another --out for each")
    runs = list[Run]()
    # seeds vary slowest: every arm has its first one before any has its second
    for seed, env_id, arm, variant in itertools.product(seeds, env_ids, arms, variants):
        varied = {name: variant[name] for name in varying}
        label = " ".join([arm.label, *(f"{name}={shown(value)}" for name, value in varied.items())])
        fixed = {"env_id": env_id, "total_steps": options.total_steps, "seed": seed}
        try:
            config = arm.config(Config(**{**defaults(options), **variant, **fixed}))
        except TypeError as error:
            raise UsageError(f"--set: {error}") from error
        run_dir = Path("runs") / _slug(env_id) / _slug(label) / f"seed-{seed}"
        runs.append(Run(label, arm, varied, config, run_dir))
    common = {
        **{"env_ids": env_ids, "arms": [arm.label for arm in arms], "seeds": seeds, "margin": options.margin},
        **{"total_steps": options.total_steps, "set": written(settings)},
    }
    return Plan(runs, common)


def defaults(options: Compare) -> dict[str, Any]:
    """Return the settings in which a comparison's runs differ from `Config()`, unless --set says otherwise."""
    return {
        "eval_every": max(1, options.total_steps // 20),
        "checkpoint_every": max(1, options.total_steps // 10),
        "checkpoint_replay": True,  # so that an interrupted run continues exactly
        "precision": "fp32",  # a measured choice may differ from run to run
        "num_threads": max(1, cores() // jobs(options)),
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return allowed_cores()


def jobs(options: Compare) -> int:
    """Return how many runs train at the same time."""
    return options.jobs or cores()


def in_groups(runs: list[Run], num_learners: int) -> list[list[Run]]:
    """Return the runs in groups of up to this many that differ only in their seeds, in order of their first runs."""
    found = dict[tuple[str, str], list[list[Run]]]()
    groups = list[list[Run]]()
    for run in runs:
        own = found.setdefault(run.key[:2], [])
        if not own or len(own[-1]) == num_learners:
            own.append([])
            groups.append(own[-1])
        own[-1].append(run)
    return groups


def parse_seeds(text: str) -> list[int]:
    """Return the random seeds of `0:5` or `0,3,7`; UsageError for anything else."""
    if match := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text):
        seeds = list(range(int(match[1]), int(match[2])))
    elif re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        seeds = list(dict.fromkeys(map(int, text.split(","))))
    else:
        seeds = []
    if not seeds:
        raise UsageError(f"--seeds must be written 0:5 (which is 0 to 4) or 0,3,7, got {text!r}")
    return seeds


def parse_settings(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each setting in `name=value ...`; a repeated name has several.

    Raises:
        UsageError: if a name is unknown, or has its own option.
    """
    known, found = {field.name for field in dataclasses.fields(Config)}, dict[str, list[Any]]()
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not equals:
            raise UsageError(f"--set takes name=value, got {text!r}")
        if name in OWN:
            raise UsageError(f"--set {name}: {OWN[name]}")
        if name not in known:
            raise UsageError(f"--set {name}: there is no such setting{did_you_mean(name, known)}")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        parsed = tuple(parsed) if isinstance(parsed, list) else parsed
        if parsed in found.setdefault(name, []):
            raise UsageError(f"--set {name}={value} is given twice")
        found[name].append(parsed)
    return found


def written(settings: dict[str, list[Any]]) -> list[str]:
    """Return parsed settings as text, in one spelling."""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))

    return [f"{name}={text(value)}" for name, values in settings.items() for value in values]


def shown(value: Any) -> str:
    """Return a setting's value as it is written after `name=`."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value) if not isinstance(value, str) else value


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings of a configuration that affect the results, as JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in values.items() if name not in IGNORED}


def difference(stored: dict[str, Any], asked: dict[str, Any]) -> str:
    """Return in words the first setting in which two results of `settings_of` differ, or nothing."""
    for name, value in asked.items():
        if stored.get(name) != value:
            return f"{name} is {stored.get(name)!r} there, not {value!r}"
    return ""


def train_command(config: Config) -> str:
    """Return the command that makes a run with this configuration."""
    if config.baseline == AS_PRINTED:  # which `fastsac train` refuses
        arm = f"{config.estimator}:{AS_PRINTED}"
        words = ["fastsac", "compare", "--env-ids", config.env_id, "--arms", arm, "--seeds", str(config.seed)]
        ours = defaults(Compare((), (), Path()))  # written out, since they are not `Config()`'s
        values = dataclasses.asdict(config).items()
        others = {n: [value] for n, value in values if n not in OWN and (n in ours or value != getattr(Config(), n))}
        return shlex.join([*words, "--total-steps", str(config.total_steps), "--out", "DIR", "--set", *written(others)])
    plain, words = dataclasses.asdict(Config()), ["fastsac", "train"]
    for name, value in dataclasses.asdict(config).items():
        if name not in ("env_id", "seed", "total_steps", "estimator") and value == plain[name]:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else f"{value}"]
    return shlex.join(words)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", text).strip(".-") or "-"
