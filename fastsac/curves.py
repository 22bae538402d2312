"""`fastsac plot`: learning curves of any number of runs; runs that differ only in their random seed form one curve."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastsac.arguments import Plot
from fastsac.config import Config
from fastsac.errors import FastsacError, UsageError, did_you_mean
from fastsac.lab.statistics import bootstrap, finite_json
from fastsac.plot import Curve, Line, common_steps, draw, read_metric
from fastsac.results import RETURN, find_runs, printable
from fastsac.run_dir import METRICS, is_held, read_config, read_rows

FORMATS = (".png", ".svg", ".pdf")
#: settings that do not change what a run computes, only what it writes; and the CPU threads
WRITING = ("eval_every", "eval_episodes", "log_every", "checkpoint_every", "checkpoint_replay", "num_threads")
#: settings with which `total_steps` changes the whole run
SCHEDULES = {"lr_schedule": "constant", "utd_end": None}
#: maximum number of names in a message
NAMED = 3


class Run(NamedTuple):
    """A run that has the metric."""

    path: Path
    config: Config
    curve: Curve

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that the runs of one curve have in common, except the environment's id."""
        left_out = {"env_id", "seed", "target_return", *WRITING}
        if all(getattr(self.config, name) == plain for name, plain in SCHEDULES.items()):
            left_out.add("total_steps")
        return {name: value for name, value in dataclasses.asdict(self.config).items() if name not in left_out}


class Group(NamedTuple):
    """Runs of one environment that differ only in their random seed."""

    env_id: str
    settings: dict[str, Any]
    runs: list[Run]


def plot(command: Plot) -> None:
    """Run the command.

    Raises:
        UsageError: if a directory does not exist, there are no runs, or none of them has the metric.
        FastsacError: if the figure cannot be written.
    """
    out = command.out if command.out is not None or command.json else Path("curves.png")
    if out is not None and out.suffix.lower() not in FORMATS:
        raise UsageError(f"--out must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {out}")
    runs, left_out = _read(command)
    groups = _grouped(runs)
    names = differing(groups)
    found = [_curve(group, label_of(group.settings, names), names) for group in groups]
    for group, each in zip(groups, found, strict=True):
        if told := _cut_short(group, each):
            _tell(told)
    if left_out:
        _tell("left out: " + "; ".join(f"{_some(paths)} ({why})" for why, paths in left_out.items()))
    if out is not None:
        _draw(found, command.metric, out)
    if command.json:
        reasons = {str(path): why for why, paths in left_out.items() for path in paths}
        result = {"metric": command.metric, "differs": names, "groups": found, "left_out": reasons}
        print(json.dumps(finite_json(result)))
    elif out is not None:
        print(f"{len(runs)} run{'s' * (len(runs) > 1)} in {len(found)} curve{'s' * (len(found) > 1)}: {out}")


def _read(command: Plot) -> tuple[list[Run], dict[str, list[Path]]]:
    """Return the runs that have the metric, and the directories of the others by the reason they are left out."""
    if not command.directories:
        raise UsageError("name run directories, or directories that contain runs: fastsac plot runs")
    paths: dict[str, Path] = {}
    for directory in command.directories:
        below = find_runs(directory)
        if not below:
            raise UsageError(f"there are no runs in {directory}")
        for path in below:
            paths.setdefault(os.path.realpath(path), path)
    runs = dict[str, Run]()
    left_out = dict[str, list[Path]]()
    for path in paths.values():
        try:
            run = Run(path, read_config(path), _increasing(read_metric(path, command.metric)))
        except UsageError as error:
            left_out.setdefault(f"damaged: {error}", []).append(path)
            continue
        except OSError as error:
            left_out.setdefault(f"damaged: {error.strerror}", []).append(path)
            continue
        if not run.curve[0]:
            left_out.setdefault(f"no {command.metric}", []).append(path)
            continue
        key = json.dumps([run.config.env_id, run.config.seed, run.settings])
        other = runs.setdefault(key, run)
        if other is not run:
            runs[key], shorter = (run, other) if run.curve[0][-1] >= other.curve[0][-1] else (other, run)
            left_out.setdefault("same settings and random seed as another run", []).append(shorter.path)
    if len(paths) == sum(len(each) for why, each in left_out.items() if why.startswith("damaged")):
        raise UsageError(f"all runs are damaged; the first one: {next(iter(left_out)).removeprefix('damaged: ')}")
    if not runs:
        known = {name for path in paths.values() for row in read_rows(path / METRICS) for name in row}
        names = sorted(known - {"step"})
        there = did_you_mean(command.metric, names) or (f": they have {', '.join(names)}" if names else "")
        raise UsageError(f"no run has a metric {command.metric!r}{there}")
    return list(runs.values()), left_out


def _increasing(curve: Curve) -> Curve:
    """Return the curve sorted by step, with each step once."""
    values = dict(zip(*curve, strict=True))
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _grouped(runs: Iterable[Run]) -> list[Group]:
    groups = dict[str, Group]()
    for run in runs:
        key = json.dumps([run.config.env_id, run.settings])
        groups.setdefault(key, Group(run.config.env_id, run.settings, [])).runs.append(run)
    for group in groups.values():
        group.runs.sort(key=lambda run: run.config.seed)
    return list(groups.values())


def differing(groups: Sequence[Group]) -> list[str]:
    """Return the names of the settings in which groups of one environment differ, in the order of `Config`."""
    names = []
    for field in dataclasses.fields(Config):
        values: dict[str, set[str]] = {}
        for group in groups:
            values.setdefault(group.env_id, set()).add(json.dumps(group.settings.get(field.name)))
        if any(len(each) > 1 for each in values.values()):
            names.append(field.name)
    return names


def label_of(settings: dict[str, Any], names: Sequence[str]) -> str:
    """Return these settings as options; automatic ones are left out if there are others."""
    chosen = [name for name in names if settings.get(name) not in (None, "auto")]
    return " ".join(_option(name, settings.get(name)) for name in chosen or names)


def _option(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    if isinstance(value, list | tuple):
        return f"{flag}={','.join(map(str, value))}"
    if isinstance(value, dict):
        return f"{flag}={json.dumps(value)}"
    short = isinstance(value, float) and float(f"{value:g}") == value  # different values never look the same
    return f"{flag}={value:g}" if short else f"{flag}={value}"


def _curve(group: Group, label: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the group's curve for JSON."""
    steps, values = common_steps([run.curve for run in group.runs])
    middle = bootstrap([values]).json() if len(steps) else {"iqm": [], "low": [], "high": []}
    return {
        **{"env_id": group.env_id, "label": label, "settings": {name: group.settings.get(name) for name in names}},
        **{"seeds": [run.config.seed for run in group.runs], "runs": [str(run.path) for run in group.runs]},
        **{"steps": steps.astype(int).tolist(), **middle},
    }


def _cut_short(group: Group, curve: dict[str, Any]) -> str:
    """Return a message if a curve ends with its shortest run although others have at least two more points."""
    ends = [run.curve[0][-1] for run in group.runs]
    shortest = group.runs[ends.index(min(ends))]
    if not any(sum(step > min(ends) for step in run.curve[0]) > 1 for run in group.runs):
        return ""
    running = ", which is still running" if is_held(shortest.path) else ""
    name = f"{group.env_id} {curve['label']}".strip()
    to = f"ends at step {curve['steps'][-1]:,} of {max(ends):,}" if curve["steps"] else "has no step in common"
    return f"{name}: the curve {to}, as {shortest.path} does{running}"


def _draw(found: Sequence[dict[str, Any]], metric: str, out: Path) -> None:
    seeds: dict[str, list[int]] = {}
    for each in found:
        seeds.setdefault(each["label"], []).append(len(each["seeds"]))
    panels: dict[str, list[Line]] = {}
    for each in found:
        few, many = min(seeds[each["label"]]), max(seeds[each["label"]])
        number = f"{many} seed{'s' * (many > 1)}" if few == many else f"{few} to {many} seeds"
        label = printable(f"{each['label']} ({number})".strip())
        line = Line(label, *(_numbers(each[name]) for name in ("steps", "iqm", "low", "high")))
        panels.setdefault(printable(each["env_id"]), []).append(line)
    several = max(map(max, seeds.values())) > 1
    alone = "" if len(seeds) > 1 else f" over {number}"
    note = f"interquartile mean with 95 % bootstrap interval{alone}" if several else ""
    try:
        draw(panels, out, "evaluation return" if metric == RETURN else printable(metric.replace("_", " ")), note)
    except OSError as error:
        raise FastsacError(f"cannot write {out}: {error.strerror or error}") from error


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _some(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(map(str, paths[:NAMED])) + more


def _tell(message: str) -> None:
    print(f"fastsac: {printable(message)}", file=sys.stderr)
