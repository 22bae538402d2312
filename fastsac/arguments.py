"""The commands and options of the command line, and their help."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fastsac.completion import complete
from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.lab.arguments import Compare, Lab, Report
from fastsac.presets import find, without_unused
from fastsac.run_dir import first_config


@dataclass(frozen=True)
class Train:
    """Train an agent, and write its configuration, metrics, learning curve and checkpoints to a run directory."""

    config: tyro.conf.OmitArgPrefixes[Config]
    preset: str | None = None
    """Settings to start from: a name from `fastsac presets`, or `auto` for the task's own preset. Options override
    them."""
    run_dir: Path | None = None
    """Directory of the run. Default: a new directory below `runs/`."""
    resume: Path | None = None
    """Resume from the newest checkpoint in this run directory; other options change its settings."""
    num_learners: int = 1
    """Train this many agents in one loop, with consecutive random seeds from --seed on. Each trains exactly as it would
    alone, in its own run directory below --run-dir: `seed-0`, `seed-1`. On a GPU, one launch updates all of them."""
    track: str | None = None
    """Where to log metrics besides metrics.jsonl: `tensorboard`, `wandb`, `trackio` and `mlflow`, separated by commas,
    or `none`. Default: TensorBoard, or with --resume the trackers that the run has used so far."""
    track_project: str | None = None
    """Project name for Weights & Biases and Trackio; experiment name for MLflow. Default: fastsac."""
    track_video: bool = False
    """Record an episode of the last evaluation as `last_evaluation.mp4` in the run directory and for the trackers."""
    callback: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A subclass of `fastsac.Callback`, as `module:Class`: your own code, called during training."""
    restarts: int = 0
    """Train in a separate process, and restart it from the last checkpoint if it crashes or hangs, or an environment
    fails. Give up after this many restarts in a row without a new checkpoint; 0 disables restarts."""
    step_timeout: float | None = None
    """With --restarts: seconds without a step after which the process counts as hung (default 600); 0 waits
    forever."""


@dataclass(frozen=True)
class Eval:
    """Evaluate the deterministic policy of a trained agent in separate environments."""

    run_dir: tyro.conf.Positional[Path]
    """The run directory."""
    episodes: int = 10
    """Episodes to play."""
    seed: int = 0
    """Random seed for the environments."""
    best: bool = False
    """Use the checkpoint with the highest evaluation return during training instead of the newest one."""
    json: bool = False
    """Print one JSON object instead of a sentence."""
    video: Path | None = None
    """Also record one episode to this file (.mp4 or .gif)."""
    env_id: str | None = None
    """Evaluate on another task, whose observations and actions must have the same shapes and bounds."""
    env_backend: Literal["auto", "envpool", "gymnasium"] | None = None
    """Create the environment with this library; a task's keyword arguments can differ between the two."""
    env_kwargs: dict[str, Any] | None = None
    """Keyword arguments for the environment, instead of those used in training, as a JSON object."""


@dataclass(frozen=True)
class Export:
    """Export a trained policy: as one file that runs without fastsac, or as a directory to share."""

    run_dir: tyro.conf.Positional[Path]
    """The run directory."""
    to: Literal["onnx", "torch"] | None = None
    """`onnx`: a file for ONNX Runtime and the like. `torch`: a program for `torch.export.load`. Both take the
    environment's observations and return the deterministic policy's actions, in the environment's own units."""
    policy_only: bool = False
    """Write a directory to share: weights, settings and a model card with an evaluation. `fastsac eval` and `SAC.load`
    can read it."""
    out: Path | None = None
    """Where to write. Default: `policy.onnx` or `policy.pt2` in the run directory; required with --policy-only."""
    best: bool = False
    """Use the checkpoint with the highest evaluation return during training instead of the newest one."""
    episodes: int | None = None
    """Evaluation episodes for the model card of --policy-only (default 10); 0 skips the evaluation."""


@dataclass(frozen=True)
class Collect:
    """Record episodes of a trained agent as a Minari dataset, in MINARI_DATASETS_PATH or ~/.minari/datasets."""

    run_dir: tyro.conf.Positional[Path]
    """The run directory."""
    out: str
    """The new dataset's id, such as pendulum/sac-v0."""
    episodes: int = 100
    """Episodes to play."""
    seed: int = 0
    """Random seed for the environments and the sampled actions."""
    best: bool = False
    """Use the checkpoint with the highest evaluation return during training instead of the newest one."""
    deterministic: bool = False
    """Use the policy's mean action instead of a sample."""


@dataclass(frozen=True)
class Presets:
    """List the presets for `fastsac train --preset NAME`: their settings, and where they come from."""

    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class Doctor:
    """Show this machine's hardware and packages, which engine would run and how fast, and what is missing."""

    json: bool = False
    """Print one JSON object, for a bug report."""


@dataclass(frozen=True)
class Ls:
    """List the runs in a directory tree: environment, estimator, seed, progress, evaluation returns and state."""

    directory: tyro.conf.Positional[Path] = Path("runs")
    """Directory to search."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class Plot:
    """Plot the learning curves of any number of runs in one figure, with a panel for each environment.

    Runs that differ only in their random seed become one curve: the interquartile mean with a 95 % bootstrap interval.
    """

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, or directories that contain runs at any depth."""
    metric: str = "eval_return"
    """Metric to plot: a name from metrics.jsonl, such as eval_return, episode_return or critic_loss."""
    out: Path | None = None
    """File to write (.png, .svg or .pdf). Default: curves.png."""
    json: bool = False
    """Print the curves as one JSON object; a figure is then drawn only with --out."""


Command = Train | Eval | Export | Collect | Ls | Plot | Presets | Doctor | Compare | Report | Lab


def parse(arguments: Sequence[str]) -> Command:
    """Parse the command line and return the command.

    Raises:
        UsageError: if an option is unknown, missing or out of range.
        SystemExit: with status 0, after printing the help or a completion script.
    """
    if complete(arguments, lambda words: _cli(words, Train(config=Config()))):
        sys.exit()
    default = Train(config=_config_before_options(arguments))
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            return _cli(arguments, default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UsageError(_unframe(refusal.getvalue(), " ".join(["fastsac", *arguments]))) from None


def _cli(arguments: Sequence[str], default: Train) -> Command:
    command: Command = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train", default=default)]
        | Annotated[Eval, tyro.conf.subcommand("eval")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Collect, tyro.conf.subcommand("collect")]
        | Annotated[Ls, tyro.conf.subcommand("ls")]
        | Annotated[Plot, tyro.conf.subcommand("plot")]
        | Annotated[Presets, tyro.conf.subcommand("presets")]
        | Annotated[Doctor, tyro.conf.subcommand("doctor")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Lab, tyro.conf.subcommand("lab")],
        args=arguments,
        prog="fastsac",
        description="Fast Soft Actor-Critic, with a choice of gradient estimators for the actor.",
        registry=_registry(),
    )
    return command


def _config_before_options(arguments: Sequence[str]) -> Config:
    """Return the values of options that are not given: a stored configuration, a preset or the defaults."""
    names = ("resume", "preset", "env_id", "estimator", "critic", "optimizer", "alpha")
    given = {name: value for name in names if (value := _given(arguments, name)) is not None}
    if "resume" in given:
        config = first_config(Path(given["resume"]))
        if "estimator" in given:  # another estimator does not inherit this one's choices
            config = dataclasses.replace(config, baseline="auto", num_action_samples=None)
    elif "preset" in given:
        env_id = given.get("env_id")
        config = find(given["preset"], env_id).config(env_id)
    else:
        return Config()
    return Config(**without_unused(dataclasses.asdict(config), given))


def _given(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of an option, the last one if there are several."""
    found = None
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option.replace("_", "-") == "--" + name.replace("_", "-"):
            found = value if equals else "".join(arguments[place + 1 : place + 2])
    return None if not found or found == "None" or found.startswith("--") else found


def _registry() -> ConstructorRegistry:
    """Return rules that let a dict be given as JSON."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def json_object(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type_origin is not dict and info.type != (dict[str, Any] | None):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: _from_json(words[0]),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    return registry


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # the configuration refuses it, with a clear message


def _unframe(box: str, typed: str) -> str:
    """Return the message of tyro's framed error on one line, with the nearest option that the subcommand has."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines()[1:]:  # the first is a title
        if re.search("[─-]{4}", line):
            paragraphs.append([])
        else:
            paragraphs[-1].append(line.strip(" │|"))
    message = next((" ".join(lines).rstrip(".") for lines in paragraphs if lines), text.strip())
    message = message.replace("invalid literal for int() with base 10:", "it must be a whole number, got")
    message = message.replace("could not convert string to float:", "it must be a number, got")
    message = re.sub(r"no type matching (\S+) could be instantiated from \[(.*?)\]\. .*", _other_types, message)
    message = message.replace("Could not find valid parse for arguments:", "they must be whole numbers, got")
    message = re.sub(r"Could not parse arguments (\[.*\]) into tuple type .*", r"they must be numbers, got \1", message)
    message = re.sub(r" \(applied to .*?\)|or misplaced | Arguments are applied to .*", "", message).rstrip()
    near = _near(text, typed)
    return f"{message}; did you mean {near}?" if near else f"{message}; see fastsac --help"


def _near(text: str, typed: str) -> str:
    """Return the first option that tyro suggests for the subcommand that was typed."""
    option = ""
    for line in text.splitlines():
        if match := re.match(r"[│| ] {5}(--[\w-]+)", line):
            option = match[1]
        elif (match := re.fullmatch(r"in (fastsac .*) --help", line.strip(" │|"))) and typed.startswith(f"{match[1]} "):
            return option
    return ""


def _other_types(match: re.Match[str]) -> str:
    """Return tyro's `{None}|FLOAT` in words."""
    names = {"FLOAT": "a number", "INT": "a whole number"}
    allowed = " or ".join(names.get(name, name.strip("{}")) for name in match[1].split("|"))
    return f"it must be {allowed}, got {match[2]}"
