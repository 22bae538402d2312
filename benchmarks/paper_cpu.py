"""The paper model on a CPU: what products, copies and calls take here, compared with the measured updates.

A call is expected to take call + max(F / peak, M / bandwidth) for F FLOPs and M bytes, since nothing overlaps on a CPU.
`python -m benchmarks.paper_model` runs it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.counted import Counted, counted
from benchmarks.launches import A, O, filled_replay
from benchmarks.machine import busy_cpu_seconds
from benchmarks.update_sizes import ENGINES
from fastsac.config import Config
from fastsac.learner import make_learner
from fastsac.learner.device import FixedBatch

RESULTS = Path(__file__).parent / "results"
#: contenders of peers_cpu.json, which draw their batches of 256, too
PEERS = {
    ("reference", "pathwise"): "fastsac reference",
    ("fused, fp32", "pathwise"): "fastsac pathwise fp32",
    ("fused, bf16", "pathwise"): "fastsac pathwise bf16",
    ("fused, fp32", "score"): "fastsac score+loo fp32",
    ("fused, bf16", "score"): "fastsac score+loo bf16",
}
ROUNDS, MOST_ROUNDS, BLOCK_SECONDS = 15, 600, 0.05
#: rounds during which other processes used more than this share of a core are thrown away
OTHERS = 0.05


def seconds_per_call(call: Callable[[], Any]) -> float:
    """Return the mean over one block."""
    call()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < BLOCK_SECONDS:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


def probes() -> dict[str, tuple[float, Callable[[], Any]]]:
    """Return what is measured: an amount of work, and a call that does it."""
    n, size = 1024, 1 << 20
    left, right, out = (torch.randn(n, n) for _ in range(3))
    rounded = [tensor.bfloat16() for tensor in (left, right, out)]
    source, target, few, few_out = torch.randn(size), torch.empty(size), torch.randn(8), torch.empty(8)
    weight = torch.ones(8, requires_grad=True)

    def forward_and_backward() -> None:
        product = weight
        for _ in range(50):
            product = product * few
        product.sum().backward()

    return {
        "fp32": (2.0 * n**3, lambda: torch.mm(left, right, out=out)),
        "bf16": (2.0 * n**3, lambda: torch.mm(*rounded[:2], out=rounded[2])),
        "bandwidth": (2.0 * source.nbytes, lambda: target.copy_(source)),
        "call": (1.0, lambda: torch.mul(few, few, out=few_out)),
        "autograd_call": (100.0, forward_and_backward),
    }


def measure_peaks() -> dict[str, dict[str, float]]:
    """Return, by number of threads, FLOP/s, bytes/s, and the seconds of a call that has next to nothing to do.

    Raises:
        RuntimeError: if the machine is too busy.
    """
    things, rounds = probes(), list[dict[str, dict[str, float]]]()
    for _ in range(MOST_ROUNDS):
        busy, own, start = busy_cpu_seconds(), time.process_time(), time.perf_counter()
        found: dict[str, dict[str, float]] = {}
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(threads)
            found[str(threads)] = {
                name: amount / seconds_per_call(call) if "call" not in name else seconds_per_call(call) / amount
                for name, (amount, call) in things.items()
            }
        others = busy_cpu_seconds() - busy - (time.process_time() - own)
        if others <= OTHERS * (time.perf_counter() - start):
            rounds.append(found)
        if len(rounds) == ROUNDS:
            return {
                threads: {name: median(each[threads][name] for each in rounds) for name in things} for threads in found
            }
    raise RuntimeError("other processes keep this machine too busy to measure it")


def parts(counts: Counted, peaks: dict[str, float], engine: str) -> dict[str, float]:
    """Return the predicted ms of an update, and how they divide."""
    call = peaks["autograd_call" if engine == "reference" else "call"]
    work = [(kernel.flops / peaks[kernel.dtype], kernel.bytes / peaks["bandwidth"]) for kernel in counts.kernels]
    seconds = {
        "calls": call * counts.launches,
        "products": sum(flops for flops, moving in work if flops > moving),
        "moving": sum(moving for flops, moving in work if flops <= moving),
    }
    return {name: 1e3 * value for name, value in (seconds | {"predicted": sum(seconds.values())}).items()}


def rows(peaks: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return the predictions at the sizes and numbers of threads of update_sizes.json, and what was measured there."""
    found = []
    for measured in json.loads((RESULTS / "update_sizes.json").read_text())["rows"]:
        row = {key: measured[key] for key in ("O", "A", "width", "B")}
        for engine in (name for name in ENGINES if name in measured):
            config = Config(hidden_sizes=(row["width"],) * 2, batch_size=row["B"], **ENGINES[engine])
            counts = counted(make_learner(config, row["O"], row["A"]), FixedBatch(row["O"], row["A"]))
            threads, ms = measured[engine]["threads"], measured[engine]["ms"]
            own = parts(counts, peaks[str(threads)], engine)
            row[engine] = counts.totals() | own | {"threads": threads, "measured": ms, "ratio": ms / own["predicted"]}
        found.append(row)
    return found


def estimator_rows(peaks: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return the predictions for both estimators with all threads, and what peers_cpu.json has at batch 256."""
    contenders, found = json.loads((RESULTS / "peers_cpu.json").read_text())["contenders"], []
    for batch in (256, 4096):
        for estimator in ("pathwise", "score"):
            for engine, settings in ENGINES.items():
                config = Config(estimator=estimator, batch_size=batch, **settings)
                counts = counted(make_learner(config, O, A), filled_replay())
                own = counts.totals() | parts(counts, list(peaks.values())[-1], engine)
                peer = PEERS.get((engine, estimator)) if batch == 256 else None
                measured = contenders[peer]["summary"]["update_16"]["median"] if peer else None
                found.append({"engine": engine, "estimator": estimator, "B": batch, **own, "measured": measured})
    return found


def peaks_table(result: dict[str, Any]) -> str:
    """Return Markdown: what this CPU reaches."""
    lines = [
        "| threads | fp32, GFLOP/s | bf16, GFLOP/s | copy, GB/s read and written | call, us | call with autograd, us |",
        "|---|---|---|---|---|---|",
    ]
    for threads, peaks in result["cpu"]["peaks"].items():
        cells = [threads, *(f"{peaks[name] / 1e9:,.0f}" for name in ("fp32", "bf16", "bandwidth"))]
        lines.append(f"| {' | '.join([*cells, *(f'{1e6 * peaks[n]:.1f}' for n in ('call', 'autograd_call'))])} |")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """Return Markdown: predicted ms and its parts at the default size, and the ratio to the measured at every size."""
    lines = ["| O, A | hidden layers | batch | " + " | ".join(ENGINES) + " |", "|---|---|---|" + "---|" * len(ENGINES)]
    for row in result["cpu"]["rows"]:
        cells = [f"{row['O']}, {row['A']}", f"{row['width']}, {row['width']}", str(row["B"])]
        for engine in (name for name in ENGINES if name in row):
            cells.append("{predicted:.2f} ({ratio:.1f}x)".format(**row[engine]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parts_table(result: dict[str, Any]) -> str:
    """Return Markdown: what the predictions at the default and the smallest size are made of."""
    lines = [
        "| hidden layers, batch | engine | calls | GFLOP | MB | calls, ms | products, ms | moving, ms | predicted, ms |"
        " measured, ms | left for a call, us |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["cpu"]["rows"]:
        if (row["O"], row["width"], row["B"]) not in ((17, 256, 256), (17, 64, 64)):
            continue
        for engine in (name for name in ENGINES if name in row):
            own = row[engine]
            cells = [f"{row['width']}, {row['width']}, {row['B']}", engine, str(own["launches"])]
            cells += [f"{own['flops'] / 1e9:.2f}", f"{own['bytes'] / 1e6:.0f}"]
            cells += [f"{own[name]:.2f}" for name in ("calls", "products", "moving", "predicted", "measured")]
            left = 1e3 * (own["measured"] - own["products"] - own["moving"]) / own["launches"]
            lines.append(f"| {' | '.join([*cells, f'{left:.1f}'])} |")
    return "\n".join(lines)


def estimators_table(result: dict[str, Any]) -> str:
    """Return Markdown: both estimators at two batch sizes."""
    lines = [
        "| engine | estimator | batch | calls | GFLOP | MB | predicted, ms | measured, ms | measured / predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["cpu"]["estimators"]:
        cells = [row["engine"], row["estimator"], str(row["B"]), str(row["launches"]), f"{row['flops'] / 1e9:.2f}"]
        cells += [f"{row['bytes'] / 1e6:.0f}", f"{row['predicted']:.2f}"]
        ms = row["measured"]
        cells += [f"{ms:.2f}", f"{ms / row['predicted']:.1f}"] if ms else ["not measured", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
