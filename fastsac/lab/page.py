"""The report's page: its frame and style, escaped text, tables and pictures."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PNG_START = b"\x89PNG\r\n\x1a\n"
KEPT = "\n\N{NO-BREAK SPACE}"
NO_NUMBER = "–"
WIDE = 1000  # pixels

STYLE = """
:root { color-scheme: light dark; --text: #1a1f26; --soft: #4d5866; --page: #fff; --card: #f4f6f8; --line: #d3d9e0;
  --link: #0060a0; --good: #00664a; --bad: #a84300; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --soft: #aab4c0; --page: #14181d; --card: #1e242b;
  --line: #3a434e; --link: #7cc0f5; --good: #5fd3ac; --bad: #ff9a5c; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1rem 4rem; background: var(--page); color: var(--text);
  font: 1.0625rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 1rem 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p, dl, ul { max-width: 46rem; } p { overflow-wrap: break-word; }
a { color: var(--link); } nav a { display: inline-block; padding: .3rem .9rem .3rem 0; }
.answer { font-size: 1.125rem; padding: 1rem 1.25rem; margin: 1rem 0; max-width: none; background: var(--card);
  border-left: .3rem solid var(--link); border-radius: .25rem; }
.note, figcaption, caption { color: var(--soft); font-size: 1rem; }
.arm { font-family: ui-monospace, "DejaVu Sans Mono", Consolas, monospace; font-size: 1rem; overflow-wrap: anywhere; }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; max-width: 40rem; } figure.wide { max-width: none; overflow-x: auto; grid-column: 1 / -1; }
figure img { display: block; width: 100%; height: auto; background: #fff; padding: .4rem; border-radius: .4rem;
  border: 1px solid var(--line); }
figure.wide img { min-width: 44rem; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; min-width: 100%; font-size: 1rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .7rem; }
th, td { padding: .45rem .55rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { background: var(--card); vertical-align: bottom; white-space: normal; min-width: 5.5rem; }
tbody th { font-weight: 500; background: var(--page); position: sticky; left: 0; }
th:first-child, .words th, .words td { text-align: left; } .words td { white-space: normal; min-width: 9rem;
  overflow-wrap: anywhere; }
.key { width: 2.4rem; height: .8rem; margin-right: .5rem; background: #fff; border-radius: .2rem; }
.equivalent { color: var(--good); font-weight: 600; } .different { color: var(--bad); font-weight: 600; }
pre { font: 1rem/1.45 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; white-space: pre-wrap;
  margin: .3rem 0 1rem; overflow-wrap: anywhere; background: var(--card); padding: .6rem .8rem; border-radius: .4rem; }
details { border: 1px solid var(--line); border-radius: .4rem; padding: 0 .8rem; margin: .6rem 0; }
summary { cursor: pointer; padding: .6rem 0; font-weight: 600; overflow-wrap: anywhere; }
dt { font-weight: 600; margin-top: .8rem; } dd { margin: 0; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
@media screen and (max-width: 40rem) {
  tbody th { min-width: 9rem; max-width: 11rem; white-space: normal; overflow-wrap: anywhere; } }
@media print {
  :root { color-scheme: light; --text: #000; --soft: #222; --page: #fff; --card: #fff; --line: #999; --link: #000;
    --good: #000; --bad: #000; }
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } nav { display: none; } .answer { border: 1px solid #000; }
  .answer, p.note, figcaption, caption, .arm { font-size: 10.5pt; } table, .panels + .scroll { font-size: 8.5pt; }
  pre, table .arm { font-size: 8.5pt; } h2, h3, summary { break-after: avoid; }
  .scroll, figure.wide { overflow: visible; border: 0; } figure.wide img { min-width: 0; max-height: 230mm; width: auto;
    max-width: 100%; }
  th, td { white-space: normal; padding: .2rem .35rem; }
  th .arm { overflow-wrap: break-word; } tbody th { position: static; } .key { display: none; }
  thead th, .words td { min-width: 0; } .scroll, .run { break-inside: avoid; }
  .panels { grid-template-columns: 1fr 1fr; } figure, tr, pre, .answer { break-inside: avoid; }
  thead { display: table-header-group; } details { border: 0; padding: 0; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
}
"""


class Markup(str):
    """HTML that is used as it is; any other text is escaped."""


def markup(value: object) -> Markup:
    """Return text as HTML that shows it, and HTML as it is."""
    if isinstance(value, Markup):
        return value
    shown = "".join(
        letter if letter.isprintable() or letter in KEPT else "\N{REPLACEMENT CHARACTER}" for letter in str(value)
    )
    return Markup(html.escape(shown))


def join(parts: Iterable[object], between: str = "\n") -> Markup:
    """Return the parts, escaped where they are text."""
    return Markup(between.join(map(markup, parts)))


def element(tag: str, content: object, **attributes: object) -> Markup:
    """Return ``<tag attributes>content</tag>``; `class_` stands for `class`."""
    named = "".join(f' {name.strip("_").replace("_", "-")}="{markup(value)}"' for name, value in attributes.items())
    return Markup(f"<{tag}{named}>{markup(content)}</{tag}>")


def number(value: object) -> str:
    """Return a readable number, with thousands separators; small ones have three significant digits."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return NO_NUMBER
    if isinstance(value, int) or abs(value) >= 1e15:
        text = f"{value:,}" if isinstance(value, int) else f"{value:.2e}"
    elif abs(value) >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def ends(values: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return the middle and both ends of an interval, with None for what is missing."""
    middle = next((values[key] for key in ("iqm", "difference", "median", "mean") if key in values), None)
    return middle, values.get("low"), values.get("high")


def interval(values: object) -> str:
    """Return ``middle [low, high]`` of a mapping with such keys, without the interval where there is none."""
    if not isinstance(values, Mapping):
        return number(values)
    parts = ends(values)
    middle, low, high = map(number, parts)
    if NO_NUMBER in (low, high):
        return middle
    if middle != NO_NUMBER and 0.0 < (largest := max(map(abs, parts))) < 100.0:  # to the same decimal place
        places = min(8, 2 - math.floor(math.log10(largest)))
        middle, low, high = (f"{part:.{places}f}".replace("-", "\N{MINUS SIGN}") for part in parts)
    return f"{middle} [{low},\N{NO-BREAK SPACE}{high}]"


def table(headers: Sequence[object], rows: Iterable[Sequence[object]], label: str, class_: str = "") -> Markup:
    """Return a table in a box that scrolls if the page is narrow; the first column names the rows."""
    head = element("tr", join((element("th", header, scope="col") for header in headers), ""))
    body = []
    for first, *rest in rows:
        cells = [element("th", first, scope="row"), *(element("td", cell) for cell in rest)]
        body.append(element("tr", join(cells, "")))
    parts = [element("caption", label), element("thead", head), element("tbody", join(body))]
    whole = element("table", join(parts), class_=class_)
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=label)


def figure(png: bytes, alt: str, caption: object = "") -> Markup:
    """Return a figure with the picture; a wide one scrolls if the page is narrow."""
    wide = int.from_bytes(png[16:20], "big") > WIDE
    image = Markup(f'<img alt="{markup(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')
    parts = [image, element("figcaption", caption)] if caption else [image]
    return element("figure", join(parts), class_="wide" if wide else "plain")


def page(title: str, body: Iterable[Markup]) -> str:
    """Return the whole document."""
    head = [
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        Markup(f"<style>{STYLE}</style>"),
    ]
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{join(head)}\n</head>\n<body>\n{join(body)}\n</body>\n</html>\n'


def part(value: object, *keys: str) -> Any:
    """Return the value under nested keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def arm_text(label: object) -> Markup:
    """Return an arm's label as it is typed."""
    return element("span", label, class_="arm")


def plural(count: int, word: str) -> str:
    """Return ``1 run`` or ``3 runs``."""
    return f"{number(count)} {word}{'s' * (count != 1)}"


def duration(seconds: object) -> str:
    """Return a time in a suitable unit."""
    if not isinstance(seconds, int | float) or number(seconds) == NO_NUMBER:
        return NO_NUMBER
    units = (("s", 1, 120), ("min", 60, 7200), ("h", 3600, math.inf))
    unit, size = next((unit, size) for unit, size, most in units if seconds <= most)
    return f"{seconds / size:.3g} {unit}"


def in_words(value: object) -> str:
    """Return a setting's value as it would be typed."""
    if isinstance(value, list):
        return ", ".join(map(in_words, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}={in_words(inner)}" for name, inner in value.items()) or "none"
    return "none" if value is None else str(value)


def folded(heading: str, content: Markup) -> Markup:
    """Return content that a click opens, and that is open in print."""
    return element("details", join([element("summary", heading), content]))
