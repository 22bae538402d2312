"""TensorBoard's event files, in the run directory. They are rebuilt from metrics.jsonl whenever the two may differ."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import Any

from fastsac.run_dir import METRICS, TENSORBOARD, read_rows
from fastsac.trackers import Line, Outcome, Run, by_tag


def start(run: Run) -> _TensorBoard:
    """Start a new file with the contents of metrics.jsonl."""
    return _TensorBoard(run)


class _TensorBoard:
    stored, place = "", ""

    def __init__(self, run: Run) -> None:
        self._told = run
        self._events: _Events | None = _Events(run)

    def log(self, lines: Sequence[Line]) -> None:
        try:
            if self._events is None or self._events.removed:  # metrics.jsonl has these lines already
                self._close()
                self._events = _Events(self._told)
                return
            for line in lines:
                self._events.add(line)
        except OSError:
            self._close()
            raise

    def video(self, step: int, path: Path) -> None:
        if self._events is not None:
            self._events.add_video(step, path)

    def close(self, outcome: Outcome) -> None:
        self._close()

    def _close(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            with suppress(OSError):
                events.close()


class _Events:
    """One file, written without a thread: the usual writer's thread would print a traceback if the disk is full."""

    def __init__(self, run: Run) -> None:
        """Start a file that replaces all earlier ones, so that no step is shown twice."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._proto, self._summary = event_pb2, summary_pb2
        directory, rows = run.directory / TENSORBOARD, read_rows(run.directory / METRICS)
        directory.mkdir(exist_ok=True)
        for path in directory.glob("events.out.tfevents.*"):
            path.unlink()
        self._path = directory / f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
        self._writer = RecordWriter(self._path.open("xb"))
        self._write(time.time(), file_version="brain.Event:2")
        # TensorBoard drops what it has read of the run so far
        self._write(time.time(), step=0, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._describe(run)
        began = time.time() - (rows[-1].get("time_s", 0.0) if rows else 0.0)
        for row in rows:
            self.add(by_tag(row), began + row.get("time_s", 0.0))

    def _describe(self, run: Run) -> None:
        """Write the settings for the HPARAMS tab, and settings and machine for the TEXT tab."""
        made: Any = importlib.import_module("torch.utils.tensorboard.summary")  # it has no types
        plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in run.settings.items()}
        texts = {"settings": run.settings, "system": run.system}
        shown = [made.text(name, indent(json.dumps(each, indent=2), "    ")) for name, each in texts.items()]
        for summary in [*made.hparams(plain, {"eval/return": 0.0}), *shown]:
            self._write(time.time(), step=0, summary=summary)

    @property
    def removed(self) -> bool:
        """Whether the file has been removed."""
        return not self._path.exists()

    def add(self, line: Line, wall_time: float | None = None) -> None:
        step, values = line
        scalars = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(wall_time or time.time(), step=step, summary=self._summary.Summary(value=scalars))

    def add_video(self, step: int, path: Path) -> None:
        """Write it as an animated GIF, which TensorBoard can show: ten frames per second, half as wide and high."""
        from imageio_ffmpeg import get_ffmpeg_exe

        options = ["-i", str(path), "-vf", "fps=10,scale=iw/2:-1", "-f", "gif", "-"]
        done = subprocess.run(
            [get_ffmpeg_exe(), "-loglevel", "error", *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
        encoded = done.stdout
        width, height = struct.unpack_from("<HH", encoded, 6)
        image = self._summary.Summary.Image(encoded_image_string=encoded, height=height, width=width, colorspace=3)
        value = self._summary.Summary.Value(tag="eval/video", image=image)
        self._write(time.time(), step=step, summary=self._summary.Summary(value=[value]))

    def _write(self, wall_time: float, **fields: Any) -> None:
        self._writer.write(self._proto.Event(wall_time=wall_time, **fields).SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
