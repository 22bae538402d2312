"""Updates per second of every engine on a GPU, and of several learners that share launches.

    python -m benchmarks.engines_gpu --out FILE [--budget SECONDS]

For batches of 256 to 8192 and hidden layers of 256 and 512: the reference engine, `graphed` in float32 and TF32,
`fused` in float32, TF32 and bfloat16, with the pathwise and the score-function estimator. Each row has the prediction
of `whole_update.json`, if any, and the share of the time that no update can avoid: its products at the chip's peak, or
its launches at 1 us each. Cases that do not fit the budget are listed. Needs a GPU;
`python -m benchmarks.gpu --engines` runs it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import write_json
from fastsac.config import Config
from fastsac.learner import make_learner
from fastsac.learner.compare import random_replay
from fastsac.learner.together import Together

PREDICTED = Path(__file__).parent / "results" / "whole_update.json"
O, A = 17, 6  # noqa: E741
#: updates in a timed call, and timed calls
UPDATES, CALLS = 256, 5
#: updates before, which compile and record
WARM_UP = 32
LEARNERS = (1, 2, 4, 8, 16)
ENGINES = (
    ("fused", "tf32"),
    ("graphed", "fp32"),
    ("reference", "fp32"),
    ("fused", "bf16"),
    ("fused", "fp32"),
    ("graphed", "tf32"),
)
ESTIMATORS: dict[str, dict[str, Any]] = {"pathwise": {}, "score": {"estimator": "score", "baseline": "loo"}}
SIZES = ((256, 256), (1024, 256), (256, 512), (8192, 256), (8192, 512))


class Case(NamedTuple):
    """One engine at one size; or so many learners in the launches of one."""

    engine: str
    precision: Any
    estimator: str
    B: int
    hidden: int
    learners: int = 0


def cases() -> list[Case]:
    """Return all, what the targets compare first."""
    found = [Case(*engine, name, *size) for size in SIZES for name in ESTIMATORS for engine in ENGINES]
    several = [Case("fused", "tf32", "pathwise", 256, 256, number) for number in LEARNERS]
    return found[: 2 * len(ENGINES)] + several + found[2 * len(ENGINES) :]


def updater(case: Case, device: torch.device) -> Callable[[int], None]:
    """Return a function that makes so many updates, of each learner; all is compiled and recorded."""
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" and case.engine != "fused" else "highest")
    sizes = {"batch_size": case.B, "hidden_sizes": (case.hidden, case.hidden)}
    config = Config(engine=case.engine, precision=case.precision, **sizes, **ESTIMATORS[case.estimator])  # type: ignore[arg-type]
    number = max(1, case.learners)
    together = Together(number)
    for seed in range(number):
        together.add(make_learner(config, O, A, device, seed), random_replay(O, A, device))
    together.complete()
    together.update([WARM_UP] * number)
    return lambda updates: together.update([updates] * number)


def measure(case: Case, device: torch.device, updates: int = UPDATES) -> dict[str, Any]:
    """Return the medians of some calls."""
    update = updater(case, device)
    number = updates if case.B < 8192 else updates // 8
    update(number)
    seconds = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        update(number)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / number)
    us = 1e6 * statistics.median(seconds)
    return case._asdict() | {"us": us, "us_all": [1e6 * each for each in seconds], "updates_per_s": 1e6 / us}


def predictions() -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the rows of `whole_update.json` by estimator, batch, width and precision."""
    rows = json.loads(PREDICTED.read_text())["rows"] if PREDICTED.exists() else []
    return {(row["estimator"], row["B"], row["hidden"], row["precision"]): row for row in rows}


def with_floor(row: dict[str, Any], chip: str | None) -> dict[str, Any]:
    """Add what was predicted for this chip, and the floor's share of the time, where the kernels were counted."""
    from benchmarks.paper_model import CHIPS
    from benchmarks.whole_update import learners_us, peak

    found = predictions().get((row["estimator"], row["B"], row["hidden"], row["precision"]))
    if found is None or chip is None or row["engine"] != "fused":
        return row
    if row["learners"] > 1:
        return row | {"predicted_us": learners_us(found, row["learners"], CHIPS[chip])}
    flops = sum(stage["flops"] for stage in found["stages"].values())
    floor = max(1e-6 * flops / peak(CHIPS[chip], row["precision"]), float(found["launches"]))
    return row | {"launches": found["launches"], "predicted_us": found["chips"][chip], "floor_share": floor / row["us"]}


def chip_of(name: str) -> str | None:
    """Return the name of a chip that the paper model has."""
    from benchmarks.paper_model import CHIPS

    return next((chip for chip in CHIPS if chip.replace("RTX ", "") in name), None)


def run(budget: float, device: torch.device, updates: int = UPDATES) -> dict[str, Any]:
    """Measure until the budget ends."""
    begun, rows, failed, missing = time.monotonic(), [], dict[str, str](), list[str]()
    chip = chip_of(torch.cuda.get_device_name())
    for case in cases():
        name = "-".join(map(str, case))
        if time.monotonic() - begun > budget:
            missing.append(name)
            continue
        try:
            rows.append(with_floor(measure(case, device, updates), chip))
        except Exception as error:  # the others still measure
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    return {"rows": rows, "failed": failed, "not_measured": {"budget": missing}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines_gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the results")
    parser.add_argument("--budget", type=float, default=300.0, metavar="SECONDS", help="no case is begun after this")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: benchmarks.engines_gpu needs a CUDA GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    write_json(options.out, run(options.budget, torch.device("cuda")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
