"""Counts which faults training runs survive, and which damage checkpoints detect.

    python -m benchmarks.faults [--out FILE]

An environment fails in nine ways during `fastsac train --restarts 2`, and the result is compared with a run without
failures. Then every byte of a small checkpoint, replay buffer included, is changed in turn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.kills import metrics
from benchmarks.machine import describe_machine, write_json
from fastsac import SAC, Config
from fastsac.checkpoint import latest_checkpoint, load_checkpoint
from fastsac.errors import FastsacError

RESULT = Path("benchmarks/results/faults.json")
KINDS = ("abort", "segfault", "oom", "exit", "hang", "raise", "nan", "nan-reward", "shape")
SETTINGS = (  # noqa: SIM905, a list is harder to read
    "--env-id tests.faulty:Faulty-v0 --num-envs 2 --hidden-sizes 8 --batch-size 8 --learning-starts 20 "
    "--buffer-size 1000 --eval-episodes 2 --eval-every 100 --log-every 50 --num-threads 1 --precision fp32 "
    "--checkpoint-every 50 --checkpoint-replay --total-steps 300"
).split()


def train(run_dir: Path, *arguments: str, fault: str = "") -> int:
    """Train without core files; return the exit status."""
    command = [sys.executable, "-m", "fastsac", "train", *SETTINGS, "--run-dir", str(run_dir), *arguments]
    environment = {**os.environ, "FAULT": fault, "PYTHONPATH": "."}
    done = subprocess.run(
        ["bash", "-c", 'ulimit -c 0; exec "$@"', "bash", *command], env=environment, capture_output=True
    )
    return done.returncode


def faults(directory: Path) -> list[dict[str, Any]]:
    """Let an environment fail once in each way."""
    train(directory / "untroubled")
    rows = []
    for kind in KINDS:
        fault = f"{kind}:100:{directory / f'marker-{kind}'}"
        status = train(directory / kind, "--restarts", "2", "--step-timeout", "6", fault=fault)
        survived = status == 0 and (directory / f"marker-{kind}").exists()
        equal = survived and metrics(directory / kind) == metrics(directory / "untroubled")
        rows.append({"kind": kind, "survived": survived, "equal_to_the_untroubled_run": equal})
    return rows


def flips(directory: Path) -> dict[str, int]:
    """Change one bit of every byte of a checkpoint in turn, and load it."""
    settings = {"hidden_sizes": (2,), "batch_size": 8, "learning_starts": 20, "buffer_size": 2000, "num_envs": 1}
    agent = SAC(
        Config(
            "Pendulum-v1", checkpoint_replay=True, eval_every=0, utd=0.1, num_threads=1, precision="fp32", **settings
        )
    )
    agent.learn(total_steps=1500, run_dir=directory / "run")
    checkpoint = latest_checkpoint(directory / "run")
    tried = refused = 0
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        for place in range(len(content)):
            path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
            tried += 1
            try:
                load_checkpoint(checkpoint)
            except FastsacError:
                refused += 1
        path.write_bytes(content)
    load_checkpoint(checkpoint)
    return {"files": len(list(checkpoint.iterdir())), "bytes": tried, "refused": refused}


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description="What training runs survive.")
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as directory:
        result = {"faults": faults(Path(directory)), "flipped": flips(Path(directory))}
    write_json(out, {"command": "python -m benchmarks.faults", "machine": describe_machine(), **result})
    print(result)


if __name__ == "__main__":
    main()
