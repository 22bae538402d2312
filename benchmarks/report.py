"""Writes the README's tables from the JSON files under `benchmarks/results/`, and from nothing else.

python -m benchmarks.report            rewrite them
python -m benchmarks.report --check    exit with 1 if they differ
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

README = Path("README.md")
RESULTS = Path("benchmarks/results")
PEERS = {
    "sb3": "Stable-Baselines3",
    "sbx": "SBX (JAX)",
    "fastsac pathwise fp32": "fastsac, pathwise",
    "fastsac pathwise bf16": "fastsac, pathwise, `--precision bf16`",
    "fastsac score+loo fp32": "fastsac, score, loo (K = 2)",
}


def read(name: str) -> dict[str, Any]:
    """Return a results file."""
    result: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return result


def learning_table(*suites: str) -> str:
    """Return one row per suite and variant: the final return's mean over seeds, and its range."""
    lines = ["| task | steps | estimator | seeds | mean return | lowest | highest |", "|---|---|---|---|---|---|---|"]
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


TABLES = {
    "learning": lambda: learning_table("halfcheetah", "pendulum", "hopper", "walker"),
    "peers": peers_table,
}


def main() -> int:
    """Rewrite or check the tables between `<!-- NAME -->` and `<!-- /NAME -->`."""
    before = after = README.read_text()
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        after = re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, block=block: block, after, flags=re.DOTALL)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
