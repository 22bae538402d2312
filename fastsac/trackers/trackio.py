"""Trackio, through its own client, which reads TRACKIO_DIR, TRACKIO_SPACE_ID and so on."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import redirect_stdout
from contextvars import Context
from io import StringIO
from pathlib import Path
from typing import Any

from fastsac.trackers import Line, Outcome, Run


def start(run: Run) -> _Trackio:
    """Start a run, or resume the stored one."""
    import trackio

    config = {**run.settings, "system": run.system}
    # it finds a run by its name only, and several run directories may have the same one
    name, resume = run.stored or f"{run.name}-{secrets.token_hex(3)}", "allow" if run.stored else "never"
    with redirect_stdout(StringIO()):  # it prints what `place` says
        # in its own context: several seeds may be trained in one process, and a new run would end the previous one
        made = Context().run(lambda: trackio.init(run.project, name, config=config, resume=resume, embed=False))
    return _Trackio(made)


class _Trackio:
    def __init__(self, run: Any) -> None:
        self._run = run
        self.stored: str = run.name
        self.place = f'`trackio show --project "{run.project}"` shows it'

    def log(self, lines: Sequence[Line]) -> None:
        for step, values in lines:
            self._run.log(values, step=step)

    def video(self, step: int, path: Path) -> None:
        import trackio

        self._run.log({"eval/video": trackio.Video(str(path), format="mp4")}, step=step)

    def close(self, outcome: Outcome) -> None:
        with redirect_stdout(StringIO()):
            self._run.finish()
