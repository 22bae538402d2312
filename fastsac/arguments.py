"""What the command line understands, and what it means."""

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
    """Train an agent; the run directory gets its configuration, metrics, learning curve and checkpoints."""

    config: tyro.conf.OmitArgPrefixes[Config]
    preset: str | None = None
    """Settings to begin from: a name that `fastsac presets` lists, or `auto`, the task's own. Options given win."""
    run_dir: Path | None = None
    """Where the run goes; by default a new directory below `runs/`."""
    resume: Path | None = None
    """Go on with this run directory's newest checkpoint; other options change its settings."""
    num_learners: int = 1
    """Train so many agents in one loop, with --seed and the seeds that follow it. Each is what it would be alone, with
    a run directory of its own below --run-dir: `seed-0`, `seed-1`. On a GPU, one launch updates all of them."""
    track: str | None = None
    """Where the metrics go beside metrics.jsonl: `tensorboard`, `wandb`, `trackio` and `mlflow`, separated by commas,
    or `none`. Default: TensorBoard, or with --resume what the run had so far."""
    track_project: str = "fastsac"
    """Project of Weights & Biases and Trackio; experiment of MLflow."""
    track_video: bool = False
    """Record an episode of the last evaluation, to `last_evaluation.mp4` in the run directory and for the trackers."""
    callback: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A subclass of `fastsac.Callback`, as `module:Class`: your own code, which training calls."""
    restarts: int = 0
    """Train in a process of its own, and start it again from the last checkpoint if it dies or hangs, or an environment
    fails. Give up after so many restarts in a row without a further checkpoint; 0 does not supervise."""
    step_timeout: float | None = None
    """With --restarts: seconds without a step after which the process counts as hung (default 600); 0 waits for
    ever."""


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained agent's deterministic policy on environments of its own."""

    run_dir: tyro.conf.Positional[Path]
    """The run directory."""
    episodes: int = 10
    """Episodes to play."""
    seed: int = 0
    """Seeds the environments."""
    best: bool = False
    """Take the checkpoint with the highest evaluation during training instead of the newest."""
    json: bool = False
    """Print one JSON object instead of a sentence."""
    video: Path | None = None
    """Also record one episode to this file (.mp4 or .gif)."""
    env_id: str | None = None
    """Evaluate on another task, whose observations and actions have the same shapes and bounds."""
    env_kwargs: dict[str, Any] | None = None
    """Keyword arguments of the environment, in place of those that the agent was trained with, as a JSON object."""


@dataclass(frozen=True)
class Export:
    """Write a trained policy for use elsewhere: one file that runs without fastsac, or a directory to share."""

    run_dir: tyro.conf.Positional[Path]
    """The run directory."""
    to: Literal["onnx", "torch"] | None = None
    """`onnx`: a file for ONNX Runtime and the like. `torch`: a program for `torch.export.load`. Either takes the
    environment's observations and returns the deterministic policy's actions, in the environment's own units."""
    policy_only: bool = False
    """Write a directory to share: weights, settings and a model card with an evaluation. It works with `fastsac eval`
    and `SAC.load`."""
    out: Path | None = None
    """Where to write. Default: `policy.onnx` or `policy.pt2` in the run directory; needed with --policy-only."""
    best: bool = False
    """Take the checkpoint with the highest evaluation during training instead of the newest."""
    episodes: int = 10
    """Episodes of the evaluation on the model card; 0 does not evaluate."""


@dataclass(frozen=True)
class Collect:
    """Write episodes of a trained agent as a Minari dataset, in MINARI_DATASETS_PATH or ~/.minari/datasets."""

    run_dir: tyro.conf.Positional[Path]
    """The run directory."""
    out: str
    """The new dataset's id, such as pendulum/sac-v0."""
    episodes: int = 100
    """Episodes to play."""
    seed: int = 0
    """Seeds the environments and the sampled actions."""
    best: bool = False
    """Take the checkpoint with the highest evaluation during training instead of the newest."""
    deterministic: bool = False
    """Take the policy's mean action instead of a sample."""


@dataclass(frozen=True)
class Presets:
    """List the presets: the settings of `fastsac train --preset NAME`, and where they come from."""

    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class Doctor:
    """Show what there is on this machine, which engine would run and how fast, and what is missing."""

    json: bool = False
    """Print one JSON object, for a report."""


@dataclass(frozen=True)
class Ls:
    """List the runs below a directory: what each is, how far it has come, and its returns in evaluations."""

    directory: tyro.conf.Positional[Path] = Path("runs")
    """Where to look."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class Plot:
    """Draw learning curves of any number of runs in one picture, a panel for each environment.

    Runs that differ in their random seeds only make one curve: the interquartile mean, with a 95 % bootstrap interval.
    """

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, or directories below which runs are found."""
    metric: str = "eval_return"
    """What to draw: a name from metrics.jsonl, such as eval_return, episode_return or critic_loss."""
    out: Path | None = None
    """The picture (.png, .svg or .pdf); by default curves.png."""
    json: bool = False
    """Print the curves as one JSON object; a picture is then drawn only with --out."""


Command = Train | Eval | Export | Collect | Ls | Plot | Presets | Doctor | Compare | Report | Lab


def parse(arguments: Sequence[str]) -> Command:
    """Return the command.

    Raises:
        UsageError: if something is unknown, missing or out of its range.
        SystemExit: with status 0, after --help or a script for completion.
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
        description="Soft Actor-Critic at speed, with the actor's gradient estimator as a choice.",
        registry=_registry(),
    )
    return command


def _config_before_options(arguments: Sequence[str]) -> Config:
    """Return what holds for options that are not given: a stored configuration, a preset or the defaults."""
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
        return text  # which the configuration refuses, saying what it should be


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
    """Return the first option that tyro suggests and the subcommand typed has."""
    option = ""
    for line in text.splitlines():
        if match := re.match(r"[│| ] {5}(--[\w-]+)", line):
            option = match[1]
        elif (match := re.fullmatch(r"in (fastsac .*) --help", line.strip(" │|"))) and typed.startswith(f"{match[1]} "):
            return option
    return ""


def _other_types(match: re.Match[str]) -> str:
    """Return what tyro says of `{None}|FLOAT` in words."""
    names = {"FLOAT": "a number", "INT": "a whole number"}
    allowed = " or ".join(names.get(name, name.strip("{}")) for name in match[1].split("|"))
    return f"it must be {allowed}, got {match[2]}"
