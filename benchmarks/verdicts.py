"""What a run on a GPU says about the targets, each with its numbers; pure functions of its JSON.

Ratios are of medians and rounded to two decimals before they are compared. Where the GPU tests are not green no speedup
is stated: wrong numbers may be fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.op_cases import ACTIONS, BACKENDS, CASES, ESTIMATORS, LAUNCH_SIZES, UPDATE, Case

Row = dict[str, Any]
RED = "not reported: the GPU tests are not green"
LARGE = (65536, 32)


def is_at(case: Case, size: tuple[int, int]) -> bool:
    """Whether the case is of the size; A has no say in some operations."""
    return size[0] == case.B and case.A in (size[1], None)


def case_of(row: Row) -> Case:
    return Case(*(row[field] for field in Case._fields))


def op_times(rows: Iterable[Row]) -> dict[tuple[Case, str], dict[str, Row]]:
    """Return rows by case and pass, then by backend."""
    times: dict[tuple[Case, str], dict[str, Row]] = {}
    for row in rows:
        times.setdefault((case_of(row), row["pass"]), {})[row["backend"]] = row
    return times


def judge(ratios: list[Row], expected: int, at_least: float, green: bool) -> Row:
    """Return the verdict on `ratio` being at least so much in every one of the expected comparisons."""
    if not green:
        return {"status": RED}
    if not ratios:
        return {"status": "not measured", "at_least": at_least, "compared": 0, "expected": expected}
    below = [entry for entry in ratios if entry["ratio"] < at_least]
    status = "missed" if below else "reached" if len(ratios) == expected else "incomplete"
    least = min(ratios, key=lambda entry: entry["ratio"])
    numbers = {"at_least": at_least, "compared": len(ratios), "expected": expected, "least": least, "below": below}
    return {"status": status} | numbers


def op_ratios(rows: list[Row]) -> list[Row]:
    """Return how many times as fast as torch.compile's version Triton's is on the device, in each pass of an update."""
    ratios = []
    for (case, which), by_backend in op_times(rows).items():
        if which in case.judged and {"compile", "triton"} <= by_backend.keys():
            compiled, ours = (by_backend[name]["device_us"][1] for name in ("compile", "triton"))
            entry = {"case": case.id, "pass": which, "compile_us": compiled, "triton_us": ours}
            ratios.append(entry | {"ratio": round(compiled / ours, 2), "large": is_at(case, LARGE)})
    return ratios


def update_ratios(rows: list[Row]) -> list[Row]:
    """Return how many times as fast as the eager update the graphed one is, at batch 256."""
    updates = {
        tuple(row[key] for key in ("estimator", "baseline", "K", "A", "engine")): row for row in rows if small(row)
    }
    ratios = []
    for (*case, engine), row in updates.items():
        eager = updates.get((*case, "reference"))
        if engine == "graphed" and eager is not None:
            ours, theirs = row["wall_us"][1], eager["wall_us"][1]
            entry = {"case": " ".join(map(str, case[:2])) + f" K{case[2]} A{case[3]}", "eager_us": theirs}
            ratios.append(entry | {"graphed_us": ours, "ratio": round(theirs / ours, 2)})
    return ratios


def small(row: Row) -> bool:
    return row["what"] == UPDATE and row["B"] == 256


def launch_verdict(rows: list[Row]) -> Row:
    """Return the counts, and whether each Triton operation is one launch forward and one backward."""
    counts: dict[str, Row] = {}
    for row in rows:
        if "launches" in row:
            counts.setdefault(case_of(row).id, {})[row["backend"]] = row["launches"]
    ours = [entry["triton"] for entry in counts.values() if "triton" in entry]
    expected = sum(is_at(case, size) for case in CASES for size in LAUNCH_SIZES)
    wrong = [name for name, entry in counts.items() if set(entry.get("triton", {}).values()) - {1}]
    status = "missed" if wrong else "reached" if len(ours) == expected else "incomplete" if ours else "not measured"
    return {"status": status, "counted": len(ours), "expected": expected, "not_one": wrong, "counts": counts}


def verdicts(result: Row) -> Row:
    """Return every target's verdict for what a run has gathered so far."""
    green = bool(result.get("tests", {}).get("green"))
    op_rows, update_rows = (result.get(part, {}).get("rows", []) for part in ("ops", "updates"))
    ratios = op_ratios(op_rows)
    large = [entry for entry in ratios if entry["large"]]
    passes = [(case, which) for case in CASES for which in case.judged]
    return {
        "no op slower than torch.compile": judge(ratios, len(passes), 1.0, green),
        "ops at B = 65536, A = 32": judge(large, sum(is_at(case, LARGE) for case, _ in passes), 1.3, green),
        "graphed update at batch 256": judge(update_ratios(update_rows), len(ESTIMATORS) * len(ACTIONS), 3.0, green),
        "one launch forward, one backward": launch_verdict(op_rows),
    }


def describe(verdict: Row) -> str:
    """Return a verdict's numbers in a line."""
    if "counted" in verdict:
        wrong = f"; not one: {', '.join(verdict['not_one'])}" if verdict["not_one"] else ""
        return f"{verdict['counted']} of {verdict['expected']} counted{wrong}"
    if not verdict.get("compared"):
        return ""
    least = verdict["least"]
    times = ", ".join(f"{key[:-3]} {value:g} us" for key, value in least.items() if key.endswith("_us"))
    text = f"{verdict['compared']} of {verdict['expected']} compared, least {least['ratio']:.2f}x of the wanted "
    text += f"{verdict['at_least']:g}x: {least['case']} {least.get('pass', '')} ({times})"
    return text + (f"; below it: {len(verdict['below'])}" if verdict["below"] else "")


def table(rows: list[Row], green: bool) -> list[str]:
    """Return the operations' device times and launches at the targets' sizes, as lines of text."""
    lines = [f"{'device time in us (launches)':38}" + "".join(f"{backend:>18}" for backend in BACKENDS)]
    for (case, which), by_backend in op_times(rows).items():
        if which != case.passes[-1] or not any(is_at(case, size) for size in LAUNCH_SIZES):
            continue
        cells = []
        for backend in BACKENDS:
            row = by_backend.get(backend, {})
            text = f"{row['device_us'][1]:.4g}" if "device_us" in row and (green or backend != "triton") else "-"
            cells.append(text + (f" ({'+'.join(map(str, row['launches'].values()))})" if "launches" in row else ""))
        lines.append(f"{case.id + ' ' + which:38}" + "".join(f"{cell:>18}" for cell in cells))
    return lines
