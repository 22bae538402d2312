"""Writes the pages' tables from the JSON files under `benchmarks/results/`, and from nothing else.

python -m benchmarks.report                 rewrite them, and draw the benchmarks' picture
python -m benchmarks.report --check         exit with 1 if they differ
python -m benchmarks.report --bench FILE    print the table of one benchmark file and draw its picture beside it
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import (
    equivalence,
    lab_tables,
    paper_cpu,
    paper_model,
    seeds,
    step_time,
    tutorial,
    update_sizes,
    whole_update,
)
from benchmarks.bench_table import draw, table

README = Path("README.md")
KERNELS_README = Path("kernels/README.md")
PERFORMANCE = Path("docs/explanation/performance.md")
RELIABILITY = Path("docs/explanation/reliability.md")
TUTORIAL = Path("docs/tutorial.md")
PRESETS = Path("docs/how-to/presets.md")
MEASURED = Path("docs/explanation/measured.md")
RESULTS = Path("benchmarks/results")
PEERS = {
    "sb3": "Stable-Baselines3",
    "sbx": "SBX (JAX)",
    "fastsac reference": "fastsac, `--engine reference`",
    "fastsac pathwise fp32": "fastsac, fp32",
    "fastsac pathwise bf16": "fastsac, bf16",
    "fastsac score+loo fp32": "fastsac, fp32, score, loo (K = 2)",
    "fastsac score+loo bf16": "fastsac, bf16, score, loo (K = 2)",
    "fastsac score+none bf16": "fastsac, bf16, score, none (K = 1)",
}


def read(name: str) -> dict[str, Any]:
    """Return a results file."""
    result: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return result


def learning_table(*suites: str, what: str = "estimator") -> str:
    """Return one row per suite and variant: the final return's mean over seeds, and its range."""
    lines = [f"| task | steps | {what} | seeds | mean return | lowest | highest |", "|---|---|---|---|---|---|---|"]
    for suite in suites:
        result = read(f"learning_{suite}.json")
        words = result["train"].split()
        env_id, steps = words[words.index("--env-id") + 1], int(words[words.index("--total-steps") + 1])
        for variant in dict.fromkeys(run["variant"] for run in result["runs"]):
            finals = [run["final"]["return_mean"] for run in result["runs"] if run["variant"] == variant]
            cells = [env_id, f"{steps:,}", variant, len(finals), *(f"{f(finals):,.0f}" for f in (np.mean, min, max))]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def peers_table() -> str:
    """Return one row per contender: milliseconds per update and steps/s, with the speed relative to SB3."""
    result = read("peers_cpu.json")
    lines = ["| | ms per update | steps/s, 16 environments | steps/s, 1 environment |", "|---|---|---|---|"]
    for name, contender in result["contenders"].items():
        cells = [PEERS.get(name, name)]
        for kind, form in (("update_16", ".1f"), ("learn_16", ",.0f"), ("learn_1", ",.0f")):
            median = contender["summary"][kind]["median"]
            cells.append(f"{median:{form}} ({contender['speed_relative_to_sb3'][kind]['median']:.2f}x)")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def launches_table() -> str:
    """Return one row per op: launches and bytes of eager PyTorch and of the Triton kernels."""
    result, rows = read("launches.json"), dict[str, dict[str, Any]]()
    for row in result["rows"]:
        rows.setdefault(row["op"], {})[row["backend"]] = row
    lines = [
        "| op | eager: launches | Triton: launches | eager: kB | Triton: kB |",
        "|---|---|---|---|---|",
    ]
    for name, by_backend in rows.items():
        cells = [name]
        for key, form in (("launches", "{:d}"), ("bytes", "{:.0f}")):
            for row in (by_backend["eager"], by_backend["triton"]):
                values = [row[f"{which}_{key}"] for which in ("forward", "backward") if f"{which}_{key}" in row]
                cells.append(" + ".join(form.format(v if key == "launches" else v / 1e3) for v in values))
        lines.append(f"| {' | '.join(cells)} |")
    for estimator, engines in result["updates"].items():
        lines.append(f"| a whole update, {estimator} | {engines['reference']} | {engines['graphed']} | | |")
    return "\n".join(lines)


def resources_table(chip: str = "sm_90") -> str:
    """Return one row per kernel as it is launched, for one chip."""
    lines = ["| kernel | launched for | warps | registers | shared bytes | code bytes |", "|---|---|---|---|---|---|"]
    for row in read("kernel_resources.json")["rows"]:
        if row["chip"] == chip:
            shape = f"{row['shape']} {row['baseline'] or ''}".strip()
            cells = [f"`{row['kernel']}`", shape, *(row[key] for key in ("warps", "registers", "shared_bytes"))]
            lines.append(f"| {' | '.join(map(str, [*cells, row['sass_bytes']]))} |")
    return "\n".join(lines)


def bench_results() -> list[dict[str, Any]]:
    """Return the benchmark files that there are, the CPU's first."""
    return [read(name) for name in ("bench_cpu.json", "gpu.json") if (RESULTS / name).exists()]


def pauses_table() -> str:
    """Return one row per way of writing checkpoints: how long training stops for each."""
    lines = [
        "| | first checkpoint | later ones, median | later ones, most | writing in the background, median |",
        "|---|---|---|---|---|",
    ]
    for label, run in read("checkpoint_pause.json").items():
        first, *later = run["pause_s"]
        writes = f"{1e3 * np.median(run['write_s'][1:]):.0f} ms" if run["write_s"] else "-"
        cells = [label, *(f"{1e3 * seconds:.1f} ms" for seconds in (first, np.median(later), max(later))), writes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kills_table() -> str:
    """Return one row per run that was killed again and again."""
    lines = [
        "| run | kills | newest checkpoint whole | killed while writing one | most steps lost | equal at the end |",
        "|---|---|---|---|---|---|",
    ]
    for run in read("kills.json")["runs"]:
        equal = "yes" if all(run["equal_to_the_run_left_alone"].values()) else "no"
        keys = ("kills", "whole_after_kill", "half_written_checkpoints_left_by_kills")
        cells = [f"`{run['settings']}`", *(run[key] for key in keys), f"{run['steps_lost']['most']:.0f}", equal]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


FAULTS = {
    "abort": "aborts (SIGABRT)",
    "segfault": "crashes (SIGSEGV)",
    "oom": "is killed, as for want of memory (SIGKILL)",
    "exit": "exits with a status",
    "hang": "hangs",
    "raise": "raises an exception",
    "nan": "returns an observation of NaN",
    "nan-reward": "returns a reward of NaN",
    "shape": "returns another shape",
}


def faults_table() -> str:
    """Return one row per way to fail."""
    lines = ["| the environment | the run survived | and ended as if nothing had failed |", "|---|---|---|"]
    for row in read("faults.json")["faults"]:
        answers = ("yes" if row[key] else "no" for key in ("survived", "equal_to_the_untroubled_run"))
        lines.append(f"| {' | '.join([FAULTS[row['kind']], *answers])} |")
    return "\n".join(lines)


def flips_text() -> str:
    """Return a sentence."""
    flipped = read("faults.json")["flipped"]
    return (
        f"One bit of each of the {flipped['bytes']:,} bytes of a small checkpoint ({flipped['files']} files, with the "
        f"replay buffer) was changed in turn, and the\ncheckpoint loaded: {flipped['refused']:,} times it was refused."
    )


PERFORMANCE_TABLES: dict[str, Callable[[], str]] = {
    "learning": lambda: learning_table("halfcheetah", "pendulum", "hopper", "walker"),
    "peers": peers_table,
    "step_time": lambda: step_time.table(read("step_time.json")),
    "update_sizes": lambda: update_sizes.table(read("update_sizes.json")),
    "equivalence": equivalence.table,
    "paper_updates": lambda: paper_model.gpu_table(read("paper_model.json")),
    "whole_updates": lambda: whole_update.updates_table(read("whole_update.json")),
    "whole_stages": lambda: whole_update.stages_table(read("whole_update.json")),
    "seeds": lambda: seeds.table(read("seeds.json")),
    "seeds_training": lambda: seeds.text(read("seeds.json")),
    "whole_learners": lambda: whole_update.learners_table(read("whole_update.json")),
    "whole_assumed": lambda: whole_update.assumed_table(read("whole_update.json")),
    "paper_chips": lambda: paper_model.chips_table(read("paper_model.json")),
    "paper_assumed": lambda: paper_model.assumed_table(read("paper_model.json")),
    "paper_steps": lambda: paper_model.step_table(read("paper_model.json")),
    "paper_peaks": lambda: paper_cpu.peaks_table(read("paper_model.json")),
    "paper_sizes": lambda: paper_cpu.table(read("paper_model.json")),
    "paper_estimators": lambda: paper_cpu.estimators_table(read("paper_model.json")),
    "paper_parts": lambda: paper_cpu.parts_table(read("paper_model.json")),
}
KERNELS_TABLES: dict[str, Callable[[], str]] = {
    "launches": launches_table,
    "bench": lambda: table(bench_results()),
    "resources": resources_table,
}
RELIABILITY_TABLES: dict[str, Callable[[], str]] = {
    "pauses": pauses_table,
    "kills": kills_table,
    "faults": faults_table,
    "flips": flips_text,
}
MEASURED_TABLES: dict[str, Callable[[], str]] = {
    "lab_toy": lab_tables.toy,
    "lab_ripples": lab_tables.ripples,
    "lab_pendulum": lambda: lab_tables.comparison("estimators_pendulum"),
    "lab_pendulum_command": lambda: lab_tables.commands("estimators_pendulum"),
    "lab_pendulum_reference": lambda: lab_tables.comparison("estimators_pendulum_reference"),
    "lab_pendulum_reference_command": lambda: lab_tables.commands("estimators_pendulum_reference"),
    "lab_mujoco": lambda: lab_tables.comparison(*lab_tables.MUJOCO),
    "lab_mujoco_command": lambda: lab_tables.commands("estimators_mujoco"),
    "lab_mujoco_bf16_command": lambda: lab_tables.commands("estimators_mujoco_bf16"),
    "lab_published": lab_tables.published,
    "lab_gradients": lambda: lab_tables.gradients("estimators"),
    "lab_gradients_value": lambda: lab_tables.gradients("estimators_value"),
    "lab_costs": lab_tables.costs,
}
PRESET_SUITES = ("presets_halfcheetah", "presets_humanoid", "presets_humanoid_longer")
PAGES = {
    README: {"peers": peers_table},
    KERNELS_README: KERNELS_TABLES,
    PERFORMANCE: PERFORMANCE_TABLES,
    RELIABILITY: RELIABILITY_TABLES,
    MEASURED: MEASURED_TABLES,
    TUTORIAL: {"tutorial": lambda: tutorial.table(read("tutorial.json"))},
    PRESETS: {"presets": lambda: learning_table(*PRESET_SUITES, what="preset")},
}


def rewritten(page: Path, tables: dict[str, Callable[[], str]]) -> str:
    """Return the page with each table between `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        ValueError: if the page has no such place.
    """
    text = page.read_text()
    for name, make in tables.items():
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        place = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
        text, found = re.subn(place, lambda _, block=block: block, text, flags=re.DOTALL)
        if not found:
            raise ValueError(f"{page} has no lines <!-- {name} --> and <!-- /{name} -->")
    return text


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the pages, or show one benchmark file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page differs from the results")
    parser.add_argument("--bench", type=Path, metavar="FILE", help="print this file's table, draw its picture")
    options = parser.parse_args(arguments)
    if options.bench is not None:
        result = json.loads(options.bench.read_text())
        print(table([result]))
        draw(result, options.bench.with_suffix(".png"))
        return 0
    texts = {page: rewritten(page, tables) for page, tables in PAGES.items()}
    if options.check:
        return int(any(page.read_text() != text for page, text in texts.items()))
    for page, text in texts.items():
        page.write_text(text)
    if (RESULTS / "bench_cpu.json").exists():
        draw(read("bench_cpu.json"), RESULTS / "bench_cpu.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
