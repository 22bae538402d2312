"""`fastsac train --restarts`: real processes that die, hang and are stopped."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastsac import SAC, supervisor
from fastsac.checkpoint import latest_checkpoint
from fastsac.run_dir import newest_step
from tests.runs import SMALL, metrics_of

ROOT = Path(__file__).parents[1]
SETTINGS = (  # noqa: SIM905, a list is harder to read
    "--env-id tests.faulty:Faulty-v0 --num-envs 2 --hidden-sizes 8 --batch-size 8 --learning-starts 20 "
    "--buffer-size 1000 --eval-episodes 2 --eval-every 100 --log-every 50 --num-threads 1 --precision fp32 "
    "--checkpoint-every 50 --checkpoint-replay --total-steps 300"
).split()


def start(run_dir, *arguments, fault=""):
    command = [sys.executable, "-m", "fastsac", "train", *SETTINGS, "--run-dir", str(run_dir), *arguments]
    environment = {**os.environ, "FAULT": fault, "PYTHONPATH": str(ROOT)}
    # no core files, and a group of its own, so that nothing that goes wrong here stops the tests
    return subprocess.Popen(
        ["bash", "-c", 'ulimit -c 0; exec "$@"', "bash", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def told(stderr):
    """The lines of the parent and of errors."""
    return [line for line in stderr.splitlines() if line.startswith("fastsac: ") and "run directory" not in line]


@pytest.fixture(scope="module")
def untroubled(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("untroubled") / "run"
    process = start(run_dir)
    process.communicate()
    return run_dir


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param("abort", "the training process was aborted by an environment or a library (SIGABRT)", marks=SLOW),
        pytest.param("segfault", "the training process was ended by a segmentation fault (SIGSEGV)", marks=SLOW),
        pytest.param("oom", "the training process was killed, perhaps out of memory (SIGKILL)", marks=SLOW),
        pytest.param("exit", "the training process ended with status 77", marks=SLOW),
        ("hang", "the training process made no step in 6 s (--step-timeout) and was killed"),
        pytest.param("raise", "an environment failed", marks=SLOW),
        pytest.param("nan", "an environment failed", marks=SLOW),
        pytest.param("nan-reward", "an environment failed", marks=SLOW),
        pytest.param("shape", "an environment failed", marks=SLOW),
    ],
)
def test_a_run_survives_what_happens_to_it(tmp_path, untroubled, kind, message):
    fault = f"{kind}:100:{tmp_path / 'marker'}"
    process = start(tmp_path / "run", "--restarts", "2", "--step-timeout", "6", "--preset", "sac", fault=fault)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    # that of step 150 may not have been written yet
    going_on = rf"fastsac: {re.escape(message)}; continuing from step (100|150) \(restart 1 of 2\)"
    assert re.fullmatch(going_on, told(stderr)[-1]), stderr
    assert len(told(stderr)) <= 2
    assert "evaluation return" in stdout
    assert metrics_of(tmp_path / "run") == metrics_of(untroubled)


def test_a_process_that_starts_or_saves_has_more_time(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "BUSY_SECONDS", 1.5)
    for messages, patience in ((b"", 1.5), (b".", 0.3), (b"..B", 1.5), (b"B.", 0.3)):
        parent = supervisor.Supervisor(tmp_path, restarts=1, step_timeout=0.3)
        parent._child = subprocess.Popen(["sleep", "60"], process_group=0)
        listen, tell = os.pipe()
        os.write(tell, messages)
        assert parent._watch(listen) == (patience, False)
        assert parent._child.wait() == -signal.SIGKILL
        os.close(listen)
        os.close(tell)


@SLOW  # the next one needs one restart more, and is as strict
def test_it_gives_up_without_progress(tmp_path):
    process = start(tmp_path / "run", "--restarts", "1", "--checkpoint-every", "1000", fault="abort:30")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert told(stderr)[-1] == (
        "fastsac: the training process was aborted by an environment or a library (SIGABRT); "
        "gave up at the beginning: no progress after 1 of 1 restarts"
    )


@pytest.mark.slow
def test_what_fails_again_is_tried_with_other_episodes(tmp_path):
    """The first restart repeats the run exactly; an environment that fails at a place would fail there again."""
    process = start(tmp_path / "run", "--restarts", "2", "--checkpoint-every", "1000", fault="abort:30")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    ends = [line.rpartition("; ")[2] for line in told(stderr) if "; " in line]
    assert ends == [
        "continuing from the beginning (restart 1 of 2)",
        "continuing from the beginning, with new episodes (restart 2 of 2)",
        "gave up at the beginning: no progress after 2 of 2 restarts",
    ]


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def child_of(process):
    (number,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(number)


LONG = ("--restarts", "3", "--total-steps", "1000000", "--eval-every", "0")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW)])
def test_signals_reach_the_child(tmp_path, number):
    process = start(tmp_path / "run", *LONG)
    wait_for(lambda: newest_step(tmp_path / "run"))
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "interrupted at step" in stdout
    assert "restart" not in stderr
    assert str(newest_step(tmp_path / "run")) in stdout.replace(",", "")


def test_a_second_signal_acts_at_once_even_if_the_child_hangs(tmp_path):
    process = start(tmp_path / "run", *LONG, fault="hang:100")
    wait_for(lambda: newest_step(tmp_path / "run") == 150)
    time.sleep(1.0)
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 1


def test_a_child_whose_parent_is_killed_saves_and_stops(tmp_path):
    process = start(tmp_path / "run", *LONG)
    wait_for(lambda: newest_step(tmp_path / "run"))
    child = child_of(process)
    process.kill()
    process.wait()
    wait_for(lambda: not Path(f"/proc/{child}").exists())
    process.communicate()
    assert latest_checkpoint(tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_child_that_cannot_start_is_not_started_again(tmp_path):
    process = start(tmp_path / "run", "--restarts", "3", "--env-id", "NoSuchThing-v0")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told(stderr) == ["fastsac: unknown environment 'NoSuchThing-v0'; did you mean NChain-v0?"]
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_ended_is_not_started_again(tmp_path):
    ended = tmp_path / "run"
    settings = {"env_id": "tests.faulty:Faulty-v0", "num_envs": 2, "hidden_sizes": (8,), "buffer_size": 1000}
    SAC(dataclasses.replace(SMALL, **settings, total_steps=40, checkpoint_replay=True)).learn(run_dir=ended)
    process = start(ended, "--resume", str(ended), "--restarts", "3", "--total-steps", "40")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told(stderr) == [f"fastsac: {ended} has already reached step 40: increase --total-steps to continue"]


def test_a_diverged_run_is_not_started_again(tmp_path):
    process = start(tmp_path / "run", "--restarts", "3", "--critic-lr", "1e30")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = told(stderr)
    assert "training diverged" in line
