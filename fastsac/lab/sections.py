"""The parts of the report: curves, final returns, costs, and the lab's tables and pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fastsac.errors import UsageError
from fastsac.lab.page import (
    PNG_START,
    Markup,
    arm_text,
    duration,
    element,
    figure,
    folded,
    interval,
    join,
    number,
    part,
    table,
)
from fastsac.lab.pictures import Look, dots_height, draw, draw_curves, draw_dots, looks

Json = dict[str, Any]
NONE = "–"
SIGNS = {"equivalent": "=", "different": "≠", "inconclusive": "?"}
PANEL = (5.2, 3.4)  # inches
LONG = 30  # rows
FINAL_NOTE = (
    "First: the IQM of the final returns (dot), its 95 % interval (bar) and each run (ticks). Second: the difference "
    "of the means from {first} with its 90 % interval; the grey band is the equivalence margin, and a bar entirely "
    "inside it shows equivalence."
)
RATIOS = {
    "update_ratio": "a whole update, {engine} engine",
    "reference_update_ratio": "a whole update, reference engine",
    "actor_step_ratio": "the actor's step",
}
#: names in the lab's files, in words
HEADINGS = {
    "variance": "noise",
    "closed_form": "noise, closed form",
    "bias_sigmas": "bias, standard errors",
    "bias_random_sigmas": "bias in a random direction, standard errors",
    "variance_sigmas": "deviation from the closed form, standard errors",
    "evaluations": "critic evaluations",
    "equal_evaluations": "noise at equal critic evaluations",
    "equal_time": "noise at equal time",
    "time_ms": "time, ms",
    "height": "height of the ripple",
    "from": "pathwise is noisier from frequency",
    "actor_step_ms": "actor's step, ms",
    "actor_step_ratio": "actor's step, relative",
    "update_ms": "update, ms",
    "update_ratio": "update, relative",
    "reference_update_ms": "update, reference engine, ms",
    "reference_update_ratio": "update, reference engine, relative",
}
NOISE = "Noise is the trace of the covariance of one gradient estimate, divided by the squared norm of the gradient."
NOTES = {
    "gradients": f"{NOISE} Head: at the policy's outputs, mean and log_std; parameters: in all of the actor's "
    "parameters. At equal evaluations and at equal time it is relative to pathwise.",
    "toy": f"{NOISE} One of dimension, distance from the optimum, sigma and K is varied at a time.",
}
PICTURES = {
    "gradients": {"gradients.png": "Variance of each estimator's gradient at checkpoints of a trained run."},
    "toy": {
        "toy.png": "Toy problem with a known answer: each estimator's measured variance, and its formula.",
        "toy_ripple.png": "Toy problem with a ripple on the critic: the variance of both families over its frequency.",
    },
}


def spoken(arms: Json, name: str) -> str:
    """Return each arm's interval in words, for readers who cannot see the picture."""
    return ", ".join(f"{arm} {interval(values[name])}" for arm, values in arms.items()) or "no results"


def labels(comparison: Json) -> list[str]:
    """Return the arms' labels in order, the first arm's first; an arm has several where a setting is varied."""
    arms = comparison["settings"]["arms"]
    seen = dict.fromkeys(label for found in comparison["summary"].values() for label in found)
    without = [arm for arm in arms if not any(arm in (label, label.partition(" ")[0]) for label in seen)]
    order = {arm: place for place, arm in enumerate(arms)}
    return sorted([*seen, *without], key=lambda label: order.get(label, order.get(label.partition(" ")[0], len(arms))))


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
        "seed has none. The panels are also in curves.png, next to this page."
    )
    return join([element("p", note, class_="note"), element("div", join(figures), class_="panels")])


def final_section(comparison: Json, pictures: dict[str, bytes]) -> Markup:
    """Return dots and a table per environment, and put all the dots in final.png."""
    settings, summary = comparison["settings"], comparison["summary"]
    key, functions = looks(labels(comparison)), list[Any]()
    size = PANEL[0], dots_height(key)
    parts = [element("p", FINAL_NOTE.format(first=settings["arms"][0]), class_="note")]
    for env_id in settings["env_ids"]:
        arms = summary.get(env_id, {})
        best = [part(comparison, "best", env_id, arm) or arm for arm in settings["arms"]]
        present = [look for look in key if look.label in arms]
        tests = {look: arms[look.label]["equivalence"] for look in present if part(arms, look.label, "equivalence")}
        rows = [(look, arms[look.label]["final"]) for look in present]
        functions.append(partial(draw_dots, title=Look.of(env_id).short, xlabel="final return", rows=rows))
        panels = [figure(draw(functions[-1:], size), f"Final return on {env_id}: {spoken(arms, 'final')}.")]
        if tests:
            margin = max((m for test in tests.values() if number(m := part(test, "margin")) != NONE), default=0.0)
            first = Look.of(part(next(iter(tests.values())), "against") or key[0].label)
            label = f"difference from {first.short}, normalised"
            of: Json = {"title": Look.of(env_id).short, "xlabel": label, "rows": list(tests.items())}
            functions.append(partial(draw_dots, **of, zero=0.0, band=margin))
            said = "; ".join(f"{look.label} {interval(test)}, {part(test, 'verdict')}" for look, test in tests.items())
            alt = f"Difference in final return from {first.label} on {env_id}, margin ±{number(margin)}: {said}."
            panels.append(figure(draw(functions[-1:], size), alt))
        parts += [
            element("h3", env_id),
            element("div", join(panels), class_="panels"),
            final_table(env_id, key, arms, best, label if tests else "difference"),
        ]
    pictures["final.png"] = draw(functions, size, columns=1 if len(key) == 1 else 2)
    if overall := comparison.get("overall"):
        cells = [
            [arm_text(arm), *(interval(part(of, name)) for name in ("final", "auc"))] for arm, of in overall.items()
        ]
        headers = ["arm", "final return", "area under the curve"]
        parts += [element("h3", "Over all environments"), table(headers, cells, "Normalised returns, all environments")]
    return join(parts)


def final_table(env_id: str, key: list[Look], arms: Json, best: list[str], difference: str) -> Markup:
    """Return one row per label; `best` has the label of each arm's best settings, the first arm's first."""
    rows = []
    for look in key:
        values = arms.get(look.label)
        if values is None:
            rows.append([look.key, *[NONE] * 7])
            continue
        test = values.get("equivalence")
        if not values["seeds"]:
            verdict = "no complete run"
        elif look.label == best[0]:
            verdict = "the first arm"
        else:
            verdict = part(test, "verdict") or ("not tested" if look.label in best else "not its best settings")
        sign = SIGNS[verdict] + "\N{NO-BREAK SPACE}" if verdict in SIGNS else ""
        shown = element("span", sign + verdict, class_=verdict.replace(" ", "-"))
        returns = [interval(values[name]) for name in ("final", "auc")]
        diverged = f" ({number(values['diverged'])} diverged)" if values.get("diverged") else ""
        last = [duration(values.get("time_s")), number(values.get("failed", 0)) + diverged]
        rows.append([look.key, shown, number(values["seeds"]), *returns, interval(test) if test else NONE, *last])
    headers = ["arm", "verdict", "seeds", "final return: IQM", "area under the curve", f"{difference} [90 % interval]"]
    return table([*headers, "median time", "failed runs"], rows, f"{env_id}: IQM [95 % interval]")


def cost_section(cost: Json, pictures: dict[str, bytes]) -> Markup:
    """Return the times relative to the first arm as dots, and all figures as a table."""
    key = {look.label: look for look in looks(dict.fromkeys(row["arm"] for row in cost["rows"]))}
    functions, figures = list[Any](), []
    size = PANEL[0], dots_height(list(key.values()))
    engines = list(dict.fromkeys(row["engine"] for row in cost["rows"]))
    for name, words in RATIOS.items():
        rows = [(key[row["arm"]], row[name]) for row in cost["rows"] if part(row, name)]
        if rows:
            what = words.format(engine=engines[0] if len(engines) == 1 else "fastest")
            label = f"time relative to {next(iter(key.values())).short}"
            functions.append(partial(draw_dots, title=what, xlabel=label, rows=rows, zero=1.0))
            said = ", ".join(f"{look.label} {interval(values)}" for look, values in rows)
            figures.append(figure(draw(functions[-1:], size), f"Time of {what}, relative to the first arm: {said}."))
    if functions:
        pictures["cost.png"] = draw(functions, size, columns=min(len(functions), 2))
    note = "Time relative to the first arm, which is 1; the bar spans the quartiles. Lower is faster."
    panels = element("div", join(figures), class_="panels")
    return join([element("p", note, class_="note"), panels, rows_section(cost, [], "Cost: median [quartiles]")])


def lab_section(name: str, result: Json, directory: Path, label: str) -> Markup:
    """Return the pictures and figures of `fastsac lab gradients` or `toy`."""
    note = element("p", NOTES[name], class_="note")
    return join([note, rows_section(result, found_pictures(directory, name), label)])


def rows_section(result: Json, figures: list[Markup], label: str) -> Markup:
    """Return the pictures, and each list of objects in a result as a table with the columns that are there."""
    parts = [element("div", join(figures), class_="panels")] if figures else []
    for name, rows in result.items():
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            flat = [flattened(row) for row in rows]
            columns = list(dict.fromkeys(key for row in flat for key in row))
            cells = ([row.get(column, NONE) for column in columns] for row in flat)
            heading = label if name == "rows" else f"{label}: {name.replace('_', ' ')}"
            shown = table(list(map(in_words, columns)), cells, heading)
            parts.append(folded(f"{heading}, all {len(rows)} rows", shown) if len(rows) > LONG else shown)
    return join(parts)


def in_words(column: str) -> str:
    """Return a column's heading: `head bias_sigmas` is the head's bias."""
    *of, name = column.split(" ")
    return " ".join([*(f"{each}:" for each in of), HEADINGS.get(name, name.replace("_", " "))])


def flattened(row: Json, before: str = "") -> dict[str, object]:
    """Return an object's numbers by name; an interval counts as one, other objects are flattened."""
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
        UsageError: if one is not a PNG.
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
            raise UsageError(f"{directory / file} is damaged: it is not a PNG picture")
        figures.append(figure(content, alt, alt))
    return figures
