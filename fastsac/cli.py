"""The command line: `fastsac train | eval | presets | doctor | compare | report | lab`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastsac.arguments import Doctor, Eval, Presets, Train, parse
from fastsac.errors import FastsacError, UsageError
from fastsac.lab.arguments import Compare, Cost, Gradients, Lab, Report, Toy
from fastsac.presets import presets, table
from fastsac.run_dir import read_config
from fastsac.train_command import train, under_torchrun


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 on success, 2 on a usage error, 1 on a failed run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        command = parse(arguments)
        if isinstance(command, Train):
            train(command, arguments)
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


def _fail(message: str, status: int = 1) -> NoReturn:
    if under_torchrun():
        from fastsac.ranks import first_to_end

        if not first_to_end():
            sys.exit(status)
    print(f"fastsac: {message}", file=sys.stderr)
    sys.exit(status)


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
