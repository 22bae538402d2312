"""The directory of results: the files that the report is made of, and what they must have."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastsac.errors import UsageError

Json = dict[str, Any]
OTHER_OUT = "choose another --out"
NUMBER = (int, float, type(None))
EACH = "*"
MIDDLE = {"iqm": NUMBER, "low": NUMBER, "high": NUMBER}
LINE = {name: [NUMBER] for name in ("steps", "iqm", "low", "high")}
#: what a file must have to be shown; anything else is shown if it is there
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


def make_directory(path: Path) -> None:
    """Make the directory of results if needed; UsageError if nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"{path} is a file: {OTHER_OUT}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be created ({error.strerror}): {OTHER_OUT}") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path} cannot be written to: {OTHER_OUT}")


def read_results(directory: Path) -> dict[str, Json]:
    """Return the results by name: comparison, cost, gradients, toy.

    Raises:
        UsageError: if there are no results, or a file is not what it should be.
    """
    results: dict[str, Json] = {}
    if not directory.is_dir():
        raise UsageError(f"{directory} does not exist" if not directory.exists() else f"{directory} is not a directory")
    for name, shape in SHAPES.items():
        path = directory / f"{name}.json"
        try:
            result = json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is damaged: it is not JSON: {error}") from error
        if not isinstance(result, dict):
            raise UsageError(f"{path} is damaged: it does not hold an object")
        if result.get("format", 1) != 1:
            raise UsageError(f"{path} has format {result['format']!r}, and this version of fastsac reads format 1")
        try:
            check(result, shape, name)
        except ValueError as error:
            raise UsageError(f"{path} is damaged: {error}") from error
        results[name] = result
    if not results:
        files = ", ".join(f"{name}.json" for name in SHAPES)
        raise UsageError(
            f"{directory} has none of {files}: make one with `fastsac compare` or `fastsac lab ... --out` first"
        )
    return results


def check(value: object, shape: object, where: str) -> None:
    """Raise ValueError that names the place if `value` does not have the shape."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        for key, inner in shape.items():
            if key != EACH and key not in value:
                raise ValueError(f"{where} has no {key!r}")
            for name in value if key == EACH else [key]:
                check(value[name], inner, f"{where}[{name!r}]")
        if shape is LINE and len({len(value[name]) for name in LINE}) > 1:
            raise ValueError(f"{where} has lists that differ in length")
    elif isinstance(shape, list):
        if not isinstance(value, list) or (not value and shape == [str]):
            raise ValueError(f"{where} is not a list, or is empty")
        for index, part in enumerate(value):
            check(part, shape[0], f"{where}[{index}]")
    elif not isinstance(value, shape):  # type: ignore[arg-type]
        raise ValueError(f"{where} is {value!r:.60}, not a {'number' if shape is NUMBER else shape.__name__}")  # type: ignore[attr-defined]
