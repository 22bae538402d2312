"""Several random seeds on a CPU: one process that trains all of them, against a process for each.

    python -m benchmarks.seeds

`training` is `fastsac train`: four seeds with `--num-learners 4`, against four processes, as many at a time as there
are cores. `updates` is an update of each of L learners: by one process, whose learners take turns; by as many processes
as there are cores, which divide the learners among them; and the least time that stacked products of the reference
engine could take. That is one reference learner with 2 L critics, whose products are those of L learners, without L
actors. Writes benchmarks/results/seeds.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine, write_json
from fastsac.config import Config
from fastsac.learner import FusedLearner, Learner
from fastsac.learner.compare import random_replay
from fastsac.learner.together import Together

RESULT = Path(__file__).parent / "results" / "seeds.json"
O, A, CPU = 17, 6, torch.device("cpu")  # noqa: E741
SIZES = ((32, 32), (64, 64), (256, 256))  # hidden units, batch
LEARNERS = (1, 2, 4, 8, 16)
SEEDS = 4
#: rounds of measurements, interleaved; the fastest one counts
ROUNDS, SECONDS = 3, 0.5


def config(hidden: int, batch: int, **settings: Any) -> Config:
    """Return the settings of one size."""
    return Config(hidden_sizes=(hidden, hidden), batch_size=batch, precision="fp32", **settings)


def in_turn(hidden: int, batch: int, number: int) -> Together:
    """Return so many fused learners in one process."""
    together = Together(number)
    for seed in range(number):
        together.add(FusedLearner(config(hidden, batch), O, A, seed=seed), random_replay(O, A, CPU))
    return together


def ms_of_round(together: Together, number: int) -> float:
    """Return the time of an update of each."""
    rounds, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        together.update([1] * number)
        rounds += 1
    return 1e3 * (time.perf_counter() - begun) / rounds


def updates(hidden: int, batch: int, number: int, cores: int) -> dict[str, Any]:
    """Return how long an update of each of so many learners takes, each way."""
    stacked, replay = Learner(config(hidden, batch, num_critics=2 * number), O, A), random_replay(O, A, CPU)
    bound = Together(1)
    bound.add(stacked, replay)
    own = in_turn(hidden, batch, number)
    share = -(-number // cores)
    command = [sys.executable, "-m", "benchmarks.seeds", "--part", f"{hidden},{batch},{share}"]
    found: dict[str, float] = dict.fromkeys(("turns", "processes", "stacked_at_least"), float("inf"))
    for _ in range(ROUNDS):
        for threads in {1, cores}:
            torch.set_num_threads(threads)
            found["turns"] = min(found["turns"], ms_of_round(own, number))
            found["stacked_at_least"] = min(found["stacked_at_least"], ms_of_round(bound, 1))
        torch.set_num_threads(1)
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(min(cores, number))]
        found["processes"] = min(found["processes"], max(float(each.communicate()[0]) for each in running))
    return {"hidden": hidden, "batch": batch, "learners": number, **{f"{name}_ms": ms for name, ms in found.items()}}


def training(cores: int, steps: int) -> dict[str, Any]:
    """Return the seconds of both ways, start included."""
    options = ["--total-steps", str(steps), "--eval-every", "0", "--precision", "fp32"]
    command = [sys.executable, "-m", "fastsac", "train", *options]
    taken: dict[str, list[float]] = {"one_process": [], "processes": []}
    for _ in range(ROUNDS):
        for way in taken:
            with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(cores) as pool:
                begun = time.perf_counter()
                if way == "one_process":
                    all_commands = [[*command, "--num-learners", str(SEEDS), "--run-dir", f"{directory}/runs"]]
                else:
                    one = [*command, "--num-threads", "1"]
                    all_commands = [[*one, "--seed", str(s), "--run-dir", f"{directory}/{s}"] for s in range(SEEDS)]
                list(pool.map(lambda each: subprocess.run(each, check=True, capture_output=True), all_commands))
                taken[way].append(time.perf_counter() - begun)
    medians = {way: statistics.median(seconds) for way, seconds in taken.items()}
    return {"seeds": SEEDS, "steps": steps, "seconds": taken, "ratio": medians["one_process"] / medians["processes"]}


def table(result: dict[str, Any]) -> str:
    """Return Markdown: what an update of each learner takes, each way."""
    lines = ["| hidden | batch | learners | one after the other, ms | a process a core, ms | stacked, at least, ms |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in result["updates"]:
        times = (f"{row[name]:.2f}" for name in ("turns_ms", "processes_ms", "stacked_at_least_ms"))
        lines.append(f"| {row['hidden']} | {row['batch']} | {row['learners']} | {' | '.join(times)} |")
    return "\n".join(lines)


def text(result: dict[str, Any]) -> str:
    """Return a sentence: whole runs."""
    found = result["training"]
    one, several = (statistics.median(found["seconds"][way]) for way in ("one_process", "processes"))
    return (
        f"{found['seeds']} seeds of HalfCheetah-v5, {found['steps']:,} steps each, from start to end on "
        f"{result['cores']} cores: {one:.0f} s in one process, {several:.0f} s in\na process each, "
        f"{result['cores']} at a time: {found['ratio']:.2f} times as long."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=4000, help="environment steps of each seed")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        torch.set_num_threads(1)
        hidden, batch, number = map(int, options.part.split(","))
        together = in_turn(hidden, batch, number)
        ms_of_round(together, number)
        print(ms_of_round(together, number))
        return
    cores = len(os.sched_getaffinity(0))
    rows = [updates(*size, number, cores) for size in SIZES for number in LEARNERS]
    result = {"command": "python -m benchmarks.seeds", "cores": cores, "machine": describe_machine(), "updates": rows}
    write_json(RESULT, {**result, "training": training(cores, options.steps)})
    print("hidden batch learners | turns, processes, stacked at least, ms")
    for row in rows:
        print(*row.values())


if __name__ == "__main__":
    main()
