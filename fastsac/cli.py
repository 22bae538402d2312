"""The command line: `fastsac train | eval | presets | doctor | compare | report | lab`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastsac.arguments import Doctor, Eval, Presets, Train, parse
from fastsac.config import AS_PRINTED, Config
from fastsac.errors import EnvironmentFailure, FastsacError, UsageError
from fastsac.lab.arguments import Compare, Cost, Gradients, Lab, Report, Toy
from fastsac.presets import AUTO, find, presets, table
from fastsac.run_dir import newest_step, read_config, refuse_if_taken
from fastsac.signals import ENVIRONMENT_FAILED, Heartbeat
from fastsac.supervisor import Supervisor


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 on success, 2 on a usage error, 1 on a failed run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        command = parse(arguments)
        if isinstance(command, Train):
            _train(command, arguments)
        elif isinstance(command, Eval):
            _eval(command)
        elif isinstance(command, Presets):
            _presets(command)
        elif isinstance(command, Doctor):
            _doctor(command)
        else:
            _lab(command)
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


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ  # asked before torch is imported


def _tell(message: str) -> None:
    print(f"fastsac: {message}", file=sys.stderr, flush=True)


def _fail(message: str, status: int = 1) -> NoReturn:
    if _under_torchrun():
        from fastsac.ranks import first_to_end

        if not first_to_end():
            sys.exit(status)
    print(f"fastsac: {message}", file=sys.stderr)
    sys.exit(status)


def default_run_dir(config: Config) -> Path:
    """Return a new name one level below `runs/`, whatever the environment's id contains."""
    env = re.sub(r"[^A-Za-z0-9._-]+", "-", config.env_id).strip(".-")
    estimator = config.estimator if config.baseline == "auto" else f"{config.estimator}-{config.baseline}"
    estimator = estimator.replace(":", "-")
    return Path("runs") / f"{env}_{estimator}_s{config.seed}_{time.strftime('%Y%m%d-%H%M%S')}"


def _train(command: Train, arguments: Sequence[str]) -> None:
    heartbeat = Heartbeat()
    if command.config.baseline == AS_PRINTED:
        raise UsageError(
            f"--baseline {AS_PRINTED} has the wrong sign on purpose, for comparisons: "
            f"fastsac compare --arms score:value score:{AS_PRINTED} ..."
        )
    if command.restarts and _under_torchrun():
        raise UsageError("--restarts supervises one process: torchrun has --max-restarts, and --resume goes on")
    if command.restarts < 0:
        raise UsageError(f"--restarts must be a whole number of at least 0, got {command.restarts}")
    if command.step_timeout is not None and not 0.0 <= command.step_timeout <= 1e9:
        raise UsageError(f"--step-timeout must be a number of seconds of at least 0, got {command.step_timeout}")
    if command.step_timeout is not None and command.restarts == 0:
        raise UsageError("--step-timeout needs --restarts: a process cannot tell that it hangs itself")
    if command.resume is not None and command.run_dir is not None and command.resume != command.run_dir:
        raise UsageError("--resume goes on in its own directory: leave --run-dir out")
    if command.resume is not None and command.preset is not None and not heartbeat.supervised:  # else: a restart
        raise UsageError("--resume goes on with the stored settings: leave --preset out, and give options to change")
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
    from fastsac.callbacks import make_callback
    from fastsac.plot import plot_curves, read_metric
    from fastsac.ranks import Ranks
    from fastsac.train import SAC

    config, ranks = command.config, Ranks.join()
    callbacks = [make_callback(place) for place in command.callback]
    if command.resume is None:
        run_dir = command.run_dir or default_run_dir(config)
        if ranks.leads:
            refuse_if_taken(run_dir)
        agent = SAC(config)
    else:
        run_dir = command.resume
        if newest_step(run_dir) is None and ranks.leads:
            print(f"fastsac: {run_dir} has no checkpoint yet: it starts from the beginning", file=sys.stderr)
        agent = SAC.resume(run_dir, config)
        if agent.finished and not heartbeat.tries:  # else it died when all was done
            if agent.steps >= config.total_steps:
                raise UsageError(f"{run_dir} has reached step {agent.steps} already: a larger --total-steps goes on")
            raise UsageError(f"{run_dir} has reached its target return already: another --target-return goes on")
    if heartbeat.tries > 1:  # what failed more than once may fail for ever
        agent.new_episodes(heartbeat.tries)
    agent.prepare(_tell if ranks.leads else lambda _: None)  # before anything is written
    if not ranks.leads:
        agent.learn(config.total_steps)
        return
    if command.resume is None and config.total_steps <= config.learning_starts:
        _tell(f"no update will be made: --learning-starts {config.learning_starts} is not below --total-steps")
    preset = None if command.resume is not None else command.preset
    several = "" if ranks.alone else f", {ranks.size} ranks"
    print(f"fastsac: {_describe(agent, preset)}{several}; run directory {run_dir}", file=sys.stderr)
    agent.learn(config.total_steps, run_dir, progress=True, callback=callbacks or None)
    if agent.stopped_by_signal:
        print(f"interrupted at step {agent.steps:,}; go on with: fastsac train --resume {run_dir}")
        return
    evaluated, returns_by_step = read_metric(run_dir, "eval_return")
    if agent.last_evaluation is not None:
        returns = agent.last_evaluation.returns
        earlier = f" at step {evaluated[-1]:,}; training ended" if evaluated and evaluated[-1] < agent.steps else ""
        print(
            f"evaluation return {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes{earlier} "
            f"after {agent.steps:,} steps and {agent.time_s:.0f} s"
        )
    curves = {config.estimator: [(evaluated, returns_by_step)]}
    try:
        curve = plot_curves(curves, run_dir / "learning_curve.png", config.env_id, "evaluation return")
    except OSError as error:
        raise FastsacError(f"cannot write {run_dir / 'learning_curve.png'}: {error.strerror or error}") from error
    if curve is not None:
        print(f"learning curve: {curve}")


def _describe(agent: Any, preset: str | None) -> str:
    config, choice = agent.config, agent.learner.choice
    named = _describe_preset(preset, config.env_id) if preset is not None else ""
    special = ", categorical critics" if config.critic == "categorical" else ""
    special += ", layer norm" if config.layer_norm else ""
    special += f", {config.n_step}-step returns" if config.n_step > 1 else ""
    estimator = config.estimator if choice.baseline == "none" else f"{config.estimator} ({choice.baseline})"
    threads = f", threads {agent.num_threads}" if agent.device.type == "cpu" else ""
    return (
        f"{config.env_id} ({agent.envs.backend_name}){named}, {estimator}, K={choice.num_action_samples}{special}, "
        f"{agent.device.type}{threads}, engine {agent.engine} ({agent.engine_reason}), "
        f"precision {agent.setup.precision} ({agent.setup.precision_reason})"
    )


def _describe_preset(name: str, env_id: str) -> str:
    found = find(name, env_id)
    missing = "" if found.env_ids or name != AUTO else f" (there is none for {env_id})"
    return f", preset {found.name}{missing}"


def _presets(command: Presets) -> None:
    if command.json:
        print(json.dumps({name: preset._asdict() for name, preset in presets().items()}, indent=2))
    else:
        print(table())


def _lab(command: Compare | Report | Lab) -> None:
    if isinstance(command, Compare):
        from fastsac.lab.compare import run

        run(command)
    elif isinstance(command, Report):
        from fastsac.lab.report import write_report

        print(f"report: {write_report(command.directory)}")
    else:
        name = {Toy: "toy", Gradients: "gradients", Cost: "cost"}[type(command.what)]
        module = importlib.import_module(f"fastsac.lab.{name}")
        print(module.table(module.run(command.what)))


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
    os.environ.pop("TORCHELASTIC_RUN_ID", None)  # an evaluation is one process's, whoever has started it
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
