"""Learning curves: trains every run of a suite through the command line and saves the results as JSON and PNG.

    python -m benchmarks.learning pendulum halfcheetah hopper walker [--jobs 2]

Every finished run is added to `benchmarks/results/learning_<suite>.json` at once, with the machine and the commit that
it ran on, and is not repeated: an interrupted suite continues where it stopped. A run's final return is from
`fastsac eval` with the deterministic policy over 20 episodes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe_machine, write_json
from fastsac.plot import plot_curves, read_metric
from fastsac.run_dir import read_config

RESULTS = Path("benchmarks/results")
FINAL_EPISODES, FINAL_SEED = 20, 12345
PATHWISE = "--estimator pathwise"
SCORE = "--estimator score --baseline"
#: sac-large at the size of a CPU: as many environments and as large a batch as the defaults have
SMALLER = "--num-envs 16 --batch-size 256 --utd 0.5 --learning-starts 1000 --buffer-size 1000000"
ENGINES = {
    "reference": "--engine reference --precision fp32",
    "fused, fp32": "--engine fused --precision fp32",
    "fused, bf16": "--engine fused --precision bf16",
}


class Suite(NamedTuple):
    """The arguments of `fastsac train`, what each variant adds to them, and how many seeds each is run with."""

    arguments: str
    variants: dict[str, str]
    num_seeds: int


SUITES = {
    "pendulum": Suite(
        "--env-id Pendulum-v1 --total-steps 20000 --eval-every 2000",
        {
            "pathwise": PATHWISE,
            "score, loo": f"{SCORE} loo",
            "score, value": f"{SCORE} value",
            "score, none": f"{SCORE} none",
        },
        5,
    ),
    "halfcheetah": Suite(
        "--env-id HalfCheetah-v5 --total-steps 100000 --eval-every 5000",
        {"pathwise": PATHWISE, "score, loo": f"{SCORE} loo"},
        3,
    ),
    "hopper": Suite("--env-id Hopper-v5 --total-steps 200000 --eval-every 5000", {"pathwise": PATHWISE}, 1),
    "walker": Suite("--env-id WalkerWalk-v1 --total-steps 50000 --eval-every 5000", {"pathwise": PATHWISE}, 1),
    "presets_humanoid": Suite(
        "--env-id HumanoidStand-v1 --total-steps 150000 --eval-every 10000",
        {"sac": "--preset sac", "sac-large, smaller": f"--preset sac-large {SMALLER}"},
        3,
    ),
    "presets_humanoid_longer": Suite(
        "--env-id HumanoidStand-v1 --total-steps 300000 --eval-every 20000",
        {"sac": "--preset sac", "sac-large, smaller": f"--preset sac-large {SMALLER} --v-min -5 --v-max 35"},
        3,
    ),
    "presets_halfcheetah": Suite(
        "--env-id HalfCheetah-v5 --total-steps 100000 --eval-every 5000",
        {"sac": "--preset sac", "sac-large, smaller": f"--preset sac-large {SMALLER} --v-min -100 --v-max 300"},
        3,
    ),
    "engines_pendulum": Suite("--env-id Pendulum-v1 --total-steps 20000 --eval-every 2000", ENGINES, 5),
    "engines_halfcheetah": Suite("--env-id HalfCheetah-v5 --total-steps 100000 --eval-every 5000", ENGINES, 18),
}
_lock = threading.Lock()


def results_file(suite: str) -> Path:
    """Return where the suite's runs are kept."""
    return RESULTS / f"learning_{suite}.json"


def load(suite: str) -> dict[str, Any]:
    """Return the suite's finished runs, `{"suite", "command", "train", "runs": [...]}`."""
    if results_file(suite).exists():
        stored: dict[str, Any] = json.loads(results_file(suite).read_text())
        return stored
    command = f"python -m benchmarks.learning {suite}"
    return {"suite": suite, "command": command, "train": f"fastsac train {SUITES[suite].arguments}", "runs": []}


def train_options(suite: str, variant: str, seed: int) -> str:
    """Return the arguments of `fastsac train` but for the run directory."""
    return f"{SUITES[suite].arguments} {SUITES[suite].variants[variant]} --seed {seed} --num-threads 1"


def finished(suite: str, variant: str, seed: int) -> bool:
    """Return whether this very run is kept already."""
    options = train_options(suite, variant, seed)
    return any((run["variant"], run["seed"], run["options"]) == (variant, seed, options) for run in load(suite)["runs"])


def train(suite: str, variant: str, seed: int, directory: Path) -> None:
    """Train and evaluate one run, and keep it."""
    if finished(suite, variant, seed):
        return
    machine = describe_machine()
    run_dir = directory / suite / f"{variant.replace(', ', '-')}_s{seed}"
    if run_dir.exists():
        shutil.rmtree(run_dir)  # cut short: a fresh start, so that every curve is of one uninterrupted run
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    options = train_options(suite, variant, seed)
    fastsac = [sys.executable, "-m", "fastsac"]
    with run_dir.with_suffix(".log").open("w") as log:
        command = [*fastsac, "train", *options.split(), "--run-dir", str(run_dir)]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
        steps, _ = read_metric(run_dir, "updates")
        if steps[-1] < read_config(run_dir).total_steps:
            raise RuntimeError(f"{run_dir} was interrupted at step {steps[-1]}: start again to repeat it")
        command = [*fastsac, "eval", str(run_dir), "--json"]
        command += ["--episodes", str(FINAL_EPISODES), "--seed", str(FINAL_SEED)]
        evaluation = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=True)
    keep(suite, variant, seed, run_dir, json.loads(evaluation.stdout), options, machine)


def keep(
    suite: str, variant: str, seed: int, run_dir: Path, final: dict[str, Any], options: str, machine: dict[str, Any]
) -> None:
    """Add a finished run to the suite's file and draw its picture anew."""
    steps, returns = read_metric(run_dir, "eval_return")
    run = {
        "variant": variant,
        "seed": seed,
        "options": options,
        "steps": steps,
        "eval_return": returns,
        "time_s": read_metric(run_dir, "time_s")[1][-1],
        "final": final,
        "machine": machine,
    }
    with _lock:
        result = load(suite)
        result["train"] = f"fastsac train {SUITES[suite].arguments}"
        others = [old for old in result["runs"] if (old["variant"], old["seed"]) != (variant, seed)]
        result["runs"] = sorted([*others, run], key=lambda run: (run["variant"], run["seed"]))
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(results_file(suite), result)
        draw(suite, result)


def draw(suite: str, result: dict[str, Any]) -> None:
    """Write `learning_<suite>.png`."""
    curves = {
        variant: [(run["steps"], run["eval_return"]) for run in result["runs"] if run["variant"] == variant]
        for variant in SUITES[suite].variants
    }
    seeds = max(len(runs) for runs in curves.values())
    spread = f"mean and range over {seeds} seeds" if seeds > 1 else "one seed"
    title = f"{SUITES[suite].arguments.split()[1]}: {spread}"
    plot_curves(curves, results_file(suite).with_suffix(".png"), title, "evaluation return")


def main() -> None:
    """Run the suites named on the command line, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one CPU thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="where run directories are kept")
    options = parser.parse_args()
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"unknown suite {', '.join(sorted(unknown))}; known: {', '.join(SUITES)}")
    with ThreadPoolExecutor(options.jobs) as pool:
        tasks = [
            pool.submit(train, suite, variant, seed, options.runs)
            for suite in options.suites or SUITES
            for seed in range(SUITES[suite].num_seeds)
            for variant in SUITES[suite].variants
        ]
        for task in tasks:
            task.result()


if __name__ == "__main__":
    main()
