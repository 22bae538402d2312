"""A model on paper: what an update should take on GPUs that it has not been run on.

    python -m benchmarks.paper_model

Launches, FLOPs and bytes are counted while the engines' code runs on a CPU, instructions in the code compiled for the
chip. Times follow from them, the chips' data sheets and the assumptions below: they are predictions. A kernel with F
FLOPs, M bytes and, if it is one of ours, I instructions should take::

    max(node, F / (peak * efficiency * busy), M / bandwidth, I * cycles / clock)
    busy = min(1, tiles of the output / multiprocessors)

and an update the sum of its kernels, or launches * launch if the host takes longer to launch them one by one. The same
model for the CPU, which is measured, is in `paper_cpu`. Writes benchmarks/results/paper_model.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch

from benchmarks import paper_cpu
from benchmarks.counted import Counted, counted, working_set
from benchmarks.launches import A, O, filled_replay
from benchmarks.machine import describe_machine, load_average, write_json
from fastsac.config import Config
from fastsac.learner import GraphedLearner, Learner
from fastsac.learner.graphed import UPDATES_PER_GRAPH

RESULTS = Path(__file__).parent / "results"
LOW, HIGH = ENDS = 0, 1


class Chip(NamedTuple):
    """TFLOP/s in fp32 (without tensor cores) and TF32 (dense), GHz, memory in GB/s, L2 in MB."""

    fp32: float
    tf32: float
    clock: float
    bandwidth: float
    l2: float
    multiprocessors: int
    compiled: str  # as kernel_resources.json names it
    source: str


CHIPS = {
    "A100": Chip(19.5, 156.0, 1.41, 2039.0, 40.0, 108, "sm_80", "A100 (SXM, 80 GB) data sheet and whitepaper"),
    "H100": Chip(66.9, 494.7, 1.98, 3350.0, 50.0, 132, "sm_90", "H100 (SXM) data sheet and whitepaper"),
    "H200": Chip(66.9, 494.7, 1.98, 4800.0, 50.0, 132, "sm_90", "H200 (SXM) data sheet; the rest is the H100's"),
    "RTX 4090": Chip(82.6, 82.6, 2.52, 1008.0, 72.0, 128, "sm_89", "Ada GPU architecture whitepaper"),
    "RTX 5090": Chip(104.8, 104.8, 2.41, 1792.0, 96.0, 170, "sm_120", "RTX Blackwell GPU architecture whitepaper"),
}
#: the fast end, the slow end, what it is, and where it comes from
ASSUMED: dict[str, tuple[float, float, str, str]] = {
    "node": (1.1, 2.0, "us from one kernel of a graph to the next", "1.1 to 1.3 for 1,024 additions, pytorch#161104"),
    "launch": (5.0, 15.0, "us of the host per eager call", "4 to 6 for CUDA's launch; PyTorch and Python assumed"),
    "graph": (5.0, 15.0, "us of the host per replay of a graph", "assumed; constant in its kernels, NVIDIA says"),
    "copy": (5.0, 10.0, "us of the host per asynchronous copy", "5 to 7 in arXiv 2602.21548"),
    "wait": (5.0, 20.0, "us until the host goes on when the device is done", "assumed"),
    "tile": (32.0, 64.0, "rows and columns of a product's output per multiprocessor", "assumed"),
    "fp32": (0.7, 0.4, "share of its fp32 peak that a busy multiprocessor reaches", "assumed"),
    "tf32": (0.5, 0.2, "the same in TF32", "assumed"),
    "l2": (4.0, 2.0, "L2's bandwidth over memory's", "3.5: the A100's 5,120 bytes a cycle, whitepaper"),
    "cycles": (2.0, 6.0, "cycles per instruction of a small kernel, gone through once", "assumed"),
}
#: no launch costs less, in us: on the host if it is eager, from kernel to kernel in a graph
LEAST = {"reference": 3.0, "graphed": 1.0}
#: what the host does in a step of the training loop on CUDA beside the updates; a test holds it to the code
STEP = {
    "graph": 1,  # acting
    "launch": 8,  # obs into that graph, actions out of it; obs, action, reward, flag, indices, span into the ring
    "copy": 2,  # actions to the host; the step's results to the device
    "wait": 1,  # for the actions
}
GPU_ENGINES: dict[str, type[Learner]] = {"reference": Learner, "graphed": GraphedLearner}
#: estimator, batch, precisions that are of use
CASES = [
    ("pathwise", 256, ("fp32",)),
    ("score", 256, ("fp32",)),
    ("pathwise", 4096, ("fp32", "tf32")),
    ("score", 4096, ("fp32", "tf32")),
]


def instructions(compiled: str) -> dict[str, int]:
    """Return the most instructions that each op's kernel has for one chip at B = 256."""
    found: dict[str, int] = {}
    for row in json.loads((RESULTS / "kernel_resources.json").read_text())["rows"]:
        if row["chip"] == compiled and row["shape"].startswith("B=256 "):
            name = row["kernel"].strip("_").removesuffix("_fwd_kernel").replace("_bwd_kernel", "_backward")
            found[name] = max(found.get(name, 0), row["sass_bytes"] // 16)
    return found


def device_us(counts: Counted, footprint: int, chip: Chip, precision: str, end: int) -> float:
    """Return the time of all kernels, one after the other."""
    assumed, own = {name: values[end] for name, values in ASSUMED.items()}, instructions(chip.compiled)
    bandwidth = chip.bandwidth * (assumed["l2"] if footprint <= 1e6 * chip.l2 else 1.0)
    total = 0.0
    for kernel in counts.kernels:
        networks, rows, columns = kernel.output
        tiles = networks * math.ceil(rows / assumed["tile"]) * math.ceil(columns / assumed["tile"])
        peak = getattr(chip, precision) * assumed[precision] * min(1.0, tiles / chip.multiprocessors)
        issuing = own.get(kernel.name, 0) * assumed["cycles"] / (1e3 * chip.clock)
        total += max(assumed["node"], 1e-6 * kernel.flops / peak, 1e-3 * kernel.bytes / bandwidth, issuing)
    return total


def predict(counts: Counted, footprint: int, chip: Chip, engine: str, precision: str = "fp32") -> dict[str, Any]:
    """Return an update's floors and its expected time at the fast and the slow end, in us."""
    floors = {
        "flops": 1e-6 * counts.flops / getattr(chip, precision),
        # what fits in L2 need not go to memory; what does not, goes there once at least
        "memory": 1e-3 * footprint / chip.bandwidth if footprint > 1e6 * chip.l2 else 0.0,
        "launches": LEAST[engine] * counts.launches,
    }
    expected = [device_us(counts, footprint, chip, precision, end) for end in ENDS]
    if engine == "reference":
        expected = [max(expected[end], counts.launches * ASSUMED["launch"][end]) for end in ENDS]
    return {"floors": floors, "floor": max(floors.values()), "expected": expected}


def step(num_envs: int, act_us: list[float], update_us: list[float]) -> dict[str, Any]:
    """Return what a step of all environments takes at one update per environment step, the environments left out."""
    replays = num_envs // UPDATES_PER_GRAPH + num_envs % UPDATES_PER_GRAPH
    counts = STEP | {"graph": STEP["graph"] + replays}
    host = [sum(count * ASSUMED[name][end] for name, count in counts.items()) for end in ENDS]
    device = [act_us[end] + num_envs * update_us[end] for end in ENDS]
    # at worst nothing overlaps, at best one of the two is hidden behind the other
    steps_per_s = [1e6 * num_envs / (host[HIGH] + device[HIGH]), 1e6 * num_envs / max(host[LOW], device[LOW])]
    return {"N": num_envs, "counts": counts, "host_us": host, "device_us": device, "steps_per_s": steps_per_s}


def gpu_rows() -> list[dict[str, Any]]:
    """Return the predictions for updates."""
    rows = []
    for estimator, batch, precisions in CASES:
        for engine, kind in GPU_ENGINES.items():
            one, another = (kind(Config(estimator=estimator, batch_size=batch), O, A, "cpu") for _ in range(2))
            counts, footprint = counted(one, filled_replay()), working_set(another, filled_replay())
            for precision in precisions if engine == "graphed" else precisions[:1]:
                row = {"engine": engine, "estimator": estimator, "B": batch, "precision": precision}
                chips = {name: predict(counts, footprint, chip, engine, precision) for name, chip in CHIPS.items()}
                rows.append(row | counts.totals() | {"footprint": footprint, "chips": chips})
    return rows


def step_rows(updates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the predictions for training steps with the graphed engine, pathwise, batch 256."""
    (update,) = (row for row in updates if (row["engine"], row["estimator"], row["B"]) == ("graphed", "pathwise", 256))
    rows = []
    for num_envs in (1, 16):
        learner, obs = GraphedLearner(Config(num_envs=num_envs), O, A, "cpu"), torch.zeros(num_envs, O)
        learner.act(obs)
        with Counted() as act:
            learner.act(obs)
        for name, chip in CHIPS.items():
            act_us = [device_us(act, act.bytes, chip, "fp32", end) for end in ENDS]
            rows.append({"chip": name} | step(num_envs, act_us, update["chips"][name]["expected"]))
    return rows


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def chips_table(result: dict[str, Any]) -> str:
    """Return Markdown: the data sheets."""
    head = ["chip", "fp32, TFLOP/s", "TF32, TFLOP/s", "GHz", "memory, GB/s", "L2, MB", "multiprocessors", "source"]
    keys = ("fp32", "tf32", "clock", "bandwidth", "l2", "multiprocessors")
    chips = result["chips"].items()
    return _markdown(head, [[name, *(f"{chip[key]:,g}" for key in keys), chip["source"]] for name, chip in chips])


def assumed_table(result: dict[str, Any]) -> str:
    """Return Markdown: the assumptions."""
    rows = [[what, f"{low:g} to {high:g}", source] for low, high, what, source in result["assumed"].values()]
    for engine, us in result["least_us"].items():
        rows.append([f"us per launch for the floor, {engine}", f"{us:g}", "assumed"])
    return _markdown(["assumption", "range", "source"], rows)


def gpu_table(result: dict[str, Any]) -> str:
    """Return Markdown: what was counted, and for each chip the floor and the expected us."""
    rows = []
    for row in result["updates"]:
        what = f"{row['engine']}, {row['precision']}, {row['estimator']}"
        cells = [what, str(row["B"]), str(row["launches"]), f"{row['flops'] / 1e9:.2f}"]
        cells += [f"{row['bytes'] / 1e6:.0f}", f"{row['footprint'] / 1e6:.1f}"]
        for found in row["chips"].values():
            low, high = found["expected"]
            cells.append(f"{found['floor']:,.0f}; {low:,.0f} to {high:,.0f}")
        rows.append(cells)
    return _markdown(["engine", "batch", "launches", "GFLOP", "MB moved", "MB held", *result["chips"]], rows)


def step_table(result: dict[str, Any]) -> str:
    """Return Markdown: what the host does in a step, and for each chip steps/s."""
    rows = []
    for num_envs in dict.fromkeys(row["N"] for row in result["steps"]):
        own = [row for row in result["steps"] if row["N"] == num_envs]
        low, high = own[0]["host_us"]
        cells = [str(num_envs), *map(str, own[0]["counts"].values()), f"{low:.0f} to {high:.0f}"]
        rows.append(cells + ["{:,.0f} to {:,.0f}".format(*row["steps_per_s"]) for row in own])
    head = ["N", "replayed graphs", "other launches", "copies", "waits", "host, us"]
    return _markdown([*head, *(f"{name}, steps/s" for name in result["chips"])], rows)


def main() -> None:
    """Count, measure the CPU, predict and write."""
    argparse.ArgumentParser(prog="python -m benchmarks.paper_model", description=(__doc__ or "").split("\n")[0])
    machine = describe_machine()
    peaks = paper_cpu.measure_peaks()
    torch.set_num_threads(1)
    updates = gpu_rows()
    result = {
        "command": "python -m benchmarks.paper_model",
        "machine": machine | {"load_average_at_end": load_average()},
        "meaning": "updates, steps: predictions, nothing was measured on a GPU; us, the fast and the slow end",
        "chips": {name: chip._asdict() for name, chip in CHIPS.items()},
        "assumed": ASSUMED,
        "least_us": LEAST,
        "updates": updates,
        "steps": step_rows(updates),
        "cpu": {"peaks": peaks, "rows": paper_cpu.rows(peaks), "estimators": paper_cpu.estimator_rows(peaks)},
    }
    write_json(RESULTS / "paper_model.json", result)
    for make in (gpu_table, step_table, paper_cpu.peaks_table, paper_cpu.table, paper_cpu.estimators_table):
        print(make(result), end="\n\n")


if __name__ == "__main__":
    main()
