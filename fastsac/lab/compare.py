"""`fastsac compare`: trains every arm on every environment with every seed, and says what came out.

Each run is an ordinary run directory below `DIR/runs`. `DIR/comparison.json` has every finished run's learning curve,
and is all that tables, tests and the report are made of: the run directories may be removed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastsac.config import Config
from fastsac.env_backends import EnvSpec
from fastsac.envs import make_envs
from fastsac.errors import FastsacError, UsageError
from fastsac.evaluate import evaluate
from fastsac.lab.arguments import Compare
from fastsac.lab.outcome import summarize
from fastsac.lab.plan import Plan, Run, difference, jobs, make_plan, settings_of, train_command
from fastsac.lab.watch import Watch
from fastsac.lab.worker import MACHINE, STOPPED, config_file
from fastsac.machine import write_json
from fastsac.plot import read_metric
from fastsac.run_dir import CONFIG, read_config
from fastsac.signals import stop_signals

FORMAT = 1
COMPARISON = "comparison.json"
RANDOM_EPISODES, RANDOM_SEED = 10, 0


class Stopped(FastsacError):
    """A signal has ended the comparison, which can go on."""

    exit_status = 0


def compare(options: Compare) -> dict[str, Any]:
    """Make the runs that are missing; return what comparison.json has.

    Raises:
        UsageError: if the options do not fit together, or the directory holds another comparison.
        Stopped: after SIGINT or SIGTERM.
        FastsacError: if runs have failed; the others are complete.
    """
    plan = make_plan(options)
    _refuse_unknown_environments(plan)
    options.out.mkdir(parents=True, exist_ok=True)
    with _locked(options.out):
        record = Record(options.out, plan, options)
        missing = [each for each in plan.runs if not record.has(each)]
        for each in missing:
            refuse_other_run(options.out / each.run_dir, each)
        record.measure_random()
        with stop_signals() as stop, Watch(options.out, plan.runs, missing) as watch:
            if options.ray is not None:
                from fastsac.lab.on_ray import train_all
            else:
                train_all = train_here
            failed = train_all(options, missing, record.add, watch, stop)
        if stop:
            raise Stopped(f"interrupted; the same command goes on: {record.result['command']}")
        record.write()
        if failed:
            told = "; ".join(f"{each.name()}: {reason}" for each, reason in failed)
            raise FastsacError(f"{len(failed)} of {len(plan.runs)} runs failed: {told}")
        return record.result


def train_here(
    options: Compare, runs: list[Run], done: Callable[[Run], None], watch: Watch, stop: list[int]
) -> list[tuple[Run, str]]:
    """Train runs in processes of their own, side by side; return those that failed, and why.

    Args:
        options: of the command.
        runs: to be made.
        done: told of each run that is complete.
        watch: shown how they go on.
        stop: signals that have come in; then the processes save, and end.
    """
    processes: list[subprocess.Popen[bytes]] = []
    lock, failed = threading.Lock(), list[tuple[Run, str]]()

    def train(run: Run) -> int:
        run_dir = options.out / run.run_dir
        with lock:
            if stop:
                return STOPPED
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            write_json(config_file(run_dir), json.loads(json.dumps(dataclasses.asdict(run.config))))
            command = [sys.executable, "-m", "fastsac.lab.worker", str(run_dir)]
            with log_file(run_dir).open("w") as log:
                # a session of its own: Ctrl-C reaches this process only, which hands it on once
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
                processes.append(process)
        watch.begin(run)
        return process.wait()

    with ThreadPoolExecutor(jobs(options)) as pool:
        waiting: dict[Future[int], Run] = {pool.submit(train, run): run for run in runs}
        told = False
        while waiting:
            complete, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            if stop and not told:
                with lock:
                    for process in processes:
                        if process.poll() is None:
                            process.send_signal(signal.SIGTERM)
                told = True
            for future in complete:
                run, status = waiting.pop(future), future.result()
                if status == 0:
                    done(run)
                elif status != STOPPED and not stop:
                    failed.append((run, last_line(log_file(options.out / run.run_dir), status)))
                watch.end(run, status)
            watch.show()
    return failed


class Record:
    """comparison.json: what has been run, and what came out."""

    def __init__(self, directory: Path, plan: Plan, options: Compare) -> None:
        """Read what there is.

        Raises:
            UsageError: if the directory holds another comparison.
        """
        self._directory, self._plan = directory, plan
        self.result: dict[str, Any] = {"format": FORMAT, "runs": [], "random_return": {}}
        path = directory / COMPARISON
        if path.exists():
            try:
                self.result = json.loads(path.read_text())
                if self.result["format"] != FORMAT:
                    raise ValueError("another format")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{path} cannot be read ({error}): choose another --out") from error
        for name in ("total_steps", "set"):
            stored = self.result.get("settings", plan.settings)[name]
            if stored != plan.settings[name]:
                raise UsageError(f"{directory} holds a comparison with {name} {stored}: choose another --out")
        self.result["command"] = command_of(options)
        self.result["settings"] = _union(self.result.get("settings"), plan.settings)
        self._configs = {
            (each["env_id"], each["arm"], each["seed"]): settings_of(Config(**each["config"]))
            for each in self.result["runs"]
        }

    def has(self, run: Run) -> bool:
        """Return whether the run is complete; UsageError if it was made with other settings."""
        stored = self._configs.get(run.key)
        if stored is not None and (what := difference(stored, settings_of(run.config))):
            raise UsageError(f"{self._directory / COMPARISON} has another run of {run.name()}: {what}")
        return stored is not None

    def measure_random(self) -> None:
        """Play with uniformly random actions in each environment that has not been played in."""
        for run in self._plan.runs:
            if run.config.env_id not in self.result["random_return"]:
                self.result["random_return"][run.config.env_id] = random_return(run.config)

    def add(self, run: Run) -> None:
        """Take a complete run in, and write the file."""
        run_dir = self._directory / run.run_dir
        steps, returns = read_metric(run_dir, "eval_return")
        updated, updates = read_metric(run_dir, "updates")
        if not steps or updated[-1] < run.config.total_steps:
            raise FastsacError(f"{run_dir} has not been evaluated at its last step")
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
                **json.loads((run_dir / MACHINE).read_text()),
            }
        )
        self.result["runs"].sort(key=lambda each: (each["env_id"], each["arm"], each["seed"]))
        self.write()

    def write(self) -> None:
        """Write the file, with the summary of the runs that there are."""
        reference = self._plan.arms[0].label
        self.result |= summarize(self.result["runs"], self.result["random_return"], reference, self._plan.settings)
        write_json(self._directory / COMPARISON, _finite(self.result))


def random_return(config: Config) -> float:
    """Return the mean return of uniformly random actions over some episodes."""
    envs = make_envs(EnvSpec.of(config), RANDOM_EPISODES, RANDOM_SEED)
    rng, size = np.random.default_rng(RANDOM_SEED), envs.spaces.action_size
    try:
        played = evaluate(lambda obs: rng.uniform(-1, 1, (len(obs), size)).astype(np.float32), envs, RANDOM_EPISODES)
    finally:
        envs.close()
    return float(played.returns.mean())


def refuse_other_run(run_dir: Path, run: Run) -> None:
    """Raise UsageError if the directory holds a run with other settings."""
    if (run_dir / CONFIG).exists():
        what = difference(settings_of(read_config(run_dir)), settings_of(run.config))
        if what:
            raise UsageError(f"{run_dir} holds another run: {what}; choose another --out")


def log_file(run_dir: Path) -> Path:
    """Return where a run's process writes what it has to say."""
    return run_dir.with_name(f"{run_dir.name}.log")


def last_line(path: Path, status: int) -> str:
    """Return the last line of a run's log, or its exit status where there is none."""
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    told = [line.strip() for line in lines if line.strip()]
    return told[-1].removeprefix("error: ")[:500] if told else f"exit status {status}"


def command_of(options: Compare) -> str:
    """Return the command line, without what does not change the outcome."""
    words = ["fastsac", "compare", "--env-ids", *options.env_ids, "--arms", *options.arms, "--seeds", options.seeds]
    words += ["--total-steps", str(options.total_steps), "--out", options.out.name]
    words += ["--set", *options.set] if options.set else []
    words += ["--margin", f"{options.margin:g}"] if options.margin != Compare.margin else []
    return shlex.join(words)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep another comparison out of the directory."""
    with (directory / ".compare.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another comparison is running in {directory}: wait for it, or stop it") from None
        yield


def _refuse_unknown_environments(plan: Plan) -> None:
    for config in {run.config.env_id: run.config for run in plan.runs}.values():
        make_envs(EnvSpec.of(config), 1, 0).close()


def _union(stored: dict[str, Any] | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of all runs that there are or will be."""
    if stored is None:
        return dict(asked)
    lists = {name: list(dict.fromkeys([*asked[name], *stored[name]])) for name in ("env_ids", "arms")}
    return {**asked, **lists, "seeds": sorted({*stored["seeds"], *asked["seeds"]})}


def _finite(value: Any) -> Any:
    """Return the same for JSON: null in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
