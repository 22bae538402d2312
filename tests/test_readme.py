"""What the README says is what the project does."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_come_from_the_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, table in report.TABLES.items():
        assert f"<!-- {name} -->\n{table()}\n<!-- /{name} -->" in README


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


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(((?!http|#)[^)]+)\)", README))))
def test_links_lead_somewhere(name):
    assert (ROOT / name).exists()
