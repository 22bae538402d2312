"""The report's pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastsac.lab.page import NO_NUMBER, Markup, element, ends, join, number
from fastsac.plot import COLOURS, DASHES, framed, shown

MARKERS = "os^DvPX"
LONGEST_LABEL = 28


class Look(NamedTuple):
    """How one arm is drawn, the same in every picture."""

    label: str
    colour: str
    dashes: tuple[float, ...]
    marker: str

    @classmethod
    def of(cls, label: str) -> Look:
        """Return a look for a name that is not drawn."""
        return cls(label, "", (), "")

    @property
    def short(self) -> str:
        """The label for a picture: a line for the arm and one for each varied setting; long lines lose their middle."""
        text = "".join(character if character.isprintable() else "?" for character in self.label)
        return "\n".join(
            word if len(word) <= LONGEST_LABEL else f"{word[: LONGEST_LABEL - 13]}…{word[-12:]}"
            for word in text.split(" ")
        )

    @property
    def lines(self) -> int:
        """How many lines `short` has."""
        return self.short.count("\n") + 1

    @property
    def key(self) -> Markup:
        """The label with the line that stands for it."""
        dashes = ",".join(str(3 * length) for length in self.dashes) or "none"
        line = f'<path d="M2 8H46" stroke="{self.colour}" stroke-width="4" stroke-dasharray="{dashes}"/>'
        drawn = Markup(f'<svg class="key" viewBox="0 0 48 16" aria-hidden="true">{line}</svg>')
        return element("span", join([drawn, self.label], ""), class_="arm")


def looks(arms: Iterable[str]) -> list[Look]:
    """Return a look for each arm; neighbours differ in colour, line and marker."""
    return [
        Look(arm, *(choices[index % len(choices)] for choices in (COLOURS, DASHES, MARKERS)))  # type: ignore[arg-type]
        for index, arm in enumerate(arms)
    ]


def dots_height(key: Sequence[Look]) -> float:
    """Return the height of `draw_dots` in inches."""
    return 1.0 + (0.24 + 0.18 * max((look.lines for look in key), default=1)) * len(key)


def draw(
    parts: Sequence[Callable[[Any], None]], size: tuple[float, float], key: Sequence[Look] = (), columns: int = 1
) -> bytes:
    """Return a PNG with one pair of axes of `size` inches per drawing function, and the arms' key below them."""
    from matplotlib.lines import Line2D

    rows, lines = -(-len(parts) // columns), -(-len(key) // (2 * columns))
    lines *= max((look.lines for look in key), default=1)
    figsize = size[0] * columns, size[1] * rows + 0.25 * lines
    with framed(len(parts), columns, figsize, font_size=11) as (chart, axes):
        for place, function in zip(axes, parts, strict=True):
            function(place)
        if key:
            handles = [Line2D([], [], color=look.colour, dashes=look.dashes or (None, None), lw=2) for look in key]
            labels = shown(look.short for look in key)
            chart.legend(handles, labels, loc="outside lower center", ncols=2 * columns, frameon=False)
        file = io.BytesIO()
        chart.savefig(file, dpi=170, format="png")
    return file.getvalue()


def finite(values: object) -> np.ndarray[Any, Any]:
    """Return an array of floats; what is not a number (null, infinity) is NaN."""
    array = np.array(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def draw_curves(
    axes: Any, env_id: str, curves: Mapping[str, Mapping[str, Any]], key: Sequence[Look], random: object
) -> None:
    """Draw the interquartile mean of each arm over the steps, with its band."""
    from matplotlib.ticker import EngFormatter

    for look in key:
        if look.label not in curves:
            continue
        curve = {name: finite(curves[look.label][name]) for name in ("steps", "iqm", "low", "high")}
        axes.fill_between(curve["steps"], curve["low"], curve["high"], color=look.colour, alpha=0.18, linewidth=0)
        (line,) = axes.plot(curve["steps"], curve["iqm"], color=look.colour, lw=2)
        line.set_dashes(look.dashes or (None, None))
    if number(random) != NO_NUMBER:
        axes.axhline(random, color="#666666", lw=1)
        axes.annotate("random policy", (1, random), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      fontsize=9, color="#444444", xytext=(0, 1), textcoords="offset points")  # fmt: skip
    axes.set_title(Look.of(env_id).short)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("evaluation return")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_dots(axes: Any, title: str, xlabel: str, rows: Sequence[tuple[Look, Mapping[str, Any]]], band: float = 0.0,
              zero: float | None = None) -> None:  # fmt: skip
    """Draw a row per arm: a dot with its interval, each run's value faintly, and a band around the line at `zero`."""
    if zero is not None:
        axes.axvline(zero, color="#444444", lw=1)
        axes.axvspan(zero - band, zero + band, color="#000000", alpha=0.1, linewidth=0)
    for place, (look, values) in enumerate(rows):
        single = finite(values.get("values", []))
        axes.plot(single, np.full(len(single), place), "|", color=look.colour, alpha=0.6, markersize=9)
        middle, low, high = finite(ends(values))
        axes.plot([low, high], [place, place], color=look.colour, lw=3, solid_capstyle="butt")
        axes.plot([middle], [place], look.marker, color=look.colour, markersize=8)
        if np.isnan(middle):
            axes.text(0.02, place, "no number", transform=axes.get_yaxis_transform(), va="center", color="#444444")
    axes.set_yticks(range(len(rows)), [look.short for look, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(title)
    axes.set_xlabel(xlabel)
