"""Learning curves: read from runs, interpolated to common steps and drawn."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsac.run_dir import METRICS, read_rows, temporary_sibling

#: steps, and a value at each
Curve = tuple[Sequence[float], Sequence[float]]
#: Okabe and Ito's colours for the colour-blind, without the yellow, which is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ((), (5, 1.5), (1.5, 1.5), (6, 1.5, 1.5, 1.5), (9, 2.5))
#: a single line has markers if it has at most this many points
MANY = 40
#: maximum characters per line of a label; six take about half an inch
WIDEST = 90


class Line(NamedTuple):
    """A line, with a band where `low` and `high` are numbers; each [S]."""

    label: str
    steps: Any
    middle: Any
    low: Any
    high: Any


def read_metric(run_dir: Path, metric: str) -> Curve:
    """Return the steps and values of one metric from a run's metrics.jsonl."""
    rows = read_rows(run_dir / METRICS, metric)
    return [row["step"] for row in rows], [row[metric] for row in rows]


def common_steps(curves: Sequence[Curve]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return steps [S] that all curves cover, taken from the longest curve, and the values [curves, S] there.

    Runs evaluate a few steps late, so values are interpolated. S is 0 if no step is covered by all.
    """
    longest = max((curve[0] for curve in curves), key=len)
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    steps = np.unique(np.clip(np.asarray(longest, np.float64), first, last)) if first <= last else np.empty(0)
    return steps, np.stack([np.interp(steps, *curve) for curve in curves])


def plot_curves(groups: Mapping[str, Sequence[Curve]], path: Path, title: str, ylabel: str) -> Path | None:
    """Draw one line per group of curves: the mean, with a band from the minimum to the maximum.

    Returns:
        The path, or None if there is nothing to draw.
    """
    lines = []
    for label, curves in groups.items():
        if there := [curve for curve in curves if curve[0]]:
            steps, values = common_steps(there)
            lines.append(Line(label, steps, values.mean(0), values.min(0), values.max(0)))
    return draw({title: lines}, path, ylabel) if lines else None


def draw(panels: Mapping[str, Sequence[Line]], path: Path, ylabel: str, note: str = "") -> Path:
    """Draw a panel for each title, with a legend below if there are several labels, and write it to `path`.

    Lines with the same label look the same in all panels.

    Args:
        panels: the lines for each title.
        path: the output file; its suffix is the format: png, svg or pdf.
        ylabel: label of the y axis.
        note: how the lines were computed, in small letters.
    """
    from matplotlib.lines import Line2D

    labels = list(dict.fromkeys(line.label for lines in panels.values() for line in lines))
    looks = {label: (COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i, label in enumerate(labels)}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width = 7.0 if columns == 1 else 5.0 * columns
    keys = {label: textwrap.fill(label, WIDEST) for label in labels} if len(labels) > 1 else {}
    key_columns = max(1, int(width / (0.7 + 0.085 * max((min(len(label), WIDEST) for label in keys), default=1))))
    key_lines = -(-sum(text.count("\n") + 1 for text in keys.values()) // key_columns)
    size = width, (4.0 if columns == 1 else 3.6) * rows + 0.23 * key_lines + (0.25 if note else 0.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    with framed(len(panels), columns, size, font_size=10) as (figure, axes):
        for place, (title, lines) in zip(axes, panels.items(), strict=True):
            _draw_panel(place, title, lines, looks)
        for place in axes[::columns]:
            place.set_ylabel(ylabel)
        if keys:
            handles = [
                Line2D([], [], color=looks[label][0], dashes=looks[label][1] or (None, None), lw=2) for label in keys
            ]
            figure.legend(
                *(handles, shown(keys.values())), loc="outside lower center", ncols=key_columns, frameon=False,
                title=note or None, title_fontsize=9,
            )  # fmt: skip
        elif note:
            figure.supxlabel(note, fontsize=9)
        try:
            figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix(".").lower())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()
    return path


@contextmanager
def framed(number: int, columns: int, size: tuple[float, float], font_size: float) -> Iterator[tuple[Any, list[Any]]]:
    """Yield a figure and so many axes in the house's style; the figure is closed afterwards.

    Args:
        number: of the axes.
        columns: in which they are laid out, row by row.
        size: of the figure, in inches.
        font_size: in points.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: Any = {
        **{"font.size": font_size, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False},
        **{"axes.grid": True, "grid.alpha": 0.3, "text.parse_math": False},
    }
    with plt.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names in scripts that the font lacks
        figure, axes = plt.subplots(-(-number // columns), columns, figsize=size, layout="constrained", squeeze=False)
        try:
            for place in axes.flat[number:]:
                place.set_axis_off()
            yield figure, list(axes.flat[:number])
        finally:
            plt.close(figure)


def shown(labels: Iterable[str]) -> list[str]:
    """Return labels for a legend, which would leave out those that start with an underscore."""
    space = "\N{HAIR SPACE}"
    return [space + label.replace("\n", "\n" + space) for label in labels]


def _draw_panel(axes: Any, title: str, lines: Sequence[Line], looks: Mapping[str, Any]) -> None:
    from matplotlib.ticker import EngFormatter

    for line in lines:
        colour, dashes = looks[line.label]
        marker = "o" if len(line.steps) == 1 or (len(looks) == 1 and len(line.steps) <= MANY) else ""
        axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        (drawn,) = axes.plot(line.steps, line.middle, color=colour, lw=1.8, marker=marker, markersize=3)
        drawn.set_dashes(dashes or (None, None))
    axes.set_title(title)
    axes.set_xlabel("environment steps")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
