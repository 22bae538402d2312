"""Verdicts on the targets from a run on a GPU, each with its numbers; pure functions of its JSON.

Ratios are of medians and rounded to two decimals before they are compared. Wrong kernels may be fast: if GPU tests
failed, each verdict says so, and results of kernels whose own tests failed are marked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from benchmarks.op_cases import BACKENDS, GPU_CASES, GPU_UPDATES, LAUNCH_SIZES, UPDATE, Case

Row = dict[str, Any]
LARGE = (65536, 32)
UPDATES = "update"
#: what is in the names of an operation's own tests
WORDS = {
    "sample": "sampl|philox",
    "pathwise": "pathwise",
    "score": "score|philox",
    "td": "td",
    "categorical": "categorical",
    "gather": "gather|philox",
}
#: stands behind the time of a kernel whose own tests failed
MARK = "!"


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


def doubt(result: Row) -> str | None:
    """Return what the tests leave open in a few words, None if they are green."""
    tests = result.get("tests", {})
    if tests.get("green"):
        return None
    failed = len(tests.get("failed", {}))
    if not failed:
        return "the GPU tests did not finish" if tests else "the GPU tests have not run"
    named = ", ".join(sorted(suspects(result)))
    return f"{failed} GPU test{'s' * (failed > 1)} failed ({named})"


def suspects(result: Row) -> set[str]:
    """Return the operations whose own tests failed, and `UPDATES` if the graphed engine's did.

    A test that names none of them may be about any.
    """
    found: set[str] = set()
    for name in result.get("tests", {}).get("failed", {}):
        ops = {op for op, words in WORDS.items() if re.search(rf"(?<![a-z])({words})", name)}
        ops = {UPDATES} if re.search("test_graphed|test_fused_cuda|whole_update", name) else ops or set(WORDS)
        found |= ops if UPDATES in ops else ops | {UPDATES}  # an update makes use of all of them
    return found


def judge(ratios: list[Row], expected: int, at_least: float, result: Row) -> Row:
    """Return the verdict on `ratio` being at least so much in every one of the expected comparisons."""
    note, doubted = doubt(result), suspects(result)
    verdict: Row = {"status": "not measured", "at_least": at_least, "compared": len(ratios), "expected": expected}
    if ratios:
        ratios = [entry | {"suspect": True} if entry["op"] in doubted else entry for entry in ratios]
        below = [entry for entry in ratios if entry["ratio"] < at_least]
        verdict["status"] = "missed" if below else "reached" if len(ratios) == expected else "incomplete"
        verdict |= {"least": min(ratios, key=lambda entry: entry["ratio"]), "below": below}
        verdict["suspect"] = sum("suspect" in entry for entry in ratios)
    return verdict | ({"doubt": note} if note else {})


def op_ratios(rows: list[Row]) -> list[Row]:
    """Return how many times as fast as torch.compile's version Triton's is on the device, in each pass of an update."""
    ratios = []
    for (case, which), by_backend in op_times(rows).items():
        if which in case.judged and {"compile", "triton"} <= by_backend.keys():
            compiled, ours = (by_backend[name]["device_us"][1] for name in ("compile", "triton"))
            entry = {"op": case.op, "case": case.id, "pass": which, "compile_us": compiled, "triton_us": ours}
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
            name = " ".join(map(str, case[:2])) + f" K{case[2]} A{case[3]}"
            entry = {"op": UPDATES, "case": name, "eager_us": theirs}
            ratios.append(entry | {"graphed_us": ours, "ratio": round(theirs / ours, 2)})
    return ratios


def small(row: Row) -> bool:
    return row["what"] == UPDATE and row["B"] == 256


def engine_ratios(rows: list[Row], other: str) -> list[Row]:
    """Return how many times as fast as another engine, in float32, `fused` in TF32 is, at batch 256."""
    times = {(row["engine"], row["precision"], row["estimator"]): row["us"] for row in rows if is_small(row)}
    ratios = []
    for (engine, precision, estimator), us in times.items():
        theirs = times.get((other, "fp32", estimator))
        if (engine, precision) == ("fused", "tf32") and theirs is not None:
            entry = {"op": UPDATES, "case": estimator, f"{other}_us": theirs, "fused_us": us}
            ratios.append(entry | {"ratio": round(theirs / us, 2)})
    return ratios


def is_small(row: Row) -> bool:
    return (row["B"], row["hidden"], row["learners"]) == (256, 256, 0)


def rate_verdict(rows: list[Row], at_least: float, result: Row) -> Row:
    """Return whether `fused` in TF32 makes so many updates a second at batch 256, with each estimator."""
    ratios = [
        {
            "op": UPDATES,
            "case": row["estimator"],
            "fused_us": row["us"],
            "ratio": round(row["updates_per_s"] / at_least, 2),
        }
        for row in rows
        if is_small(row) and (row["engine"], row["precision"]) == ("fused", "tf32")
    ]
    return judge(ratios, 2, 1.0, result)


def engine_verdicts(result: Row) -> Row:
    """Return the verdicts on the fused engine."""
    rows = result["engines"].get("rows", [])
    return {
        "fused 10 times the eager update": judge(engine_ratios(rows, "reference"), 2, 10.0, result),
        "fused 3 times the graphed update": judge(engine_ratios(rows, "graphed"), 2, 3.0, result),
        "fused 15,000 updates/s at batch 256": rate_verdict(rows, 15_000.0, result),
    }


def engines_table(result: Row) -> list[str]:
    """Return updates/s of the engines, as lines of text."""
    lines = [f"{'updates/s':44}{'us':>10}{'updates/s':>12}{'predicted us':>18}{'floor':>8}"]
    for row in result.get("engines", {}).get("rows", []):
        name = f"{row['engine']} {row['precision']} {row['estimator']} B{row['B']} H{row['hidden']}"
        name += f" x {row['learners']} learners" if row["learners"] else ""
        low, high = row.get("predicted_us", (0.0, 0.0))
        predicted = f"{low:.0f} to {high:.0f}" if high else "-"
        share = f"{row['floor_share']:.0%}" if "floor_share" in row else "-"
        lines.append(f"{name:44}{row['us']:10.1f}{row['updates_per_s']:12,.0f}{predicted:>18}{share:>8}")
    return lines if len(lines) > 1 else []


def launch_verdict(rows: list[Row]) -> Row:
    """Return the counts, and whether each Triton operation is one launch forward and one backward."""
    counts: dict[str, Row] = {}
    for row in rows:
        if "launches" in row:
            counts.setdefault(case_of(row).id, {})[row["backend"]] = row["launches"]
    ours = [entry["triton"] for entry in counts.values() if "triton" in entry]
    expected = sum(is_at(case, size) for case in GPU_CASES for size in LAUNCH_SIZES)
    wrong = [name for name, entry in counts.items() if set(entry.get("triton", {}).values()) - {1}]
    status = "missed" if wrong else "reached" if len(ours) == expected else "incomplete" if ours else "not measured"
    return {"status": status, "counted": len(ours), "expected": expected, "not_one": wrong, "counts": counts}


def verdicts(result: Row) -> Row:
    """Return every target's verdict for what a run has gathered so far."""
    op_rows, update_rows = (result.get(part, {}).get("rows", []) for part in ("ops", "updates"))
    ratios = op_ratios(op_rows)
    large = [entry for entry in ratios if entry["large"]]
    if "engines" in result:
        return engine_verdicts(result)
    passes = [(case, which) for case in GPU_CASES for which in case.judged]
    return {
        "no op slower than torch.compile": judge(ratios, len(passes), 1.0, result),
        "ops at B = 65536, A = 32": judge(large, sum(is_at(case, LARGE) for case, _ in passes), 1.3, result),
        "graphed update at batch 256": judge(update_ratios(update_rows), len(GPU_UPDATES), 3.0, result),
        "one launch forward, one backward": launch_verdict(op_rows),
    }


def describe(verdict: Row) -> str:
    """Return a verdict's numbers in a line."""
    if "counted" in verdict:
        wrong = f"; not one: {', '.join(verdict['not_one'])}" if verdict["not_one"] else ""
        return f"{verdict['counted']} of {verdict['expected']} counted{wrong}"
    warning = f"; IN DOUBT: {verdict['doubt']}" if "doubt" in verdict else ""
    if not verdict["compared"]:
        return warning.removeprefix("; ")
    least = verdict["least"]
    times = ", ".join(f"{key[:-3]} {value:g} us" for key, value in least.items() if key.endswith("_us"))
    text = f"{verdict['compared']} of {verdict['expected']} compared, least {least['ratio']:.2f}x of the wanted "
    text += f"{verdict['at_least']:g}x: {least['case']} {least.get('pass', '')} ({times})"
    text += f"; below it: {len(verdict['below'])}" if verdict["below"] else ""
    return text + warning + (f", and {verdict['suspect']} of the ratios are of these" if verdict["suspect"] else "")


def table(result: Row) -> list[str]:
    """Return the operations' device times and launches at the targets' sizes, as lines of text."""
    rows, doubted = result.get("ops", {}).get("rows", []), suspects(result)
    lines = [f"{'device time in us (launches)':38}" + "".join(f"{backend:>18}" for backend in BACKENDS)]
    for (case, which), by_backend in op_times(rows).items():
        if which != case.passes[-1] or not any(is_at(case, size) for size in LAUNCH_SIZES):
            continue
        cells = []
        for backend in BACKENDS:
            row = by_backend.get(backend, {})
            text = f"{row['device_us'][1]:.4g}" if "device_us" in row else "-"
            text += MARK if "device_us" in row and backend == "triton" and case.op in doubted else ""
            cells.append(text + (f" ({'+'.join(map(str, row['launches'].values()))})" if "launches" in row else ""))
        lines.append(f"{case.id + ' ' + which:38}" + "".join(f"{cell:>18}" for cell in cells))
    if any(MARK in line for line in lines):
        lines.append(f"{MARK} its own tests failed: the time may be that of a wrong result")
    return lines
