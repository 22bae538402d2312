"""How long the commands of docs/tutorial.md take, one after the other, start of Python included.

    python -m benchmarks.tutorial

Writes benchmarks/results/tutorial.json, with what each command printed last.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, load_average, write_json

PAGE = Path("docs/tutorial.md")
RESULT = Path(__file__).parent / "results" / "tutorial.json"
LINES = 8  # of the output that are kept


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Return the `fastsac ...` commands of the page, each with the heading that it stands under."""
    found = []
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        heading = part.partition("\n")[0]
        for block in re.findall(r"^```sh[^\n]*\n(.*?)^```$", part, flags=re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if (words := shlex.split(line, comments=True))[:1] == ["fastsac"]:
                    found.append((heading, words))
    return found


def run(words: list[str], place: str) -> dict[str, Any]:
    begun = time.perf_counter()
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    lines = done.stdout.replace(place, "").splitlines()
    return {"seconds": time.perf_counter() - begun, "first_line": lines[0], "last_lines": lines[-LINES:]}


def table(result: dict[str, Any]) -> str:
    lines = ["| step | command | time |", "|---|---|---|"]
    for row in result["rows"]:
        words = row["command"].split()
        shown = " ".join(words) if len(words) <= 5 else " ".join([*words[:2], "..."])
        lines.append(f"| {row['step']} | `{shown}` | {row['seconds']:.0f} s |")
    return "\n".join(lines)


def main() -> None:
    rows, before = list[dict[str, Any]](), load_average()
    with tempfile.TemporaryDirectory() as place:
        for heading, words in commands(PAGE.read_text()):
            rows.append({"step": heading, "command": shlex.join(words), **run(words, place)})
            print(f"{rows[-1]['seconds']:6.1f} s  {rows[-1]['command']}", flush=True)
    about = {"command": "python -m benchmarks.tutorial", "machine": describe_machine(), "load_average_before": before}
    write_json(RESULT, {**about, "seeds": "0; 0 and 1 in the comparison", "rows": rows})


if __name__ == "__main__":
    main()
