"""Writes metrics.jsonl, from which every tracker gets its data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from fastsac.run_dir import METRICS, Row, read_rows, replace_text

Value = float | int | Tensor


def read_scalars(values: Mapping[str, Value]) -> dict[str, float]:
    """Read scalars; those on a device are read in one transfer."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    read = torch.stack([value.detach().double() for value in tensors.values()]).tolist() if tensors else []
    on_device = dict(zip(tensors, read, strict=True))
    return {name: float(on_device.get(name, value)) for name, value in values.items()}


class MetricsFile:
    """A run's metrics.jsonl; a line that cannot be written is written with the next one."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Open the file and drop all lines after `step`; OSError if that fails."""
        self._path = run_dir / METRICS
        self._waiting: list[Row] = []
        rows = [row for row in read_rows(self._path) if row["step"] <= step]
        replace_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file: IO[bytes] | None = self._path.open("ab")

    def add(self, row: Row) -> tuple[list[Row], str]:
        """Write the line and all waiting ones; return the lines written, and an error message or an empty string."""
        self._waiting.append(row)
        return self._write()

    def _write(self) -> tuple[list[Row], str]:
        written: list[Row] = []
        try:
            if self._file is not None and not _is_at(self._file, self._path):  # removed, or moved with the run
                self._file.close()
                self._file = None
            if self._file is None:
                self._file = self._path.open("ab")
            while self._waiting:
                end = os.fstat(self._file.fileno()).st_size
                try:
                    self._file.write(json.dumps(self._waiting[0]).encode() + b"\n")
                    self._file.flush()
                except OSError:
                    self._close_metrics(end)
                    raise
                written.append(self._waiting.pop(0))
        except OSError as error:
            return written, f"cannot write {self._path}: {error.strerror}"
        return written, ""

    def _close_metrics(self, size: int) -> None:
        """Close the file, without a partial line at its end."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                os.truncate(self._path, size)

    def close(self) -> tuple[list[Row], str]:
        """Close the file after a last attempt to write the waiting lines; return the same as `add`."""
        written = self._write() if self._waiting else ([], "")
        if self._file is not None:
            self._file.close()
        return written


def _is_at(file: IO[bytes], path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
