"""The runs of a comparison on a Ray cluster, whose nodes share no disk.

Each run is a task. It trains in a temporary directory of its node, and ships the run directory's files to an actor on
the driver's node, the store, whenever a checkpoint has been written. Ray starts a task again when its node is lost; it
then asks the store for what there is, and goes on from that.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastsac.callbacks import Callback
from fastsac.errors import Divergence, FastsacError, UsageError
from fastsac.lab.arguments import Compare
from fastsac.lab.plan import Run
from fastsac.lab.watch import Watch
from fastsac.lab.worker import DIVERGED, MACHINE, POLL_SECONDS, STOPPED, Done, Failure, train
from fastsac.run_dir import CHECKPOINTS, CONFIG, LOCK, METRICS, config_from_dict, newest_step

#: a run's files, by their names relative to the run directory
Files = dict[str, bytes]
#: how often a run is started again after its node or its process was lost
RETRIES = 5
REPORT_SECONDS, CONNECT_SECONDS = 1.0, 10.0
#: for tasks that have been cancelled to ship a last checkpoint
PATIENCE_SECONDS = 60.0


class Store:
    """Keeps the runs' files in the comparison's directory: an actor on the driver's node."""

    def __init__(self, out: str) -> None:
        """Say where."""
        self._out = Path(out)
        self._attempts: dict[str, int] = {}
        self._steps: dict[str, int] = {}

    def begin(self, name: str) -> tuple[int, Files]:
        """Return the number of this attempt at a run, and the files that earlier ones have left."""
        self._attempts[name] = self._attempts.get(name, 0) + 1
        run_dir = self._out / name
        if not run_dir.exists() and _replaced(run_dir).exists():  # the driver died between two renames
            _replaced(run_dir).rename(run_dir)
        return self._attempts[name], read_files(run_dir) if (run_dir / CONFIG).exists() else {}

    def put(self, name: str, attempt: int, files: Files) -> bool:
        """Put the files in the place of the run directory, all at once; False if a later attempt has begun."""
        if attempt != self._attempts[name]:
            return False
        run_dir = self._out / name
        temporary, old = run_dir.with_name(f".{run_dir.name}.shipped"), _replaced(run_dir)
        for path in (temporary, old):
            shutil.rmtree(path, ignore_errors=True)
        write_files(temporary, files)
        if run_dir.exists():
            run_dir.rename(old)
        temporary.rename(run_dir)
        shutil.rmtree(old, ignore_errors=True)
        return True

    def report(self, name: str, step: int) -> None:
        """Take in how far a run is."""
        self._steps[name] = step

    def steps(self) -> dict[str, int]:
        """Return how far each run is that has begun."""
        return self._steps


def _replaced(run_dir: Path) -> Path:
    return run_dir.with_name(f".{run_dir.name}.replaced")


def read_files(run_dir: Path, checkpoint: Path | None = None) -> Files:
    """Return a run directory's files.

    Args:
        run_dir: the run directory.
        checkpoint: while the run is under way: this checkpoint only, and the files beside it that a resume needs.
    """
    if checkpoint is None:
        paths = [path for path in run_dir.rglob("*") if path.name != LOCK]
    else:
        paths = [*checkpoint.iterdir(), *(run_dir / name for name in (CONFIG, METRICS, MACHINE))]
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def write_files(run_dir: Path, files: Files) -> None:
    """Write what `read_files` returned.

    Raises:
        ValueError: for a name that leads out of the directory.
    """
    run_dir.mkdir(parents=True)
    for name, content in files.items():
        path = run_dir / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} leads out of the run directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


class Ship(Callback):
    """Sends checkpoints and steps to the store, and ends the run when another attempt has taken its place."""

    def __init__(self, ray: Any, store: Any, name: str, attempt: int) -> None:
        """Say whose they are."""
        self._ray, self._store, self._name, self._attempt = ray, store, name, attempt
        self._told = 0.0
        self.current = True

    def on_step(self, agent: Any) -> bool:
        """Report the step now and then."""
        if time.monotonic() - self._told > REPORT_SECONDS:
            self._told = time.monotonic()
            self._store.report.remote(self._name, agent.steps)
        return self.current

    def on_checkpoint(self, agent: Any, path: Path) -> bool:
        """Ship it, with the metrics so far."""
        self.ship(read_files(path.parents[1], path))
        return self.current

    def ship(self, files: Files) -> None:
        """Hand the files over, and wait until they are in their place."""
        self.current = self._ray.get(self._store.put.remote(self._name, self._attempt, files))


def train_there(store: Any, name: str, settings: dict[str, Any]) -> tuple[int, str]:
    """Train a run on this node: the task. Return an exit status as `fastsac.lab.worker` has it, and what went wrong."""
    import ray

    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    attempt, files = ray.get(store.begin.remote(name))
    with tempfile.TemporaryDirectory(prefix="fastsac-") as directory:
        run_dir, ship = Path(directory) / "run", Ship(ray, store, name, attempt)
        if files:
            write_files(run_dir, files)
        try:
            agent = train(run_dir, config_from_dict(settings), ship)
            newest = newest_step(run_dir)
            for path in (run_dir / CHECKPOINTS).glob("step-*"):
                if path.name != f"step-{newest:012d}":
                    shutil.rmtree(path)
            ship.ship(read_files(run_dir))
        except FastsacError as error:
            return DIVERGED if isinstance(error, Divergence) else error.exit_status, str(error)
    return STOPPED if agent.stopped_by_signal or not ship.current else 0, ""


def train_all(options: Compare, runs: list[Run], done: Done, watch: Watch, stop: list[int]) -> list[Failure]:
    """Train runs on the cluster; return those that failed. See `fastsac.lab.worker.train_here`.

    Raises:
        UsageError: if Ray is not installed, or there is no cluster.
    """
    with connected(str(options.ray)) as ray:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        store = ray.remote(Store).options(num_cpus=0, scheduling_strategy=here).remote(str(options.out.resolve()))
        num_gpus = options.gpus_per_run if ray.cluster_resources().get("GPU", 0) else 0
        task, takes = ray.remote(train_there), {"num_gpus": num_gpus, "max_retries": RETRIES, "retry_exceptions": False}
        waiting: dict[Any, Run] = {}
        for run in runs:
            settings = dataclasses.asdict(run.config)
            sized = task.options(num_cpus=max(1, run.config.num_threads), **takes)
            waiting[sized.remote(store, run.run_dir.as_posix(), settings)] = run
        failed, names, shown = list[Failure](), {run.run_dir.as_posix(): run for run in runs}, set[str]()
        while waiting and not stop:
            complete, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
            steps = ray.get(store.steps.remote())
            for name in steps.keys() - shown:
                watch.begin(names[name])
            shown |= steps.keys()
            for task_ in complete:
                run = waiting.pop(task_)
                failure = _outcome(ray, run, task_, done)
                failed += [failure] if failure is not None else []
                watch.end(run, 0 if failure is None else 1)
            watch.show({run.key: steps.get(name, 0) for name, run in names.items()})
        if stop:
            _cancel(ray, list(waiting))
    return failed


def _outcome(ray: Any, run: Run, task: Any, done: Done) -> Failure | None:
    """Tell of a complete run, or return its failure."""
    try:
        status, reason = ray.get(task)
        if status == 0:
            done(run)
            return None
    except FastsacError as error:
        status, reason = 1, str(error)
    except ray.exceptions.RayError as error:  # what no run should raise, or no node is left
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        status, reason = 1, lines[-1] if lines else type(error).__name__
    return Failure(run, reason or "its process was stopped by a signal; it can go on", status == DIVERGED)


def _cancel(ray: Any, tasks: list[Any]) -> None:
    """Let the tasks end as by a signal, which saves and ships a checkpoint, and wait for that."""
    for task in reversed(tasks):  # those that wait first, or they would begin
        ray.cancel(task)
    with suppress(ray.exceptions.RayError):
        ray.wait(tasks, num_returns=len(tasks), timeout=PATIENCE_SECONDS)


def _refuse_unreachable(address: str) -> None:
    """Raise UsageError at once for what Ray would try for minutes, or what would leave the files on another machine."""
    if address.startswith("ray://"):
        raise UsageError("--ray takes host:port or auto, on a machine that belongs to the cluster, not ray://")
    host, colon, port = address.rpartition(":")
    if not colon:  # auto, or local
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"no Ray cluster at {address}: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster.

    Raises:
        UsageError: if Ray is not installed, or there is no cluster at this address.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UsageError('--ray needs Ray: pip install "fastsac[ray]"') from error
    _refuse_unreachable(address)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with warnings.catch_warnings():  # of what Ray is going to change about GPUs, on which nothing here relies
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"no Ray cluster at {address}: {' '.join(str(error).split())[:300]}") from error
    try:
        for number, handler in before.items():  # Ray has put its own in their place
            with suppress(ValueError):
                signal.signal(number, handler)
        yield ray
    finally:
        ray.shutdown()
