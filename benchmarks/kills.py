"""Kills training runs with SIGKILL at random moments, resumes them, and compares the results with an undisturbed run.

    python -m benchmarks.kills [--kills 60] [--out FILE]

Most kills come at a random moment between two steps that are spread over the run, with a checkpoint every 100 steps, so
many of them hit a checkpoint being written; every fifth comes during startup.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.machine import describe_machine, write_json
from fastsac.checkpoint import latest_checkpoint, load_checkpoint
from fastsac.errors import FastsacError
from fastsac.run_dir import newest_step, read_rows

RESULT = Path("benchmarks/results/kills.json")
INTERVAL = 100  # steps between checkpoints
STEPS_PER_KILL = 1000
SETTINGS = (
    "--env-id Pendulum-v1 --num-envs 4 --hidden-sizes 32 32 --batch-size 32 --learning-starts 100 --buffer-size 3000 "
    f"--eval-episodes 2 --eval-every 500 --log-every 20 --num-threads 1 --precision fp32 --checkpoint-replay "
    f"--checkpoint-every {INTERVAL}"
).split()  # fmt: skip
TIMES = ("time_s", "steps_per_s", "updates_per_s")


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """Start `fastsac train`."""
    command = [sys.executable, "-m", "fastsac", "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that is to succeed."""
    _, stderr = process.communicate()
    if process.returncode:
        raise RuntimeError(f"it ended with status {process.returncode}: {stderr.decode()[-2000:]}")


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl but for times."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def contents(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return a checkpoint's tensors, as bytes, and its state, but for the time."""
    groups, state = load_checkpoint(path)
    tensors = {f"{group}/{name}": tensor for group, own in groups.items() for name, tensor in own.items()}
    del state["time_s"]
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, state


def same_run(left: Path, right: Path) -> dict[str, bool]:
    """Compare two finished runs bit for bit: metrics, and everything in the newest and the best checkpoint.

    And whether TensorBoard shows each step once.
    """
    rows = metrics(left)
    parts = {"metrics": metrics(right) == rows}
    shown = EventAccumulator(str(right / "tensorboard")).Reload().Scalars("rollout/episode_return")
    parts["tensorboard"] = [scalar.step for scalar in shown] == [row["step"] for row in rows if "episode_return" in row]
    newest = [contents(latest_checkpoint(run_dir)) for run_dir in (left, right)]
    parts["tensors"] = newest[0][0] == newest[1][0]
    parts["state"] = newest[0][1] == newest[1][1]
    best = [contents(run_dir / "checkpoints" / "best") for run_dir in (left, right)]
    return parts | {"best": best[0] == best[1]}


def torment(kills: int, seed: int, directory: Path, settings: list[str]) -> dict[str, Any]:
    """Kill and resume one run; return what happened, and whether it ended as the run left alone did."""
    rng = random.Random(seed)
    total = STEPS_PER_KILL * (kills + 1)
    arguments = [*SETTINGS, *settings, "--total-steps", str(total)]
    alone, killed = directory / "alone", directory / "killed"
    finish(start(*arguments, "--run-dir", str(alone)))
    whole, lost, rubbish = 0, list[float](), 0
    for kill in range(kills):
        place = "--resume" if (killed / "config.json").exists() else "--run-dir"
        process = start(*arguments, place, str(killed))
        if kill % 5 == 4:
            time.sleep(rng.uniform(0.0, 3.0))
        else:
            aim = STEPS_PER_KILL * (kill + 1) - INTERVAL
            while process.poll() is None and (newest_step(killed) or 0) < aim:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        _, stderr = process.communicate()
        if process.returncode != -9:
            raise RuntimeError(f"ended by itself with {process.returncode}: {stderr.decode()[-2000:]}")
        rubbish += any(".tmp-" in path.name for path in (killed / "checkpoints").glob(".*"))
        try:
            if (step := newest_step(killed)) is not None:
                load_checkpoint(latest_checkpoint(killed))  # every hash is checked
            rows = read_rows(killed / "metrics.jsonl")
            lost.append((rows[-1]["step"] if rows else 0) - (step or 0))
            whole += 1
        except FastsacError as error:
            print(error, file=sys.stderr)
    if newest_step(killed) != total:  # the last kill may have come when all was done
        finish(start(*arguments, "--resume" if (killed / "config.json").exists() else "--run-dir", str(killed)))
    left = [name for path in (killed, killed / "checkpoints") for name in os.listdir(path) if ".tmp-" in name]
    return {
        "seed": seed,
        "settings": " ".join(settings),
        "kills": kills,
        "whole_after_kill": whole,
        "half_written_checkpoints_left_by_kills": rubbish,
        "steps_lost": {"most": max(lost, default=0), "checkpoint_interval": INTERVAL},
        "temporary_files_at_the_end": len(left),
        "equal_to_the_run_left_alone": same_run(alone, killed),
    }


def main() -> None:
    """Torment and write."""
    parser = argparse.ArgumentParser(description="Kill and resume training runs.")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--kills", type=int, default=60)
    arguments = parser.parse_args()
    runs = []
    choices = (["--estimator", "pathwise"], ["--estimator", "score"], ["--engine", "reference"])
    for seed, settings in enumerate(choices):
        with tempfile.TemporaryDirectory() as directory:
            runs.append(torment(arguments.kills // len(choices), seed, Path(directory), settings))
            print(json.dumps(runs[-1]), flush=True)
    command = f"python -m benchmarks.kills --kills {arguments.kills}"
    write_json(arguments.out, {"command": command, "machine": describe_machine(), "runs": runs})


if __name__ == "__main__":
    main()
