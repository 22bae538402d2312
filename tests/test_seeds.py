"""Several agents that differ in their seeds only, in one loop: each is what it would be alone, and fails alone."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsac import SAC, Callback, Config
from fastsac.cli import main
from fastsac.errors import FastsacError, UsageError
from fastsac.learner.fused_cuda import FusedCudaLearner
from fastsac.replay import bytes_needed
from fastsac.run_dir import learners_in, read_config
from fastsac.seeds import Seeds
from fastsac.supervisor import Supervisor
from fastsac.train_command import default_run_dir
from tests.runs import SMALL, metrics_of, state_of

ROOT = Path(__file__).parents[1]
#: episodes of different lengths, so that the learners have different numbers of steps and of updates
UNEVEN = dataclasses.replace(
    SMALL, env_id="InvertedPendulum-v5", total_steps=230, eval_every=100, checkpoint_every=60, checkpoint_replay=True
)
OPTIONS = (  # noqa: SIM905, a list is harder to read
    "--num-envs 2 --hidden-sizes 8 --batch-size 8 --learning-starts 20 --buffer-size 1000 --eval-episodes 2 "
    "--eval-every 100 --log-every 50 --num-threads 1 --precision fp32 --checkpoint-every 50 --total-steps 200"
).split()
PENDULUM, FAULTY = ("--env-id", "Pendulum-v1"), ("--env-id", "tests.faulty:Faulty-v0")


def run(*arguments: Any) -> Any:
    """Exit status of `fastsac train`."""
    try:
        main(["train", *OPTIONS, *map(str, arguments)])
    except SystemExit as error:
        return error.code or 0
    return 0


def several(config: Config, directory: Path, number: int, resume: bool = False) -> Seeds:
    together = Seeds(number)
    for seed in range(number):
        together.add(dataclasses.replace(config, seed=seed), directory / f"seed-{seed}", resume)
    return together


def assert_as_alone(directory: Path, config: Config, seed: int) -> None:
    """Compare a run with the one that a process of its own would make."""
    alone = SAC(dataclasses.replace(config, seed=seed))
    alone.learn(run_dir=directory / "alone" / str(seed))
    found, wanted = SAC.load(directory / f"seed-{seed}"), SAC.load(directory / "alone" / str(seed))
    one, other = state_of(found), state_of(wanted)
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert one[name] == value, name
    assert metrics_of(directory / f"seed-{seed}") == metrics_of(directory / "alone" / str(seed))
    for agent in (alone, found, wanted):
        agent.close()


def test_each_learner_is_what_it_would_be_alone(tmp_path: Path) -> None:
    together = several(UNEVEN, tmp_path, 3)
    assert together.how == "updated one after the other; on a CPU, separate processes are faster"
    together.learn()
    assert together.failures == {}
    for seed in range(3):
        assert_as_alone(tmp_path, UNEVEN, seed)
    assert len({learner.agent.steps for learner in together.learners}) > 1
    assert len({learner.agent.updates for learner in together.learners}) > 1


class Stop(Callback):
    """Sends a signal at some step, as Ctrl-C would."""

    def on_step(self, agent: SAC) -> None:
        if agent.config.seed == 1 and agent.steps >= 120 and agent.steps < 124:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    together = several(UNEVEN, tmp_path, 2)
    together.learn(lambda: [Stop()])
    assert all(learner.agent.stopped_by_signal for learner in together.learners)
    assert {learner.agent.steps for learner in together.learners} < set(range(100, 200))
    again = several(UNEVEN, tmp_path, 2, resume=True)
    again.learn()
    for seed in range(2):
        assert_as_alone(tmp_path, UNEVEN, seed)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_gpu")
def test_on_a_gpu_one_launch_serves_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(
        UNEVEN, hidden_sizes=(64, 64), device="cuda", total_steps=90, learning_starts=84, num_envs=2, buffer_size=100
    )
    config = dataclasses.replace(config, eval_every=0, checkpoint_every=0, log_every=45)
    together, made = several(config, tmp_path, 2), list[tuple[int, ...]]()
    update_each = FusedCudaLearner.update_each
    monkeypatch.setattr(
        FusedCudaLearner, "update_each", lambda self, dues: made.append(tuple(dues)) or update_each(self, dues)
    )
    assert together.how == "updated together, with the launches of one"
    assert together.learners[0].agent.engine == "fused"
    together.learn()
    assert together.failures == {}
    assert any(0 not in dues for dues in made)
    assert {seed: sum(dues[seed] for dues in made) for seed in range(2)} == {
        seed: learner.agent.updates for seed, learner in enumerate(together.learners)
    }
    for seed in range(2):
        assert_as_alone(tmp_path, config, seed)


def test_one_that_fails_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FAULT", f"raise:40:{tmp_path / 'marker'}")  # the first one to get there
    assert run(*FAULTY, "--num-learners", 3, "--run-dir", tmp_path / "runs") == 1
    out, err = capsys.readouterr()
    assert "fastsac: seed 0: tests.faulty:Faulty-v0 failed at step" in err
    assert err.splitlines()[-1] == f"fastsac: 1 of 3 learners failed; continue with: --resume {tmp_path / 'runs'}"
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["seed 1", "seed 2", "learning curves"]
    assert all("evaluation return" in line for line in lines[:2])
    assert (tmp_path / "runs" / "learning_curve.png").exists()
    assert (tmp_path / "runs" / "seed-1" / "learning_curve.png").exists()
    monkeypatch.setenv("FAULT", "")
    assert run("--resume", tmp_path / "runs", "--total-steps", 250) == 0
    assert "250 steps" in capsys.readouterr().out
    assert run("--resume", tmp_path / "runs", "--total-steps", 250) == 2
    assert "has already reached step" in capsys.readouterr().err


def diverges(monkeypatch: pytest.MonkeyPatch, seed: int, steps: int) -> None:
    """Let a learner's alpha be no number from some step on."""
    read = SAC._read_metrics

    def reading(agent: SAC, *arguments: Any) -> Any:
        if agent.config.seed == seed and agent.steps >= steps:
            agent.learner.log_alpha.data.fill_(float("nan"))
        return read(agent, *arguments)

    monkeypatch.setattr(SAC, "_read_metrics", reading)


def test_one_that_diverges_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    diverges(monkeypatch, 0, 100)
    assert run(*PENDULUM, "--num-learners", 2, "--run-dir", tmp_path / "runs") == 1
    out, err = capsys.readouterr()
    assert "fastsac: seed 0: training diverged" in err
    assert out.startswith("seed 1: evaluation return")


def test_a_supervisor_hears_of_a_failed_environment_also_after_a_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    listen, tell = os.pipe()
    monkeypatch.setenv("FASTSAC_SUPERVISOR", f"{tell},0")
    monkeypatch.setenv("FAULT", f"raise:60:{tmp_path / 'marker'}")
    diverges(monkeypatch, 1, 50)
    assert run(*FAULTY, "--num-learners", 3, "--run-dir", tmp_path / "runs") == 1
    err = capsys.readouterr().err
    assert err.index("fastsac: seed 1: training diverged") < err.index("fastsac: seed 0: tests.faulty:Faulty-v0 failed")
    assert b"E" in os.read(listen, 65536)
    os.close(listen)
    os.close(tell)


def test_the_run_directory_has_one_for_each_seed(tmp_path: Path, capsys: Any) -> None:
    assert run(*PENDULUM, "--seed", 9, "--num-learners", 2, "--run-dir", tmp_path / "runs") == 0
    found = learners_in(tmp_path / "runs")
    assert [path.name for path in found] == ["seed-9", "seed-10"]
    assert [read_config(path).seed for path in found] == [9, 10]
    assert all(read_config(path).precision == "fp32" for path in found)
    err = capsys.readouterr().err
    assert "2 learners, updated one after the other; on a CPU, separate processes are faster" in err
    assert err.count("step 50/200  ") == 1  # of the first one only
    for wrong, told in (
        (["--resume", tmp_path / "runs", "--num-learners", 1, "--seed", 3], "--seed: the learners in"),
        (["--resume", tmp_path / "runs", "--seed", 10, "--num-learners", 3], "holds the seeds 9, 10: leave --num-lear"),
        (["--resume", tmp_path / "runs", "--seed", 3], "--seed: the learners in"),
        (["--resume", tmp_path / "runs", "--layer-norm"], "fastsac: --layer-norm cannot be changed from False to True"),
        (["--resume", tmp_path / "runs" / "seed-9", "--num-learners", 2], "holds one run: leave --num-learners out"),
        (["--num-learners", 2, "--seed", 30, "--run-dir", tmp_path / "runs"], "already holds several runs"),
        (["--run-dir", tmp_path / "runs"], "already holds several runs"),
        (["--num-learners", 0], "--num-learners must be a whole number of at least 1, got 0"),
    ):
        assert run(*([] if "--resume" in wrong else PENDULUM), *wrong) == 2
        err = capsys.readouterr().err
        assert told in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "runs")])
    assert "holds several run directories: choose one of seed-9, seed-10" in capsys.readouterr().err
    assert run("--resume", tmp_path / "runs" / "seed-9", "--total-steps", 220) == 0  # alone
    assert run("--resume", tmp_path / "runs", "--total-steps", 240) == 0
    assert capsys.readouterr().out.count("240 steps") >= 2
    assert run("--resume", tmp_path / "runs", "--num-learners", 3, "--total-steps", 260) == 0  # one more
    assert "seed-11 has no checkpoint yet: it starts from the beginning" in capsys.readouterr().err
    assert [path.name for path in learners_in(tmp_path / "runs")] == ["seed-9", "seed-10", "seed-11"]
    assert run("--resume", tmp_path / "runs" / "seed-9", "--total-steps", 280, "--critic-lr", 0.1) == 0
    assert run("--resume", tmp_path / "runs", "--total-steps", 300) == 2
    assert "differ in --critic-lr: resume each of them separately" in capsys.readouterr().err


def test_under_torchrun_there_is_one_learner(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("fastsac.ranks.first_to_end", lambda: True)
    assert run(*PENDULUM, "--num-learners", 2) == 2
    assert "--num-learners trains in one process: leave it out, or train without torchrun" in capsys.readouterr().err


def test_the_default_directory_names_the_seeds() -> None:
    assert "_s3-6_" in default_run_dir(Config(seed=3), 4).name
    assert "_s3_" in default_run_dir(Config(seed=3)).name


def test_replay_buffers_that_do_not_fit_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = bytes_needed(501, 4, 3, 1)
    monkeypatch.setattr("fastsac.replay.available_bytes", lambda device: needed)
    several(SMALL, tmp_path, 1)
    several(SMALL, tmp_path, 2)  # the first one's is taken
    with pytest.raises(UsageError, match=r"2 replay buffers need .* of cpu memory, but .*: --buffer-size \d+ fits"):
        several(SMALL, tmp_path, 3)


def test_learners_whose_processes_die_are_started_again(tmp_path: Path) -> None:
    from tests.test_supervisor import start, told

    fault = f"exit:60:{tmp_path / 'marker'}"
    options = ["--restarts", "2", "--num-learners", "2", "--total-steps", "200"]
    process = start(tmp_path / "run", *options, fault=fault)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    going_on = r"ended with status 77; continuing from step (50|100) \(restart 1 of 2\)"  # 100 may not be written yet
    assert re.search(going_on, "".join(told(stderr))), stderr
    assert stdout.count("after 200 steps") == 2


def test_progress_is_that_of_the_learner_which_is_behind(tmp_path: Path) -> None:
    """Or one that fails again and again would be started again for ever, since the others go on meanwhile."""
    parent = Supervisor(tmp_path, restarts=1, step_timeout=1.0)
    assert parent._step() is None
    for seed, steps in ((0, [50]), (1, [500, 700]), (10, [])):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "config.json").touch()
        for step in steps:
            checkpoint = tmp_path / f"seed-{seed}" / "checkpoints" / f"step-{step:012d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "manifest.json").touch()
    assert parent._step() is None
    (tmp_path / "seed-10" / "config.json").unlink()
    assert parent._step() == 50


def test_a_damaged_run_leaves_the_others_alone(tmp_path: Path, capsys: Any) -> None:
    directory = tmp_path / "runs"
    assert run(*PENDULUM, "--num-learners", 2, "--run-dir", directory) == 0
    path = max((directory / "seed-0" / "checkpoints").glob("step-*/learner.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert run("--resume", directory, "--total-steps", 250) == 1
    out, err = capsys.readouterr()
    assert "fastsac: seed 0: " in err
    assert "is damaged" in err
    assert "1 of 2 learners failed" in err.splitlines()[-1]
    assert "seed 1: evaluation return" in out
    assert "250 steps" in out


def test_messages_name_the_learner(tmp_path: Path, capsys: Any) -> None:
    together = several(dataclasses.replace(SMALL, total_steps=400), tmp_path, 2)
    together.learn(lambda: [EndsSecond()], progress=True)
    err = capsys.readouterr().err
    assert "seed 1: EndsSecond.on_step ends training at step" in err
    assert together.learners[0].agent.steps == 400


class EndsSecond(Callback):
    def on_step(self, agent: SAC) -> bool:
        return agent.config.seed != 1 or agent.steps < 100


def test_supervised_learners_stop_together_when_an_environment_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", f"raise:40:{tmp_path / 'marker'}")
    config = dataclasses.replace(SMALL, env_id="tests.faulty:Faulty-v0", total_steps=400)
    together = several(config, tmp_path, 2)
    together.learn(supervised=True)
    assert list(together.failures) == [tmp_path / "seed-0"]
    assert isinstance(together.failures[tmp_path / "seed-0"], FastsacError)
    assert together.learners[1].agent.stopped_by_signal
    assert together.learners[1].agent.steps < 400
    assert json.loads((tmp_path / "seed-1" / "metrics.jsonl").read_text().splitlines()[-1])["step"] <= 200
    assert np.isfinite(together.learners[1].agent.metrics["critic_loss"])
