"""What several tests do with runs."""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsac import SAC, Config

SMALL = Config(
    env_id="Pendulum-v1",
    num_envs=4,
    hidden_sizes=(16, 16),
    batch_size=16,
    learning_starts=40,
    buffer_size=2000,
    eval_every=0,
    eval_episodes=2,
    log_every=50,
    num_threads=1,
    precision="fp32",
)
TIMES = ("time_s", "steps_per_s", "updates_per_s")


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without times."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows_of(run_dir)]


def parameters(agent: SAC) -> dict[str, torch.Tensor]:
    """A copy of the learner's tensors."""
    return {name: value.clone() for name, value in agent.learner.state()[0].items()}


def state_of(agent: SAC) -> dict[str, Any]:
    """Everything that a run consists of, comparable with ==; without times."""
    progress = agent._progress.state()
    del progress["time_s"]
    replay = agent.replay
    rows = replay.rows(replay.oldest, replay.newest)
    tensors = {**parameters(agent), **{f"replay.{name}": tensor for name, tensor in rows.items()}}
    head, counters = replay.state()
    tensors |= {f"replay.head.{name}": tensor for name, tensor in head.items()}
    queue = [replay._queue[(replay._first + place) % len(replay._queue)].item() for place in range(replay.size)]
    return {
        "tensors": {name: (tensor.dtype, tuple(tensor.shape), tensor.tolist()) for name, tensor in tensors.items()},
        "progress": progress,
        "metrics": {name: float(value) for name, value in agent._progress.metrics.items()},
        "counters": (counters, agent.learner.updates, queue),
        "envs": agent.envs.state(),
    }


@contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, steps: int):
    """Within it, training stops as by a signal once it has made so many steps."""
    step = SAC._step

    def stopping(agent: SAC, *arguments: Any) -> Any:
        outcome = yield from step(agent, *arguments)
        if agent.steps >= steps:
            agent._heartbeat.beat = lambda stop: stop.append(15) or True
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(SAC, "_step", stopping)
        yield
