"""What the README says is what the project does."""

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


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("total_steps=10_000", "total_steps=1020"), {})
    assert float(capsys.readouterr().out) < 0.0


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(((?!http|#)[^)]+)\)", README))))
def test_links_lead_somewhere(name):
    assert (ROOT / name).exists()
