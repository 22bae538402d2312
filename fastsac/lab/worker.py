"""The process of one run of a comparison: `python -m fastsac.lab.worker RUN_DIR`, which goes on if it can.

It reads `RUN_DIR.config.json`, and leaves `machine.json` in the run directory. Exit status: 0 when the run is complete,
75 when a signal has stopped it, else that of `fastsac train`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fastsac.callbacks import Callback
from fastsac.config import Config
from fastsac.errors import FastsacError
from fastsac.machine import describe_machine, write_json
from fastsac.run_dir import CONFIG, config_from_dict
from fastsac.train import SAC

#: exit status of a run that can go on
STOPPED = 75
MACHINE = "machine.json"


class WithParent(Callback):
    """Ends the run when the comparison has died."""

    def __init__(self) -> None:
        """Remember whose child this process is."""
        self.parent = os.getppid()
        self.orphaned = False

    def on_step(self, agent: Any) -> bool:
        """Return whether the parent is still there."""
        self.orphaned = os.getppid() != self.parent
        return not self.orphaned


def config_file(run_dir: Path) -> Path:
    """Return where a run's process finds its configuration."""
    return run_dir.with_name(f"{run_dir.name}.config.json")


def train(run_dir: Path, config: Config, *callbacks: Callback) -> SAC:
    """Train to the end, from the newest checkpoint if there is one; return the agent."""
    agent = SAC.resume(run_dir, config) if (run_dir / CONFIG).exists() else SAC(config)
    agent.prepare()
    run_dir.mkdir(parents=True, exist_ok=True)
    setup = {"engine": agent.engine, "precision": agent.setup.precision, "machine": describe_machine()}
    write_json(run_dir / MACHINE, setup)
    agent.learn(config.total_steps, run_dir, callback=callbacks or None)
    return agent


def main() -> None:
    """Train the run that the command line names."""
    run_dir = Path(sys.argv[1])
    parent = WithParent()
    try:
        config = config_from_dict(json.loads(config_file(run_dir).read_text()))
        agent = train(run_dir, config, parent)
    except FastsacError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    if agent.stopped_by_signal or parent.orphaned:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
