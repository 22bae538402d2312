"""Learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from fastsac.metrics import read_rows
from fastsac.run_dir import METRICS, temporary_sibling

#: steps, and a value at each
Curve = tuple[Sequence[float], Sequence[float]]


def read_metric(run_dir: Path, metric: str) -> Curve:
    """Return the steps and values of one metric of a run's metrics.jsonl."""
    rows = [row for row in read_rows(run_dir / METRICS) if metric in row]
    return [row["step"] for row in rows], [row[metric] for row in rows]


def plot_curves(groups: Mapping[str, Sequence[Curve]], path: Path, title: str, ylabel: str) -> Path | None:
    """Draw one line per group of curves, the mean with the range from the lowest to the highest, and write it as PNG.

    Returns:
        The path, or None if there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {label: [curve for curve in curves if curve[0]] for label, curves in groups.items()}
    if not any(groups.values()):
        return None
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, curves in groups.items():
        if not curves:
            continue
        # runs pass an evaluation's step by a few, so they are brought to common steps
        steps = np.array(max((curve[0] for curve in curves), key=len))
        values = np.stack([np.interp(steps, *curve) for curve in curves])
        (line,) = axes.plot(steps, values.mean(0), marker="o", markersize=3, label=label)
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_title(title)
    axes.set_xlabel("environment steps")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if len(groups) > 1:
        axes.legend(frameon=False)
    temporary = temporary_sibling(path)
    try:
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))
        temporary.replace(path)
    finally:
        plt.close(figure)
        with suppress(OSError):
            temporary.unlink()
    return path
