"""How long a checkpoint stops training: HalfCheetah-v5 in 16 environments with a full replay buffer.

    python -m benchmarks.checkpoint_pause [--out FILE] [--label NAME]

The buffer is filled with random transitions, then training continues with a checkpoint every 50,000 steps. The pause is
the time that the training thread spends on saving. Few updates are made in between, so that the steps are fast. Runs
under other labels in FILE are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine, write_json
from fastsac import SAC, Config

RESULT = Path("benchmarks/results/checkpoint_pause.json")
INTERVAL = 50_000  # steps between checkpoints, the default


def fill(agent: SAC, transitions: int, generator: torch.Generator) -> None:
    """Add random transitions to the replay that is under way."""
    n, sizes = agent.config.num_envs, (agent.spaces.obs_size, agent.spaces.action_size)
    valid = np.ones(n, dtype=np.bool_)
    obs, action = (torch.randn(n, size, generator=generator) for size in sizes)
    reward, terminated = torch.randn(n, generator=generator), torch.zeros(n, dtype=torch.bool)
    agent.replay.begin(obs)
    for _ in range(transitions // n):
        agent.replay.add(action, reward, terminated, obs.normal_(generator=generator), valid)


def timed(owner: type, name: str, seconds: list[float]) -> None:
    """Let a method note how long each of its calls took."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, call)


def measure(capacity: int, checkpoints: int, interval: int) -> dict[str, Any]:
    """Train over some checkpoints; return the pauses, and the seconds that writing took beside the training."""
    config = Config(
        buffer_size=capacity,
        checkpoint_replay=True,
        checkpoint_every=interval,
        eval_every=0,
        utd=0.01,
        num_threads=1,
        precision="fp32",
    )
    pauses, writes = list[float](), list[float]()
    try:
        from fastsac.saver import Saver
    except ImportError:  # as it was before: everything is written by the training thread
        timed(SAC, "save", pauses)
    else:
        timed(Saver, "save", pauses)
        timed(Saver, "_write", writes)
    directory = Path(tempfile.mkdtemp(dir="."))
    try:
        agent = SAC(config)
        agent.learn(total_steps=interval // 2)
        fill(agent, capacity, torch.Generator().manual_seed(0))
        start, steps = time.perf_counter(), agent.steps
        agent.learn(total_steps=(checkpoints + 1) * interval - interval // 2, run_dir=directory / "run")
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in agent_files(directory))
    finally:
        shutil.rmtree(directory)
    return {
        "capacity": capacity,
        "interval": interval,
        "pause_s": pauses[:checkpoints],
        "write_s": writes[:checkpoints],
        "written_by": "a thread beside the training" if writes else "the training thread",
        "checkpoint_bytes": size,
        "steps_per_s": (agent.steps - steps) / seconds,
    }


def agent_files(directory: Path) -> list[Path]:
    """Return the files of the newest checkpoint."""
    newest = max((directory / "run" / "checkpoints").glob("step-*"))
    return list(newest.iterdir())


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="How long a checkpoint stops training.")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--label", default="incremental")
    parser.add_argument("--capacity", type=int, default=1_000_000)
    parser.add_argument("--checkpoints", type=int, default=6)
    parser.add_argument("--interval", type=int, default=INTERVAL)
    arguments = parser.parse_args()
    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    row = measure(arguments.capacity, arguments.checkpoints, arguments.interval)
    command = f"python -m benchmarks.checkpoint_pause --label {arguments.label}"
    result[arguments.label] = {"command": command, "machine": describe_machine(), **row}
    write_json(arguments.out, result)
    print(arguments.label, json.dumps(row))


if __name__ == "__main__":
    main()
