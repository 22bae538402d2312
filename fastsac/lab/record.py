"""comparison.json: the runs of a comparison, and their results."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastsac.config import Config
from fastsac.env_backends import EnvSpec
from fastsac.envs import make_envs
from fastsac.errors import EnvironmentFailure, FastsacError, UsageError
from fastsac.estimators import choose
from fastsac.evaluate import evaluate
from fastsac.lab.arguments import Compare
from fastsac.lab.outcome import summarize
from fastsac.lab.plan import Plan, Run, difference, parse_settings, settings_of, train_command, written
from fastsac.lab.results import OTHER_OUT
from fastsac.lab.statistics import finite_json
from fastsac.lab.worker import MACHINE, Failure
from fastsac.machine import portable, write_json
from fastsac.plot import read_metric
from fastsac.run_dir import CONFIG, config_from_dict, read_config

FORMAT = 1
COMPARISON = "comparison.json"
#: episodes of random actions, in this many environments; their mean is the zero of normalised returns
RANDOM_EPISODES, RANDOM_ENVS, RANDOM_SEED = 200, 10, 0


class Record:
    """comparison.json: the runs so far, and their results."""

    def __init__(self, directory: Path, plan: Plan, options: Compare) -> None:
        """Read the file if there is one.

        Raises:
            UsageError: if the directory holds another comparison.
        """
        self._directory, self._plan = directory, plan
        self.result: dict[str, Any] = {"format": FORMAT, "runs": [], "random_return": {}}
        path = directory / COMPARISON
        try:
            if path.exists():
                self.result = json.loads(path.read_text())
            if self.result["format"] != FORMAT:
                raise ValueError("another format")
            before = self.result.get("settings", plan.settings)
            _refuse_other_comparison(directory, before, plan.settings)
            self._settings = {_key(each): _settings(config_from_dict(each["config"])) for each in self.result["runs"]}
            found = self.result["random_return"].items()
            played = self.result.get("random_episodes") == RANDOM_EPISODES
            self.result["random_return"] = {env_id: value for env_id, value in found if value is not None and played}
            self.result["random_episodes"] = RANDOM_EPISODES
            self.result["settings"] = _union(before, plan.settings)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(f"{path} cannot be read ({reason}): {OTHER_OUT}") from error
        self.result["command"] = command_of(_united(options, self.result["settings"]))

    def has(self, run: Run) -> bool:
        """Return whether the run is complete; UsageError if it was made with other settings."""
        stored = self._settings.get(run.key)
        if stored is not None and (what := difference(stored, _settings(run.config))):
            raise UsageError(f"{self._directory / COMPARISON} has another run of {run.name()}: {what}")
        return stored is not None

    def more(self) -> str:
        """Return in words which earlier runs this plan does not ask for."""
        united, asked = self.result["settings"], self._plan.settings
        left = {
            name: [each for each in united[name] if each not in asked[name]] for name in ("env_ids", "arms", "seeds")
        }
        words = {"env_ids": "environments", "arms": "arms", "seeds": "random seeds"}
        return "; ".join(f"{words[name]} {', '.join(map(str, each))}" for name, each in left.items() if each)

    def measure_random(self) -> None:
        """Measure the return of uniformly random actions in each environment where it is missing."""
        earlier = {each["env_id"]: each["config"] for each in self.result["runs"]}
        configs = {env_id: config_from_dict(values) for env_id, values in earlier.items()}
        for env_id, config in (configs | {run.config.env_id: run.config for run in self._plan.runs}).items():
            if env_id not in self.result["random_return"]:
                try:
                    value = random_return(config)
                except EnvironmentFailure as error:  # the runs may be luckier, and other environments have theirs
                    print(f"fastsac: the return of a random policy could not be measured: {error}", file=sys.stderr)
                    value = math.nan
                self.result["random_return"][env_id] = value

    def add(self, run: Run) -> None:
        """Add a complete run, and write the file.

        Raises:
            FastsacError: if the run directory does not hold a complete run.
        """
        run_dir = self._directory / run.run_dir
        steps, returns = read_metric(run_dir, "eval_return")
        _, updates = read_metric(run_dir, "updates")
        if not steps or steps[-1] < run.config.total_steps:  # returns that are not finite are not in the file
            raise FastsacError(f"{run_dir} has not been evaluated at its last step")
        try:
            setup = json.loads((run_dir / MACHINE).read_text())
        except (OSError, ValueError) as error:
            raise FastsacError(f"{run_dir / MACHINE} cannot be read ({error})") from error
        config = read_config(run_dir)
        choice = run.arm.choice
        self.result["runs"].append(
            {
                **{"env_id": config.env_id, "arm": run.label, "estimator": config.estimator},
                **{"baseline": choice.baseline, "num_action_samples": choice.num_action_samples},
                **{"varied": run.varied, "seed": config.seed, "run_dir": run.run_dir.as_posix()},
                **{"command": train_command(config), "config": json.loads(json.dumps(dataclasses.asdict(config)))},
                **{"steps": steps, "eval_return": returns, "updates": updates[-1]},
                "time_s": read_metric(run_dir, "time_s")[1][-1],
                **setup,
            }
        )
        self.result["runs"].sort(key=_key)
        self.write()

    def fail(self, failures: list[Failure]) -> None:
        """Add failed runs, and write the file."""
        told = [
            {**dict(zip(("env_id", "arm", "seed"), run.key, strict=True)), "error": reason, "diverged": diverged}
            for run, reason, diverged in failures
        ]
        earlier = [each for each in self.result.get("failed", []) if _key(each) not in set(map(_key, told))]
        self.result["failed"] = sorted([*earlier, *told], key=_key)
        self.write()

    def write(self) -> None:
        """Write the file, with the summary of the runs so far."""
        complete = set(map(_key, self.result["runs"]))
        failed = [each for each in self.result.get("failed", []) if _key(each) not in complete]
        settings = self.result["settings"]
        runs, random = self.result["runs"], self.result["random_return"]
        self.result |= summarize(runs, failed, random, settings["arms"][0], settings)
        self.result["failed"] = failed
        for each in failed:
            arms = self.result["summary"].setdefault(each["env_id"], {})
            arms.setdefault(each["arm"], no_runs())
        for env_id, arms in self.result["summary"].items():
            for label, values in arms.items():
                here = [each["diverged"] for each in failed if _key(each)[:2] == (env_id, label)]
                values |= {"failed": len(here), "diverged": sum(here)}
        write_json(self._directory / COMPARISON, finite_json(self.result))


def _key(entry: dict[str, Any]) -> tuple[str, str, int]:
    return entry["env_id"], entry["arm"], entry["seed"]


def no_runs() -> dict[str, Any]:
    """Return the summary of an arm without complete runs."""
    nan: dict[str, Any] = {"iqm": math.nan, "low": math.nan, "high": math.nan}
    curve: dict[str, Any] = {"steps": [], "iqm": [], "low": [], "high": []}
    spread = {name: {**nan, "values": []} for name in ("final", "auc")}
    return {"seeds": 0, **spread, "curve": curve, "time_s": math.nan}


def random_return(config: Config) -> float:
    """Return the mean return of uniformly random actions over some episodes."""
    envs = make_envs(EnvSpec.of(config), RANDOM_ENVS, RANDOM_SEED)
    rng, size = np.random.default_rng(RANDOM_SEED), envs.spaces.action_size
    try:
        played = evaluate(lambda obs: rng.uniform(-1, 1, (len(obs), size)).astype(np.float32), envs, RANDOM_EPISODES)
    finally:
        envs.close()
    return float(played.returns.mean())


def refuse_other_run(run_dir: Path, run: Run) -> None:
    """Raise UsageError if the directory holds a run with other settings."""
    if (run_dir / CONFIG).exists():
        what = difference(_settings(read_config(run_dir)), _settings(run.config))
        if what:
            raise UsageError(f"{run_dir} holds another run: {what}; {OTHER_OUT}")


def _united(options: Compare, settings: dict[str, Any]) -> Compare:
    """Return the options of a command that makes all existing and planned runs, without this machine's paths."""
    seeds = settings["seeds"]
    several = seeds == list(range(seeds[0], seeds[-1] + 1))
    return dataclasses.replace(
        options,
        env_ids=tuple(settings["env_ids"]),
        arms=tuple(settings["arms"]),
        set=tuple(settings["set"]),
        seeds=f"{seeds[0]}:{seeds[-1] + 1}" if several else ",".join(map(str, seeds)),
        out=Path(portable(options.out)),
    )


def command_of(options: Compare) -> str:
    """Return the command line, without options that do not affect the results."""
    words = ["fastsac", "compare", "--env-ids", *options.env_ids, "--arms", *options.arms, "--seeds", options.seeds]
    words += ["--total-steps", str(options.total_steps), "--out", str(options.out)]
    words += ["--set", *options.set] if options.set else []
    words += ["--margin", f"{options.margin:g}"] if options.margin != Compare.margin else []
    return shlex.join(words)


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings that affect the results, the same for `score` and `score:loo:2`."""
    choice = choose(config)
    baseline = choice.baseline if choice.takes_baseline else "auto"
    samples = choice.num_action_samples
    return settings_of(dataclasses.replace(config, baseline=baseline, num_action_samples=samples))


def _refuse_other_comparison(directory: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise UsageError unless both can be one comparison: a varied setting may get more values, no other may change."""
    steps = stored["total_steps"], asked["total_steps"]
    if steps[0] != steps[1]:
        raise UsageError(f"{directory} holds a comparison with total_steps {steps[0]}, not {steps[1]}: {OTHER_OUT}")
    before, now = parse_settings(stored["set"]), parse_settings(asked["set"])
    for name in sorted(before.keys() | now.keys()):
        ours, theirs = now.get(name, []), before.get(name, [])
        if ours != theirs and min(len(ours), len(theirs)) < 2:
            told = [" ".join(["--set", *written({name: v})]) if v else f"no --set {name}" for v in (theirs, ours)]
            raise UsageError(f"{directory} holds a comparison with {told[0]}, not with {told[1]}: {OTHER_OUT}")


def _union(stored: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of all existing and planned runs."""

    def both(ours: list[str], theirs: list[str]) -> list[str]:  # in our order if we name all
        return list(dict.fromkeys([*ours, *theirs] if set(theirs) <= set(ours) else [*theirs, *ours]))

    before = stored | {"set": written(parse_settings(stored["set"]))}
    lists = {name: both(asked[name], before[name]) for name in ("env_ids", "arms", "set")}
    margins = dict.fromkeys([*stored.get("earlier_margins", []), stored["margin"]])
    changed = {"earlier_margins": earlier} if (earlier := [each for each in margins if each != asked["margin"]]) else {}
    return {**asked, **lists, "seeds": sorted({*stored["seeds"], *asked["seeds"]}), **changed}
