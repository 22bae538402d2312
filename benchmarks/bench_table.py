"""The table and the picture of what `make bench` and `benchmarks.gpu` measured, made from their JSON alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OPS = {
    "sample": "sample and log-probability",
    "pathwise": "pathwise loss",
    "score": "score-function loss",
    "td": "critics' loss",
    "categorical": "categorical critics' loss",
    "gather": "batch from replay",
}
BACKENDS = {"reference": "PyTorch", "compile": "torch.compile", "triton": "Triton"}
ENGINES = {
    "reference": "PyTorch",
    "compile": "torch.compile",
    "graphed": "CUDA graph, Triton",
    "fused": "fused",
    "fused-bf16": "fused, bf16",
}
STEPS = {"actor": "actor's step", "update": "whole update"}
COLUMNS = [(what, name) for what in STEPS for name in ENGINES if what == "update" or "fused" not in name]
ESTIMATOR_SIZE = (256, 6)


def rows_of(result: Row) -> list[Row]:
    """Return all rows of a file of either kind, without those of kernels that failed their tests."""
    if "rows" in result:
        return list(result["rows"])
    rows = [row for part in ("ops", "updates") for row in result.get(part, {}).get("rows", [])]
    return [row for row in rows if green(result) or not ours(row.get("backend", row.get("engine")))]


def ours(name: str | None) -> bool:
    return name in ("triton", "graphed")


def green(result: Row) -> bool:
    """Whether the file's kernels passed their tests, where it says so."""
    return bool(result.get("tests", {"green": True}).get("green"))


def digits(value: float) -> str:
    """Return the number with three digits."""
    return f"{float(f'{value:.3g}'):,g}"


def on_gpu(result: Row) -> bool:
    return result["machine"]["gpu"] is not None


def table(results: Iterable[Row]) -> str:
    """Return Markdown for each file: its machine, the operations at one size, the estimators at another."""
    blocks = []
    for result in results:
        sizes = ((4096, 6), (65536, 32)) if on_gpu(result) else ((4096, 6),)
        tables = [ops_table(result, *size) for size in sizes]
        blocks += [machine_line(result), *tables, ratios_table(result), estimators_table(result)]
    return "\n\n".join(filter(None, blocks))


def machine_name(result: Row) -> str:
    machine = result["machine"]
    if on_gpu(result):
        return str(machine["gpu"]["name"])
    threads = machine["torch_threads"]
    return f"{machine['cpu']['model']}, {threads} thread{'s' * (threads > 1)}"


def machine_line(result: Row) -> str:
    """Return what it ran on in a sentence."""
    machine, versions = result["machine"], result["machine"]["versions"]
    copy = result.get("copy_gb_per_s") or result.get("ops", {}).get("copy_gb_per_s")
    copied = f", copies {copy:,.0f} GB/s (read and written)" if copy else ""
    return f"**{machine_name(result)}**{copied}; torch {versions['torch']}, {machine['date'][:10]}."


def label(row: Row) -> str:
    """Return a row's estimator or operation in words."""
    name = OPS[row["op"]] if "op" in row else row["estimator"]
    baseline = row["baseline"] if row["baseline"] not in (None, "auto") else None
    samples = f"K = {row['K']}" if row.get("op") not in ("td", "categorical", "gather") else None
    return ", ".join(part for part in (name, baseline, samples) if part)


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])


def missing(name: str, result: Row) -> str:
    if ours(name) and not on_gpu(result):
        return "needs a GPU"
    return "not reported: tests are not green" if ours(name) and not green(result) else "not measured"


def ops_table(result: Row, batch: int, actions: int) -> str:
    """Return a row per operation at B and A, where that has a say; nothing if none was measured."""
    times: dict[str, dict[str, Row]] = {}
    for row in rows_of(result):
        whole = row.get("pass") == ("fwd" if row.get("op") == "gather" else "fwd+bwd")
        if whole and row["B"] == batch and row["A"] in (actions, None):
            times.setdefault(label(row), {})[row["backend"]] = row
    lines = []
    for name, by_backend in sorted(times.items(), key=lambda item: order(item[1])):
        size = f"{next(iter(by_backend.values()))['bytes'] / 1e6:.2f}"
        lines.append([name, size, *(op_cell(by_backend.get(key), key, result) for key in BACKENDS)])
    if not lines:
        return ""
    where = "kernels' time on the device" if on_gpu(result) else "time of a call"
    title = f"Operations at B = {batch}, A = {actions}, forward and backward: median {where} in us, back to back (with "
    title += "cold caches; bytes over that time as a share of what a copy reaches)"
    return f"{title}\n\n" + markdown(["operation", "MB moved", *BACKENDS.values()], lines)


def ratios_table(result: Row) -> str:
    """Return a row per operation: the range over all sizes of each backend's speed relative to eager PyTorch."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows_of(result):
        if row.get("pass") == ("fwd" if row.get("op") == "gather" else "fwd+bwd"):
            case = tuple(row[key] for key in ("op", "baseline", "K", "B", "A"))
            times.setdefault(case, {})[row["backend"]] = row.get("device_us", row["wall_us"])[1]
    lines = []
    for op, name in OPS.items():
        cells = [name]
        for backend in ("compile", "triton"):
            both = [t for case, t in times.items() if case[0] == op and {"reference", backend} <= t.keys()]
            ratios = sorted(t["reference"] / t[backend] for t in both)
            cells.append(f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if ratios else missing(backend, result))
        lines.append(cells)
    if not times:
        return ""
    title = "How many times as fast as eager PyTorch, forward and backward: the range over all sizes and baselines"
    return f"{title}\n\n" + markdown(["operation", "torch.compile", "Triton"], lines)


def order(by_backend: dict[str, Row]) -> tuple[int, int]:
    row = next(iter(by_backend.values()))
    return list(OPS).index(row["op"]), row["K"]


def op_cell(row: Row | None, name: str, result: Row) -> str:
    if row is None:
        return missing(name, result)
    times = row.get("device_us", row["wall_us"])
    return f"{digits(times[1])} ({digits(row['cold_us'][1])}; {100 * row['copy_share']:.0f} %)"


def estimators_table(result: Row) -> str:
    """Return a row per estimator, the actor's step and the whole update by engine; nothing if none was measured."""
    times = estimator_times(result)
    if not times:
        return ""
    lines = [
        [name, *(step_cell(by_case.get(column), column[1], result) for column in COLUMNS)]
        for name, by_case in times.items()
    ]
    batch, actions = ESTIMATOR_SIZE
    title = f"Estimators at B = {batch}, A = {actions}: median time in ms (p20 to p80)"
    header = ["estimator", *(f"{STEPS[what]}, {ENGINES[engine]}" for what, engine in COLUMNS)]
    return f"{title}\n\n" + markdown(header, lines)


def estimator_times(result: Row) -> dict[str, dict[tuple[str, str], Row]]:
    """Return the rows at the table's size by estimator, and by step and engine."""
    times: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows_of(result):
        if "what" in row and (row["B"], row["A"]) == ESTIMATOR_SIZE:
            times.setdefault(label(row), {})[row["what"], row["engine"]] = row
    return times


def step_cell(row: Row | None, engine: str, result: Row) -> str:
    if row is None:
        return missing(engine, result)
    low, middle, high = (digits(value / 1e3) for value in row["wall_us"])
    return f"{middle} ({low} to {high})"


def draw(result: Row, path: Path) -> None:
    """Write the estimators' times as PNG: a panel for the actor's step and one for the whole update."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times = estimator_times(result)
    if not times:
        return
    measured = [engine for engine in ENGINES if any((what, engine) in t for t in times.values() for what in STEPS)]
    figure, panels = plt.subplots(1, 2, figsize=(8, 4), sharey=True, layout="constrained")
    height = 0.8 / len(measured)
    for axes, (what, title) in zip(panels, STEPS.items(), strict=True):
        for number, engine in enumerate(measured):
            key = what, engine
            rows = [(place, t[key]["wall_us"]) for place, t in enumerate(times.values()) if key in t]
            places = [place + (number - (len(measured) - 1) / 2) * height for place, _ in rows]
            middle = [wall[1] / 1e3 for _, wall in rows]
            spread = [[(wall[1] - wall[0]) / 1e3 for _, wall in rows], [(wall[2] - wall[1]) / 1e3 for _, wall in rows]]
            style = {"elinewidth": 0.8, "ecolor": "0.25"}
            axes.barh(places, middle, height, xerr=spread, label=ENGINES[engine], color=f"C{number}", error_kw=style)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("ms")
        axes.set_yticks(range(len(times)), list(times))
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].invert_yaxis()
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    batch, actions = ESTIMATOR_SIZE
    note = "" if on_gpu(result) else "; Triton needs a GPU"
    figure.suptitle(f"B = {batch}, A = {actions}: median, p20 to p80. {machine_name(result)}{note}", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)
