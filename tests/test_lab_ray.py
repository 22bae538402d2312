"""`fastsac compare --ray`: a run whose node is lost goes on from its last checkpoint on another one."""

from __future__ import annotations

import builtins
import dataclasses
import json
import signal
import threading
import time
import types
from pathlib import Path

import pytest

from fastsac import SAC, FastsacError, UsageError
from fastsac.lab import on_ray
from fastsac.lab.arguments import Compare
from fastsac.lab.compare import compare
from fastsac.lab.on_ray import connected
from fastsac.lab.plan import make_plan
from fastsac.lab.store import Store, read_files, write_files
from fastsac.lab.worker import DIVERGED, STOPPED
from fastsac.run_dir import newest_step
from tests.runs import metrics_of

STEPS = 2500
SETTINGS = (  # noqa: SIM905, a list is harder to read
    "num_envs=4 hidden_sizes=[16,16] batch_size=16 learning_starts=40 buffer_size=4000 eval_episodes=2 log_every=50 "
    "env_backend=gymnasium num_threads=1 eval_every=500 checkpoint_every=100"
).split()


def options(out: Path, **changes) -> Compare:
    plain = Compare(("Pendulum-v1",), ("pathwise",), out, "0:1", STEPS, tuple(SETTINGS))
    return dataclasses.replace(plain, **changes)


def test_what_is_shipped_is_never_half_there(tmp_path):
    store, name = Store(str(tmp_path)), "runs/x/seed-0"
    run_dir = tmp_path / name
    assert store.begin(name) == (1, {})
    assert store.put(name, 1, {"config.json": b"{}", "checkpoints/step-000000000001/state.json": b"1"})
    for leftover in (".seed-0.shipped", ".seed-0.replaced"):  # of a store that died
        write_files(run_dir.with_name(leftover), {"half": b""})
    assert store.put(name, 1, {"config.json": b"{}", "checkpoints/step-000000000002/state.json": b"2"})
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-000000000002"]
    attempt, files = store.begin(name)
    assert attempt == 2
    assert files["checkpoints/step-000000000002/state.json"] == b"2"
    assert not store.put(name, 1, {"config.json": b"late"})  # of a node that was thought to be lost
    assert (run_dir / "config.json").read_bytes() == b"{}"
    assert [path.name for path in run_dir.parent.iterdir()] == ["seed-0"]
    run_dir.rename(run_dir.with_name(".seed-0.replaced"))  # where a driver may die
    assert store.begin(name) == (3, files)
    with pytest.raises(ValueError, match="leads out"):
        write_files(tmp_path / "other", {"../evil": b""})
    assert read_files(run_dir) == files


def test_the_best_checkpoint_is_shipped_beside_the_newest(tmp_path):
    names = ["config.json", "metrics.jsonl", "machine.json", *(f"checkpoints/{name}/state.json" for name in ("a", "b"))]
    best = {"checkpoints/best/state.json": b"best"}
    write_files(tmp_path / "run", dict.fromkeys(names, b"") | best)
    found = read_files(tmp_path / "run", tmp_path / "run" / "checkpoints" / "a")
    assert found == dict.fromkeys(names[:-1], b"") | best


class RayError(Exception):
    """What Ray raises."""


class Ray:
    """What of Ray the end of a task needs."""

    exceptions = types.SimpleNamespace(RayError=RayError)

    def __init__(self):
        self.cancelled, self.waited = [], None

    def get(self, task):
        if isinstance(task, Exception):
            raise task
        return task

    def cancel(self, task):
        self.cancelled.append(task)

    def wait(self, tasks, num_returns, timeout):
        self.waited = (tasks, num_returns)
        raise RayError


@pytest.mark.parametrize(
    ("task", "told", "reason", "diverged"),
    [
        ((0, ""), 1, None, None),
        ((1, "an environment broke"), 0, "an environment broke", False),
        ((DIVERGED, "training diverged"), 0, "training diverged", True),
        ((STOPPED, ""), 0, "its process was stopped by a signal; it can be continued", False),
        (RayError("long\n\n  no node is left\n"), 0, "no node is left", False),
    ],
)
def test_what_becomes_of_a_task(tmp_path, task, told, reason, diverged):
    (run,) = make_plan(options(tmp_path)).runs
    done = []
    failure = on_ray._outcome(Ray(), run, task, done.append)
    assert len(done) == told
    assert (failure and (failure.reason, failure.diverged)) == (None if reason is None else (reason, diverged))


def test_a_run_that_cannot_be_taken_in_has_failed(tmp_path):
    def done(run):
        raise FastsacError("machine.json cannot be read")

    (run,) = make_plan(options(tmp_path)).runs
    assert on_ray._outcome(Ray(), run, (0, ""), done).reason == "machine.json cannot be read"


def test_tasks_are_cancelled_the_waiting_ones_first():
    ray = Ray()
    on_ray._cancel(ray, ["first", "second"])
    assert ray.cancelled == ["second", "first"]
    assert ray.waited == (["first", "second"], 2)


def test_what_no_node_has_is_told():
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 1.0}}]
    assert on_ray.lacking(nodes, 8, 0.0) == ""
    assert on_ray.lacking(nodes, 16, 0.0) == "a run needs 16 CPU, but no node of the cluster has more than 8"
    assert on_ray.lacking(nodes, 1, 0.5) == "a run needs 0.5 GPU, but no node of the cluster has more than 0"
    assert on_ray.lacking([], 1, 0.0) == "a run needs 1 CPU, but no node of the cluster has more than 0"


def test_without_ray_it_says_how_to_get_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "ray":
            raise ModuleNotFoundError(name="ray")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match="--ray needs Ray: pip install ray"), connected("auto"):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: Connection refused"),
        ("127.0.0.1:x", "no Ray cluster at 127.0.0.1:x"),
        ("ray://127.0.0.1:10001", "on a machine that belongs to the cluster"),
    ],
)
def test_without_a_cluster_it_says_so(address, message):
    with pytest.raises(UsageError, match=message), connected(address):
        pass


@pytest.mark.slow
def test_a_run_goes_on_when_its_node_is_lost(tmp_path):
    from ray.cluster_utils import Cluster

    plain = options(tmp_path / "out")
    (run,) = make_plan(plain).runs
    run_dir = plain.out / run.run_dir
    lost: list[int | None] = []
    handler = signal.getsignal(signal.SIGTERM)  # Ray puts its own in its place
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]

        def lose_a_node() -> None:
            """Remove the node that trains, once its first checkpoint has come."""
            from ray._private.state import available_resources_per_node

            while newest_step(run_dir) is None:
                time.sleep(0.05)
            free = available_resources_per_node()
            (busy,) = [node for node in nodes if not free[node.node_id].get("CPU")]
            cluster.remove_node(busy, allow_graceful=False)
            lost.append(newest_step(run_dir))

        breaker = threading.Thread(target=lose_a_node, daemon=True)
        breaker.start()
        result = compare(dataclasses.replace(plain, ray=cluster.address))
        breaker.join(60)
        again = compare(dataclasses.replace(plain, ray=cluster.address))  # nothing is left to do
        assert again["runs"] == result["runs"]
    finally:
        cluster.shutdown()
        signal.signal(signal.SIGTERM, handler)
    (found,) = result["runs"]
    (resumed,) = found["resumed_at"]
    assert lost[0] is not None
    assert 0 < resumed < STEPS
    assert resumed >= lost[0] - 200
    agent = SAC(run.config)
    agent.learn(run_dir=tmp_path / "alone")
    agent.close()
    assert metrics_of(run_dir) == metrics_of(tmp_path / "alone")
    ours, alone = (path / "checkpoints" / f"step-{agent.steps:012d}" for path in (run_dir, tmp_path / "alone"))
    assert (ours / "learner.safetensors").read_bytes() == (alone / "learner.safetensors").read_bytes()
    best = [SAC.load(path, best=True).steps for path in (run_dir, tmp_path / "alone")]
    assert best[0] == best[1]
    assert json.loads((plain.out / "comparison.json").read_text())["runs"][0]["eval_return"] == found["eval_return"]
