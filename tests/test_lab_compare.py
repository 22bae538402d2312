"""`fastsac compare`: real processes, their results, interruptions, failures, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastsac import SAC, UsageError, run_dir
from fastsac.arguments import Train, parse
from fastsac.errors import FastsacError
from fastsac.lab import compare as module
from fastsac.lab import record, results, worker
from fastsac.lab.arguments import Compare
from fastsac.lab.compare import FailedRuns, Stopped, compare, run
from fastsac.lab.how import run_text
from fastsac.lab.outcome import table
from fastsac.lab.plan import make_plan, train_command
from fastsac.lab.record import command_of, random_return
from fastsac.lab.worker import Failure, last_line, train
from fastsac.machine import describe_machine
from fastsac.run_dir import newest_step, read_config
from tests.runs import metrics_of

ROOT = Path(__file__).parents[1]
SETTINGS = (  # noqa: SIM905, a list is harder to read
    "num_envs=4 hidden_sizes=[16,16] batch_size=16 learning_starts=40 buffer_size=4000 eval_episodes=1 log_every=50 "
    "env_backend=gymnasium num_threads=1 eval_every=500 checkpoint_every=100"
).split()


def options(out: Path, *settings: str, **changes) -> Compare:
    plain = Compare(("Pendulum-v1",), ("pathwise", "score:none"), out, "0:2", 80, (*SETTINGS, *settings), jobs=2)
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def in_process(monkeypatch):
    """Runs are trained here, one after the other, which is quicker; a label that is put into it fails."""
    broken: dict[str, bool] = {}

    def train_here(options, runs, done, watch, stop):
        failed = []
        for each in runs:
            if each.label in broken:
                failed.append(Failure(each, "an explosion", broken[each.label]))
                continue
            train(options.out / each.run_dir, each.config).close()
            done(each)
        return failed

    monkeypatch.setattr(module, "train_here", train_here)
    monkeypatch.setattr(record, "random_return", lambda config: -1200.0)
    monkeypatch.setattr(worker, "describe_machine", dict)  # asks git
    return broken


def as_if_alone(out: Path, tmp_path: Path, each) -> None:
    """Compare a run with the one that the Python API makes."""
    alone = tmp_path / "alone" / each.run_dir
    agent = SAC(each.config)
    agent.learn(run_dir=alone)
    agent.close()
    run_dir = out / each.run_dir
    assert read_config(run_dir) == each.config
    assert metrics_of(run_dir) == metrics_of(alone)
    ours, theirs = (path / "checkpoints" / f"step-{agent.steps:012d}" for path in (run_dir, alone))
    assert (ours / "learner.safetensors").read_bytes() == (theirs / "learner.safetensors").read_bytes()


def test_an_interrupted_comparison_goes_on_and_ends_as_if_left_alone(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    asked = options(out, arms=("pathwise",), seeds="0", total_steps=1000)
    (first,) = make_plan(asked).runs
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.02)

    def interrupt() -> None:
        while newest_step(out / first.run_dir) is None:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped, match=rf"command again: fastsac compare .*--out {re.escape(str(out))}") as stopped:
        compare(asked)
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    assert "seed 0: stopped (0 of 1)" in capsys.readouterr().err
    step = newest_step(out / first.run_dir)
    assert 0 < step < 1000

    larger = dataclasses.replace(asked, arms=("pathwise", "score:none"))
    result = compare(larger)
    resumed = [(each["arm"], each["resumed_at"]) for each in result["runs"]]
    assert resumed == [("pathwise", [step]), ("score:none", [])]
    for each in make_plan(larger).runs:
        as_if_alone(out, tmp_path, each)
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(record.finite_json(result)))
    check_schema(result)
    assert "Pendulum-v1 score:none seed 0: complete (" in capsys.readouterr().err


def check_schema(result) -> None:
    assert result["format"] == 1
    assert result["settings"]["env_ids"] == ["Pendulum-v1"]
    assert result["settings"]["arms"] == ["pathwise", "score:none"]
    assert result["settings"]["seeds"] == [0]
    assert -1500 < result["random_return"]["Pendulum-v1"] < -900  # about -1,200
    for each in result["runs"]:
        assert len(each["steps"]) == len(each["eval_return"]) == 2
        assert each["updates"] > 900
        assert each["engine"] == "fused"
        assert each["machine"].keys() == describe_machine().keys()
        assert each["machine"]["torch_threads"] == 1
        command = parse(shlex.split(each["command"])[1:])
        assert isinstance(command, Train)
        assert dataclasses.asdict(command.config) == {
            **each["config"],
            **{name: tuple(each["config"][name]) for name in ("hidden_sizes", "adam_betas", "env_wrappers")},
        }
    arms = result["summary"]["Pendulum-v1"]
    finals = [each["eval_return"][-1] for each in result["runs"]]
    assert [arms[arm]["final"]["values"] for arm in arms] == [finals[:1], finals[1:]]
    assert arms["score:none"]["curve"]["iqm"] == pytest.approx(result["runs"][1]["eval_return"])
    assert "equivalence" not in arms["pathwise"]
    assert arms["score:none"]["equivalence"]["against"] == "pathwise"
    assert (arms["score:none"]["failed"], arms["score:none"]["diverged"]) == (0, 0)


def test_a_failing_run_is_named_and_the_others_finish(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAULT", f"raise:15:{tmp_path / 'failed'}")  # the first one to get there
    monkeypatch.setattr(record, "random_return", lambda config: -20.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = options(tmp_path / "out", env_ids=("tests.faulty:Faulty-v0",), arms=("pathwise",))
    groups, popen = [], worker.subprocess.Popen

    def started(*arguments, **named):
        process = popen(*arguments, **named)
        if "fastsac.lab.worker" in arguments[0]:
            groups.append((os.getsid(process.pid) == os.getsid(0), os.getpgid(process.pid) == process.pid))
        return process

    monkeypatch.setattr(worker.subprocess, "Popen", started)
    with pytest.raises(FailedRuns, match="1 of 2 runs failed; run the same command again to retry them") as failed:
        run(asked)
    assert failed.value.exit_status == 1
    assert groups == [(True, True)] * 2  # `nice` holds, and Ctrl-C reaches the comparison only
    told = capsys.readouterr()
    (line,) = re.findall(r"fastsac: tests.faulty:Faulty-v0 pathwise seed \d failed: .*", told.err)
    assert "ValueError: broken" in line
    page = (asked.out / "report.html").read_text()  # of those that are there
    assert "1 of 2 runs failed." in page
    assert "with 1 of 2 random seeds" in page
    assert re.search(r"seed \d: .*ValueError: broken", page)
    assert "1 (1 failed)" in told.out
    assert failed.value.result["summary"]["tests.faulty:Faulty-v0"]["pathwise"]["failed"] == 1
    assert len(failed.value.result["runs"]) == 1
    result = compare(asked)  # it does not happen again
    assert [each["seed"] for each in result["runs"]] == [0, 1]
    assert result["failed"] == []


def processes_of(monkeypatch):
    """The run directories that each process gets."""
    found, popen = [], worker.subprocess.Popen

    def started(*arguments, **named):
        if "fastsac.lab.worker" in arguments[0]:
            found.append([Path(argument).name for argument in arguments[0][4:]])
        return popen(*arguments, **named)

    monkeypatch.setattr(worker.subprocess, "Popen", started)
    return found


def test_seeds_share_a_process_and_come_out_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "random_return", lambda config: -1200.0)
    started = processes_of(monkeypatch)
    asked = options(tmp_path / "out", seeds="0:3", num_learners=2)
    result = compare(asked)
    assert sorted(started) == [["seed-0", "seed-1"]] * 2 + [["seed-2"]] * 2
    assert "6 of 6 runs to train, up to 2 in a process, 2 at a time" in capsys.readouterr().err
    assert [each["num_learners"] for each in result["runs"]] == [2, 2, 1] * 2
    for each in make_plan(asked).runs:
        as_if_alone(asked.out, tmp_path, each)
    page = run_text(result["runs"][0])
    assert "with 1 other in its process" in page
    assert "in its process" not in run_text(result["runs"][2])


def test_a_run_that_fails_beside_others_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAULT", f"raise:15:{tmp_path / 'failed'}")  # the first one to get there
    monkeypatch.setattr(record, "random_return", lambda config: -20.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = options(tmp_path / "out", env_ids=("tests.faulty:Faulty-v0",), arms=("pathwise",), num_learners=2)
    started = processes_of(monkeypatch)
    with pytest.raises(FailedRuns, match="1 of 2 runs failed") as failed:
        compare(asked)
    assert started == [["seed-0", "seed-1"]]
    told = capsys.readouterr().err
    assert "fastsac: tests.faulty:Faulty-v0 pathwise seed 0 failed: " in told
    assert "ValueError: broken" in told
    assert "pathwise seed 1: complete" in told
    assert [each["seed"] for each in failed.value.result["runs"]] == [1]
    assert [each["seed"] for each in compare(asked)["runs"]] == [0, 1]  # it does not happen again
    assert started[1:] == [["seed-0"]]


def test_a_process_that_dies_without_a_word_is_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAULT", "oom:15:")
    monkeypatch.setattr(record, "random_return", lambda config: -20.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = options(tmp_path / "out", env_ids=("tests.faulty:Faulty-v0",), arms=("pathwise",), num_learners=2)
    run_dir = asked.out / make_plan(asked).runs[0].run_dir
    run_dir.parent.mkdir(parents=True)
    worker.outcome_file(run_dir).write_text(json.dumps({"status": 0, "reason": ""}))  # of an earlier time
    with pytest.raises(FailedRuns, match="2 of 2 runs failed"):
        compare(asked)
    assert capsys.readouterr().err.count("failed: its process was killed by SIGKILL") == 2


def test_a_process_stops_when_the_comparison_has_died(tmp_path):
    (each,) = make_plan(options(tmp_path, arms=("pathwise",), seeds="0", total_steps=4000)).runs
    run_dir = tmp_path / each.run_dir
    run_dir.parent.mkdir(parents=True)
    worker.write_json(worker.config_file(run_dir), dataclasses.asdict(each.config))
    gone = subprocess.run([sys.executable, "-m", "fastsac.lab.worker", "1", str(run_dir)], cwd=ROOT)
    assert gone.returncode == worker.STOPPED
    assert newest_step(run_dir) < 400


def test_a_run_stops_when_the_comparison_has_died():
    assert worker.WithParent(os.getppid()).on_step(None)
    orphan = worker.WithParent(os.getppid() + 1)  # it died before the run could ask
    assert not orphan.on_step(None)
    assert orphan.orphaned


def test_runs_are_not_repeated_and_more_may_be_added(tmp_path, in_process, capsys):
    first = compare(options(tmp_path))
    for path in (tmp_path / "runs").rglob("config.json"):
        path.unlink()  # what is in comparison.json counts
    in_process |= dict.fromkeys(("pathwise", "score:none"), True)
    again = compare(options(tmp_path, arms=("pathwise", "score:none:1"), seeds="0"))
    assert again["runs"] == first["runs"]
    assert f"{tmp_path} also has earlier runs, and the results include them: random seeds 1" in capsys.readouterr().err
    del in_process["score:none"]
    compare(options(tmp_path, arms=("score:none", "pathwise"), seeds="1,0"))
    last = options(tmp_path, arms=("score:none",), seeds="0:3")
    more = compare(last)
    assert [each for each in more["runs"] if each["seed"] < 2] == first["runs"]
    assert [(each["arm"], each["seed"]) for each in more["runs"] if each["seed"] == 2] == [("score:none", 2)]
    assert more["settings"]["seeds"] == [0, 1, 2]
    assert more["settings"]["arms"] == ["score:none", "pathwise"]  # as the last command that named all had them
    assert more["summary"]["Pendulum-v1"]["pathwise"]["equivalence"]["against"] == "score:none"
    assert "equivalence" not in more["summary"]["Pendulum-v1"]["score:none"]
    told = parse(shlex.split(more["command"])[1:])  # makes all that there is
    assert told == dataclasses.replace(last, arms=("score:none", "pathwise"), out=Path(tmp_path.name), jobs=None)


def test_one_setting_has_one_spelling(tmp_path, in_process):
    first = compare(options(tmp_path, "tau=1e-2", arms=("pathwise",), seeds="0"))
    in_process["pathwise"] = True
    for spelling in ("tau=0.01", "--tau=0.010", "tau=1e-2"):
        again = compare(options(tmp_path, spelling, arms=("pathwise",), seeds="0"))
        assert (again["settings"], again["command"]) == (first["settings"], first["command"])
    assert first["settings"]["set"][-1] == "tau=0.01"


def test_random_actions_are_measured_again_where_too_few_episodes_were_played(tmp_path, in_process):
    asked = options(tmp_path, seeds="0")
    compare(asked)
    path = tmp_path / "comparison.json"
    earlier = json.loads(path.read_text())
    del earlier["random_episodes"]
    path.write_text(json.dumps(earlier | {"random_return": {"Pendulum-v1": -1.0}}))
    assert compare(asked)["random_return"] == {"Pendulum-v1": -1200.0}
    path.write_text(json.dumps(earlier))
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    other = compare(dataclasses.replace(asked, env_ids=("MountainCarContinuous-v0",)))
    assert other["random_return"].keys() == {"Pendulum-v1", "MountainCarContinuous-v0"}  # of earlier runs, too


def test_the_command_of_each_run_makes_it(tmp_path):
    arms = ("pathwise", "score:value-as-printed")
    for each in make_plan(options(tmp_path, "checkpoint_replay=false", arms=arms, seeds="3")).runs:
        command = parse(shlex.split(train_command(each.config))[1:])
        if each.label == "pathwise":
            assert isinstance(command, Train)
            assert command.config == each.config
        else:  # which `fastsac train` refuses
            assert isinstance(command, Compare)
            (run,) = make_plan(command).runs
            assert run.config == each.config


def test_two_spellings_of_an_arm_are_one(tmp_path, in_process):
    first = compare(options(tmp_path, arms=("score",), seeds="0"))
    assert first["runs"][0]["arm"] == "score:loo:2"
    in_process["score:loo:2"] = True
    assert compare(options(tmp_path, arms=("score:loo:2",), seeds="0"))["runs"] == first["runs"]


def test_other_settings_are_refused_by_name(tmp_path, in_process):
    compare(options(tmp_path, seeds="0"))
    with pytest.raises(UsageError, match=r"total_steps 80, not 400: choose another --out"):
        compare(options(tmp_path, total_steps=400))
    with pytest.raises(UsageError, match=r"with --set batch_size=16, not with --set batch_size=32"):
        compare(options(tmp_path, set=tuple(each.replace("h_size=16", "h_size=32") for each in SETTINGS)))
    with pytest.raises(UsageError, match=r"with no --set tau, not with --set tau=0.01 tau=0.02: choose"):
        compare(options(tmp_path, "tau=0.01", "tau=0.02"))
    with pytest.raises(UsageError, match=r"with no --set tau, not with --set tau=0.01"):
        compare(options(tmp_path, "tau=0.01"))
    (tmp_path / "comparison.json").unlink()  # the run directories are looked at, too
    where = re.escape(str(tmp_path / "runs/Pendulum-v1/pathwise/seed-0"))
    with pytest.raises(UsageError, match=rf"{where} holds another run: tau is 0.005 there, not 0.01"):
        compare(options(tmp_path, "tau=0.01"))
    other = [each.replace("num_threads=1", "num_threads=2") for each in SETTINGS]
    compare(options(tmp_path, set=tuple(other), seeds="0"))  # which changes no outcome


def test_a_setting_is_varied_and_the_best_value_is_named(tmp_path, in_process):
    result = compare(options(tmp_path, "actor_lr=1e-4", "actor_lr=3e-2", seeds="0"))
    arms = result["summary"]["Pendulum-v1"]
    assert list(arms) == [f"{arm} actor_lr={rate}" for arm in ("pathwise", "score:none") for rate in ("0.0001", "0.03")]
    assert {(each["config"]["actor_lr"], each["varied"]["actor_lr"]) for each in result["runs"]} == {
        *[(1e-4, 1e-4), (3e-2, 3e-2)]
    }
    for arm, label in result["best"]["Pendulum-v1"].items():
        assert arms[label]["auc"]["iqm"] == max(arms[each]["auc"]["iqm"] for each in arms if each.startswith(arm))
        assert ("equivalence" in arms[label]) == (arm == "score:none")
    assert sum("equivalence" in each for each in arms.values()) == 1  # only the best is tested
    more = compare(options(tmp_path, "actor_lr=1e-4", "actor_lr=3e-2", "actor_lr=1e-3", seeds="0"))
    assert len(more["runs"]) == 6
    shown = table(more)
    assert "actor_lr=0.03" in shown
    assert shown.count("not its best settings") == 4


def test_arms_that_fail_are_counted(tmp_path, in_process):
    in_process["score:none"] = True
    with pytest.raises(FailedRuns, match="2 of 4 runs failed") as failed:
        compare(options(tmp_path))
    arm = failed.value.result["summary"]["Pendulum-v1"]["score:none"]
    assert (arm["seeds"], arm["failed"], arm["diverged"]) == (0, 2, 2)
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert stored["summary"]["Pendulum-v1"]["score:none"]["final"]["iqm"] is None
    assert stored["failed"][0]["error"] == "an explosion"
    (row,) = (line for line in table(failed.value.result).splitlines() if "score:none" in line)
    assert "no complete run" in row
    in_process |= {"pathwise": False}
    everything = options(tmp_path / "all", seeds="0")
    with pytest.raises(FailedRuns, match="2 of 2 runs failed"):
        run(everything)
    in_process.clear()
    assert compare(everything)["failed"] == []


def test_an_environment_that_fails_at_random_has_no_random_return(tmp_path, in_process, monkeypatch, capsys):
    monkeypatch.setattr(record, "random_return", random_return)
    monkeypatch.setenv("FAULT", "raise:10:")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = options(tmp_path, env_ids=("tests.faulty:Faulty-v0",), seeds="0")
    in_process |= {"pathwise": False, "score:none": False}
    with pytest.raises(FailedRuns):
        compare(asked)
    assert "the return of a random policy could not be measured" in capsys.readouterr().err
    monkeypatch.setenv("FAULT", "")
    in_process.clear()
    result = compare(asked)
    assert math.isfinite(result["random_return"]["tests.faulty:Faulty-v0"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": ("actr_lr=1",)}, r"no such setting; did you mean .*actor_lr"),
        ({"set": ("seed=1",)}, "--set seed: --seeds sets it"),
        ({"set": ("baseline=loo",)}, "--set baseline: --arms sets it"),
        ({"set": ("total_steps=1",)}, "--total-steps sets it"),
        ({"set": ("batch_size",)}, "name=value"),
        ({"set": ("batch_size=many",)}, "--batch-size must be a whole number"),
        ({"set": ("hidden_sizes=3",)}, "--hidden-sizes must be whole numbers"),
        (
            {"set": ("max_episode_steps=50", "max_episode_steps=200")},
            "--set max_episode_steps: all runs of a comparison",
        ),
        ({"set": ("eval_every=0",)}, "eval_every=0 leaves nothing to compare"),
        ({"set": ("entropy_split=0.5",), "arms": ("pathwise", "pathwise-stl")}, "takes no --entropy-split"),
        ({"arms": ("pathwise:x",)}, "arm 'pathwise:x'"),
        ({"arms": ()}, "at least one arm"),
        ({"env_ids": ("Pendulm-v1",)}, "did you mean Pendulum-v"),
        ({"seeds": "5:5"}, "--seeds must be written"),
        ({"seeds": "a"}, "--seeds must be written"),
        ({"jobs": 0}, "--jobs must be"),
        ({"num_learners": 0}, "--num-learners must be a whole number of at least 1, got 0"),
        ({"num_learners": 2, "ray": "auto"}, "--num-learners is for runs on this machine"),
        ({"margin": 0.0}, "--margin must be"),
        ({"gpus_per_run": 0.5}, "--gpus-per-run needs --ray"),
        ({"jobs": 2, "ray": "auto"}, "--jobs is for runs on this machine"),
    ],
)
def test_usage_errors(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as refused:
        compare(options(tmp_path / "out", **changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_directory_is_refused_if_it_is_something_else(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        compare(options(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"file/below cannot be created \(Not a directory\): choose another --out"):
        compare(options(tmp_path / "file" / "below"))
    with monkeypatch.context() as patched:  # root may write everywhere
        patched.setattr(results.os, "access", lambda *_: False)
        with pytest.raises(UsageError, match="cannot be written to: choose another --out"):
            compare(options(tmp_path))
    (tmp_path / "config.json").touch()
    with pytest.raises(UsageError, match="is a run directory"):
        compare(options(tmp_path))
    for place, damaged in enumerate(("{", "[]", '{"format": 2}', '{"format": 1, "runs": [{}], "random_return": {}}')):
        (tmp_path / f"{place}").mkdir()
        (tmp_path / f"{place}/comparison.json").write_text(damaged)
        with pytest.raises(UsageError, match=r"comparison.json cannot be read"):
            compare(options(tmp_path / f"{place}"))


def test_two_at_once_are_refused(tmp_path, in_process, monkeypatch):
    def another(config):
        with pytest.raises(UsageError, match="another comparison is running"):
            compare(options(tmp_path))
        return -1200.0

    monkeypatch.setattr(record, "random_return", another)
    compare(options(tmp_path, arms=("pathwise",), seeds="0"))


def test_a_file_system_without_locks(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "no locks")))
    assert compare(options(tmp_path, arms=("pathwise",), seeds="0"))["runs"]


def test_a_run_waits_for_the_process_of_a_comparison_that_was_killed(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    (each,) = make_plan(options(tmp_path, arms=("pathwise",), seeds="0")).runs
    where = tmp_path / each.run_dir
    train(where, dataclasses.replace(each.config, total_steps=40)).close()
    orphan, held, resume = run_dir.RunLock(where), [], SAC.resume
    monkeypatch.setattr(worker.SAC, "resume", lambda *args: held.append(orphan.holds()) or resume(*args))
    threading.Timer(0.3, orphan.release).start()
    train(where, each.config).close()
    assert held == [False]  # its last checkpoint is there by then
    assert json.loads((where / worker.MACHINE).read_text())["resumed_at"] == [40]
    orphan = run_dir.RunLock(where)
    monkeypatch.setattr(worker, "ORPHAN_SECONDS", 0.05)
    with pytest.raises(UsageError, match="is being written by"):
        train(where, each.config)
    orphan.release()


def test_a_run_without_its_last_evaluation_is_not_taken_in(tmp_path, in_process, monkeypatch):
    """A return that is no finite number is not in the file."""
    plain = record.read_metric

    def without_the_last(where, name):
        steps, values = plain(where, name)
        return (steps[:-1], values[:-1]) if name == "eval_return" else (steps, values)

    monkeypatch.setattr(record, "read_metric", without_the_last)
    often = tuple(each.replace("eval_every=500", "eval_every=40") for each in SETTINGS)
    with pytest.raises(FastsacError, match="has not been evaluated at its last step"):
        compare(options(tmp_path, set=often, arms=("pathwise",), seeds="0"))


def test_a_margin_that_is_changed_afterwards_is_on_record(tmp_path, in_process):
    asked = options(tmp_path, seeds="0")
    assert "earlier_margins" not in compare(asked)["settings"]
    assert "earlier_margins" not in compare(asked)["settings"]
    for margin, earlier in ((0.5, [0.05]), (0.5, [0.05]), (0.1, [0.05, 0.5])):
        settings = compare(dataclasses.replace(asked, margin=margin))["settings"]
        assert (settings["margin"], settings["earlier_margins"]) == (margin, earlier)


def test_the_command_can_be_given_again(tmp_path):
    asked = options(tmp_path, "actor_lr=1e-4", "actor_lr=1e-3", margin=0.1)
    assert parse(shlex.split(command_of(asked))[1:]) == dataclasses.replace(asked, jobs=None)


def test_the_last_line_of_a_log_says_what_happened(tmp_path):
    log = tmp_path / "log"
    assert last_line(log, 1) == "exit status 1"
    assert last_line(log, -9) == "its process was killed by SIGKILL"
    log.write_text("warning: one\nthe environment broke\n\n")
    assert last_line(log, 1) == "the environment broke"
    assert last_line(log, -11) == "its process was killed by SIGSEGV: the environment broke"
    assert "stopped by a signal" in last_line(log, 75)
