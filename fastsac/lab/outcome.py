"""The results of a comparison: curves, final returns, areas under the curve and tests, from its runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastsac.lab.statistics import Numbers, area, bootstrap, equivalence, untestable

Runs = list[dict[str, Any]]
NONE = "-"
DIVERGED = "runs of the arm or of the first arm have diverged, and the remaining ones would flatter it"


def summarize(
    runs: Runs, failed: Runs, random_return: dict[str, float], reference: str, settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return `summary`, `best` and `overall` of comparison.json.

    A return is normalised to 0 for uniformly random actions and 1 for the mean final return of the reference arm. If a
    setting varies, each arm is tested with its best value: the one with the largest area under the curve among those
    with the most complete runs. It is chosen on the runs that are tested, in the same way for every arm. An arm with
    diverged runs is not tested: the remaining runs would flatter it.

    Args:
        runs: of comparison.json.
        failed: of comparison.json.
        random_return: for each environment.
        reference: label of the arm that the others are compared with.
        settings: of comparison.json.
    """
    summary, best, normalised = dict[str, Any](), dict[str, dict[str, str]](), dict[str, list[dict[str, Numbers]]]()
    diverged = {(each["env_id"], each["arm"]) for each in failed if each["diverged"]}
    for env_id in dict.fromkeys(run["env_id"] for run in runs):
        by_label: dict[str, Runs] = {}
        for run in runs:
            if run["env_id"] == env_id:
                by_label.setdefault(run["arm"], []).append(run)
        labels = sorted(by_label, key=lambda label: _place(label, settings["arms"]))
        seeds = {label: [run["seed"] for run in by_label[label]] for label in labels}
        summary[env_id] = {label: _of_arm(by_label[label]) for label in labels}
        best[env_id] = _best(summary[env_id])
        anchor = best[env_id].get(reference)
        if anchor is None:
            continue
        finals = {label: summary[env_id][label]["final"]["values"] for label in labels}
        zero = random_return.get(env_id, math.nan)
        scale = float(np.mean(finals[anchor])) - zero
        for label in best[env_id].values():
            if label != anchor:
                both = [seed for seed in seeds[anchor] if seed in seeds[label]]
                first, other = ([finals[each][seeds[each].index(seed)] for seed in both] for each in (anchor, label))
                whole = not {(env_id, anchor), (env_id, label)} & diverged
                found = equivalence(first, other, scale, settings["margin"]) if whole else untestable(DIVERGED)
                summary[env_id][label]["equivalence"] = {
                    **{"against": anchor, "margin": settings["margin"], "seeds": len(both)},
                    **found._asdict(),
                }
        if not (scale > 0.0 and math.isfinite(scale)):
            continue
        for base, label in best[env_id].items():
            if (env_id, label) in diverged:
                continue
            arm = summary[env_id][label]
            shares = {name: (np.array(arm[name]["values"]) - zero) / scale for name in ("final", "auc")}
            normalised.setdefault(base, []).append(shares)
    overall = {
        base: {name: bootstrap([each[name] for each in shares]).json() for name in ("final", "auc")}
        for base, shares in normalised.items()
        if len(shares) == len(summary) > 1
    }
    return {"summary": summary, "best": best, "overall": overall}


def common_curve(runs: Runs) -> tuple[Numbers, Numbers]:
    """Return steps [S] and returns [runs, S]; evaluations come a few steps after multiples of their interval."""
    steps = np.array(max((run["steps"] for run in runs), key=len), dtype=np.float64)
    returns = [np.array(run["eval_return"], dtype=np.float64) for run in runs]
    return steps, np.stack([np.interp(steps, run["steps"], each) for run, each in zip(runs, returns, strict=True)])


def _of_arm(runs: Runs) -> dict[str, Any]:
    steps, returns = common_curve(runs)
    final, areas = returns[:, -1], np.array([area(steps, each) for each in returns])
    return {
        "seeds": len(runs),
        "final": {**bootstrap([final]).json(), "values": final.tolist()},
        "auc": {**bootstrap([areas]).json(), "values": areas.tolist()},
        "curve": {"steps": steps.tolist(), **bootstrap([returns]).json()},
        "time_s": float(np.median([run["time_s"] for run in runs])),
    }


def _best(of_env: dict[str, Any]) -> dict[str, str]:
    """Return the label of each arm's best settings; an arm has only one label if nothing is varied."""
    best: dict[str, str] = {}

    def merit(label: str) -> tuple[int, float]:
        auc = of_env[label]["auc"]["iqm"]
        return of_env[label]["seeds"], auc if _is_number(auc) else -math.inf

    for label in sorted(of_env, key=merit):
        best[label.split(" ")[0]] = label
    return {base: best[base] for base in dict.fromkeys(label.split(" ")[0] for label in of_env)}


def _place(label: str, arms: list[str]) -> tuple[int, str]:
    base = label.split(" ")[0]
    return (arms.index(base) if base in arms else len(arms)), label


def table(result: dict[str, Any]) -> str:
    """Return the results as a table in plain text."""
    rows = [["task", "arm", "seeds", "final return (95 %)", "area (95 %)", "difference of means", "verdict", "time"]]
    for env_id, arms in result["summary"].items():
        for label, arm in arms.items():
            returns = [interval(arm[name]) for name in ("final", "auc")]
            test, beside, verdict = arm.get("equivalence"), "", ""
            if test is not None:
                verdict = test["verdict"]
                if verdict != "not tested":
                    beside = "{difference:+.1%} ({low:+.1%} to {high:+.1%})".format(**test)
            elif not arm["seeds"]:
                verdict = "no complete run"
            elif label not in result.get("best", {}).get(env_id, {label: label}).values():
                verdict = "not its best settings"
            failed = f" ({arm['failed']} failed)" if arm.get("failed") else ""
            time_s = f"{arm['time_s']:.0f} s" if _is_number(arm["time_s"]) else NONE
            rows.append([env_id, label, f"{arm['seeds']}{failed}", *returns, beside, verdict, time_s])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    margin = result["settings"]["margin"]
    lines.append(
        f"interquartile means; differences from the first arm as shares of its gain over random actions, with 90 % "
        f"intervals; equivalent: within {100.0 * margin:g} % by two one-sided tests; inconclusive: neither equivalent "
        "nor different"
    )
    lines += [f"not tested: {reason}" for reason in untested(result["summary"])]
    if any(" " in label for arms in result["summary"].values() for label in arms):
        lines.append(
            "only each arm's best settings are tested: those with the largest area under the curve; they were chosen "
            "on the same seeds, which flatters them"
        )
    return "\n".join(lines)


def untested(summary: dict[str, Any]) -> list[str]:
    """Return the reasons why arms were not tested, each once."""
    tests = [arm.get("equivalence") or {} for arms in summary.values() for arm in arms.values()]
    return list(dict.fromkeys(test["reason"] for test in tests if test.get("reason")))


def interval(of: dict[str, Any], form: str = ",.1f") -> str:
    """Return an interquartile mean, with its interval if there is more than one seed."""
    if not _is_number(of["iqm"]):
        return NONE
    ends = _is_number(of["low"]) and _is_number(of["high"])
    return f"{of['iqm']:{form}}" + (f" ({of['low']:{form}} to {of['high']:{form}})" if ends else "")


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
