"""The report's last part: how everything was run, and what the words mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastsac.lab.page import Markup, arm_text, duration, element, folded, in_words, join, number, part, plural, table

Json = dict[str, Any]
NONE = "–"
WORDS = {
    "IQM": "The interquartile mean: the mean of the middle half of the runs. A lucky or a broken run hardly moves it.",
    "Interval, band": "95 % stratified bootstrap: the runs are resampled with replacement many times, and 95 % "
    "of the results lie inside. With few seeds, such intervals tend to be too narrow.",
    "Equivalence margin": "The largest difference that does not matter. Choose it before the runs: "
    "margins that were tried before this one are in the settings above, as earlier_margins.",
    "Verdicts": "Equivalent: two one-sided paired t-tests at 5 % each show that the means differ by less than the "
    "margin; that is, the 90 % interval lies within it. Different: they do not, and a two-sided test finds a "
    "difference at 5 %. Inconclusive: neither, so these runs leave it open. Pairs are runs with the same "
    "seed, whose evaluations start in the same states: where these decide the return, the difference is known better "
    "than either return.",
    "Normalised return": "0 is the mean return of random actions, 1 the first arm's mean final "
    "return, in each environment.",
    "Area under the curve": "The mean return over the whole run: it is higher if learning is faster.",
    "Arm": "An estimator of the actor's gradient, its baseline and its number of action samples, written "
    "estimator:baseline:samples; omitted parts have their defaults.",
}


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
            parts.append(folded("Options that all runs share", table(["option", "value"], same, "Options", "words")))
        failed = [
            element(
                "li", join([each["env_id"], " ", arm_text(each["arm"]), f", seed {each['seed']}: {each['error']}"], "")
            )
            for each in comparison.get("failed", [])
        ]
        if failed:
            parts.append(join([element("h3", "Runs that failed"), element("ul", join(failed))]))
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
    if isinstance(beside := run.get("num_learners"), int) and beside > 1:
        told.append(f", with {plural(beside - 1, 'other')} in its process")
    parts = [element("p", join([arm_text(run["arm"]), *told], "")), element("pre", run["command"])]
    return element("div", join(parts), class_="run")


def machines_table(results: Mapping[str, Json]) -> Markup:
    """Return what ran where: a column for each combination of machine, versions and commit."""
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
        return element("p", "No machine was recorded.", class_="note")
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
    """Return the facts that tell machines apart."""
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
    facts["commit"] = str(part(git, "commit")) + ", with uncommitted changes" * bool(part(git, "dirty"))
    return facts
