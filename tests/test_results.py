"""`fastsac ls`: which runs are found, and what is said of each."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import threading

import pytest

from fastsac import SAC
from fastsac.cli import main
from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.results import find_runs, look_at
from fastsac.run_dir import PATIENCE, RunLock, is_held, write_config
from tests.runs import SMALL, rows_of, stopped_at

TOTAL = 1000


def store(path, config=None, returns=(), checkpoint=None, **state):
    """Write what a run with evaluations every 100 steps leaves."""
    config = config or Config(env_id="Pendulum-v1", total_steps=TOTAL)
    path.mkdir(parents=True)
    write_config(path, config)
    rows = [{"step": 100 * place, "eval_return": value} for place, value in enumerate(returns, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if checkpoint is not None:
        place = path / "checkpoints" / f"step-{checkpoint:012d}"
        place.mkdir(parents=True)
        (place / "manifest.json").write_text("{}")
        values = {"steps": checkpoint, "reached": None, "evaluation_due": False}
        (place / "state.json").write_text(json.dumps(values | state))
    return path


def states(directory):
    return {entry.run: entry.state for entry in entries(directory)}


def entries(directory):
    return [look_at(path, path.relative_to(directory).as_posix()) for path in find_runs(directory)]


def test_a_run_and_its_end(tmp_path, monkeypatch):
    """What training itself leaves."""
    config = dataclasses.replace(SMALL, total_steps=60, eval_every=20)
    agent = SAC(config)
    with stopped_at(monkeypatch, 40):
        agent.learn(run_dir=tmp_path / "a")
    (stopped,) = entries(tmp_path)
    assert (stopped.state, stopped.steps, stopped.total_steps, stopped.checkpoint) == ("stopped", 40, 60, 40)
    agent = SAC.resume(tmp_path / "a", config)
    agent.learn(run_dir=tmp_path / "a")
    (finished,) = entries(tmp_path)
    returns = [row["eval_return"] for row in rows_of(tmp_path / "a") if "eval_return" in row]
    assert len(returns) == 3
    assert (finished.state, finished.steps, finished.checkpoint) == ("finished", 60, 60)
    assert (finished.last_return, finished.best_return) == (returns[-1], max(returns))
    target = dataclasses.replace(config, target_return=-1e9)
    SAC(target).learn(run_dir=tmp_path / "b")
    assert states(tmp_path) == {"a": "finished", "b": "target reached"}


def test_every_state(tmp_path):
    config = Config(total_steps=TOTAL, target_return=0.0)
    store(tmp_path / "finished", returns=[1.0, 3.0, 2.0], checkpoint=TOTAL)
    store(tmp_path / "evaluation-due", returns=[1.0], checkpoint=TOTAL, evaluation_due=True)
    store(tmp_path / "stopped", returns=[1.0], checkpoint=500)
    store(tmp_path / "target", config, returns=[1.0], checkpoint=100, reached=0.0)
    store(tmp_path / "another-target", config, returns=[1.0], checkpoint=100, reached=-5.0)
    store(tmp_path / "target-due", config, returns=[1.0], checkpoint=100, reached=0.0, evaluation_due=True)
    store(tmp_path / "no-checkpoint", returns=[1.0])
    store(tmp_path / "empty")
    store(tmp_path / "running", returns=[1.0], checkpoint=500)
    (store(tmp_path / "killed", returns=[1.0], checkpoint=500) / ".lock").write_text("process 1 on somewhere")
    lock = RunLock(tmp_path / "running")
    assert states(tmp_path) == {
        **{"finished": "finished", "evaluation-due": "stopped", "stopped": "stopped", "target": "target reached"},
        **{"another-target": "stopped", "target-due": "stopped"},
        **{"no-checkpoint": "stopped, no checkpoint", "empty": "empty"},
        **{"running": "running", "killed": "stopped"},
    }
    lock.release()
    assert states(tmp_path)["running"] == "stopped"
    finished = next(entry for entry in entries(tmp_path) if entry.run == "finished")
    assert (finished.steps, finished.last_return, finished.best_return) == (TOTAL, 2.0, 3.0)


def test_looking_at_a_lock_takes_it_from_nobody(tmp_path):
    """A run that starts while `fastsac ls` looks waits for that moment, and is not refused."""
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as `is_held` does
        assert not is_held(tmp_path)
        with pytest.raises(UsageError, match="is being written by"):
            RunLock(tmp_path)
        timer = threading.Timer(PATIENCE / 5, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        lock = RunLock(tmp_path)
        timer.join()
        assert is_held(tmp_path)
        lock.release()


def test_damaged_files(tmp_path, capsys):
    for number, text in enumerate(
        ['{"env_id": "Pend', "[]", '{"no_such_setting": 1}', '{"tau": -1}', "[" * 9999, "\0"]
    ):
        (store(tmp_path / f"config-{number}", returns=[1.0]) / "config.json").write_text(text)
    (store(tmp_path / "no-config", checkpoint=100) / "config.json").unlink()
    for number, text in enumerate(["", "{", '{"steps": "x"}', "{}", "[" * 9999]):
        path = store(tmp_path / f"state-{number}", returns=[1.0], checkpoint=100)
        (path / "checkpoints" / "step-000000000100" / "state.json").write_text(text)
    os.mkfifo(store(tmp_path / "fifo") / "fifo")
    (tmp_path / "fifo" / "metrics.jsonl").unlink()
    (tmp_path / "fifo" / "fifo").rename(tmp_path / "fifo" / "metrics.jsonl")
    lines = [
        '{"step": 100, "eval_return": 5.0}',
        "\x00\xff",
        '{"step": 200, "eval_return": NaN}',
        "[1]",
        '{"step": "x"}',
    ]
    path = store(tmp_path / "lines") / "metrics.jsonl"
    path.write_text("\n".join([*lines, '{"step": 300, "x": 1}', '{"step": 400, "eval_re']))
    found = {entry.run: entry for entry in entries(tmp_path)}
    damaged = {name for name, entry in found.items() if entry.state == "damaged"}
    assert damaged == {name for name in found if name.startswith(("config", "state", "no-config"))}
    assert len(damaged) == 12
    assert (found["lines"].steps, found["lines"].last_return, found["lines"].best_return) == (300, 5.0, 5.0)
    assert found["fifo"].state == "empty"
    main(["ls", str(tmp_path)])
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 12
    assert "the checkpoint of step 100" in told[-1]


def test_what_is_no_run_is_not_listed(tmp_path):
    store(tmp_path / "a" / "seed-10")
    store(tmp_path / "a" / "seed-9")
    store(tmp_path / "tau=0.01")
    store(tmp_path / "tau=0.005")
    store(tmp_path / ".seed-1.shipped")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "config.json").write_text('{"name": "something else"}')
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    assert list(states(tmp_path)) == ["a/seed-9", "a/seed-10", "tau=0.005", "tau=0.01"]
    assert list(states(tmp_path / "a" / "seed-9")) == ["."]


def test_no_symbolic_link_leads_out(tmp_path):
    outside = store(tmp_path / "outside", returns=[1.0, 2.0], checkpoint=TOTAL)
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "link").symlink_to(outside)
    (runs / "loop").symlink_to(runs)
    for name in ("config.json", "metrics.jsonl", "checkpoints"):
        (path := store(runs / f"a-{name}", returns=[5.0], checkpoint=500) / name).rename(tmp_path / f"old-{name}")
        path.symlink_to(outside / name)
    path = store(runs / "step", returns=[5.0], checkpoint=TOTAL) / "checkpoints" / f"step-{TOTAL:012d}"
    path.rename(tmp_path / "old-step")
    path.symlink_to(outside / "checkpoints" / path.name)
    found = {entry.run: entry for entry in entries(runs)}
    assert {name: entry.state for name, entry in found.items()} == {
        **{"a-config.json": "damaged", "a-metrics.jsonl": "stopped", "a-checkpoints": "stopped, no checkpoint"},
        "step": "damaged",
    }
    assert found["a-metrics.jsonl"].last_return is None
    assert list(states(runs / "link")) == ["."]  # who names a link means where it leads


def test_the_table_is_plain_and_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "x" * 120 + " [bold]\n\x1b[31m"
    score = Config(env_id="Pendulum-v1", estimator="score", baseline="loo", seed=3, total_steps=TOTAL)
    store(tmp_path / name, score, returns=[-1234.56], checkpoint=TOTAL)
    store(tmp_path / "a")
    main(["ls", str(tmp_path)])
    header, *rows = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "run task estimator seed steps last return best return state"
    assert rows[0].split() == ["a", "Pendulum-v1", "pathwise", "0", "-/1,000", "-", "-", "empty"]
    assert rows[1].split() == [
        *("x" * 120, "[bold]??[31m", "Pendulum-v1", "score:loo", "3", "1,000/1,000", "-1,234.6", "-1,234.6", "finished")
    ]
    assert {header.index("state"), rows[0].index("empty"), rows[1].index("finished")} == {header.index("state")}
    main(["ls", str(tmp_path), "--json"])
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["run"] for run in runs] == ["a", name]
    assert (runs[1]["estimator"], runs[1]["baseline"], runs[1]["best_return"]) == ("score", "loo", -1234.56)


def test_wrong_directories(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for arguments, told in ((["ls"], "runs does not exist"), (["ls", "file"], "file is a file")):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert told in capsys.readouterr().err
    main(["ls", "."])
    assert "there are no runs in ." in capsys.readouterr().err
    main(["ls", ".", "--json"])
    assert json.loads(capsys.readouterr().out) == {"runs": []}


def test_a_list_needs_no_pytorch(tmp_path):
    store(tmp_path / "a")
    code = "import sys; from fastsac.cli import main; main(sys.argv[1:]); print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code, "ls", tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
