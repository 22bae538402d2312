"""What the README and the pages under docs/ say is what the project does.

Every ```python block runs, page by page, and so do the tutorial's commands; of all other commands the arguments are
parsed. Blocks that say `no-run` behind their language are left out, and those that say `slow` run with the slow tests.
To be quick, runs of N steps make 1000 + N / 1000 steps, with a few updates, and precision and threads are given.
"""

import contextlib
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from benchmarks import report
from fastsac import estimators
from fastsac.arguments import parse
from fastsac.cli import main
from fastsac_kernels.whole_update import METRICS
from tests.runs import SMALL, rows_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCS = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
PAGES = [*dict.fromkeys([*report.PAGES, *DOCS])]
TUTORIAL = Path("docs/tutorial.md")


class Block(NamedTuple):
    """A fenced block: its language, the words behind it, and what is in it."""

    language: str
    words: list[str]
    code: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)([^\n]*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [Block(language, words.split(), code) for language, words, code in found]


def commands(block: Block) -> Iterator[list[str]]:
    """The arguments of each `fastsac ...` in a block of a shell's input."""
    if block.language not in ("", "sh", "console"):
        return
    for line in re.findall(r"^(?:\$ )?((?:fastsac|torchrun) .*)$", block.code.replace("\\\n", " "), flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        words = words[words.index("fastsac") + 1 :]
        if not words[0].startswith("--tyro"):  # which writes a script; tests/test_completion.py has it
            yield words


def shorter(text: str) -> str:
    text = re.sub(r"(total[_-]steps[= ])([\d_]+)", lambda m: f"{m[1]}{1000 + int(m[2]) // 1000}", text)
    text = text.replace("train --env-id", "train --num-threads 1 --precision fp32 --env-id")
    return re.sub(r"\bConfig\(", 'Config(num_threads=1, precision="fp32", ', text)


def run_page(page: Path, slow: bool = False) -> dict[str, object]:
    """Run a page's Python, in one namespace, and the tutorial's commands."""
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if "no-run" in block.words or ("slow" in block.words and not slow):
            continue
        if block.language == "python":
            exec(compile(shorter(block.code), str(page), "exec"), names)
        elif page == TUTORIAL:
            for arguments in commands(block):
                main(shlex.split(shorter(shlex.join(arguments))))
    return names


WITH_PYTHON = [page for page in PAGES if page != TUTORIAL and any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=str)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = {name: entry for name, entry in estimators.ESTIMATORS.items() if name != "normalized"}
    monkeypatch.setattr(estimators, "ESTIMATORS", known)  # a page registers one
    names = run_page(page)
    if page == report.README:
        assert float(capsys.readouterr().out) < 0.0
    if page == report.KERNELS_README:
        assert (names["actor"].weight.grad != 0.0).any()
        assert names["rng"].state[1] == 1


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_page(TUTORIAL)
    out = capsys.readouterr().out
    assert "learning curve: runs/pendulum/learning_curve.png" in out
    assert "over 20 episodes" in out
    assert rows_of(Path("runs/pendulum"))[-1]["step"] >= 1015
    assert Path("pendulum.gif").exists()


@pytest.mark.slow
def test_the_whole_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(TUTORIAL, slow=True)
    assert Path("comparisons/pendulum/report.html").exists()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_are_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        for arguments in commands(block):
            if "--resume" in arguments:  # its settings are read first
                run_dir = Path(arguments[arguments.index("--resume") + 1])
                run_dir.mkdir(parents=True, exist_ok=True)
                (run_dir / "config.json").write_text("{}")
            with contextlib.suppress(SystemExit) if "--help" in arguments else contextlib.nullcontext():
                parse(arguments)


def test_there_are_commands_to_understand():
    found = {page: sum(len(list(commands(block))) for block in blocks(page)) for page in PAGES}
    assert found[TUTORIAL] >= 5
    assert sum(found.values()) >= 40


def test_tables_come_from_the_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    for page, tables in report.PAGES.items():
        for name, table in tables.items():
            assert f"<!-- {name} -->\n{table()}\n<!-- /{name} -->" in page.read_text()


def test_the_claim_at_the_top_is_the_measured_one():
    contenders = json.loads((ROOT / "benchmarks/results/peers_cpu.json").read_text())["contenders"]
    names = ("fastsac pathwise fp32", "fastsac pathwise bf16", "sbx")
    measured = [f"{contenders[name]['speed_relative_to_sb3']['learn_16']['median']:.1f}" for name in names]
    assert re.findall(r"([\d.]+) times\b", README.split("## ")[0]) == measured
    home = (ROOT / "docs/index.md").read_text()
    assert re.findall(r"([\d.]+) times\b", home) == measured[:2]


def test_the_promises_are_held_by_tests_that_there_are():
    table = (ROOT / report.RELIABILITY).read_text().split("## The promises")[1].split("\n## ")[0]
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", table)
    assert len(named) >= 15
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), name


def test_every_metric_is_explained(tmp_path):
    from fastsac import SAC

    run = {"estimator": "score", "baseline": "value", "total_steps": 1000, "eval_every": 500}
    SAC(SMALL.__class__(**{**vars(SMALL), **run})).learn(run_dir=tmp_path)
    written = {key for row in rows_of(tmp_path) for key in row}
    assert written > {*METRICS}
    page = (ROOT / "docs/reference/metrics.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == written


def anchors(page: Path) -> set[str]:
    """The names that GitHub and the site give to headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, Path("benchmarks/results/README.md")], ids=str)
def test_links_lead_somewhere(page):
    for name in set(re.findall(r"\]\(((?!http)[^)\s]+)\)", (ROOT / page).read_text())):
        path, _, anchor = name.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), name
        made = "reference" in target.parts  # on the site, of docstrings
        assert not anchor or made or anchor in anchors(target), name


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/theme/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://unpkg.com/iframe-worker/shim"></script>',
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
        "<style>@import 'https://cdn.example/a.css'</style>",
        '<img alt="" src="//cdn.example/a.png">',
    ],
)
def test_a_site_that_needs_the_network_is_refused(html, hooks, tmp_path):
    (tmp_path / "index.html").write_text('<script src="a.js"></script><a href="https://example.com">fine</a>')
    config = type("Config", (), {"site_dir": tmp_path})
    hooks.on_post_build(config)
    (tmp_path / "index.html").write_text(html)
    with pytest.raises(hooks.PluginError, match="network"):
        hooks.on_post_build(config)


def test_links_on_the_site(hooks):
    file = type("File", (), {"abs_src_path": ROOT / "docs/how-to/seeds.md", "src_uri": "how-to/seeds.md"})

    def rewritten(text: str) -> str:
        return hooks.FENCE_OR_LINK.sub(lambda match: hooks._rewritten(match, file), text)

    assert rewritten("[a](../tutorial.md#look)") == "[a](../tutorial.md#look)"
    assert rewritten("[k](../../kernels/README.md)") == "[k](../kernels.md)"
    assert rewritten("[replay.py](../../fastsac/replay.py)") == "`fastsac/replay.py`"
    assert rewritten("[log](../../LOG.md)") == "log (`LOG.md`)"
    curve = "benchmarks/results/learning_pendulum.png"
    assert rewritten(f"![c](../../{curve})") == f"![c](../pictures/{curve})"
    assert rewritten("[w](https://example.com)") == "[w](https://example.com)"
    assert rewritten("```python no-run\n[x](y)\n```") == "```python\n[x](y)\n```"
    with pytest.raises(hooks.PluginError, match="nowhere"):
        rewritten("[gone](../gone.md)")


def test_code_on_the_site_breaks_where_it_may(hooks):
    broken = hooks._breakable("<code>pytest tests/test_a.py::test_b --no-header</code>")
    assert broken == '<code>pytest tests/<wbr>test_a.py::<wbr>test_b <span class="whole">--no-header</span></code>'


def test_formulas_on_the_site(hooks):
    assert "<mspace" in hooks._mathml(r"\alpha \log \pi", "inline")
    assert hooks._mathml(r"\begin{aligned} a &amp;= b \\ &amp;= c \end{aligned}", "block").count("<mtr>") == 2
    with pytest.raises(hooks.PluginError, match="not understood"):
        hooks._mathml(r"a & b", "inline")
