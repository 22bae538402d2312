"""One page about a comparison: its results, how certain they are, and how it was run.

It is made from the JSON files of `fastsac compare`, `cost`, `gradients` and `toy`, and needs nothing else: no network,
no scripts, no other files.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastsac.errors import FastsacError
from fastsac.lab.how import WORDS, how_section
from fastsac.lab.outcome import untested
from fastsac.lab.page import (
    Markup,
    arm_text,
    element,
    interval,
    join,
    markup,
    number,
    page,
    part,
    plural,
)
from fastsac.lab.results import read_results
from fastsac.lab.sections import (
    cost_section,
    curves_section,
    final_section,
    lab_section,
    labels,
)
from fastsac.run_dir import temporary_sibling

Json = dict[str, Any]
MINUS = "\N{MINUS SIGN}"


def write_report(directory: Path) -> Path:
    """Write report.html, and its pictures beside it, from the results in `directory`.

    Returns:
        The page's path.

    Raises:
        UsageError: if there are no results, or a file is not what it should be.
        FastsacError: if the page cannot be written.
    """
    results = read_results(directory)
    pictures: dict[str, bytes] = {}
    sections: list[tuple[str, str, Markup]] = []
    if comparison := results.get("comparison"):
        sections += [
            ("curves", "Learning curves", curves_section(comparison, pictures)),
            ("final", "Final return", final_section(comparison, pictures)),
        ]
    if cost := results.get("cost"):
        sections.append(("cost", "Cost of an update", cost_section(cost, pictures)))
    for name, heading in (("gradients", "Gradient diagnostics"), ("toy", "Toy problem with known answers")):
        if name in results:
            sections.append((name, heading, lab_section(name, results[name], directory, heading)))
    sections.append(("how", "How it was run", how_section(results)))
    if comparison:
        words = (join([element("dt", word), element("dd", text)]) for word, text in WORDS.items())
        sections.append(("words", "Glossary", element("dl", join(words))))
    links = (element("a", heading, href=f"#{name}") for name, heading, _ in sections)
    body = [element("h1", title(results)), answer(comparison), element("nav", join(links), aria_label="Contents")]
    for name, heading, content in sections:
        body.append(element("section", join([element("h2", heading, id=name), content])))
    for name, png in pictures.items():
        write(directory / name, png)
    write(directory / "report.html", page(title(results), body).encode())
    return directory / "report.html"


def write(path: Path, content: bytes) -> None:
    """Write the whole file or none of it."""
    temporary = temporary_sibling(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise FastsacError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def listed(words: Iterable[object]) -> Markup:
    """Return ``a, b and c``."""
    *rest, last = [markup(word) for word in words]
    return join([join(rest, ", "), last], " and ") if rest else last


def title(results: Mapping[str, Json]) -> str:
    """Return what is compared, or which results there are."""
    if "comparison" not in results:
        names = {"cost": "the cost of an update", "gradients": "gradient diagnostics", "toy": "a toy problem"}
        return f"fastsac: {listed(names[name] for name in results)}"
    settings = results["comparison"]["settings"]
    arms, env_ids = settings["arms"], settings["env_ids"]
    what = " and ".join(filter(None, [", ".join(arms[:-1]), arms[-1]])) if len(arms) <= 4 else f"{len(arms)} estimators"
    where = " and ".join(filter(None, [", ".join(env_ids[:-1]), env_ids[-1]]))
    return f"{what} on {where if len(env_ids) <= 3 else f'{len(env_ids)} environments'}"


def seeds_in_words(comparison: Json) -> str:
    """Return how many random seeds there are, and how many of them the arms have if some runs are missing."""
    asked = len(comparison["settings"]["seeds"])
    places = itertools.product(comparison["settings"]["env_ids"], labels(comparison))
    numbers = [part(comparison["summary"], env_id, label, "seeds") or 0 for env_id, label in places]
    least, most = min(numbers), max(numbers)
    if least == asked:
        return plural(asked, "random seed")
    return f"{least if least == most else f'{least} to {most}'} of {plural(asked, 'random seed')}"


def answer(comparison: Json | None) -> Markup:
    """Return the results of the comparison in one paragraph."""
    if comparison is None:
        return Markup("")
    failed = len(comparison.get("failed", []))
    lost = (
        [element("strong", f"{failed} of {plural(failed + len(comparison['runs']), 'run')} failed.")] if failed else []
    )
    if not comparison["runs"]:
        return element("p", join(["No run is complete.", *lost], " "), class_="answer")
    settings, summary = comparison["settings"], comparison["summary"]
    (first, *others), env_ids = settings["arms"], settings["env_ids"]
    found: dict[str, dict[str, list[Markup]]] = {}  # places by verdict and label
    margins: dict[str, str] = {}
    several = len(env_ids) > 1  # with one, its name is in the title
    for arm, env_id in itertools.product(others, env_ids):
        label = part(comparison, "best", env_id, arm) or arm
        equivalence = part(summary, env_id, label, "equivalence")
        verdict, place = part(equivalence, "verdict") or "not tested", markup(env_id if several else "")
        if verdict == "different":
            side = "lower" if number(equivalence["difference"]).startswith(MINUS) else "higher"
            place = join([env_id if several else "", f" ({side}: {interval(equivalence)})"], "")
        if part(equivalence, "margin") is not None:
            margins[env_id] = f"±{number(equivalence['margin'])} of the normalised return"
        found.setdefault(verdict, {}).setdefault(label, []).append(place)

    def at(places: list[Markup]) -> Markup:
        everywhere = 2 < len(env_ids) == len(places) and all(map(operator.eq, places, map(markup, env_ids)))
        return markup(f"all {len(env_ids)} environments") if everywhere else listed(places)

    def those(verdict: str) -> Markup:
        arms = [
            join([arm_text(arm), " on " if several else "", at(places)], "")
            for arm, places in found.get(verdict, {}).items()
        ]
        return join([join(arms, "; ") or "none was shown to be", "."], "")

    told: list[object] = [
        f"Each arm was trained on {plural(len(env_ids), 'environment')} with {seeds_in_words(comparison)} for "
        f"{number(settings['total_steps'])} steps."
    ]
    if others:
        same = len(set(margins.values())) == 1
        shown = list(margins.values())[:1] if same else [f"{margin} on {env_id}" for env_id, margin in margins.items()]
        within = join([" (", listed(shown), ")"], "") if margins else ""
        told += [element("strong", "Equivalent"), "to", arm_text(first)]
        told += [join(["in final return within the margin", within, ":"], ""), those("equivalent")]
        told += [element("strong", "Different:"), those("different")]
        for verdict, words in (("inconclusive", "Inconclusive:"), ("not tested", "Not tested:")):
            if verdict in found:
                told += [element("strong", words), those(verdict)]
        told += [f"Reason for not testing: {reason}." for reason in untested(summary)]
        told.append(
            "No significant difference does not mean equal: only an interval inside the margin shows equivalence."
        )
    else:
        told.append("There is only one arm, and nothing to compare it with.")
    if len(labels(comparison)) > len(settings["arms"]):
        told.append(
            "Only each arm's best settings are tested, and they were chosen on the same seeds, which flatters them."
        )
    return element("p", join([*told, *lost], " "), class_="answer")
