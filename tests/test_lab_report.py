"""The report of a comparison: what is on the page, that it needs nothing else, and what it refuses."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsac.errors import UsageError
from fastsac.lab.page import interval, number
from fastsac.lab.pictures import LONGEST_LABEL, Look, draw, looks
from fastsac.lab.record import no_runs
from fastsac.lab.report import write_report

EVIL = "<script>alert(1)</script>&\"'"
ARMS = ["pathwise", "score:loo:2", "score:none", f"my_$file$:{EVIL}"]
ENV_IDS = ["Hopper-v5", "Walker2d-v5", "one<b>seed-v0"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def machine(commit: str = "c0ffee" * 6) -> dict[str, Any]:
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "cpu": {"model": "Zen <i>9</i>", "cores": 32, "cores_allowed": 16},
        "memory_gib": 62.5,
        "gpu": None,
        "os": "Linux 6.1",
        "python": "3.11.2",
        "torch_threads": 4,
        "versions": {"torch": "2.11.0+cpu", "envpool": "1.2.5", "triton": None},
        "git": {"commit": commit, "dirty": True},
        "load_average": [0.5, 1.0, 2.0],
    }


def spread(middle: float, width: float, runs: int = 1) -> dict[str, Any]:
    values = list(np.linspace(middle - width, middle + width, runs))
    return {"iqm": middle, "low": middle - width, "high": middle + width, "values": values}


def arm_summary(place: int, seeds: int, verdict: str) -> dict[str, Any]:
    if place == 3:
        return no_runs() | {"failed": seeds, "diverged": seeds}
    end = [2400.0, 2350.0, 300.0][place]
    steps = list(range(0, 100_001, 5000))
    middle = [end * (1 - math.exp(-step / 30_000)) for step in steps]
    bands = {name: [value + side * 120 for value in middle] for name, side in (("low", -1), ("high", 1))}
    summary = {
        "seeds": seeds,
        "final": spread(end, 120.0, seeds),
        "auc": spread(0.7 * end, 90.0, seeds),
        "curve": {"steps": steps, "iqm": middle, **bands},
        "time_s": 812.5,
        "failed": 0,
        "diverged": 0,
    }
    if seeds == 1:
        for name in ("final", "auc"):
            summary[name] |= {"low": math.nan, "high": None}
        summary["curve"] |= {"low": [None] * len(steps), "high": [math.nan] * len(steps)}
    if place:
        ends = {name: (end - to) / 2382.0 for name, to in (("difference", 2400.0), ("low", 2480.0), ("high", 2320.0))}
        test = {"against": ARMS[0], "seeds": seeds, **ends, "margin": 0.05, "p": 0.01, "verdict": verdict}
        summary["equivalence"] = test
    return summary


def run(env_id: str, arm: str, seed: int) -> dict[str, Any]:
    return {
        "env_id": env_id,
        "arm": arm,
        "estimator": arm.partition(":")[0],
        "seed": seed,
        "run_dir": f"runs/{seed}",
        "command": f"fastsac train --env-id '{env_id}' --seed {seed} --estimator '{arm}'",
        "config": {"batch_size": 256, "gamma": 0.99, "seed": seed},
        "engine": "fused",
        "precision": "fp32",
        "steps": [0, 100_000],
        "eval_return": [10.0, 2345.6],
        "updates": 99_000,
        "time_s": 800.0,
        "machine": machine("feedbeef" * 5 if seed == 2 else "c0ffee" * 6),
    }


def comparison() -> dict[str, Any]:
    verdicts = ["", "equivalent", "different", ""]
    seeds = {env_id: 1 if "seed" in env_id else 3 for env_id in ENV_IDS}
    return {
        "format": 1,
        "command": f"fastsac compare --env-ids {' '.join(ENV_IDS)}",
        "settings": {
            "env_ids": ENV_IDS, "arms": ARMS, "seeds": [0, 1, 2], "total_steps": 100_000,
            "set": ["num_envs=4"], "margin": 0.05,
        },
        "random_return": dict.fromkeys(ENV_IDS, 18.0),
        "random_episodes": 200,
        "runs": [run(e, arm, seed) for e in ENV_IDS for arm in ARMS[:3] for seed in range(seeds[e])],
        "failed": [
            {"env_id": e, "arm": ARMS[3], "seed": seed, "error": "a loss is not <finite>", "diverged": True}
            for e in ENV_IDS for seed in range(seeds[e])
        ],
        "summary": {
            env_id: {
                arm: arm_summary(place, seeds[env_id], verdicts[place] if seeds[env_id] > 1 else "not tested")
                for place, arm in enumerate(ARMS)
            }
            for env_id in ENV_IDS
        },
        "overall": {arm: {"final": spread(0.9, 0.05), "auc": spread(0.7, 0.05)} for arm in ARMS[:3]},
    }  # fmt: skip


def timing(middle: float) -> dict[str, float]:
    return {"median": middle, "low": 0.95 * middle, "high": 1.1 * middle}


def cost() -> dict[str, Any]:
    rows = [
        {"arm": arm, "engine": engine, "actor_step_ms": timing(2.0 + place), "update_ms": timing(5.0 + place),
         "actor_step_ratio": timing((2.0 + place) / 2), "update_ratio": timing((5.0 + place) / 5)}
        for engine in ("fused",) for place, arm in enumerate(ARMS)
    ]  # fmt: skip
    return {"command": "fastsac cost --arms pathwise", "machine": machine(), "rows": rows}


def fill(directory: Path, **results: Any) -> Path:
    for name, result in results.items():
        (directory / f"{name}.json").write_text(json.dumps(result))
    return directory


def some_png() -> bytes:
    return draw([lambda axes: axes.plot([0, 1], [1, 0])], (5, 2))


def fill_everything(directory: Path) -> Path:
    rows = [{"step": 1000, "arm": arm, "mean": {"bias_sigmas": 0.01, "variance": 2.5}} for arm in ARMS[:3]]
    for file in ("gradients.png", "toy.png", "toy_ripple.png"):
        (directory / file).write_bytes(some_png())
    gradients = {"command": "fastsac gradients runs/0", "machine": machine(), "rows": rows}
    toy = {"command": "fastsac toy", "rows": [{"arm": "pathwise", "variance": 1.25, "known": 1.24}]}
    return fill(directory, comparison=comparison(), cost=cost(), gradients=gradients, toy=toy)


class Page(HTMLParser):
    """What a browser would make of the page: its text, its tags with their attributes, and which are left open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = fill_everything(tmp_path_factory.mktemp("report"))
    assert write_report(directory) == directory / "report.html"
    return directory


@pytest.fixture(scope="module")
def page(directory: Path) -> Page:
    return Page(directory / "report.html")


def test_everything_is_on_the_page(page: Page) -> None:
    result = comparison()
    words = [*ARMS, *ENV_IDS, result["command"], cost()["command"], "fastsac gradients runs/0", "fastsac toy"]
    words += [run["command"] for run in result["runs"]]
    words += ["2.11.0+cpu", "1.2.5", "Zen <i>9</i>", "c0ffee" * 6, "feedbeef" * 5, "2 commits", "3.11.2", "num_envs=4"]
    words += ["2,400 [2,280,\N{NO-BREAK SPACE}2,520]", "batch_size", "a loss is not <finite>", "13.5 min"]
    words += [
        "random seed",
        "No significant difference does not mean equal",
        "7 of 28 runs failed",
        "0 to 3 of 3 random seeds",
    ]
    words += ["mean: bias, standard errors", "mean: noise", "Noise is the trace of the covariance"]
    words += ["Runs that failed", "seed 2: a loss is not <finite>", "3 (3 diverged)"]
    assert [word for word in words if word not in page.text] == []
    assert page.open == []
    assert "&lt;dt" not in page.source  # markup escaped twice
    assert page.text.count("fastsac train") == len(result["runs"])


def test_the_answer_says_which_arms_are_equivalent_different_or_neither(page: Page) -> None:
    answer = page.text[page.text.index("Each arm was") : page.text.index("runs failed")]
    parts = re.split("Equivalent|Different:|Not shown either way:|Not tested:", answer)
    for place, arm in ((1, ARMS[1]), (2, ARMS[2]), (3, ARMS[3])):
        assert f"{arm} on {'all 3 environments' if arm == ARMS[3] else 'Hopper-v5'}" in parts[place]
    assert "(±0.05 of the normalised return)" in parts[1]
    assert "lower: −0.882 [−0.915,\N{NO-BREAK SPACE}−0.848]" in parts[2]
    assert ENV_IDS[2] in parts[3]
    assert not any(ENV_IDS[2] in part for part in parts[1:3])


def test_what_is_inconclusive_is_said(tmp_path: Path) -> None:
    result = comparison()
    result["summary"]["Hopper-v5"][ARMS[1]]["equivalence"]["verdict"] = "inconclusive"
    text = Page(write_report(fill(tmp_path, comparison=result))).text
    assert f"Inconclusive: {ARMS[1]} on Hopper-v5." in text


def test_names_are_shown_and_not_run(page: Page) -> None:
    assert not page.all("script")
    assert not page.all("i")
    assert not any(attribute.startswith("on") for _, attributes in page.tags for attribute in attributes)
    assert page.text.count(EVIL) > 10


def test_the_page_needs_nothing_else(page: Page) -> None:
    ids = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert tag not in ("link", "script", "iframe", "object")
        assert not {"srcset", "style", "action"} & attributes.keys()
        assert "href" not in attributes or attributes["href"] in ids
        assert (attributes.get("src") or "data:image/png").startswith("data:image/png")
    assert "://" not in page.source
    assert not re.search(r"url\(|@import", page.source)


def test_every_picture_is_a_png_and_is_told_in_words(page: Page, directory: Path) -> None:
    import matplotlib.image

    images = page.all("img")
    assert len(images) == 3 + 2 * 3 + 2 + 3  # curves, returns and differences, costs, and those of the lab
    for place, image in enumerate(images):
        assert len(image["alt"] or "") > 40
        file = directory / f"picture{place}.png"
        file.write_bytes(base64.b64decode((image["src"] or "").partition(",")[2], validate=True))
        assert matplotlib.image.imread(file).std() > 0.01  # something is drawn
    assert "pathwise 2,400" in (images[0]["alt"] or "")
    for name in ("curves.png", "final.png", "cost.png"):
        assert matplotlib.image.imread(directory / name).std() > 0.01
    assert not list(directory.glob("*.tmp")) + list(directory.glob(".*"))


@pytest.mark.parametrize("name", ["comparison", "cost", "gradients", "toy"])
def test_each_file_makes_a_page_of_its_own(name: str, tmp_path: Path) -> None:
    results: dict[str, Any] = {
        "comparison": comparison(),
        "cost": cost(),
        "gradients": {"rows": [{"arm": EVIL}]},
        "toy": {},
    }
    results["comparison"]["settings"]["env_ids"] = ENV_IDS[:1]
    page = Page(write_report(fill(tmp_path, **{name: results[name]})))
    assert page.open == []
    assert ("Glossary" in page.text) == (name == "comparison")


def test_arms_with_different_engines_are_beside_one_another(tmp_path: Path) -> None:
    result = cost()
    for row, engine in zip(result["rows"], itertools.cycle(["fused", "reference"]), strict=False):
        row["engine"] = engine
    images = Page(write_report(fill(tmp_path, cost=result))).all("img")
    assert len(images) == 2
    assert all(arm in (image["alt"] or "") for image in images for arm in ARMS)


def test_one_arm_and_arms_without_a_result(tmp_path: Path) -> None:
    result = comparison()
    result["settings"] |= {"arms": ARMS[:1], "env_ids": ENV_IDS[:1]}
    result["summary"] = {ENV_IDS[0]: {}}
    result["runs"] = []
    del result["overall"]
    text = Page(write_report(fill(tmp_path, comparison=result))).text
    assert "No run is complete. 7 of 7 runs failed." in text


def test_an_arm_without_a_run_has_no_seed(tmp_path: Path) -> None:
    result = comparison()
    result["settings"] |= {"env_ids": ENV_IDS[:1]}
    result["failed"] = []
    del result["summary"][ENV_IDS[0]][ARMS[3]]  # as after an interruption
    text = Page(write_report(fill(tmp_path, comparison=result))).text
    assert "with 0 to 3 of 3 random seeds" in text


def test_a_varied_setting_without_a_test(tmp_path: Path) -> None:
    """Nothing is tested then, but what is best is known; and so are the figures of all environments together."""
    result, env_id = comparison(), ENV_IDS[0]
    worse, best, lost = (f"{ARMS[0]} tau={tau}" for tau in ("0.005", "0.01", "0.02"))
    arm = result["summary"][env_id][ARMS[0]]
    other = f"{ARMS[1]} tau=0.01"  # as if the first arm had no run
    result["settings"] |= {"arms": ARMS[:2], "env_ids": [env_id]}
    result["summary"] = {env_id: {worse: arm, best: arm, lost: no_runs(), other: arm}}
    result["best"] = {env_id: {ARMS[0]: best, ARMS[1]: other}}
    result["overall"] = {ARMS[0]: {"final": spread(0.9, 0.05), "auc": spread(0.7, 0.05)}}
    text = Page(write_report(fill(tmp_path, comparison=result))).text
    row = text[text.index("median time") :]
    assert "not its best settings" in row[row.index(worse) : row.index(best)]
    assert "the first arm" in row[row.index(best) : row.index(lost)]
    assert "no complete run" in row[row.index(lost) : row.index(other)]
    assert "not tested" in row[row.index(other) :]
    assert "0.900 [0.850" in text[text.index("Over all environments") :]


def test_of_a_varied_setting_the_best_is_tested_and_the_others_are_shown(tmp_path: Path) -> None:
    result, env_id = comparison(), ENV_IDS[0]
    first, other = (f"{arm} actor_lr=0.001" for arm in ARMS[:2])
    arms = result["summary"][env_id]
    worse = {name: value for name, value in arms[ARMS[1]].items() if name != "equivalence"}
    found = {f"{ARMS[0]} actor_lr=1": worse, first: arms[ARMS[0]], f"{ARMS[1]} actor_lr=1": worse, other: arms[ARMS[1]]}
    found[other]["equivalence"]["against"] = first
    result["settings"] |= {"arms": ARMS[:2], "env_ids": [env_id]}
    result |= {"summary": {env_id: found}, "best": {env_id: {ARMS[0]: first, ARMS[1]: other}}}
    page = Page(write_report(fill(tmp_path, comparison=result)))
    text = page.text
    assert any(f"Difference in final return from {first} on" in (image["alt"] or "") for image in page.all("img"))
    assert f"difference from {first.replace(' ', chr(10))}, normalised" in text
    assert f"{other}." in text[text.index("Equivalent") : text.index("Different:")]
    assert "chosen on the same seeds" in text
    assert text.count("not its best settings") == 2
    row = text[text.index("median time") :]
    assert "the first arm" in row[row.index(first) : row.index(f"{ARMS[1]} actor_lr=1")]
    assert "not its best settings" in row[row.index(f"{ARMS[1]} actor_lr=1") : row.index(other)]
    assert "equivalent" in row[row.index(other) :]


def damaged(**changes: Any) -> bytes:
    return json.dumps(comparison() | changes).encode()


BAD_RUN = {**run("Hopper-v5", "pathwise", 0), "seed": "one\ntwo"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"format": 1', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not hold an object"),
        (damaged(format=2), "format 2"),
        (damaged(runs=[BAD_RUN]), r"comparison\['runs'\]\[0\]\['seed'\]"),
        (damaged(settings={"env_ids": []}), "env_ids"),
        (damaged(summary={"a": {"b": {}}}), r"\['a'\]\['b'\] has no 'seeds'"),
        (damaged(summary=3), "summary"),
    ],
    ids=["half", "binary", "deep", "list", "format", "seed", "no-environments", "no-seeds", "no-summary"],
)
def test_a_damaged_comparison_is_refused_in_one_line(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_bytes(content)
    with pytest.raises(UsageError, match=why) as error:
        write_report(tmp_path)
    assert "comparison.json" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_curves_of_unequal_lengths_are_refused(tmp_path: Path) -> None:
    result = comparison()
    result["summary"]["Hopper-v5"]["pathwise"]["curve"]["iqm"].pop()
    with pytest.raises(UsageError, match="differ in length"):
        write_report(fill(tmp_path, comparison=result))


def test_an_empty_directory_and_a_damaged_picture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none of comparison\.json"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="nowhere does not exist"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "toy.png").write_bytes(b"GIF89a" * 10)
    with pytest.raises(UsageError, match=r"toy\.png is damaged"):
        write_report(fill(tmp_path, toy={}))


def test_a_long_label_keeps_both_ends() -> None:
    four, eight = (Look.of(f"my_estimators:normalized_advantage:loo:{samples}").short for samples in (4, 8))
    assert (four[:13], four[-6:], eight[-6:]) == ("my_estimators", ":loo:4", ":loo:8")
    assert len(four) == len(eight) == LONGEST_LABEL
    assert Look.of("score-antithetic:mean-action").short == "score-antithetic:mean-action"


def test_neighbouring_arms_differ_in_colour_line_and_marker() -> None:
    many = looks(map(str, range(30)))
    assert len({(look.colour, look.dashes) for look in many}) == 30
    for one, other in itertools.pairwise(many):
        assert one.colour != other.colour
        assert one.dashes != other.dashes
        assert one.marker != other.marker


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (-1234.6, "−1,235"), (0.012345, "0.0123"), (-0.5, "−0.5"), (0, "0"), (math.nan, "–"),
     (None, "–"), ("x", "–"), (math.inf, "–"), (1e20, "1.00e+20"), (99.96, "100")],
)  # fmt: skip
def test_numbers_are_written_to_be_read(value: Any, text: str) -> None:
    assert number(value) == text


def test_an_interval_has_the_same_digits_after_the_point() -> None:
    shown = {"iqm": -0.00841, "low": -0.15, "high": 0.1334}
    assert interval(shown) == "−0.008 [−0.150,\N{NO-BREAK SPACE}0.133]"
    assert interval(shown | {"low": None}) == "−0.00841"
    assert interval({"median": 1234.5, "low": 1000.0, "high": 2000.0}) == "1,234 [1,000,\N{NO-BREAK SPACE}2,000]"
    assert interval({"iqm": 0.0, "low": 0.0, "high": 0.0}) == "0 [0,\N{NO-BREAK SPACE}0]"


CHECK = """<script>
window.onerror = (message) => { document.title = "ERROR " + message; };
window.addEventListener("load", () => {
  const images = [...document.images], out = document.createElement("p");
  const small = [...document.querySelectorAll("body *")].filter(
    (e) => e.textContent.trim() && !e.closest("svg") && parseFloat(getComputedStyle(e).fontSize) < 16);
  out.textContent = "CHECK " + JSON.stringify({images: images.length,
    drawn: images.filter((i) => i.naturalWidth > 0).length,
    wider: document.documentElement.scrollWidth - innerWidth, small: small.length, title: document.title});
  document.body.append(out);
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (looked for chromium, google-chrome)")
def test_a_browser_shows_it_without_errors(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.html"
    copy.write_text((directory / "report.html").read_text() + CHECK)
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--window-size=500,900", "--virtual-time-budget=5000", "--dump-dom"]
    shown = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"CHECK (\{.*?\})</p>", shown.stdout)
    assert found is not None, shown.stdout[-500:]
    checks = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert checks["images"] == checks["drawn"] == 14
    assert checks["wider"] <= 0, "the page scrolls sideways"
    assert checks["small"] == 0, "text under 16 px"
    assert not checks["title"].startswith("ERROR")
    assert "CONSOLE" not in shown.stderr
