"""A run's directory: whose it is, and its config.json."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastsac.config import Config
from fastsac.errors import FastsacError, UsageError

CONFIG = "config.json"
METRICS = "metrics.jsonl"


def refuse_if_taken(directory: Path) -> None:
    """Raise UsageError if the directory already holds a run."""
    if not any((directory / name).exists() for name in (CONFIG, METRICS, "checkpoints")):
        return
    if any((directory / "checkpoints").glob("step-*")):
        advice = "choose another directory, or go on with it (--resume, SAC.load)"
    else:
        advice = "it ended before its first checkpoint, so choose another directory or delete this one"
    raise UsageError(f"{directory} already holds a run: {advice}")


def write_config(directory: Path, config: Config) -> None:
    """Write config.json atomically, making the directory if need be.

    Raises:
        FastsacError: if it cannot be written.
    """
    temporary = directory / f".{CONFIG}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        temporary.replace(directory / CONFIG)
    except OSError as error:
        raise FastsacError(f"cannot write to the run directory {directory}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_config(directory: Path) -> Config:
    """Read config.json back.

    Raises:
        UsageError: if there is none that can be read.
    """
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{directory} is no run directory: {path} cannot be read ({error})") from error
    return config_from_dict(values)


def config_from_dict(values: Any) -> Config:
    """Return the configuration that `dataclasses.asdict` was taken of.

    Raises:
        UsageError: if a setting is unknown or out of its range.
    """
    if not isinstance(values, dict):
        raise UsageError("the stored configuration is not a JSON object")
    unknown = set(values) - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise UsageError(f"the stored configuration has unknown settings: {', '.join(sorted(unknown))}")
    return Config(**values)
