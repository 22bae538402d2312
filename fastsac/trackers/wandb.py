"""Weights & Biases, through its own client, which reads WANDB_MODE, WANDB_ENTITY and so on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsac.trackers import Line, Outcome, Run


def start(run: Run) -> _Wandb:
    """Start a run, or resume the stored one; it writes below the run directory."""
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    config = {**run.settings, "system": run.system}
    made = wandb.init(
        project=run.project,
        name=run.name,
        id=run.stored,
        resume="allow",
        dir=str(run.directory),
        config=config,
        reinit="create_new",  # several seeds may be trained in one process
        settings=settings,
    )
    # a resumed run goes back to its checkpoint, but W&B's own step never decreases
    made.define_metric("*", step_metric="step")
    return _Wandb(made)


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run
        self.stored: str = run.id
        self.place: str = run.url if not run.offline else f"offline; `wandb sync {Path(run.dir).parent}` uploads it"

    def log(self, lines: Sequence[Line]) -> None:
        for step, values in lines:
            self._run.log({"step": step, **values})

    def video(self, step: int, path: Path) -> None:
        import wandb

        self._run.log({"step": step, "eval/video": wandb.Video(str(path), format="mp4")})

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code={"finished": 0, "failed": 1, "stopped": 255}[outcome])  # 255: "killed"
