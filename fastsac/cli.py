"""The command line: `fastsac train`, `eval`, `export`, `collect`, `ls`, `plot`, `compare` and the rest."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from fastsac.arguments import Collect, Doctor, Eval, Export, Ls, Plot, Presets, Train, parse
from fastsac.config import Config
from fastsac.errors import FastsacError, UsageError
from fastsac.lab.arguments import Compare, Cost, Gradients, Lab, Report, Toy
from fastsac.presets import presets, table
from fastsac.run_dir import read_config
from fastsac.train_command import train, under_torchrun

if TYPE_CHECKING:
    from fastsac.train import SAC


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 on success, 2 on a usage error, 1 on a failed run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        command = parse(arguments)
        if isinstance(command, Train):
            train(command, arguments)
        else:
            _COMMANDS.get(type(command), _lab)(command)
        sys.stdout.flush()
    except FastsacError as error:
        _fail(str(error), error.exit_status)
    except BrokenPipeError:  # the reader of our output is gone; the interpreter must not complain about it on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        _fail("interrupted")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        _fail("out of memory: try smaller --hidden-sizes, --batch-size or --num-envs")


def _fail(message: str, status: int = 1) -> NoReturn:
    if under_torchrun():
        from fastsac.ranks import first_to_end

        if not first_to_end():
            sys.exit(status)
    print(f"fastsac: {message}", file=sys.stderr)
    sys.exit(status)


def _ls(command: Ls) -> None:
    from fastsac.results import ls

    ls(command.directory, command.json)


def _plot(command: Plot) -> None:
    from fastsac.curves import plot

    plot(command)


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


def _check_play(command: Eval | Collect) -> None:
    if command.episodes < 1:
        raise UsageError(f"--episodes must be a whole number of at least 1, got {command.episodes}")
    if command.seed < 0:
        raise UsageError(f"--seed must be a whole number of at least 0, got {command.seed}")


def _load(command: Eval | Collect | Export, config: Config) -> SAC:
    """Load an agent that only acts: on any device, with one thread, since small batches gain nothing from more."""
    from fastsac.train import SAC

    os.environ.pop("TORCHELASTIC_RUN_ID", None)  # it acts in one process, even if torchrun started it
    plain = dataclasses.replace(
        config, device="auto", engine="auto", precision="fp32", num_threads=1, checkpoint_replay=False
    )
    return SAC.load(command.run_dir, plain, best=command.best)


def _collect(command: Collect) -> None:
    from fastsac.collect import check_new, collect

    _check_play(command)
    check_new(command.out)
    told = command.out, command.episodes, command.seed, command.deterministic
    result, path = collect(_load(command, read_config(command.run_dir)), *told)
    returns = f"return {result.returns.mean():.1f} +- {result.returns.std():.1f}"
    print(f"{command.out}: {command.episodes:,} episodes, {result.lengths.sum():,} steps, {returns}")
    print(f"dataset: {path}")


def _export(command: Export) -> None:
    if (command.to is None) != command.policy_only:
        raise UsageError("choose one of --to onnx, --to torch and --policy-only")
    if command.episodes is not None and not command.policy_only:
        raise UsageError("--episodes is for the model card of --policy-only")
    if command.episodes is not None and command.episodes < 0:
        raise UsageError(f"--episodes must be a whole number of at least 0, got {command.episodes}")
    if command.policy_only and command.out is None:
        raise UsageError("--policy-only writes a directory: name it with --out")
    from fastsac.export import KINDS

    config = read_config(command.run_dir)
    agent = _load(command, config)
    if command.to is None:
        assert command.out is not None
        agent.config = config  # as it was trained
        episodes = 10 if command.episodes is None else command.episodes
        evaluation = agent.evaluate(episodes, seed=0) if episodes else None
        agent.save(command.out, policy_only=True, evaluation=evaluation)
        print(f"policy, settings and model card: {command.out}")
        return
    path = command.out or command.run_dir / {"onnx": "policy.onnx", "torch": "policy.pt2"}[command.to]
    if KINDS.get(path.suffix) != command.to:
        raise UsageError(f"--to {command.to} writes {'.onnx' if command.to == 'onnx' else '.pt2'}, not {path.name!r}")
    exported = agent.export(path)
    inputs = ", ".join(f"{name} {['N', *shape]}".replace("'", "") for name, shape in exported.inputs.items())
    print(f"{exported.path}: {inputs} -> action {['N', *exported.output]}".replace("'", ""))


def _eval(command: Eval) -> None:
    from fastsac.evaluate import check_video_path

    _check_play(command)
    if command.video is not None:
        check_video_path(command.video)
    config = read_config(command.run_dir)
    if command.env_id is not None and command.env_id != config.env_id:  # another task has its own arguments
        config = dataclasses.replace(config, env_id=command.env_id, env_backend="auto", env_kwargs={})
    if command.env_backend is not None:
        config = dataclasses.replace(config, env_backend=command.env_backend)
    if command.env_kwargs is not None:
        config = dataclasses.replace(config, env_kwargs=command.env_kwargs)
    agent = _load(command, config)
    if command.video is not None:
        agent.record_video(command.video, command.seed)
        print(f"video: {command.video}", file=sys.stderr)
    result = agent.evaluate(command.episodes, command.seed)
    if command.json:
        print(json.dumps(result.summary()))
    else:
        mean, spread = result.returns.mean(), result.returns.std()
        print(
            f"return {mean:.1f} +- {spread:.1f} over {command.episodes} episode{'s' * (command.episodes > 1)} of "
            f"{result.lengths.mean():.0f} steps"
        )


_COMMANDS: dict[type, Callable[[Any], None]] = {
    **{Eval: _eval, Export: _export, Collect: _collect, Ls: _ls, Plot: _plot, Presets: _presets, Doctor: _doctor}
}
