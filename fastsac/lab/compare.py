"""`fastsac compare`: trains every arm on every environment with every seed, and reports the results.

Each run is an ordinary run directory below `DIR/runs`. `DIR/comparison.json` has every finished run's learning curve.
Tables, tests and the report need nothing else, so the run directories may be deleted.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsac.env_backends import EnvSpec
from fastsac.envs import make_envs
from fastsac.errors import FastsacError, UsageError
from fastsac.estimators import choose
from fastsac.lab.arguments import Compare
from fastsac.lab.outcome import table
from fastsac.lab.plan import Plan, in_groups, jobs, make_plan
from fastsac.lab.record import Record, command_of, refuse_other_run
from fastsac.lab.results import OTHER_OUT, make_directory
from fastsac.lab.watch import Watch
from fastsac.lab.worker import log_file, train_here
from fastsac.run_dir import CONFIG
from fastsac.signals import stop_signals
from fastsac.system import lock


class Stopped(FastsacError):
    """A signal has stopped the comparison, which can be continued; the exit status is the shell's for that signal."""


class FailedRuns(FastsacError):
    """Runs have failed; `result` has the others."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


def run(options: Compare) -> None:
    """Run the command: make the missing runs, print the results and write the report.

    Raises:
        UsageError, Stopped, FailedRuns: as `compare` does; the last one after everything else is done.
    """
    from fastsac.lab.report import write_report

    failed: FailedRuns | None = None
    try:
        result = compare(options)
    except FailedRuns as error:
        failed, result = error, error.result
    print(table(result))
    print(f"report: {write_report(options.out)}")
    if failed is not None:
        raise failed


def compare(options: Compare) -> dict[str, Any]:
    """Make the missing runs; return the content of comparison.json.

    Raises:
        UsageError: if the options do not fit together, or the directory holds another comparison.
        Stopped: after SIGINT or SIGTERM.
        FailedRuns: if runs have failed, each with a line on stderr; the others are complete.
    """
    plan = make_plan(options)
    _refuse_misfits(plan, options)
    make_directory(options.out)
    with _locked(options.out):
        record = Record(options.out, plan, options)
        missing = [each for each in plan.runs if not record.has(each)]
        if more := record.more():
            print(
                f"fastsac: {options.out} also has earlier runs, and the results include them: {more}", file=sys.stderr
            )
        for each in missing:
            refuse_other_run(options.out / each.run_dir, each)
        record.measure_random()
        if missing:
            together = f", up to {options.num_learners} in a process" if options.num_learners > 1 else ""
            processes = len(in_groups(missing, options.num_learners))
            beside = f"{together}, {min(jobs(options), processes)} at a time" if options.ray is None else ""
            told = f"{len(missing)} of {len(plan.runs)} runs to train{beside}, below {options.out / 'runs'}"
            print(f"fastsac: {told}", file=sys.stderr)
        with stop_signals() as stop, Watch(options.out, plan.runs, missing) as watch:
            if options.ray is not None:
                from fastsac.lab.on_ray import train_all
            else:
                train_all = train_here
            failed = train_all(options, missing, record.add, watch, stop)
        record.fail(failed)
        for failure in failed:
            log = log_file(options.out / failure.run.run_dir)  # on Ray it is the task's
            more = f" (see {log})" if options.ray is None and log.exists() else ""
            print(f"fastsac: {failure.run.name()} failed: {failure.reason}{more}", file=sys.stderr)
        if stop:
            where = ["--jobs", str(options.jobs)] if options.jobs is not None else []
            where += ["--num-learners", str(options.num_learners)] if options.num_learners > 1 else []
            where += ["--ray", options.ray] if options.ray is not None else []
            where += ["--gpus-per-run", f"{options.gpus_per_run:g}"] if options.gpus_per_run else []
            command = " ".join([command_of(options), shlex.join(where)]).strip()
            stopped = Stopped(f"interrupted; to continue, run the same command again: {command}")
            stopped.exit_status = 128 + stop[0]
            raise stopped
        if failed:
            told = f"{len(failed)} of {len(plan.runs)} runs failed; run the same command again to retry them"
            raise FailedRuns(told, record.result)
        return record.result


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep another comparison out of the directory."""
    with (directory / ".compare.lock").open("w") as file:
        if not lock(file.fileno()):
            raise UsageError(f"another comparison is running in {directory}: wait for it, or stop it")
        yield


def _refuse_misfits(plan: Plan, options: Compare) -> None:
    """Raise UsageError for what would make every run of an arm or an environment fail."""
    if (options.out / CONFIG).exists():
        raise UsageError(f"{options.out} is a run directory: {OTHER_OUT}")
    if options.gpus_per_run and options.ray is None:
        raise UsageError("--gpus-per-run needs --ray: without it the runs share the GPU, --jobs of them at a time")
    for each in plan.runs:
        choose(each.config)
        if not each.config.eval_every:
            raise UsageError("--set eval_every=0 leaves nothing to compare: it must be at least 1")
    if len({each.run_dir for each in plan.runs}) < len(plan.runs):
        raise UsageError("two arms or environments would have the same directory name: compare them separately")
    for config in {each.config.env_id: each.config for each in plan.runs}.values():
        make_envs(EnvSpec.of(config), 1, 0).close()
