"""MLflow, through its own client, which reads MLFLOW_TRACKING_URI and so on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsac.trackers import Line, Outcome, Run

#: MLflow's limits: characters in a parameter's value, and parameters per call
LONGEST, MOST = 6000, 100


def start(run: Run) -> _Mlflow:
    """Start a run in the experiment `run.project`, or resume the stored one."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own seven take minutes
    from mlflow import MlflowClient
    from mlflow.entities import Param, RunStatus

    client = MlflowClient()
    if run.stored is not None:
        client.update_run(run.stored, status=RunStatus.to_string(RunStatus.RUNNING))
        before = client.get_run(run.stored).data.params
        for name, value in run.settings.items():
            if before.get(name) != str(value)[:LONGEST]:  # parameters cannot be changed
                client.set_tag(run.stored, f"settings.{name}", str(value))
        return _Mlflow(client, run.stored)
    experiment = client.get_experiment_by_name(run.project)
    experiment_id = client.create_experiment(run.project) if experiment is None else experiment.experiment_id
    run_id: str = client.create_run(experiment_id, run_name=run.name).info.run_id
    params = [Param(name, str(value)[:LONGEST]) for name, value in run.settings.items()]
    for first in range(0, len(params), MOST):
        client.log_batch(run_id, params=params[first : first + MOST])
    for name, value in run.system.items():
        client.set_tag(run_id, f"system.{name}", json.dumps(value))
    return _Mlflow(client, run_id)


class _Mlflow:
    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self.stored = run_id
        self.place = f"run {run_id} at {client.tracking_uri}"

    def log(self, lines: Sequence[Line]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for step, values in lines:
            self._client.log_batch(self.stored, [Metric(name, value, now, step) for name, value in values.items()])

    def video(self, step: int, path: Path) -> None:
        self._client.log_artifact(self.stored, str(path), "eval")

    def close(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
        self._client.set_terminated(self.stored, status[outcome])
