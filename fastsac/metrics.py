"""The files that metrics go to: metrics.jsonl, and TensorBoard's events."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fastsac.run_dir import METRICS, TENSORBOARD, temporary_sibling

Value = float | int | Tensor
Row = dict[str, float | int]


def read_scalars(values: Mapping[str, Value]) -> dict[str, float]:
    """Read scalars, those that are on a device all at once."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    read = torch.stack([value.detach().double() for value in tensors.values()]).tolist() if tensors else []
    on_device = dict(zip(tensors, read, strict=True))
    return {name: float(on_device.get(name, value)) for name, value in values.items()}


class MetricsFiles:
    """metrics.jsonl, and TensorBoard's events, which are made of it whenever the two may differ."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Open the files, without what they hold behind `step`; OSError if that fails."""
        self._path = run_dir / METRICS
        self._directory = run_dir / TENSORBOARD
        self._waiting: list[Row] = []
        rows = [row for row in read_rows(self._path) if row["step"] <= step]
        temporary = temporary_sibling(self._path)
        try:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
            temporary.replace(self._path)
        finally:
            with suppress(OSError):
                temporary.unlink()
        self._file: IO[bytes] | None = self._path.open("ab")
        self._events: _Events | None = _Events(self._directory, rows)

    def add(self, row: Row) -> str:
        """Write the line and those that wait; return what went wrong, or an empty string."""
        self._waiting.append(row)
        return self._write()

    def _write(self) -> str:
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
                row = self._waiting.pop(0)
                if self._events is not None:
                    self._events.add(row)
            if self._events is None or self._events.removed:
                self._close_events()
                self._events = _Events(self._directory, read_rows(self._path))
        except OSError as error:
            self._close_events()
            return f"cannot write {self._path}: {error.strerror}"
        return ""

    def _close_metrics(self, size: int) -> None:
        """Close the file without the half line that it may hold."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                os.truncate(self._path, size)

    def _close_events(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            with suppress(OSError):
                events.close()

    def close(self) -> str:
        """Close the files; return what could not be written, or an empty string."""
        problem = self._write() if self._waiting else ""
        self._close_events()
        if self._file is not None:
            self._file.close()
        return problem


def _is_at(file: IO[bytes], path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def read_rows(path: Path) -> list[Row]:
    """Return the lines of a metrics.jsonl that are whole."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError, TypeError, RecursionError):  # cut short, or not ours
            row = json.loads(line)
            if isinstance(row, dict) and row.get("step", -1) >= 0 and all(abs(value) < 1e38 for value in row.values()):
                rows.append(row)
    return rows


class _Events:
    """TensorBoard events, written at once: the usual writer's thread would print a traceback if the disk is full."""

    def __init__(self, directory: Path, rows: Sequence[Row]) -> None:
        """Begin a new file with `rows`, in place of all earlier ones: no step is ever shown twice."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._proto, self._summary = event_pb2, summary_pb2
        directory.mkdir(exist_ok=True)
        for path in directory.glob("events.out.tfevents.*"):
            path.unlink()
        self._path = directory / f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
        self._writer = RecordWriter(self._path.open("xb"))
        self._write(time.time(), file_version="brain.Event:2")
        # whoever watches the run drops what was read of it before
        self._write(time.time(), step=0, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        began = time.time() - (rows[-1].get("time_s", 0.0) if rows else 0.0)
        for row in rows:
            self.add(row, began + row.get("time_s", 0.0))

    @property
    def removed(self) -> bool:
        """Whether somebody has removed the file."""
        return not self._path.exists()

    def add(self, row: Row, wall_time: float | None = None) -> None:
        values = {key: value for key, value in row.items() if key not in ("step", "updates", "time_s")}
        scalars = [self._summary.Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        summary = self._summary.Summary(value=scalars)
        self._write(wall_time or time.time(), step=int(row["step"]), summary=summary)

    def _write(self, wall_time: float, **fields: Any) -> None:
        self._writer.write(self._proto.Event(wall_time=wall_time, **fields).SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
