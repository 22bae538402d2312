"""Tables of docs/explanation/measured.md, from the results of `fastsac compare` and `lab` in `benchmarks/results/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastsac.lab.outcome import interval

RESULTS = Path("benchmarks/results")
MUJOCO = ("estimators_mujoco", "estimators_mujoco_bf16")
Row = list[object]


def read(name: str) -> dict[str, Any]:
    """Return a results file."""
    result: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return result


def table(head: list[str], rows: list[Row]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines)


def summary(directories: tuple[str, ...]) -> dict[str, Any]:
    """Return the summaries of comparisons on different tasks as one."""
    return {env_id: arms for name in directories for env_id, arms in read(f"{name}/comparison.json")["summary"].items()}


def comparison(*directories: str) -> str:
    """Return one row per task and arm of comparisons."""
    rows = list[Row]()
    for env_id, arms in summary(directories).items():
        for label, arm in arms.items():
            test = arm.get("equivalence")
            beside = verdict = ""
            if test is not None:
                verdict = test["verdict"]
                if test["difference"] is not None:
                    beside = f"{test['difference']:+.1%} ({test['low']:+.1%} to {test['high']:+.1%})"
            returns = [interval(arm[name], ",.0f") for name in ("final", "auc")]
            cells = env_id, f"`{label}`", arm["seeds"], *returns, beside, verdict
            rows.append(list(cells))
    head = ["task", "arm", "seeds", "final return", "area under the curve", "difference of means", "verdict"]
    return table(head, rows)


def commands(directory: str) -> str:
    """Return the command of a comparison, and what it ran on."""
    result = read(f"{directory}/comparison.json")
    machines = {run["machine"]["cpu"]["model"] for run in result["runs"]}
    commits = {run["machine"]["git"]["commit"][:7] for run in result["runs"] if run["machine"]["git"]}
    return (
        f"`{result['command']}`; {len(result['runs'])} runs on {' and '.join(sorted(machines))}, "
        f"commit{'s' if len(commits) > 1 else ''} {', '.join(sorted(commits))}."
    )


def costs() -> str:
    """Return one row per arm: milliseconds, and shares of pathwise's."""
    result, rows = read("estimators/cost.json"), list[Row]()
    for row in result["rows"]:
        cells = [
            f"{row[f'{kind}_ms']['median']:.1f} ({row[f'{kind}_ratio']['median']:.2f}x)"
            for kind in ("actor_step", "reference_update", "update")
        ]
        rows.append([f"`{row['arm']}`", row["K"], *cells, row["engine"]])
    return table(["arm", "K", "actor's step, ms", "update, `reference`, ms", "update, ms", "engine"], rows)


def gradients(directory: str) -> str:
    """Return one row per arm at the newest checkpoint: noise and bias in the actor's parameters."""
    result, rows = read(f"{directory}/gradients.json"), list[Row]()
    last = max(row["checkpoint"] for row in result["rows"])
    for row in result["rows"]:
        if row["checkpoint"] == last:
            of, head = row["parameters"], row["head"]
            worst = max((each["bias_sigmas"] for each in (of, head)), key=abs)
            cells = f"{head['variance']:.3g}", f"{of['variance']:.3g}", f"{of['cosine']:.2f}", f"{worst:+.1f}"
            equal = f"{of['equal_evaluations']:.3g}", f"{of['equal_time']:.3g}"
            rows.append([f"`{row['arm']}`", row["K"], f"{row['evaluations']:g}", *cells, *equal])
    head_row = [
        "arm",
        "K",
        "critic evaluations",
        "noise at the head",
        "noise in the parameters",
        "cosine",
        "bias, sigmas",
    ]
    return table([*head_row, "noise at equal evaluations", "at equal time"], rows)


def toy() -> str:
    """Return one row per arm at the centre of the toy problem."""
    rows = list[Row]()
    for row in read("estimators/toy.json")["rows"]:
        if row["axis"] == "dimension" and row["value"] == 4:
            known = "-" if row["closed_form"] is None else f"{row['closed_form']:.3g}"
            rows.append([f"`{row['arm']}`", row["K"], f"{row['variance']:.3g}", known, f"{row['bias_sigmas']:.1f}"])
    return table(["arm", "K", "noise, measured", "closed form", "bias, largest, sigmas"], rows)


def ripples() -> str:
    """Return where the order of the two families turns over."""
    rows: list[Row] = [
        [each["height"], "nowhere up to 100" if each["from"] is None else f"{each['from']:.3g}"]
        for each in read("estimators/toy.json")["ripple"]
    ]
    return table(["height eta of the ripple", "pathwise is noisier from omega ="], rows)


def published() -> str:
    """Return others' returns beside ours at the same step, where there are any."""
    result, rows = read("published_returns.json"), list[Row]()
    ours = summary(MUJOCO)
    for row in result["rows"]:
        arm = ours.get(row["env_id"], {}).get("pathwise")
        same = arm is not None and row["steps"] == 100_000
        mine = f"{interval(arm['final'], ',.0f')}, {arm['seeds']} seeds" if same else "not run so far"
        rows.append([row["env_id"], f"{row['steps']:,}", row["source"], row["return"], mine])
    return table(["task", "steps", "source", "return", "ours, `pathwise`"], rows)
