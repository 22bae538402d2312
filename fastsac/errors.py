"""Errors that a user can cause, each with a one-line message."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path


class FastsacError(Exception):
    """A failed run. The one-line message says what is wrong and how to fix it."""

    exit_status = 1


class EnvironmentFailure(FastsacError):
    """An environment raised an exception, or returned invalid values."""


class Divergence(FastsacError):
    """A loss or a parameter is not finite."""


class EnvironmentMisfit(EnvironmentFailure):
    """An environment returned observations that do not have the shape of its observation space."""

    exit_status = 2


class OtherShape(ValueError):
    """An observation whose shape or keys differ from those of its space."""


class WorkerError(Exception):
    """An exception that an environment raised in its own process; the message names the type."""


class UsageError(FastsacError):
    """Invalid settings or arguments, found before anything was written; or an error in the user's own code."""

    exit_status = 2


def told(error: Exception, *ours: str) -> str:
    """Return an error of the user's code on one line, with the first traceback entry outside `ours`."""
    import traceback

    ours = (*ours, importlib.__file__)
    frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename not in ours]
    first = next((each for each in frames if not each.filename.startswith("<frozen importlib")), None)
    where = "" if first is None else f" ({Path(first.filename).name}, line {first.lineno})"
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean A, B or C?"``, or an empty string if no known name is similar."""
    import difflib

    by_lower = {candidate.lower(): candidate for candidate in known}
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)]
    if not near:
        return ""
    return f"; did you mean {', '.join(near[:-1]) + ' or ' if len(near) > 1 else ''}{near[-1]}?"
