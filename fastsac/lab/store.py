"""Stores the files of a comparison's runs on a Ray cluster: an actor on the driver's node."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from fastsac.checkpoint import best_checkpoint
from fastsac.lab.worker import MACHINE
from fastsac.run_dir import CONFIG, LOCK, METRICS

#: a run's files, by their names relative to the run directory
Files = dict[str, bytes]


class Store:
    """Keeps the runs' files in the comparison's directory."""

    def __init__(self, out: str) -> None:
        """Remember the directory."""
        self._out = Path(out)
        self._attempts: dict[str, int] = {}
        self._steps: dict[str, int] = {}

    def begin(self, name: str) -> tuple[int, Files]:
        """Return the number of this attempt at a run, and the files that earlier ones have left."""
        self._attempts[name] = self._attempts.get(name, 0) + 1
        run_dir = self._out / name
        if not run_dir.exists() and _replaced(run_dir).exists():  # the driver died between two renames
            _replaced(run_dir).rename(run_dir)
        return self._attempts[name], read_files(run_dir) if (run_dir / CONFIG).exists() else {}

    def put(self, name: str, attempt: int, files: Files) -> bool:
        """Replace the run directory by the files, all at once; return False if a later attempt has begun."""
        if attempt != self._attempts[name]:
            return False
        run_dir = self._out / name
        temporary, old = run_dir.with_name(f".{run_dir.name}.shipped"), _replaced(run_dir)
        for path in (temporary, old):
            shutil.rmtree(path, ignore_errors=True)
        write_files(temporary, files)
        if run_dir.exists():
            run_dir.rename(old)
        temporary.rename(run_dir)
        shutil.rmtree(old, ignore_errors=True)
        return True

    def report(self, name: str, step: int) -> None:
        """Record how far a run is."""
        self._steps[name] = step

    def steps(self) -> dict[str, int]:
        """Return how far each started run is."""
        return self._steps


def _replaced(run_dir: Path) -> Path:
    return run_dir.with_name(f".{run_dir.name}.replaced")


def read_files(run_dir: Path, checkpoint: Path | None = None) -> Files:
    """Return a run directory's files.

    Args:
        run_dir: the run directory.
        checkpoint: while the run is training: only this checkpoint, and the other files that a resume needs.
    """
    if checkpoint is None:
        paths = [path for path in run_dir.rglob("*") if path.name != LOCK]
    else:
        paths = [*checkpoint.iterdir(), *(run_dir / name for name in (CONFIG, METRICS, MACHINE))]
        return _files_of_best(run_dir) | {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in paths}
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def _files_of_best(run_dir: Path) -> Files:
    """Return the files of the best checkpoint, if there is one: it may be replaced meanwhile."""
    while (best := best_checkpoint(run_dir)).exists():
        with suppress(FileNotFoundError):
            return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in best.iterdir()}
    return {}


def write_files(run_dir: Path, files: Files) -> None:
    """Write what `read_files` returned.

    Raises:
        ValueError: for a name that leads out of the directory.
    """
    run_dir.mkdir(parents=True)
    for name, content in files.items():
        path = run_dir / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} leads out of the run directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
