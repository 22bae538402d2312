"""`fastsac train`: one agent, or several that differ only in their random seed."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsac.arguments import Train
from fastsac.config import AS_PRINTED, Config
from fastsac.errors import EnvironmentFailure, FastsacError, UsageError
from fastsac.presets import AUTO, find
from fastsac.run_dir import CONFIG, learners_in, newest_step, read_config, refuse_if_taken
from fastsac.signals import ENVIRONMENT_FAILED, Heartbeat
from fastsac.supervisor import Supervisor
from fastsac.system import WINDOWS
from fastsac.trackers import Tracking


def under_torchrun() -> bool:
    """Whether `torchrun` has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ  # asked before torch is imported


def _tell(message: str) -> None:
    print(f"fastsac: {message}", file=sys.stderr, flush=True)


def default_run_dir(config: Config, num_learners: int = 1) -> Path:
    """Return a new name one level below `runs/`, whatever the environment's id contains."""
    env = re.sub(r"[^A-Za-z0-9._-]+", "-", config.env_id).strip(".-")
    estimator = config.estimator if config.baseline == "auto" else f"{config.estimator}-{config.baseline}"
    estimator = estimator.replace(":", "-")
    seeds = f"s{config.seed}" if num_learners == 1 else f"s{config.seed}-{config.seed + num_learners - 1}"
    return Path("runs") / f"{env}_{estimator}_{seeds}_{time.strftime('%Y%m%d-%H%M%S')}"


def train(command: Train, arguments: Sequence[str]) -> None:
    """Run the command, which was parsed from these arguments.

    Raises:
        FastsacError: if an argument is wrong, or a run fails.
    """
    heartbeat = Heartbeat()
    if command.config.baseline == AS_PRINTED:
        raise UsageError(
            f"--baseline {AS_PRINTED} has the wrong sign on purpose, for comparisons: "
            f"fastsac compare --arms score:value score:{AS_PRINTED} ..."
        )
    Tracking.of(command.track, command.track_project, command.track_video)
    if command.track_video and not command.config.eval_every:
        raise UsageError("--track-video records an evaluation, and --eval-every 0 never evaluates")
    if command.num_learners < 1:
        raise UsageError(f"--num-learners must be a whole number of at least 1, got {command.num_learners}")
    if command.num_learners > 1 and under_torchrun():
        raise UsageError("--num-learners trains in one process: leave it out, or train without torchrun")
    if command.restarts and under_torchrun():
        raise UsageError("--restarts supervises one process: use torchrun's --max-restarts, and --resume to continue")
    if command.restarts and WINDOWS:
        raise UsageError("--restarts needs Linux or macOS: leave it out, and use --resume after a crash")
    if command.restarts < 0:
        raise UsageError(f"--restarts must be a whole number of at least 0, got {command.restarts}")
    if command.step_timeout is not None and not 0.0 <= command.step_timeout <= 1e9:
        raise UsageError(f"--step-timeout must be a number of seconds of at least 0, got {command.step_timeout}")
    if command.step_timeout is not None and command.restarts == 0:
        raise UsageError("--step-timeout needs --restarts: a process cannot detect that it hangs itself")
    if command.resume is not None and command.run_dir is not None and command.resume != command.run_dir:
        raise UsageError("--resume continues in its own directory: leave out --run-dir")
    if command.resume is not None and command.preset is not None and not heartbeat.supervised:  # else: a restart
        raise UsageError("--resume uses the stored settings: leave out --preset, and give the options to change")
    if command.restarts and not heartbeat.supervised:
        run_dir = command.resume or command.run_dir or default_run_dir(command.config, command.num_learners)
        if command.resume is None:
            refuse_if_taken(run_dir)
        timeout = 600.0 if command.step_timeout is None else command.step_timeout
        status = Supervisor(run_dir, command.restarts, timeout).run(arguments)
        if status:
            sys.exit(status)
        return
    several = command.num_learners > 1 or (command.resume is not None and not (command.resume / CONFIG).exists())
    try:
        (_train_seeds if several else _train_here)(command, heartbeat)
    except EnvironmentFailure:
        heartbeat.send(ENVIRONMENT_FAILED)
        raise


def _train_here(command: Train, heartbeat: Heartbeat) -> None:
    from fastsac.callbacks import make_callback
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
            _tell(f"{run_dir} has no checkpoint yet: it starts from the beginning")
        agent = SAC.resume(run_dir, config)
        if agent.finished and not heartbeat.tries:  # otherwise it died after it had finished
            _refuse_finished(agent, run_dir)
    if heartbeat.tries > 1:  # the same episodes may fail every time
        agent.new_episodes(heartbeat.tries)
    agent.prepare(_tell if ranks.leads else lambda _: None)  # before anything is written
    if not ranks.leads:
        agent.learn(config.total_steps)
        return
    _warn_of_no_update(command)
    several = "" if ranks.alone else f", {ranks.size} ranks"
    print(f"fastsac: {_describe(agent, command)}{several}; run directory {run_dir}", file=sys.stderr)
    track = command.track, command.track_project, command.track_video
    agent.learn(config.total_steps, run_dir, True, callbacks or None, *track)
    if agent.stopped_by_signal:
        print(f"interrupted at step {agent.steps:,}; continue with: fastsac train --resume {run_dir}")
        return
    if told := _outcome(agent, run_dir):
        print(told)
    if curve := _plot(config, [run_dir], run_dir):
        print(f"learning curve: {curve}")


def _train_seeds(command: Train, heartbeat: Heartbeat) -> None:
    from fastsac.callbacks import make_callback
    from fastsac.seeds import Seeds

    config = command.config
    directory = command.resume or command.run_dir or default_run_dir(config, command.num_learners)
    run_dirs = _run_dirs(command, directory)
    together = Seeds(len(run_dirs))
    for seed, run_dir in run_dirs.items():
        begun = (run_dir / CONFIG).exists()
        if command.resume is not None and newest_step(run_dir) is None:
            _tell(f"{run_dir} has no checkpoint yet: it starts from the beginning")
        together.add(dataclasses.replace(config, seed=seed), run_dir, begun, _tell)
    agents = [learner.agent for learner in together.learners if not learner.agent.finished]
    if not together.learners:
        raise next(iter(together.failures.values()))
    if not agents and not heartbeat.tries:
        _refuse_finished(together.learners[0].agent, directory)
    if heartbeat.tries > 1:  # the same episodes may fail every time: those of the learner that is behind
        for agent in agents:
            if agent.steps == min(each.steps for each in agents):
                agent.new_episodes(heartbeat.tries)
    _warn_of_no_update(command)
    number = f"{len(together.learners)} learner{'s' * (len(together.learners) != 1)}, {together.how}"
    told = f"{_describe(together.learners[0].agent, command)}; {number}"
    print(f"fastsac: {told}; run directories {directory}/seed-...", file=sys.stderr)
    tracking = Tracking.of(command.track, command.track_project, command.track_video)
    together.learn(
        lambda: [make_callback(place) for place in command.callback], _tell, True, heartbeat.supervised, tracking
    )
    complete = []
    for agent, run_dir in together.learners:
        if run_dir not in together.failures and not agent.stopped_by_signal:
            complete.append(run_dir)
            print(f"seed {agent.config.seed}: {_outcome(agent, run_dir) or f'{agent.steps:,} steps'}; {run_dir}")
    failed = list(together.failures.values())
    if len(complete) + len(failed) < len(run_dirs):
        print(f"interrupted; continue with: fastsac train --resume {directory}")
    if heartbeat.supervised and (environments := [each for each in failed if isinstance(each, EnvironmentFailure)]):
        raise environments[0]  # the parent tries again
    for run_dir in complete:
        _plot(config, [run_dir], run_dir)
    if curve := _plot(config, complete, directory):
        print(f"learning curves: {curve}")
    if failed:
        raise FastsacError(f"{len(failed)} of {len(run_dirs)} learners failed; continue with: --resume {directory}")


def _run_dirs(command: Train, directory: Path) -> dict[int, Path]:
    """Return each learner's run directory by its seed.

    Raises:
        UsageError: if they do not match the command, or one another.
    """
    config, found = command.config, {}
    if command.resume is None:
        refuse_if_taken(directory)
    else:
        found = {stored.seed: stored for stored in map(read_config, learners_in(directory))}
        if not found:
            raise UsageError(f"{directory} holds one run: leave --num-learners out")
    seeds = list(range(config.seed, config.seed + command.num_learners))
    if command.num_learners == 1 or not found.keys() <= set(seeds):
        seeds = list(found)
    if command.num_learners not in (1, len(seeds)):
        raise UsageError(f"{directory} holds the seeds {', '.join(map(str, found))}: leave --num-learners out")
    if found and config.seed not in found:
        raise UsageError(f"--seed: the learners in {directory} keep their own seeds")
    stored = [dataclasses.asdict(each) | {"seed": 0, "total_steps": 0} for each in found.values()]
    for name, value in stored[0].items() if stored else ():
        if any(each[name] != value for each in stored):
            flag = name.replace("_", "-")
            raise UsageError(f"the learners in {directory} differ in --{flag}: resume each of them separately")
    return {seed: directory / f"seed-{seed}" for seed in seeds}


def _refuse_finished(agent: Any, run_dir: Path) -> None:
    if agent.steps >= agent.config.total_steps:
        raise UsageError(f"{run_dir} has already reached step {agent.steps}: increase --total-steps to continue")
    raise UsageError(f"{run_dir} has already reached its target return: change --target-return to continue")


def _warn_of_no_update(command: Train) -> None:
    config = command.config
    if command.resume is None and config.total_steps <= config.learning_starts:
        _tell(f"no update will be made: --learning-starts {config.learning_starts} is not below --total-steps")


def _outcome(agent: Any, run_dir: Path) -> str:
    """Return the last evaluation in words, if there was one."""
    from fastsac.plot import read_metric

    if agent.last_evaluation is None:
        return ""
    returns, (evaluated, _) = agent.last_evaluation.returns, read_metric(run_dir, "eval_return")
    earlier = f" at step {evaluated[-1]:,}; training ended" if evaluated and evaluated[-1] < agent.steps else ""
    number = f"{len(returns)} episode{'s' * (len(returns) > 1)}"
    return (
        f"evaluation return {returns.mean():.1f} +- {returns.std():.1f} over {number}{earlier} "
        f"after {agent.steps:,} steps and {agent.time_s:.0f} s"
    )


def _plot(config: Config, run_dirs: list[Path], directory: Path) -> Path | None:
    """Draw the runs' learning curves, if they have any."""
    from fastsac.plot import plot_curves, read_metric

    place = directory / "learning_curve.png"
    curves = {config.estimator: [read_metric(run_dir, "eval_return") for run_dir in run_dirs]}
    try:
        return plot_curves(curves, place, config.env_id, "evaluation return")
    except OSError as error:
        raise FastsacError(f"cannot write {place}: {error.strerror or error}") from error


def _describe(agent: Any, command: Train) -> str:
    preset = None if command.resume is not None else command.preset
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
        + (f"; {agent.loaded_dataset}" if agent.loaded_dataset else "")
    )


def _describe_preset(name: str, env_id: str) -> str:
    found = find(name, env_id)
    missing = "" if found.env_ids or name != AUTO else f" (there is none for {env_id})"
    return f", preset {found.name}{missing}"
