"""Counts the whole-update kernels of the fused engine on CUDA, and predicts their time, without a GPU.

    python -m benchmarks.whole_update

The kernels are interpreted with a GPU's cut into programs: launches, programs, FLOPs of their products, the bytes that
all programs load and store, and the bytes that are touched at all. At the batch of 256 everything is carried out; for
larger ones the counts follow from two small batches, since a program of rows does not know how many others there are,
and a tile of weights takes as long as the batch is. Times are predictions (see `paper_model.py`)::

    stage  = node + latency + ceil(programs / multiprocessors) * program
    program = FLOPs / (peak * efficiency / multiprocessors) and bytes / (stream * clock): the larger one at the fast
              end, their sum at the slow end

Writes benchmarks/results/whole_update.json.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy as np
import torch

from benchmarks.kernel_launches import make_plan, make_state
from benchmarks.launches import Interpreted
from benchmarks.machine import write_json
from benchmarks.paper_model import ASSUMED, CHIPS, ENDS, LOW, Chip, _markdown
from fastsac_kernels import whole_update_launch
from fastsac_kernels.whole_update import STAGES, Plan, Scratch, State, make_scratch, run_stage

RESULT = Path(__file__).parent / "results" / "whole_update.json"
CUDA = torch.device("cuda")
NAMES = ("next value", "critics", "critics' step", "sampled q", "actor", "actor's step")
#: beside paper_model's
MORE: dict[str, tuple[float, float, str, str]] = {
    "latency": (1.0, 3.0, "us of a stage until its loads follow one another", "assumed"),
    "stream": (
        64.0,
        40.0,
        "bytes a cycle from L2 to one multiprocessor",
        "64 to fill L1; the A100's L2 gives 47 to each",
    ),
}
CASES: tuple[dict[str, Any], ...] = tuple(
    {**estimator, "batch_size": batch, "hidden_sizes": (width, width), "precision": precision}
    for estimator in ({}, {"estimator": "score", "baseline": "loo", "num_action_samples": 2})
    for batch, width, precision in (
        *((256, 256, precision) for precision in ("fp32", "tf32", "bf16")),
        *((1024, 256, "tf32"), (8192, 256, "tf32"), (256, 512, "tf32"), (8192, 512, "tf32")),
    )
)


#: in the launches of one, for predictions
LEARNERS = (1, 2, 4, 8, 16)


class Stage(NamedTuple):
    """What one launch does in all."""

    programs: int
    flops: int
    bytes: int


class Counter(Interpreted):
    """Counts interpreted programs, products and accesses; and which of the tensors' elements are touched."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.programs = self.flops = self.bytes = 0
        self.touched = {
            tensor.data_ptr(): (np.zeros(tensor.numel(), np.int8), tensor.element_size()) for tensor in tensors
        }
        self.bases = np.array(sorted(self.touched))
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        dot, place = InterpreterBuilder.create_dot, InterpreterBuilder.set_grid_idx

        def counting_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._note(pointers.data, mask.data, 1)
            return load(builder, pointers, mask, *rest)

        def counting_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._note(pointers.data, mask.data, 2)
            return store(builder, pointers, value, mask, *rest)

        def counting_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
            self.flops += 2 * a.data.size * b.data.shape[-1]
            return dot(builder, a, b, *rest)

        def counting_place(builder: Any, *index: Any) -> Any:
            self.programs += 1
            return place(builder, *index)

        replacements = {"create_masked_load": counting_load, "create_masked_store": counting_store}
        replacements |= {"create_dot": counting_dot, "set_grid_idx": counting_place}
        self.patches = [patch.object(InterpreterBuilder, name, value) for name, value in replacements.items()]

    def _note(self, pointers: Any, mask: Any, kind: int) -> None:
        """Note loads (1) and stores (2). What is stored first is not counted as read: it comes from no memory."""
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        if not addresses.size:
            return
        base = int(self.bases[np.searchsorted(self.bases, addresses.flat[0], "right") - 1])
        flags, width = self.touched[base]
        self.bytes += addresses.size * width
        index = (addresses - base) // width
        flags[index] |= np.where(flags[index] & 2, kind & 2, kind).astype(np.int8)

    def read_and_written(self) -> int:
        """Return the bytes that have to be read once, and those that have to be written once, in all."""
        return sum(width * int(((flags & 1) + (flags >> 1)).sum()) for flags, width in self.touched.values())


def filled(plan: Plan) -> tuple[State, Scratch]:
    """Return a learner's state that stages can run on."""
    state = make_state(plan, num_rows=max(8, plan.batch_size))
    state.queue[:] = torch.arange(state.queue.shape[1])
    state.span[:, 1] = state.queue.shape[1]
    state.steps[:] = 1.0
    state.due[:, 0] = 2**62
    for part in (state.actor, state.critic, state.target, state.value):
        part.values.normal_(0.0, 0.05)
    return state, make_scratch(plan, "cpu")


def count(plan: Plan, cut: Plan | None = None) -> tuple[list[Stage], int]:
    """Return each stage's counts, and the bytes that an update has to read and to write; cut up as for another plan."""
    blocks = whole_update_launch.blocks_of(cut or plan, CUDA)
    state, scratch = filled(plan)
    small = [part for part in (*state, *scratch) if isinstance(part, torch.Tensor)]
    tensors = [*small, *(part for network in state if isinstance(network, tuple) for part in network)]
    stages = []
    with patch.object(whole_update_launch, "blocks_of", lambda *_: blocks), Counter(tensors) as counter:
        for stage in STAGES:
            before = counter.programs, counter.flops, counter.bytes
            run_stage(stage, state, scratch, plan)
            after = counter.programs, counter.flops, counter.bytes
            stages.append(Stage(*(now - then for now, then in zip(after, before, strict=True))))
    return stages, counter.read_and_written()


def scaled(changes: dict[str, Any]) -> list[Stage]:
    """Return the counts of a large batch, which follow from those of two small ones."""
    plan = make_plan(**changes)
    rows = whole_update_launch.blocks_of(plan, CUDA).BLOCK_B
    sizes = 4 * rows, 8 * rows  # whole numbers of what a tile of weights goes through at a time
    small, large = (count(make_plan(**{**changes, "batch_size": size}), plan)[0] for size in sizes)
    times = (plan.batch_size - sizes[0]) / (sizes[1] - sizes[0])
    return [
        Stage(*(round(a + times * (b - a)) for a, b in zip(*pair, strict=True)))
        for pair in zip(small, large, strict=True)
    ]


def needed_bytes(plan: Plan) -> int:
    """Return what an update cannot do without: parameters, moments, targets and batch, read and written once."""
    state = make_state(plan)
    networks = [state.actor, state.critic, *([state.value] if plan.baseline == "value" else [])]
    held = sum(part.nbytes for network in networks for part in network[:3]) + state.target.values.nbytes
    batch = 4 * plan.batch_size * (2 * plan.obs_size + plan.action_size + 2)
    return 2 * (held + batch)


def peak(chip: Chip, precision: str) -> float:
    """Return TFLOP/s; of bfloat16 twice those of TF32, as all these data sheets have it."""
    return {"fp32": chip.fp32, "tf32": chip.tf32, "bf16": 2.0 * chip.tf32}[precision]


def stage_us(stage: Stage, chip: Chip, precision: str, end: int) -> float:
    """Return a stage's predicted time."""
    assumed = {name: values[end] for name, values in (ASSUMED | MORE).items()}
    efficiency = assumed["fp32" if precision == "fp32" else "tf32"]
    of_one = 1e6 * peak(chip, precision) * efficiency / chip.multiprocessors
    compute = stage.flops / stage.programs / of_one
    stream = stage.bytes / stage.programs / (1e3 * assumed["stream"] * chip.clock)
    program = max(compute, stream) if end == LOW else compute + stream
    # all together, L2 limits them
    shared = 1e-3 * stage.bytes / (chip.bandwidth * assumed["l2"])
    waves = math.ceil(stage.programs / chip.multiprocessors)
    return assumed["node"] + assumed["latency"] + max(waves * program, shared)


def rows() -> list[dict[str, Any]]:
    """Return counts and predictions."""
    found = []
    for changes in CASES:
        plan = make_plan(**changes)
        row: dict[str, Any] = {"estimator": plan.estimator, "K": plan.num_action_samples, "B": plan.batch_size}
        row |= {"hidden": plan.hidden_sizes[0], "precision": plan.precision, "launches": len(STAGES)}
        if plan.batch_size == 256:
            stages, touched = count(plan)
            row |= {"memory_bytes": touched, "needed_bytes": needed_bytes(plan)}
        else:
            stages = scaled(changes)
        row["stages"] = {name: stage._asdict() for name, stage in zip(NAMES, stages, strict=True)}
        row["chips"] = {
            name: [sum(stage_us(stage, chip, plan.precision, end) for stage in stages) for end in ENDS]
            for name, chip in CHIPS.items()
        }
        print(row["estimator"], row["B"], row["hidden"], row["precision"], row["chips"]["H100"], flush=True)
        found.append(row)
    return found


def updates_table(result: dict[str, Any]) -> str:
    """Return Markdown: counts, and for each chip the predicted us; for an H100 updates/s, too."""
    lines = []
    for row in result["rows"]:
        totals = {key: sum(stage[key] for stage in row["stages"].values()) for key in ("flops", "bytes")}
        share = f"{row['memory_bytes'] / row['needed_bytes']:.2f}x" if "memory_bytes" in row else "-"
        cells = [f"{row['precision']}, {row['estimator']}", str(row["B"]), str(row["hidden"]), str(row["launches"])]
        cells += [f"{totals['flops'] / 1e9:.2f}", f"{totals['bytes'] / 1e6:.0f}", share]
        cells += [f"{low:,.0f} to {high:,.0f}" for low, high in row["chips"].values()]
        low, high = row["chips"]["H100"]
        cells.append(f"{1e6 / high:,.0f} to {1e6 / low:,.0f}")
        lines.append(cells)
    head = ["precision", "batch", "hidden", "launches", "GFLOP", "MB moved", "memory", *result["rows"][0]["chips"]]
    head.append("H100, updates/s")
    return _markdown(head, lines)


def stages_table(result: dict[str, Any], chip: str = "H100") -> str:
    """Return Markdown: the stages at batch 256 in TF32, pathwise."""
    (row,) = (each for each in result["rows"] if _is_main(each))
    lines = []
    for name, stage in row["stages"].items():
        low, high = (stage_us(Stage(**stage), CHIPS[chip], row["precision"], end) for end in ENDS)
        per_program = [
            f"{stage['flops'] / stage['programs'] / 1e6:.2f}",
            f"{stage['bytes'] / stage['programs'] / 1e3:.0f}",
        ]
        lines.append([name, str(stage["programs"]), *per_program, f"{low:.1f} to {high:.1f}"])
    return _markdown(["stage", "programs", "MFLOP of one", "kB of one", f"{chip}, us"], lines)


def learners_us(row: dict[str, Any], number: int, chip: Chip) -> list[float]:
    """Return the predicted time of an update of each of so many learners, whose programs stand in the same launches."""
    stages = [Stage(*(number * value for value in stage.values())) for stage in row["stages"].values()]
    return [sum(stage_us(stage, chip, row["precision"], end) for stage in stages) for end in ENDS]


def learners_table(result: dict[str, Any], chip: str = "H100") -> str:
    """Return Markdown: several learners in the launches of one, at batch 256 in TF32, pathwise."""
    (row,) = (each for each in result["rows"] if _is_main(each))
    alone, lines = learners_us(row, 1, CHIPS[chip]), []
    for number in LEARNERS:
        low, high = learners_us(row, number, CHIPS[chip])
        gains = sorted(number * one / all_ for one, all_ in zip(alone, (low, high), strict=True))
        rates = f"{1e6 * number / high:,.0f} to {1e6 * number / low:,.0f}"
        lines.append([str(number), f"{low:.0f} to {high:.0f}", rates, f"{gains[0]:.1f}x to {gains[1]:.1f}x"])
    head = ["learners", f"{chip}, us for an update of each", "updates/s of all", "of one learner's"]
    return _markdown(head, lines)


def assumed_table(result: dict[str, Any]) -> str:
    """Return Markdown: what is assumed beside the paper model's."""
    rows = [(name, result["assumed"][name]) for name in MORE]
    lines = [[what, f"{low:g} to {high:g}", source] for _, (low, high, what, source) in rows]
    return _markdown(["assumption", "range", "source"], lines)


def _is_main(row: dict[str, Any]) -> bool:
    return (row["estimator"], row["B"], row["hidden"], row["precision"]) == ("pathwise", 256, 256, "tf32")


def sources() -> str:
    """Return a hash of all that the counts follow from."""
    folder, kernels = Path(__file__).parent, Path(whole_update_launch.__file__ or "").parent
    names = [
        kernels / f"{name}.py"
        for name in ("whole_update_launch", "whole_update_triton", "two_layer_triton", "descent_triton")
    ]
    names += [folder / f"{name}.py" for name in ("whole_update", "kernel_launches", "paper_model")]
    digest = hashlib.sha256()
    for path in names:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Count, predict and write."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    torch.manual_seed(0)
    meaning = "counted in Triton's interpreter; us are predictions, the fast and the slow end: nothing ran on a GPU"
    result = {"command": "python -m benchmarks.whole_update", "meaning": meaning, "assumed": ASSUMED | MORE}
    result |= {"sources": sources(), "versions": {"torch": torch.__version__}, "rows": rows()}
    write_json(RESULT, result)
    print(stages_table(result), updates_table(result), sep="\n\n")


if __name__ == "__main__":
    main()
