"""One page of a comparison: what came out, how sure it is, and how it was run.

It is made from the JSON files of `fastsac compare`, `cost`, `gradients` and `toy`, and needs nothing else: no network,
no scripts, no other files.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastsac.errors import FastsacError, UsageError
from fastsac.lab.page import (
    PNG_START,
    Look,
    Markup,
    draw,
    draw_curves,
    draw_dots,
    element,
    figure,
    interval,
    join,
    looks,
    markup,
    number,
    page,
    table,
)
from fastsac.run_dir import temporary_sibling

Json = dict[str, Any]
MINUS, NONE = "\N{MINUS SIGN}", "–"
SIGNS = {"equivalent": "=", "different": "≠", "not shown": "?"}
PANEL = (5.2, 3.4)  # inches
LONG = 30  # rows
NUMBER = (int, float, type(None))
EACH = "*"
MIDDLE = {"iqm": NUMBER, "low": NUMBER, "high": NUMBER}
LINE = {name: [NUMBER] for name in ("steps", "iqm", "low", "high")}
FINAL_NOTE = (
    "First the IQM of the final returns (dot), its 95 % interval (bar) and each run (ticks). Then the difference of "
    "the means to {first} with its 90 % interval; the grey band is the equivalence margin, and a bar wholly inside it "
    "shows equivalence."
)
RATIOS = {
    "update_ratio": "a whole update, engine {engine}",
    "reference_update_ratio": "a whole update, engine reference",
    "actor_step_ratio": "the actor's step",
}
PICTURES = {
    "gradients": {"gradients.png": "Variance of each estimator's gradient at checkpoints of a trained run."},
    "toy": {
        "toy.png": "Toy problem with a known answer: each estimator's variance as measured beside its formula.",
        "toy_ripple.png": "Toy problem with a rippled reward: how each estimator fares as the ripple grows.",
    },
}
#: what a file must have to be shown; whatever else it has is shown where it is there
SHAPES: dict[str, Json] = {
    "comparison": {
        "format": int,
        "command": str,
        "settings": {"env_ids": [str], "arms": [str], "seeds": [int], "total_steps": NUMBER},
        "runs": [{"env_id": str, "arm": str, "seed": int, "command": str}],
        "summary": {EACH: {EACH: {"seeds": int, "final": MIDDLE, "auc": MIDDLE, "curve": LINE}}},
    },
    "cost": {"command": str, "rows": [{"arm": str, "engine": str}]},
    "gradients": {},
    "toy": {},
}
WORDS = {
    "IQM": "The interquartile mean: the mean of the middle half of the runs. A lucky or a broken run hardly moves it.",
    "Interval, band": "95 % stratified bootstrap: the runs are drawn again with replacement many times, and 95 % "
    "of the results lie inside. With few seeds such intervals are too narrow rather than too wide.",
    "Equivalence margin": "The largest difference that does not matter, fixed before the runs.",
    "Verdicts": "Equivalent: two one-sided Welch tests at 5 % each show that the means differ by less than the margin; "
    "that is, the 90 % interval lies within it. Different: they do not, and a two-sided test finds a difference. Not "
    "shown: neither, so these runs leave it open. No significant difference is not equality.",
    "Normalised return": "0 is the mean return of random actions, 1 the first arm's mean final return, in each "
    "environment.",
    "Area under the curve": "The mean return over the whole run: it is higher where learning is faster.",
    "Arm": "An estimator of the actor's gradient, its baseline and its number of action samples, written "
    "estimator:baseline:samples; what is left out has its default.",
}


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
            sections.append((name, heading, rows_section(results[name], found_pictures(directory, name), heading)))
    sections.append(("how", "How it was run", how_section(results)))
    words = (join([element("dt", word), element("dd", text)]) for word, text in WORDS.items())
    sections.append(("words", "What the words mean", element("dl", join(words))))
    links = (element("a", heading, href=f"#{name}") for name, heading, _ in sections)
    body = [element("h1", title(results)), answer(comparison), element("nav", join(links), aria_label="Contents")]
    for name, heading, content in sections:
        body.append(element("section", join([element("h2", heading, id=name), content])))
    for name, png in pictures.items():
        write(directory / name, png)
    write(directory / "report.html", page(title(results), body).encode())
    return directory / "report.html"


def read_results(directory: Path) -> dict[str, Json]:
    """Return what there is by name: comparison, cost, gradients, toy.

    Raises:
        UsageError: if there is nothing, or a file is not what it should be.
    """
    results: dict[str, Json] = {}
    for name, shape in SHAPES.items():
        path = directory / f"{name}.json"
        try:
            result = json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is damaged, it is no JSON: {error}") from error
        if not isinstance(result, dict):
            raise UsageError(f"{path} is damaged: it holds no object")
        if result.get("format", 1) != 1:
            raise UsageError(f"{path} has format {result['format']!r}, and this version of fastsac reads format 1")
        try:
            check(result, shape, name)
        except ValueError as error:
            raise UsageError(f"{path} is damaged: {error}") from error
        results[name] = result
    if not results:
        files = ", ".join(f"{name}.json" for name in SHAPES)
        raise UsageError(f"{directory} has none of {files}: make one with `fastsac compare` first")
    return results


def check(value: object, shape: object, where: str) -> None:
    """Raise ValueError, which names the place, if `value` is not of the shape."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no object")
        for key, inner in shape.items():
            if key != EACH and key not in value:
                raise ValueError(f"{where} has no {key!r}")
            for name in value if key == EACH else [key]:
                check(value[name], inner, f"{where}[{name!r}]")
        if shape is LINE and len({len(value[name]) for name in LINE}) > 1:
            raise ValueError(f"{where} has lists that differ in length")
    elif isinstance(shape, list):
        if not isinstance(value, list) or (not value and shape == [str]):
            raise ValueError(f"{where} is no list, or an empty one")
        for index, part in enumerate(value):
            check(part, shape[0], f"{where}[{index}]")
    elif not isinstance(value, shape):  # type: ignore[arg-type]
        raise ValueError(f"{where} is {value!r:.60}, not a {'number' if shape is NUMBER else shape.__name__}")  # type: ignore[attr-defined]


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


def part(value: object, *keys: str) -> Any:
    """Return what lies under the keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def listed(words: Iterable[object]) -> Markup:
    """Return ``a, b and c``."""
    *rest, last = [markup(word) for word in words]
    return join([join(rest, ", "), last], " and ") if rest else last


def arm_text(label: object) -> Markup:
    """Return an arm's label as it is typed."""
    return element("span", label, class_="arm")


def plural(count: int, word: str) -> str:
    """Return ``1 run`` or ``3 runs``."""
    return f"{number(count)} {word}{'s' * (count != 1)}"


def spoken(arms: Json, name: str) -> str:
    """Return each arm's interval in words, for those who do not see the picture."""
    return ", ".join(f"{arm} {interval(values[name])}" for arm, values in arms.items()) or "no results"


def duration(seconds: object) -> str:
    """Return a time in a unit that suits it."""
    if not isinstance(seconds, int | float) or number(seconds) == NONE:
        return NONE
    units = (("s", 1, 120), ("min", 60, 7200), ("h", 3600, math.inf))
    unit, size = next((unit, size) for unit, size, most in units if seconds <= most)
    return f"{seconds / size:.3g} {unit}"


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


def labels(comparison: Json) -> list[str]:
    """Return the arms, and where a setting is varied, each of an arm's labels in its place; the first arm's first."""
    arms = comparison["settings"]["arms"]
    seen = dict.fromkeys(label for found in comparison["summary"].values() for label in found)
    without = [arm for arm in arms if not any(arm in (label, label.partition(" ")[0]) for label in seen)]
    order = {arm: place for place, arm in enumerate(arms)}
    return sorted([*seen, *without], key=lambda label: order.get(label, order.get(label.partition(" ")[0], len(arms))))


def answer(comparison: Json | None) -> Markup:
    """Return what the comparison says, in one paragraph."""
    if comparison is None:
        return element("p", "There is no comparison of trained agents here (no comparison.json).", class_="answer")
    settings, summary = comparison["settings"], comparison["summary"]
    (first, *others), env_ids, seeds = settings["arms"], settings["env_ids"], len(settings["seeds"])
    found: dict[str, dict[str, list[Markup]]] = {}  # places by verdict and label
    margins: dict[str, str] = {}
    for arm, env_id in itertools.product(others, env_ids):
        label = part(comparison, "best", env_id, arm) or arm
        equivalence = part(summary, env_id, label, "equivalence")
        verdict, place = part(equivalence, "verdict") or "not tested", markup(env_id)
        if verdict == "different":
            side = "lower" if number(equivalence["difference"]).startswith(MINUS) else "higher"
            place = join([env_id, f" ({side}: {interval(equivalence)})"], "")
        if part(equivalence, "margin") is not None:
            margins[env_id] = f"±{number(equivalence['margin'])}{share(settings, equivalence)}"
        found.setdefault(verdict, {}).setdefault(label, []).append(place)

    def at(places: list[Markup]) -> Markup:
        everywhere = 2 < len(env_ids) == len(places) and all(map(operator.eq, places, map(markup, env_ids)))
        return markup(f"all {len(env_ids)} environments") if everywhere else listed(places)

    def those(verdict: str) -> Markup:
        arms = [join([arm_text(arm), " on ", at(places)], "") for arm, places in found.get(verdict, {}).items()]
        return join([join(arms, "; ") or "none was shown to be", "."], "")

    told: list[object] = [
        f"Each arm was trained on {plural(len(env_ids), 'environment')} with {plural(seeds, 'random seed')} for "
        f"{number(settings['total_steps'])} steps."
    ]
    if others:
        same = len(set(margins.values())) == 1
        shown = list(margins.values())[:1] if same else [f"{margin} on {env_id}" for env_id, margin in margins.items()]
        within = join([" (", listed(shown), ")"], "") if margins else ""
        told += [element("strong", "Equivalent"), "to", arm_text(first)]
        told += [join(["in final return within the margin", within, ":"], ""), those("equivalent")]
        told += [element("strong", "Different:"), those("different")]
        for verdict, words in (("not shown", "Not shown either way:"), ("not tested", "Not tested, for want of runs:")):
            if verdict in found:
                told += [element("strong", words), those(verdict)]
        told.append("No significant difference is not equality: only an interval inside the margin shows equivalence.")
    else:
        told.append("There is one arm only, and nothing to compare it with.")
    if len(labels(comparison)) > len(settings["arms"]):
        told.append(
            "Only an arm's best settings are tested, and they were chosen on the same seeds, which flatters them."
        )
    failed = sum(part(values, "failed") or 0 for arms in summary.values() for values in arms.values())
    if failed:
        told.append(element("strong", f"{failed} of {plural(len(comparison['runs']), 'run')} failed."))
    return element("p", join(told, " "), class_="answer")


def share(settings: Json, equivalence: Json | None) -> str:
    """Return what a difference is a share of: of the normalised return where the margin is as it was given."""
    return " of the normalised return" if part(equivalence, "margin") == settings.get("margin", "none") else ""


def curves_section(comparison: Json, pictures: dict[str, bytes]) -> Markup:
    """Return one panel per environment, and put all of them in curves.png."""
    settings, summary = comparison["settings"], comparison["summary"]
    key, figures, functions = looks(labels(comparison)), [], []
    for env_id in settings["env_ids"]:
        arms, random = summary.get(env_id, {}), part(comparison, "random_return", env_id)
        curves = {arm: values["curve"] for arm, values in arms.items()}
        functions.append(partial(draw_curves, env_id=env_id, curves=curves, key=key, random=random))
        alt = (
            f"Learning curves on {env_id}: evaluation return over {number(settings['total_steps'])} environment steps, "
            f"a line per arm with its band. At the end: {spoken(arms, 'final')}."
        )
        figures.append(figure(draw(functions[-1:], PANEL, key), alt))
    pictures["curves.png"] = draw(functions, PANEL, key, columns=min(len(functions), 3))
    note = (
        "Line: interquartile mean (IQM) over the random seeds. Band: its 95 % stratified bootstrap interval; a single "
        "seed has none. The panels are also in curves.png, beside this page."
    )
    return join([element("p", note, class_="note"), element("div", join(figures), class_="panels")])


def final_section(comparison: Json, pictures: dict[str, bytes]) -> Markup:
    """Return dots and a table per environment, and put all the dots in final.png."""
    settings, summary = comparison["settings"], comparison["summary"]
    key, functions = looks(labels(comparison)), list[Any]()
    size = PANEL[0], 1.0 + 0.42 * len(key)
    parts = [element("p", FINAL_NOTE.format(first=settings["arms"][0]), class_="note")]
    for env_id in settings["env_ids"]:
        arms = summary.get(env_id, {})
        present = [look for look in key if look.label in arms]
        tests = {look: arms[look.label]["equivalence"] for look in present if part(arms, look.label, "equivalence")}
        rows = [(look, arms[look.label]["final"]) for look in present]
        functions.append(partial(draw_dots, title=Look.of(env_id).short, xlabel="final return", rows=rows))
        panels = [figure(draw(functions[-1:], size), f"Final return on {env_id}: {spoken(arms, 'final')}.")]
        if tests:
            margin = max((m for test in tests.values() if number(m := part(test, "margin")) != NONE), default=0.0)
            label = f"difference to {key[0].short}" + ", normalised" * bool(share(settings, next(iter(tests.values()))))
            of: Json = {"title": Look.of(env_id).short, "xlabel": label, "rows": list(tests.items())}
            functions.append(partial(draw_dots, **of, zero=0.0, band=margin))
            said = "; ".join(f"{look.label} {interval(test)}, {part(test, 'verdict')}" for look, test in tests.items())
            alt = f"Difference in final return to {key[0].label} on {env_id}, margin ±{number(margin)}: {said}."
            panels.append(figure(draw(functions[-1:], size), alt))
        parts += [
            element("h3", env_id),
            element("div", join(panels), class_="panels"),
            final_table(env_id, key, arms, label if tests else "difference"),
        ]
    pictures["final.png"] = draw(functions, size, columns=1 if len(key) == 1 else 2)
    if overall := comparison.get("overall"):
        cells = [[look.key, *(interval(part(overall, look.label, name)) for name in ("final", "auc"))] for look in key]
        headers = ["arm", "final return", "area under the curve"]
        parts += [element("h3", "Over all environments"), table(headers, cells, "Normalised returns, all environments")]
    return join(parts)


def final_table(env_id: str, key: list[Look], arms: Json, difference: str) -> Markup:
    """Return one row per arm."""
    against = (part(values, "equivalence", "against") for values in arms.values())
    first, rows = next(filter(None, against), key[0].label), []
    for look in key:
        values = arms.get(look.label)
        if values is None:
            rows.append([look.key, *[NONE] * 7])
            continue
        test = values.get("equivalence")
        verdict = "the first arm" if look.label == first else part(test, "verdict") or "not tested"
        sign = SIGNS[verdict] + "\N{NO-BREAK SPACE}" if verdict in SIGNS else ""
        shown = element("span", sign + verdict, class_=verdict.replace(" ", "-"))
        returns = [interval(values[name]) for name in ("final", "auc")]
        diverged = f" ({number(values['diverged'])} diverged)" if values.get("diverged") else ""
        last = [duration(values.get("time_s")), number(values.get("failed", 0)) + diverged]
        rows.append([look.key, number(values["seeds"]), *returns, interval(test) if test else NONE, shown, *last])
    headers = ["arm", "seeds", "final return: IQM", "area under the curve", f"{difference} [90 % interval]"]
    return table([*headers, "verdict", "median time", "failed runs"], rows, f"{env_id}: IQM [95 % interval]")


def cost_section(cost: Json, pictures: dict[str, bytes]) -> Markup:
    """Return the times relative to the first arm as dots, and all figures as a table."""
    key = {look.label: look for look in looks(dict.fromkeys(row["arm"] for row in cost["rows"]))}
    functions, figures = list[Any](), []
    size = PANEL[0], 1.0 + 0.42 * len(key)
    engines = dict.fromkeys(row["engine"] for row in cost["rows"])
    # one row an arm: each with the fastest engine that serves it, beside one another
    groups = {"the fastest": [*engines]} if len(key) == len(cost["rows"]) else {engine: [engine] for engine in engines}
    for (group, members), (name, words) in itertools.product(groups.items(), RATIOS.items()):
        rows = [(key[row["arm"]], row[name]) for row in cost["rows"] if row["engine"] in members and part(row, name)]
        if rows:
            what = words.format(engine=next(iter(members)) if len(members) == 1 else group)
            label = f"time relative to {next(iter(key.values())).short}"
            functions.append(partial(draw_dots, title=what, xlabel=label, rows=rows, zero=1.0))
            said = ", ".join(f"{look.label} {interval(values)}" for look, values in rows)
            figures.append(figure(draw(functions[-1:], size), f"Time of {what}, relative to the first arm: {said}."))
    if functions:
        pictures["cost.png"] = draw(functions, size, columns=min(len(functions), 2))
    note = "Time relative to the first arm, which is 1; the bar spans the quartiles. Less is faster."
    panels = element("div", join(figures), class_="panels")
    return join([element("p", note, class_="note"), panels, rows_section(cost, [], "Cost: median [quartiles]")])


def rows_section(result: Json, figures: list[Markup], label: str) -> Markup:
    """Return the pictures, and each list of objects in a result as a table with the columns that are there."""
    parts = [element("div", join(figures), class_="panels")] if figures else []
    for name, rows in result.items():
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            flat = [flattened(row) for row in rows]
            columns = list(dict.fromkeys(key for row in flat for key in row))
            cells = ([row.get(column, NONE) for column in columns] for row in flat)
            heading = label if name == "rows" else f"{label}: {name.replace('_', ' ')}"
            shown = table([column.replace("_", " ") for column in columns], cells, heading)
            parts.append(folded(f"{heading}, all {len(rows)} rows", shown) if len(rows) > LONG else shown)
    return join(parts)


def flattened(row: Json, before: str = "") -> dict[str, object]:
    """Return an object's figures by name; an interval is one of them, other objects are taken apart."""
    flat: dict[str, object] = {}
    for name, value in row.items():
        if isinstance(value, dict) and not {"low", "high"} <= value.keys():
            flat |= flattened(value, f"{before}{name} ")
        elif isinstance(value, list):  # a long one is for the pictures
            flat |= {before + name: ", ".join(map(number, value))} if len(value) <= 4 else {}
        elif isinstance(value, bool):
            flat[before + name] = "yes" if value else "no"
        else:
            flat[before + name] = value if isinstance(value, str) else interval(value)
    return flat


def found_pictures(directory: Path, name: str) -> list[Markup]:
    """Return the pictures that belong to a result.

    Raises:
        UsageError: if one is no PNG.
    """
    figures = []
    for file, alt in PICTURES[name].items():
        try:
            content = (directory / file).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageError(f"cannot read {directory / file}: {error.strerror}") from error
        if not content.startswith(PNG_START) or len(content) < 33:
            raise UsageError(f"{directory / file} is damaged, it is no PNG picture")
        figures.append(figure(content, alt, alt))
    return figures


def how_section(results: Mapping[str, Json]) -> Markup:
    """Return the commands, settings, machines and runs."""
    commands = [result["command"] for result in results.values() if isinstance(result.get("command"), str)]
    parts = [element("pre", "\n".join(commands))] if commands else []
    parts += [machines_table(results)]
    if comparison := results.get("comparison"):
        runs, settings = comparison["runs"], comparison["settings"]
        shown = [[name, in_words(value)] for name, value in settings.items()]
        parts.insert(1, table(["setting", "value"], shown, "Settings of the comparison", "words"))
        configs = [config for run in runs if isinstance(config := run.get("config"), dict)]
        if configs:
            same = [[n, in_words(v)] for n, v in configs[0].items() if all(c.get(n, ...) == v for c in configs)]
            parts.append(folded("What all runs have in common", table(["option", "value"], same, "Options", "words")))
        for env_id in settings["env_ids"]:
            chosen = [run_text(run) for run in runs if run["env_id"] == env_id]
            parts.append(folded(f"{env_id}: {plural(len(chosen), 'run')}, each with its command", join(chosen)))
    return join(parts)


def run_text(run: Json) -> Markup:
    """Return one run's outcome and command."""
    last = run["eval_return"][-1] if isinstance(run.get("eval_return"), list) and run["eval_return"] else None
    engine = " ".join(str(run[name]) for name in ("engine", "precision") if name in run)
    told = [f", seed {run['seed']}: last evaluation {number(last)}, {number(run.get('updates'))} updates, "
            f"{duration(run.get('time_s'))}", f", engine {engine}" * bool(engine)]  # fmt: skip
    if run.get("error"):
        told.append(f", failed: {run['error']}")
    parts = [element("p", join([arm_text(run["arm"]), *told], "")), element("pre", run["command"])]
    return element("div", join(parts), class_="run")


def folded(heading: str, content: Markup) -> Markup:
    """Return what a click opens, and print shows."""
    return element("details", join([element("summary", heading), content]))


def in_words(value: object) -> str:
    """Return a setting's value as it would be typed."""
    if isinstance(value, list):
        return ", ".join(map(in_words, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}={in_words(inner)}" for name, inner in value.items()) or "none"
    return "none" if value is None else str(value)


def machines_table(results: Mapping[str, Json]) -> Markup:
    """Return what was run on what: a column for each machine, set of versions and commit."""
    columns: dict[tuple[tuple[str, str], ...], dict[str, list[Any]]] = {}
    for name, result in results.items():
        for entry in [*result.get("runs", []), result] if name == "comparison" else [result]:
            machine = entry if "cpu" in entry else part(entry, "machine")
            if isinstance(machine, dict):
                seen = columns.setdefault(tuple(machine_facts(machine).items()), {"what": [], "date": [], "load": []})
                seen["what"].append("runs" if "run_dir" in entry else name)
                seen["date"].append(str(machine.get("date")))
                load = machine.get("load_average")
                seen["load"] += load[:1] if isinstance(load, list) else []
    if not columns:
        return element("p", "Nothing is recorded of the machine.", class_="note")
    facts, all_seen = [dict(column) for column in columns], columns.values()
    rows = [
        [name, *(column.get(name, NONE) for column in facts)] for name in dict.fromkeys(n for f in facts for n in f)
    ]
    rows.insert(0, ["used for", *(uses(seen["what"]) for seen in all_seen)])
    rows.append(["dates", *(" to ".join(dict.fromkeys([min(seen["date"]), max(seen["date"])])) for seen in all_seen)])
    loads = (f"{min(seen['load'])} to {max(seen['load'])}" if seen["load"] else NONE for seen in all_seen)
    rows.append(["load average, 1 minute", *loads])
    commits = {column.get("commit") for column in facts}
    told = f"{plural(len(columns), 'combination')} of machine, versions and commit; {plural(len(commits), 'commit')}."
    heads = ["", *("all" if len(columns) == 1 else f"machine {n}" for n in range(1, len(columns) + 1))]
    return join([element("p", told, class_="note"), table(heads, rows, "Hardware, versions and commit", "words")])


def uses(what: list[str]) -> str:
    """Return ``12 runs, cost``."""
    return ", ".join(plural(what.count(use), "run") if use == "runs" else use for use in dict.fromkeys(what))


def machine_facts(machine: Json) -> dict[str, str]:
    """Return what makes two machines different."""
    cpu, gpu, git = (part(machine, name) for name in ("cpu", "gpu", "git"))
    facts = {
        "CPU": f"{part(cpu, 'model')}, {in_words(part(cpu, 'cores_allowed') or part(cpu, 'cores'))} cores",
        "memory": f"{number(machine.get('memory_gib'))} GiB",
        "GPU": f"{part(gpu, 'name')}, {number(part(gpu, 'memory_gib'))} GiB, CUDA {part(gpu, 'cuda')}"
        if gpu
        else "none",
        "operating system": in_words(machine.get("os")),
        "Python": in_words(machine.get("python")),
        "PyTorch threads": in_words(machine.get("torch_threads")),
    }
    if isinstance(versions := machine.get("versions"), dict):
        facts |= {str(name): in_words(version) for name, version in versions.items()}
    facts["commit"] = str(part(git, "commit")) + ", with changes that are not in it" * bool(part(git, "dirty"))
    return facts
