"""What other operating systems lack is not used; simulated, see `tests/elsewhere.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsac import envs
from fastsac.env_backends import EnvSpec
from fastsac.errors import UsageError

ELSEWHERE = Path(__file__).with_name("elsewhere.py")
TINY = (  # noqa: SIM905, a list is harder to read
    "train --env-id Pendulum-v1 --num-envs 2 --hidden-sizes 8 --batch-size 8 --learning-starts 20 --buffer-size 1000 "
    "--eval-episodes 1 --eval-every 50 --num-threads 1 --checkpoint-every 30 --checkpoint-replay"
).split()


def run_elsewhere(system: str, where: Path, *commands: list[str]) -> tuple[list[int], str, str]:
    """Return the statuses of the command lines, what was printed after them, and standard error."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", str(ELSEWHERE), system, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=where, env=variables, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [json.loads(line)["status"] for line in lines if line.startswith('{"status"')], lines[-1], done.stderr


def check_runs(system: str, where: Path, *more: list[str]) -> tuple[list[int], str]:
    statuses, triton, errors = run_elsewhere(
        system,
        where,
        [*TINY, "--total-steps", "100", "--run-dir", "run"],
        ["train", "--resume", "run", "--total-steps", "140"],
        ["eval", "run", "--episodes", "1"],
        *more,
    )
    assert statuses[:3] == [0, 0, 0], errors
    assert "the replay buffer is empty" not in errors
    assert sorted(path.name for path in (where / "run" / "checkpoints").glob("step-*"))[-1].endswith("140")
    assert not (where / "run" / ".lock").exists()
    assert triton.startswith("these kernels need Triton, which is not installed: pip install triton")
    return statuses[3:], errors


def test_on_windows(tmp_path):
    train = [*TINY, "--total-steps", "30", "--run-dir", "other"]
    refused = [*train, "--restarts", "1"], [*train, "--env-backend", "envpool"]
    statuses, errors = check_runs("windows", tmp_path, *refused)
    assert statuses == [2, 2]
    assert errors.count("EnvPool cannot be imported") == 2  # once for `auto`, and where it was asked for
    assert "using Gymnasium's environments instead" in errors
    assert "Pendulum-v1 (gymnasium)" in errors
    assert "--restarts needs Linux or macOS" in errors
    assert "--env-backend envpool: EnvPool cannot be imported" in errors


@pytest.mark.slow
def test_on_macos(tmp_path):
    _, errors = check_runs("macos", tmp_path)
    assert "Pendulum-v1 (envpool)" in errors


def test_without_envpool(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "envpool", None)
    made = envs.make_envs(EnvSpec("Pendulum-v1"), 1, 0)
    assert made.backend_name == "gymnasium"
    made.close()
    with pytest.raises(UsageError, match="pip install envpool, or use --env-backend auto"):
        envs.make_envs(EnvSpec("Pendulum-v1", "envpool"), 1, 0)
