"""Callbacks: when they are called, how they end training, and what happens if they fail."""

import dataclasses
import re
import textwrap
import threading
import time
from collections import deque

import numpy as np
import pytest
import torch

from fastsac import SAC, Callback, UsageError, checkpoint
from fastsac.errors import EnvironmentFailure
from fastsac.run_dir import LOCK
from tests.runs import SMALL, metrics_of, parameters, rows_of
from tests.test_cli import TINY, run

SLOW = pytest.mark.slow
CONFIG = dataclasses.replace(SMALL, total_steps=200, eval_every=100, checkpoint_every=60)


class Recorder(Callback):
    """Notes every call, and answers what it was told to answer."""

    def __init__(self, hook=None, answer=None, at=0):
        self.hook, self.answer, self.at = hook, answer, at
        self.steps, self.evaluations, self.checkpoints = [], [], []

    def _answer(self, agent, hook):
        assert threading.current_thread() is threading.main_thread()
        if hook != self.hook or agent.steps < self.at:
            return None
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def on_step(self, agent):
        self.steps.append(agent.steps)
        return self._answer(agent, "on_step")

    def on_evaluation(self, agent, evaluation):
        assert agent.last_evaluation is evaluation
        self.evaluations.append((agent.steps, evaluation.returns.mean()))
        return self._answer(agent, "on_evaluation")

    def on_checkpoint(self, agent, path):
        assert checkpoint.problem(path) == ""
        _, state = checkpoint.load_checkpoint(path, groups=())
        assert path == checkpoint.step_directory(path.parent.parent, state["steps"])
        self.checkpoints.append(state["steps"])
        return self._answer(agent, "on_checkpoint")


class Patient(Recorder):
    """Waits for a checkpoint, so that it is told of before the run is over."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_step(self, agent):
        end = time.monotonic() + 30.0
        while agent.steps >= int(self.path.name[5:]) and not self.path.exists() and time.monotonic() < end:
            time.sleep(0.001)
        return super().on_step(agent)


class Curious(Callback):
    """Reads everything that a callback may read."""

    def on_step(self, agent):
        if agent.steps % 40 == 0:
            assert all(type(value) is float for value in agent.metrics.values())
            agent.evaluate(1)
            agent.predict(np.zeros(3, np.float32))
            agent.actor(torch.zeros(5, 3))
            assert agent.replay.size == agent.steps


def test_each_hook_is_called_when_it_should_be(tmp_path, monkeypatch):
    save = checkpoint.save_checkpoint

    def slow(*arguments):
        time.sleep(0.03)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    recorder, alone = Recorder(), SAC(CONFIG)
    alone.learn(run_dir=tmp_path / "alone")
    agent = SAC(CONFIG)
    agent.learn(run_dir=tmp_path / "run", callback=deque([recorder, Curious()]))
    assert recorder.steps == list(range(4, 201, 4))
    assert recorder.evaluations == [
        (row["step"], row["eval_return"]) for row in rows_of(tmp_path / "run") if "eval_return" in row
    ]
    assert [step for step, _ in recorder.evaluations] == [100, 200]
    assert recorder.checkpoints == [60, 120, 180, 200]
    # callbacks that only read leave training as it is
    assert all(torch.equal(value, parameters(alone)[name]) for name, value in parameters(agent).items())
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "alone")
    agent.learn(total_steps=220, callback=recorder)  # without a run directory
    assert recorder.steps[-5:] == [204, 208, 212, 216, 220]
    assert len(recorder.checkpoints) == 4


def test_metrics_and_actor(tmp_path):
    agent = SAC(SMALL)
    assert agent.metrics == {}
    agent.learn(total_steps=100, run_dir=tmp_path)
    assert {"critic_loss", "actor_loss", "alpha", "entropy"} <= agent.metrics.keys()
    assert agent.metrics.items() <= rows_of(tmp_path)[-1].items()
    obs = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -3.0]])
    mean, log_std = agent.actor(obs)
    assert isinstance(agent.actor, torch.nn.Module)
    assert mean.shape == log_std.shape == (2, 1)
    np.testing.assert_allclose(agent.predict(obs.numpy()), 2.0 * np.tanh(mean.detach().numpy()), rtol=1e-5)


@pytest.mark.parametrize(
    ("hook", "answer", "end"),
    [
        ("on_step", False, 80),
        ("on_step", np.False_, 80),  # what `returns.mean() < 5.0` gives
        pytest.param("on_step", np.array(False), 80, marks=SLOW),
        ("on_step", torch.tensor(False), 80),
        ("on_step", np.zeros(3, bool), 200),
        pytest.param("on_step", torch.tensor(0), 200, marks=SLOW),
        ("on_evaluation", False, 100),
        ("on_checkpoint", False, None),  # a write that began at step 60 or 120 has ended some steps later
        ("on_step", 0, 200),
        pytest.param("on_step", True, 200, marks=SLOW),
        pytest.param("on_checkpoint", "", 200, marks=SLOW),
    ],
)
def test_only_false_ends_training_and_a_later_call_goes_on(tmp_path, capsys, hook, answer, end):
    agent, other = SAC(CONFIG), Patient(tmp_path / "run" / "checkpoints" / "step-000000000120")
    agent.learn(run_dir=tmp_path / "run", progress=True, callback=(Recorder(hook, answer, at=80), other))
    assert agent.steps == end or (end is None and 80 <= agent.steps < 200)
    assert not agent.stopped_by_signal
    assert agent.finished == (end == 200)
    assert other.steps[-1] == other.checkpoints[-1] == agent.steps  # the others are told, and the last state is saved
    assert (f"Recorder.{hook} ends training at step {agent.steps}" in capsys.readouterr().err) == (end != 200)
    assert SAC.load(tmp_path / "run").steps == agent.steps
    agent.learn(run_dir=tmp_path / "run")
    straight = SAC(CONFIG)
    straight.learn()
    assert agent.steps == 200
    assert all(torch.equal(value, parameters(straight)[name]) for name, value in parameters(agent).items())


def test_an_evaluation_that_was_interrupted_is_made_up_for_and_may_end_training():
    agent, stopping = SAC(CONFIG), Recorder("on_evaluation", False)
    agent.learn(total_steps=80)
    agent._progress.evaluation_due = True  # as a signal leaves it
    agent.learn(total_steps=200, callback=stopping)
    assert (agent.steps, stopping.steps) == (80, [])
    assert [step for step, _ in stopping.evaluations] == [80]


@pytest.mark.parametrize(("hook", "at", "step"), [("on_step", 80, 80), ("on_evaluation", 0, 100), ("on_step", 0, 4)])
def test_a_callback_that_raises_ends_training(tmp_path, hook, at, step):
    agent, run_dir, error = SAC(CONFIG), tmp_path / "run", ZeroDivisionError("one\ntwo")
    with pytest.raises(UsageError) as caught:
        agent.learn(run_dir=run_dir, callback=Recorder(hook, error, at))
    assert caught.value.__cause__ is error
    told = f"callback Recorder.{hook} failed at step {step}: ZeroDivisionError: one two (test_callbacks.py, line "
    assert str(caught.value).startswith(told)
    assert agent.steps == step
    assert not (run_dir / LOCK).exists()
    saved = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    assert saved == ([] if step == 4 else ["step-000000000060"])
    resumed = SAC.resume(run_dir, CONFIG)
    assert resumed.steps == (0 if step == 4 else 60)
    resumed.learn(run_dir=run_dir)
    assert [row["step"] for row in rows_of(run_dir) if "eval_return" in row] == [100, 200]
    agent.learn(total_steps=step + 20)  # in new episodes
    assert agent.steps == step + 20


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), EnvironmentFailure("it broke")])
def test_what_is_no_error_of_the_callback_passes_through(tmp_path, error):
    with pytest.raises(type(error)):
        SAC(CONFIG).learn(run_dir=tmp_path / "run", callback=Recorder("on_step", error))
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("method", ["learn", "close", "new_episodes"])
def test_what_a_callback_must_not_call(method):
    class Calling(Callback):
        def on_step(self, agent):
            getattr(agent, method)()

    agent = SAC(CONFIG)
    with pytest.raises(UsageError, match=rf"agent\.{method} must not be called during training"):
        agent.learn(callback=Calling())
    agent.learn(total_steps=60)


@pytest.mark.parametrize("wrong", [Recorder, [Recorder(), print], "Recorder"])
def test_what_is_no_callback_is_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(UsageError, match=r"must be an object of a subclass of fastsac.Callback, got"):
        SAC(CONFIG).learn(run_dir=tmp_path / "run", callback=wrong)
    assert not (tmp_path / "run").exists()


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"elsewhere::\n\n(.*)", Callback.__doc__, flags=re.DOTALL)
    exec(textwrap.dedent(example).replace("total_steps=20_000", "total_steps=2_000"), {})
    steps = [int(line.split(",")[0]) for line in (tmp_path / "losses.csv").read_text().splitlines()]
    assert [step // 1000 for step in steps] == [2]  # at step 1000 no update has been made yet
    assert checkpoint.problem(*tmp_path.glob("kept-step-*")) == ""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own, and an empty directory to be in."""
    (tmp_path / "callbacks_of_mine.py").write_text(
        textwrap.dedent(
            """
            from fastsac import Callback

            class Stop(Callback):
                def on_step(self, agent):
                    return agent.steps % 50 != 0

            class Also(Stop):
                pass

            class Wrong(Callback):
                def on_checkpoint(self, agent, path):
                    raise ValueError("no such place")

            class Argument(Callback):
                def __init__(self, value):
                    pass

            class Other:
                pass
            """
        )
    )
    (tmp_path / "no_python.py").write_text("1 +")
    (tmp_path / "here").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    return "callbacks_of_mine"


def test_the_command_line_takes_callbacks(mine, capsys):
    settings = [*TINY, "--total-steps", 200, "--checkpoint-every", 80, "--eval-every", 0]
    both = ["--callback", f"{mine}:Stop", "--callback", f"{mine}:Also"]
    assert run("train", *settings, "--run-dir", "run", *both, "--eval-every", 30, "--eval-episodes", 1) == 0
    told = capsys.readouterr()
    assert "\nStop.on_step ends training at step 50" in told.err
    line = r"evaluation return -\d+\.\d \+- 0\.0 over 1 episode at step 30; training ended after 50 steps"
    assert re.match(line, told.out)
    assert run("train", "--resume", "run", "--callback", f"{mine}:Stop", f"--callback={mine}:Wrong") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"fastsac: callback Wrong.on_checkpoint failed at step (8\d|9\d|100): ValueError: no such place "
        r"\(callbacks_of_mine.py, line 13\)",
        last,
    )
    assert run("train", "--resume", "run") == 0


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("callbacks_of_mine", "--callback must be given as module:Class, got 'callbacks_of_mine'"),
        (":Stop", "--callback must be given as module:Class, got ':Stop'"),
        ("not_there:Stop", "cannot import 'not_there' for --callback not_there:Stop: is it on PYTHONPATH?"),
        ("callbacks_of_mine:Stopp", "callbacks_of_mine has no 'Stopp' for --callback; did you mean Stop?"),
        ("callbacks_of_mine:Other", "--callback callbacks_of_mine:Other must be a subclass of fastsac.Callback"),
        ("callbacks_of_mine:Argument", "cannot be created: TypeError: Argument.__init__() missing 1 required"),
        ("no_python:Stop", "cannot be created: SyntaxError: invalid syntax (no_python.py, line 1)"),
        ("", "--callback must be given as module:Class, got ''"),
        (None, "Missing value for argument '--callback'"),
    ],
)
def test_a_wrong_callback_is_one_line_and_leaves_nothing(mine, tmp_path, capsys, place, message):
    assert run("train", *TINY, "--callback", *([] if place is None else [place])) == 2
    err = capsys.readouterr().err
    assert message in err
    assert (err.count("\n"), err.startswith("fastsac: ")) == (1, True)
    assert not list((tmp_path / "here").iterdir())
