"""What the README says is what the project does."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
LINKS = [
    (page, name)
    for page in report.PAGES
    for name in sorted(set(re.findall(r"\]\(((?!http|#)[^)]+)\)", (ROOT / page).read_text())))
]


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


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("total_steps=10_000", "total_steps=1020"), {})
    assert float(capsys.readouterr().out) < 0.0


def test_the_kernels_example_runs():
    page = (ROOT / report.KERNELS_README).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    exec(code, names)
    assert (names["actor"].weight.grad != 0.0).any()
    assert names["rng"].state[1] == 1


def test_the_promises_are_held_by_tests_that_there_are():
    table = (ROOT / report.RELIABILITY).read_text().split("## The promises")[1].split("\n## ")[0]
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", table)
    assert len(named) >= 15
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), name


@pytest.mark.parametrize(("page", "name"), LINKS)
def test_links_lead_somewhere(page, name):
    assert (ROOT / page.parent / name.partition("#")[0]).exists()
