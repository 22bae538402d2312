"""The command line: `fastsac train`, `fastsac eval` and `fastsac doctor`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from fastsac.config import Config
from fastsac.errors import EnvironmentFailure, FastsacError, UsageError
from fastsac.run_dir import newest_step, read_config, refuse_if_taken
from fastsac.signals import ENVIRONMENT_FAILED, Heartbeat
from fastsac.supervisor import Supervisor


@dataclass(frozen=True)
class Train:
    """Train an agent; the run directory gets its configuration, metrics, learning curve and checkpoints."""

    config: tyro.conf.OmitArgPrefixes[Config]
    run_dir: Path | None = None
    """Where the run goes; by default a new directory below `runs/`."""
    resume: Path | None = None
    """Go on with this run directory's newest checkpoint; other options change its settings."""
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


@dataclass(frozen=True)
class Doctor:
    """Show what there is on this machine, which engine would run and how fast, and what is missing."""

    json: bool = False
    """Print one JSON object, for a report."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 on success, 2 on a usage error, 1 on a failed run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        command = _parse(arguments)
        if isinstance(command, Train):
            _train(command, arguments)
        elif isinstance(command, Eval):
            _eval(command)
        else:
            _doctor(command)
        sys.stdout.flush()
    except FastsacError as error:
        _fail(str(error), error.exit_status)
    except BrokenPipeError:  # whoever read our output has gone; the interpreter must not complain about it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        _fail("interrupted")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        _fail("out of memory: smaller --hidden-sizes, --batch-size or --num-envs need less")


def _tell(message: str) -> None:
    print(f"fastsac: {message}", file=sys.stderr, flush=True)


def _fail(message: str, status: int = 1) -> NoReturn:
    print(f"fastsac: {message}", file=sys.stderr)
    sys.exit(status)


def _parse(arguments: list[str]) -> Train | Eval | Doctor:
    default = Config()
    names = [argument.partition("=")[0] for argument in arguments]
    if "--resume" in names:
        position = len(names) - 1 - names[::-1].index("--resume")
        value = arguments[position].partition("=")[2] or "".join(arguments[position + 1 : position + 2])
        if value:
            default = read_config(Path(value))
        if "--estimator" in names:  # another estimator does not inherit this one's choices
            default = dataclasses.replace(default, baseline="auto", num_action_samples=None)
    train = Annotated[Train, tyro.conf.subcommand("train", default=Train(config=default))]
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            command: Train | Eval | Doctor = tyro.cli(
                train
                | Annotated[Eval, tyro.conf.subcommand("eval")]
                | Annotated[Doctor, tyro.conf.subcommand("doctor")],
                args=arguments,
                prog="fastsac",
                description="Soft Actor-Critic at speed, with the actor's gradient estimator as a choice.",
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UsageError(_unframe(refusal.getvalue())) from None
    return command


def _unframe(box: str) -> str:
    """Return the message of tyro's framed error on one line, with the nearest option if it suggests any."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines()[1:]:  # the first is a title
        if re.search("[─-]{4}", line):
            paragraphs.append([])
        else:
            paragraphs[-1].append(line.strip(" │|"))
    message, *others = [" ".join(lines).rstrip(".") for lines in paragraphs if lines] or [text.strip()]
    message = message.replace("invalid literal for int() with base 10:", "it must be a whole number, got")
    message = message.replace("could not convert string to float:", "it must be a number, got")
    near = [match[0] for other in others if other.startswith("Perhaps") and (match := re.search(r"--[\w-]+", other))]
    return f"{message}; did you mean {near[0]}?" if near else f"{message}; see fastsac --help"


def default_run_dir(config: Config) -> Path:
    """Return a new name one level below `runs/`, whatever the environment's id contains."""
    env = re.sub(r"[^A-Za-z0-9._-]+", "-", config.env_id).strip(".-")
    estimator = config.estimator if config.baseline == "auto" else f"{config.estimator}-{config.baseline}"
    return Path("runs") / f"{env}_{estimator}_s{config.seed}_{time.strftime('%Y%m%d-%H%M%S')}"


def _train(command: Train, arguments: Sequence[str]) -> None:
    heartbeat = Heartbeat()
    if command.restarts < 0:
        raise UsageError(f"--restarts must be a whole number of at least 0, got {command.restarts}")
    if command.step_timeout is not None and not 0.0 <= command.step_timeout <= 1e9:
        raise UsageError(f"--step-timeout must be a number of seconds of at least 0, got {command.step_timeout}")
    if command.step_timeout is not None and command.restarts == 0:
        raise UsageError("--step-timeout needs --restarts: a process cannot tell that it hangs itself")
    if command.resume is not None and command.run_dir is not None and command.resume != command.run_dir:
        raise UsageError("--resume goes on in its own directory: leave --run-dir out")
    if command.restarts and not heartbeat.supervised:
        run_dir = command.resume or command.run_dir or default_run_dir(command.config)
        if command.resume is None:
            refuse_if_taken(run_dir)
        timeout = 600.0 if command.step_timeout is None else command.step_timeout
        status = Supervisor(run_dir, command.restarts, timeout).run(arguments)
        if status:
            sys.exit(status)
        return
    try:
        _train_here(command, heartbeat)
    except EnvironmentFailure:
        heartbeat.send(ENVIRONMENT_FAILED)
        raise


def _train_here(command: Train, heartbeat: Heartbeat) -> None:
    from fastsac.plot import plot_curves, read_metric
    from fastsac.train import SAC

    config = command.config
    if command.resume is None:
        run_dir = command.run_dir or default_run_dir(config)
        refuse_if_taken(run_dir)
        agent = SAC(config)
    else:
        run_dir = command.resume
        if newest_step(run_dir) is None:
            print(f"fastsac: {run_dir} has no checkpoint yet: it starts from the beginning", file=sys.stderr)
        agent = SAC.resume(run_dir, config)
        if agent.finished and not heartbeat.tries:  # else it died when all was done
            if agent.steps >= config.total_steps:
                raise UsageError(f"{run_dir} has reached step {agent.steps} already: a larger --total-steps goes on")
            raise UsageError(f"{run_dir} has reached its target return already: another --target-return goes on")
    if heartbeat.tries > 1:  # what failed more than once may fail for ever
        agent.new_episodes(heartbeat.tries)
    agent.prepare(_tell)  # before anything is written
    print(f"fastsac: {_describe(agent)}; run directory {run_dir}", file=sys.stderr)
    agent.learn(config.total_steps, run_dir, progress=True)
    if agent.stopped_by_signal:
        print(f"interrupted at step {agent.steps:,}; go on with: fastsac train --resume {run_dir}")
        return
    if agent.last_evaluation is not None:
        returns = agent.last_evaluation.returns
        print(
            f"evaluation return {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes "
            f"after {agent.steps:,} steps and {agent.time_s:.0f} s"
        )
    curves = {config.estimator: [read_metric(run_dir, "eval_return")]}
    try:
        curve = plot_curves(curves, run_dir / "learning_curve.png", config.env_id, "evaluation return")
    except OSError as error:
        raise FastsacError(f"cannot write {run_dir / 'learning_curve.png'}: {error.strerror or error}") from error
    if curve is not None:
        print(f"learning curve: {curve}")


def _describe(agent: Any) -> str:
    config, choice = agent.config, agent.learner.choice
    estimator = config.estimator if choice.baseline == "none" else f"{config.estimator} ({choice.baseline})"
    threads = f", threads {agent.num_threads}" if agent.device.type == "cpu" else ""
    return (
        f"{config.env_id} ({agent.envs.backend_name}), {estimator}, K={choice.num_action_samples}, "
        f"{agent.device.type}{threads}, engine {agent.engine} ({agent.engine_reason}), "
        f"precision {agent.setup.precision} ({agent.setup.precision_reason})"
    )


def _doctor(command: Doctor) -> None:
    from fastsac.doctor import run

    if not run(command.json):
        sys.exit(1)


def _eval(command: Eval) -> None:
    from fastsac.evaluate import check_video_path
    from fastsac.train import SAC

    if command.episodes < 1:
        raise UsageError(f"--episodes must be a whole number of at least 1, got {command.episodes}")
    if command.seed < 0:
        raise UsageError(f"--seed must be a whole number of at least 0, got {command.seed}")
    if command.video is not None:
        check_video_path(command.video)
    config = read_config(command.run_dir)
    # where it is evaluated need not be like where it was trained, and small batches gain nothing by threads
    plain = dataclasses.replace(config, device="auto", engine="auto", precision="fp32", num_threads=1)
    agent = SAC.load(command.run_dir, plain, best=command.best)
    if command.video is not None:
        agent.record_video(command.video, command.seed)
        print(f"video: {command.video}", file=sys.stderr)
    result = agent.evaluate(command.episodes, command.seed)
    if command.json:
        print(json.dumps(result.summary()))
    else:
        mean, spread = result.returns.mean(), result.returns.std()
        print(
            f"return {mean:.1f} +- {spread:.1f} over {command.episodes} episodes of {result.lengths.mean():.0f} steps"
        )
