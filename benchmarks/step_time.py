"""Where the time of a training step goes, at several numbers of environments: JSON and a picture.

    python -m benchmarks.step_time [--out benchmarks/results/step_time.json]

HalfCheetah-v5 with the default settings (one update per step, batch 256, two hidden layers of 256), for the reference
and the fused engine. Agents take turns, block by block. The time of each part is the host's while it waits for that
part: environments that step in the background while the learner updates only cost it what they slow down.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine, load_average, write_json

NUM_ENVS = (1, 16, 64)
ENGINES: dict[str, dict[str, Any]] = {
    "reference": {"engine": "reference"},
    "fused, fp32": {"engine": "fused", "precision": "fp32"},
    "fused, bf16": {"engine": "fused", "precision": "bf16"},
}
#: from the bottom of a bar to its top
PARTS = ("update", "drawing batches", "acting", "environments", "replay", "the rest")
BLOCK_STEPS = {1: 200, 16: 800, 64: 1280}  # environment steps
WARM_UP = 1000  # random steps without updates
ROUNDS = 5


class Timed:
    """An agent whose parts are timed."""

    def __init__(self, engine: str, num_envs: int) -> None:
        from fastsac import SAC, Config  # the tables are written without the environments

        settings = ENGINES[engine] | {"num_envs": num_envs, "learning_starts": WARM_UP, "eval_every": 0}
        self.engine, self.num_envs = engine, num_envs
        self.agent = SAC(Config("HalfCheetah-v5", **settings))
        self.agent.learn(WARM_UP + 2 * BLOCK_STEPS[num_envs])  # the trial of threads is over by then
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.blocks: list[dict[str, float]] = []
        agent = self.agent
        for owner, name, part in (
            (agent.learner, "update", "update"),
            (agent.replay, "sample", "drawing batches"),
            (agent.learner, "act", "acting"),
            (agent.envs, "send", "environments"),
            (agent.envs, "recv", "environments"),
            (agent.replay, "add", "replay"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds[part] += time.perf_counter() - start
            return result

        return call

    def measure(self) -> None:
        """One block of training."""
        torch.set_num_threads(self.agent.num_threads)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        before, start = self.agent.steps, time.perf_counter()
        self.agent.learn(before + BLOCK_STEPS[self.num_envs])
        total, steps = time.perf_counter() - start, self.agent.steps - before
        self.seconds["update"] -= self.seconds["drawing batches"]  # which is within it
        self.seconds["the rest"] = total - sum(self.seconds.values())
        self.blocks.append({part: 1e6 * seconds / steps for part, seconds in self.seconds.items()})

    def result(self) -> dict[str, Any]:
        """Medians over the blocks, in us per environment step."""
        parts = {part: round(float(np.median([block[part] for block in self.blocks])), 2) for part in PARTS}
        totals = [sum(block.values()) for block in self.blocks]
        return {
            "engine": self.engine,
            "num_envs": self.num_envs,
            "threads": self.agent.num_threads,
            "precision": self.agent.setup.precision,
            "us_per_step": parts,
            "steps_per_s": round(float(np.median([1e6 / total for total in totals])), 1),
            "blocks": [round(1e6 / total, 1) for total in totals],
        }


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture: a bar for each engine and number of environments, its parts on top of one another."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(result["rows"], key=lambda row: (NUM_ENVS.index(row["num_envs"]), list(ENGINES).index(row["engine"])))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    places = [index + 0.6 * NUM_ENVS.index(row["num_envs"]) for index, row in enumerate(rows)]
    left = np.zeros(len(rows))
    for number, part in enumerate(PARTS):
        widths = np.array([row["us_per_step"][part] for row in rows]) / 1e3
        axes.barh(places, widths, left=left, label=part, color=f"C{number}", height=0.8)
        left += widths
    for place, end, row in zip(places, left, rows, strict=True):
        axes.text(end, place, f"  {row['steps_per_s']:,.0f} steps/s", va="center", fontsize=8)
    axes.set_yticks(places, [f"{row['engine']}, N = {row['num_envs']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.2 * left.max())
    axes.set_xlabel("ms per environment step, one update included")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    cpu = result["machine"]["cpu"]
    axes.set_title(f"HalfCheetah-v5 on {cpu['cores_allowed']} cores, {cpu['model']}", fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(result: dict[str, Any]) -> str:
    """Return Markdown: us per environment step by part."""
    lines = [["engine", "N", "threads", "steps/s", *PARTS], ["---"] * (4 + len(PARTS))]
    for row in result["rows"]:
        times = [f"{row['us_per_step'][part]:,.0f}" for part in PARTS]
        lines.append([row["engine"], str(row["num_envs"]), str(row["threads"]), f"{row['steps_per_s']:,.0f}", *times])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/step_time.json"), help="JSON file to write"
    )
    path = parser.parse_args().out
    machine = describe_machine()
    agents = [Timed(engine, num_envs) for num_envs in NUM_ENVS for engine in ENGINES]
    for _ in range(ROUNDS):
        for agent in agents:
            agent.measure()
    result = {
        "command": "python -m benchmarks.step_time",
        "machine": machine | {"load_average_at_end": load_average()},
        "settings": {"env_id": "HalfCheetah-v5", "seed": 0, "rounds": ROUNDS, "block_steps": BLOCK_STEPS},
        "meaning": "us_per_step: the host's time per environment step, medians over blocks; one update a step",
        "rows": [agent.result() for agent in agents],
    }
    write_json(path, result)
    draw(json.loads(path.read_text()), path.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
