"""An update's time by engine at several widths and batch sizes: is the fused engine ever slower than the reference?

    python -m benchmarks.update_sizes [--out benchmarks/results/update_sizes.json]

HalfCheetah-v5's shapes (O = 17, A = 6) and Humanoid-v5's (O = 348, A = 17), pathwise, two hidden layers. Engines and
numbers of threads take turns, block by block; an engine's time is the one with its best number of threads.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import describe_machine, load_average, write_json
from fastsac.config import Config
from fastsac.learner import has_bfloat16_products, make_learner
from fastsac.learner.device import FixedBatch, thread_counts

ENGINES: dict[str, dict[str, Any]] = {
    "reference": {"engine": "reference", "precision": "fp32"},
    "fused, fp32": {"engine": "fused", "precision": "fp32"},
    "fused, bf16": {"engine": "fused", "precision": "bf16"},
}
#: O, A, width, batch
SIZES = [(17, 6, width, batch) for width in (64, 256, 512) for batch in (64, 256, 1024)] + [(348, 17, 256, 256)]
ROUNDS = 9
BLOCK_SECONDS = 0.1


def measure(obs_size: int, action_size: int, width: int, batch_size: int) -> dict[str, dict[int, list[float]]]:
    """Return each engine's times per update in ms, by number of threads, round by round."""
    engines = {name: settings for name, settings in ENGINES.items() if "bf16" not in name or has_bfloat16_products()}
    size = {"hidden_sizes": (width, width), "batch_size": batch_size}
    learners = {name: make_learner(Config(**size, **each), obs_size, action_size) for name, each in engines.items()}
    batch, times = (
        FixedBatch(obs_size, action_size),
        {name: {count: [] for count in thread_counts()} for name in engines},
    )
    for _ in range(ROUNDS + 1):  # the first one warms up
        for count in thread_counts():
            torch.set_num_threads(count)
            for name, learner in learners.items():
                learner.update(batch)
                updates, start = 0, time.perf_counter()
                while time.perf_counter() - start < BLOCK_SECONDS:
                    learner.update(batch)
                    updates += 1
                times[name][count].append(1e3 * (time.perf_counter() - start) / updates)
    return {name: {count: values[1:] for count, values in by_count.items()} for name, by_count in times.items()}


def row_of(size: tuple[int, ...], times: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """Return a size's medians in ms, the threads that they were reached with, and the ratio to the reference."""
    row: dict[str, Any] = dict(zip(("O", "A", "width", "B"), size, strict=True))
    best = {name: min(by_count, key=lambda count: median(by_count[count])) for name, by_count in times.items()}
    for name, count in best.items():
        own, reference = times[name][count], times["reference"][best["reference"]]
        ratio = median(mine / other for mine, other in zip(own, reference, strict=True))
        row[name] = {"ms": round(median(own), 4), "threads": count, "of_reference": round(ratio, 3)}
    return row


def table(result: dict[str, Any]) -> str:
    """Return Markdown: ms per update, and the share of the reference's time."""
    lines = [["O, A", "hidden layers", "batch", *ENGINES], ["---"] * (3 + len(ENGINES))]
    for row in result["rows"]:
        cells = [f"{row['O']}, {row['A']}", f"{row['width']}, {row['width']}", str(row["B"])]
        for name in ENGINES:
            found = row.get(name)
            share = f" ({found['of_reference']:.2f})" if found and name != "reference" else ""
            cells.append(f"{found['ms']:.3g}{share}" if found else "not measured")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.update_sizes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/update_sizes.json"), help="file to write")
    path = parser.parse_args().out
    machine = describe_machine()
    torch.set_flush_denormal(True)
    result = {
        "command": "python -m benchmarks.update_sizes",
        "machine": machine,
        "meaning": "ms: median of an update's time; of_reference: median over rounds of its share of the reference's",
        "rows": [row_of(size, measure(*size)) for size in SIZES],
    }
    machine["load_average_at_end"] = load_average()
    write_json(path, result)
    print(table(result))


if __name__ == "__main__":
    main()
