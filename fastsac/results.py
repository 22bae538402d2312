"""Lists the runs in a directory tree and their progress: `fastsac ls`.

Nothing here imports PyTorch, writes a file or follows a symbolic link, and any file may be damaged or incomplete.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.run_dir import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    NO_LINK,
    NO_WAIT,
    TENSORBOARD,
    is_held,
    newest_step,
    parse_json,
    parse_row,
    read_config,
    read_lines,
)

RUNNING, FINISHED, REACHED, STOPPED = "running", "finished", "target reached", "stopped"
NO_CHECKPOINT, EMPTY, DAMAGED = "stopped, no checkpoint", "empty", "damaged"
COLOURS = {RUNNING: "cyan", FINISHED: "green", REACHED: "green", EMPTY: "yellow", DAMAGED: "red"}
RETURN = "eval_return"
NONE = "-"
#: maximum bytes of a checkpoint's state.json; with the actions of long episodes it has a few megabytes
LONGEST_STATE = 64 * 2**20


class Entry(NamedTuple):
    """What the files say about a run; None if they do not say."""

    run: str  # its directory, relative to the one that was searched
    state: str
    env_id: str | None = None
    estimator: str | None = None
    baseline: str | None = None
    num_action_samples: int | None = None
    seed: int | None = None
    steps: int | None = None
    total_steps: int | None = None
    last_return: float | None = None
    best_return: float | None = None
    checkpoint: int | None = None  # step of the newest one, from which --resume continues
    problem: str = ""  # what is damaged


def find_runs(directory: Path) -> list[Path]:
    """Return the run directories in a directory tree, sorted by path, with numbers sorted by value.

    A run directory has a readable config.json, or metrics or checkpoints next to an unreadable one. Symbolic links and
    hidden directories below `directory` are skipped. Unreadable directories are reported on standard error.

    Raises:
        UsageError: if there is no such directory.
    """
    if not directory.is_dir():
        what = "is a file: name a directory" if directory.exists() else "does not exist: name a directory with runs"
        raise UsageError(f"{directory} {what}")

    def tell(error: OSError) -> None:
        print(f"fastsac: {error.filename} cannot be read: {error.strerror}", file=sys.stderr)

    found = []
    for place, below, files in os.walk(directory, onerror=tell):
        path, there = Path(place), CONFIG in files or CHECKPOINTS in below
        below[:] = [name for name in below if name not in (CHECKPOINTS, TENSORBOARD) and not name.startswith(".")]
        if METRICS in files or (there and (_newest(path) is not None or _has_config(path))):
            found.append(path)
    return sorted(found, key=lambda path: _natural(str(path)))


def _has_config(run_dir: Path) -> bool:
    with suppress(UsageError):
        read_config(run_dir)
        return True
    return False


def _natural(text: str) -> list[tuple[float, str]]:
    """Return a sort key by which seed-10 follows seed-9, and tau=0.01 follows tau=0.005."""
    parts = re.split(r"([0-9]{1,18}(?:[.][0-9]{1,18})?)", text)
    return [(float(part), "") if place % 2 else (0.0, part) for place, part in enumerate(parts)]


def _newest(run_dir: Path) -> int | None:
    return None if (run_dir / CHECKPOINTS).is_symlink() else newest_step(run_dir)


def look_at(run_dir: Path, name: str) -> Entry:
    """Return what a run directory's files say about the run, which may still be running."""
    running = is_held(run_dir)  # checked first: if the run ends after this, all its files are read below
    try:
        config = read_config(run_dir)
        lines = read_lines(run_dir / METRICS)
    except UsageError as error:
        return Entry(name, RUNNING if running else DAMAGED, problem=str(error))
    except OSError as error:
        problem = f"{run_dir / METRICS} cannot be read ({error.strerror})"
        return Entry(name, RUNNING if running else DAMAGED, problem=problem)
    steps = next((int(row["step"]) for line in reversed(lines) if (row := parse_row(line)) is not None), None)
    rows = [row for line in lines if RETURN.encode() in line and (row := parse_row(line)) is not None]  # few of them
    returns = [row[RETURN] for row in rows if RETURN in row]
    newest, problem = _newest(run_dir), ""
    if running:
        state = RUNNING
    elif newest is None:
        state = EMPTY if steps is None else NO_CHECKPOINT
    else:
        try:
            state = _ended(config, _read_state(run_dir, newest))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            state, problem = DAMAGED, f"the checkpoint of step {newest} in {run_dir} cannot be read"
    return Entry(
        *(name, state, config.env_id, config.estimator, config.baseline, config.num_action_samples, config.seed),
        steps=max((each for each in (steps, newest) if each is not None), default=None),
        total_steps=config.total_steps,
        last_return=returns[-1] if returns else None,
        best_return=max(returns, default=None),
        checkpoint=newest,
        problem=problem,
    )


def _ended(config: Config, state: dict[str, Any]) -> str:
    """Return how a run ended, as in `SAC.finished`."""
    steps, reached, due = state["steps"], state["reached"], state["evaluation_due"]
    if steps >= config.total_steps and not due:
        return FINISHED
    return REACHED if config.target_return is not None and reached == config.target_return and not due else STOPPED


def _read_state(run_dir: Path, step: int) -> dict[str, Any]:
    """Return a checkpoint's state.json; OSError or ValueError if it cannot be read."""
    name = f"step-{step:012d}"
    place = next((each for each in (name, f".{name}.replaced") if (run_dir / CHECKPOINTS / each).exists()), name)
    path = run_dir / CHECKPOINTS / place / "state.json"
    if path.parent.is_symlink():
        raise ValueError("it is a symbolic link")
    descriptor = os.open(path, os.O_RDONLY | NO_LINK | NO_WAIT)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LONGEST_STATE:
            raise ValueError("it is not a regular file, or is too large")
        return parse_json(file.read())


def ls(directory: Path, as_json: bool) -> None:
    """Print a table of the runs found below a directory, or one JSON object.

    Raises:
        UsageError: if there is no such directory.
    """
    entries = [look_at(path, os.path.relpath(path, directory)) for path in find_runs(directory)]
    if as_json:
        print(json.dumps({"runs": [entry._asdict() for entry in entries]}, indent=2))
        return
    if not entries:
        print(f"fastsac: there are no runs in {directory}", file=sys.stderr)
        return
    _print_table(entries)
    for entry in entries:
        if entry.problem:
            print(f"fastsac: {printable(entry.problem)}", file=sys.stderr)


def _print_table(entries: Sequence[Entry]) -> None:
    """Print a row for each run, with colours on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("run", "task", "estimator", box=None, pad_edge=False)
    for name in ("seed", "steps", "last return", "best return"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for entry in entries:
        steps = NONE if entry.steps is None else f"{entry.steps:,}"
        steps += "" if entry.total_steps is None else f"/{entry.total_steps:,}"
        cells = [entry.run, entry.env_id or NONE, _estimator(entry), NONE if entry.seed is None else f"{entry.seed}"]
        cells += [steps, *(NONE if each is None else f"{each:,.1f}" for each in (entry.last_return, entry.best_return))]
        table.add_row(*(Text(printable(cell)) for cell in cells), Text(entry.state, COLOURS.get(entry.state, "")))
    console = Console(width=100_000)  # never wrap or cut off, in a terminal or a file
    with console.capture() as printed:
        console.print(table)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))


def _estimator(entry: Entry) -> str:
    """Return `estimator[:baseline[:K]]`, without the parts that are automatic."""
    parts = [entry.estimator, entry.baseline, entry.num_action_samples]
    return ":".join(str(part) for part in parts if part not in (None, "auto")) or NONE


def printable(text: str) -> str:
    """Replace unprintable characters, for example in file names, with question marks."""
    return "".join(character if character.isprintable() else "?" for character in text)
