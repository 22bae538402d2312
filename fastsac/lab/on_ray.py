"""Trains the runs of a comparison on a Ray cluster, whose nodes share no disk.

Each run is a task. It trains in a temporary directory of its node, and ships the run directory's files to an actor on
the driver's node, the store, whenever a checkpoint has been written. Ray restarts a task when its node is lost; the
task then gets the files from the store, and continues from them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import socket
import sys
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
from fastsac.lab.store import Files, Store, read_files, write_files
from fastsac.lab.watch import Watch
from fastsac.lab.worker import DIVERGED, POLL_SECONDS, STOPPED, Done, Failure, train
from fastsac.run_dir import CHECKPOINTS, config_from_dict, newest_step

#: how often a run is restarted after its node or its process was lost
RETRIES = 5
REPORT_SECONDS, CONNECT_SECONDS = 1.0, 10.0
#: time for cancelled tasks to ship a last checkpoint
PATIENCE_SECONDS = 60.0


class Ship(Callback):
    """Sends checkpoints and steps to the store, and ends the run when another attempt has taken its place."""

    def __init__(self, ray: Any, store: Any, name: str, attempt: int) -> None:
        """Remember the run and the attempt."""
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
        """Send the files, and wait until they are in place."""
        self.current = self._ray.get(self._store.put.remote(self._name, self._attempt, files))


def train_there(store: Any, name: str, settings: dict[str, Any]) -> tuple[int, str]:
    """The task: train a run on this node. Return an exit status as in `fastsac.lab.worker`, and what went wrong."""
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
        takes = {"num_gpus": options.gpus_per_run, "max_retries": RETRIES, "retry_exceptions": False}
        task = ray.remote(train_there)
        num_cpus = max((run.config.num_threads for run in runs), default=1)
        if told := lacking(ray.nodes(), num_cpus, options.gpus_per_run):
            print(f"fastsac: {told}; the runs wait for such a node", file=sys.stderr)
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
                watch.end(run, "complete" if failure is None else "failed")
            watch.show({run.key: steps.get(name, 0) for name, run in names.items()})
        if stop:
            _cancel(ray, list(waiting))
    return failed


def lacking(nodes: list[dict[str, Any]], num_cpus: int, num_gpus: float) -> str:
    """Return in words what a run needs and no node of the cluster has; a cluster may grow."""
    for what, needed in (("CPU", num_cpus), ("GPU", num_gpus)):
        most = max((node["Resources"].get(what, 0) for node in nodes if node["Alive"]), default=0)
        if most < needed:
            return f"a run needs {needed:g} {what}, but no node of the cluster has more than {most:g}"
    return ""


def _outcome(ray: Any, run: Run, task: Any, done: Done) -> Failure | None:
    """Report a complete run, or return its failure."""
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
    return Failure(run, reason or "its process was stopped by a signal; it can be continued", status == DIVERGED)


def _cancel(ray: Any, tasks: list[Any]) -> None:
    """Stop the tasks as a signal would, which saves and ships a checkpoint, and wait for that."""
    for task in reversed(tasks):  # those that wait first, or they would begin
        ray.cancel(task)
    with suppress(ray.exceptions.RayError):
        ray.wait(tasks, num_returns=len(tasks), timeout=PATIENCE_SECONDS)


def _refuse_unreachable(address: str) -> None:
    """Raise UsageError at once if Ray would retry for minutes, or would leave the files on another machine."""
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
        raise UsageError("--ray needs Ray: pip install ray") from error
    _refuse_unreachable(address)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with warnings.catch_warnings():  # about GPUs in future versions of Ray, on which nothing here relies
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"no Ray cluster at {address}: {' '.join(str(error).split())[:300]}") from error
    try:
        for number, handler in before.items():  # Ray has replaced them
            with suppress(ValueError):
                signal.signal(number, handler)
        yield ray
    finally:
        ray.shutdown()
