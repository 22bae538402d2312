import dataclasses
import json
import os
import struct
import threading
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastsac import SAC, Callback, FastsacError, UsageError
from fastsac.cli import main
from fastsac.trackers import Tracking, by_tag
from fastsac.trackers import wandb as wandb_tracker
from tests.runs import SMALL, rows_of, stopped_at

CONFIG = dataclasses.replace(SMALL, total_steps=1200, eval_every=600, eval_episodes=1)


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """Every client keeps what it gets below the test's directory."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlflow")


def leveldb_records(log):
    """The records of LevelDB's log format; W&B's begins after 7 bytes of its own."""
    place, record = 7, b""
    log = bytes(7) + log
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        record += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_history(run_dir):
    """The values of each line that W&B has on disk, and the settings."""
    from wandb.proto.wandb_internal_pb2 import Record

    lines, config = [], {}
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()[7:]):
            record = Record()
            record.ParseFromString(data)
            if record.history.item:
                keys = ["/".join(item.nested_key) or item.key for item in record.history.item]
                lines.append(
                    dict(zip(keys, (json.loads(item.value_json) for item in record.history.item), strict=True))
                )
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return lines, config


def test_every_tracker_gets_what_metrics_jsonl_holds(at_home, tmp_path):
    import mlflow
    from trackio.sqlite_storage import SQLiteStorage

    run_dir, project = tmp_path / "run", "pendulum"
    agent = SAC(CONFIG)
    agent.learn(900, run_dir, track="wandb,tensorboard, trackio,mlflow", track_project=project)
    agent = SAC.load(run_dir)
    agent.learn(1200, run_dir, track_video=True)  # continues in the same four, and in the same project
    rows = rows_of(run_dir)
    assert {row["step"] for row in rows} >= {600, 900, 1200}
    wanted = [(step, tag, value) for step, values in map(by_tag, rows) for tag, value in values.items()]
    tags = {tag for _, tag, _ in wanted}
    assert tags >= {"rollout/episode_return", "train/critic_loss", "time/steps_per_s", "eval/return", "eval/return_std"}
    assert {tag.partition("/")[0] for tag in tags} == {"rollout", "train", "time", "eval"}
    video = run_dir / "last_evaluation.mp4"

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    shown = [(scalar.step, tag, scalar.value) for tag in tags for scalar in events.Scalars(tag)]
    assert sorted(shown) == [(step, tag, pytest.approx(value, rel=1e-6)) for step, tag, value in sorted(wanted)]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    assert b'"env_id": "Pendulum-v1"' in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]
    assert b'"cores"' in events.Tensors("system/text_summary")[0].tensor_proto.string_val[0]
    assert events.Images("eval/video")[0].encoded_image_string.startswith(b"GIF8")

    lines, config = wandb_history(run_dir)
    assert config["env_id"] == "Pendulum-v1"
    assert config["system"]["cpu"]
    found = [(each["step"], tag, value) for each in lines for tag, value in each.items() if tag in tags]
    assert sorted(found) == sorted(wanted)
    assert [each["step"] for each in lines if any(tag.startswith("eval/video") for tag in each)] == [1200]

    (name,) = {json.loads((run_dir / "tracking.json").read_text())["runs"]["trackio"]}
    logs = SQLiteStorage.get_logs(project, name)
    found = [(each["step"], tag, value) for each in logs for tag, value in each.items() if tag in tags]
    assert sorted(found) == sorted(wanted)
    assert [each["step"] for each in logs if "eval/video" in each] == [1200]

    client = mlflow.MlflowClient()
    run = client.get_run(json.loads((run_dir / "tracking.json").read_text())["runs"]["mlflow"])
    assert run.info.status == "FINISHED"
    assert run.data.params["env_id"] == "Pendulum-v1"
    assert "cores" in run.data.tags["system.cpu"]
    assert run.data.tags["settings.total_steps"] == "1200"  # a parameter cannot be changed
    assert run.data.params["total_steps"] == "900"
    histories = {tag: client.get_metric_history(run.info.run_id, tag) for tag in tags}
    found = [(metric.step, tag, metric.value) for tag, history in histories.items() for metric in history]
    assert sorted(found) == sorted(wanted)
    assert [each.path for each in client.list_artifacts(run.info.run_id, "eval")] == [f"eval/{video.name}"]


def test_seeds_have_runs_of_their_own(at_home, tmp_path):
    """Trackio would end the run before with the next one."""
    from trackio.sqlite_storage import SQLiteStorage

    options = ["--env-id", "Pendulum-v1", "--num-envs", "2", "--hidden-sizes", "16", "16", "--batch-size", "16"]
    options += ["--total-steps", "200", "--learning-starts", "50", "--eval-every", "0", "--log-every", "100"]
    options += ["--num-threads", "1", "--precision", "fp32", "--num-learners", "2", "--run-dir", str(tmp_path / "two")]
    main(["train", *options, "--track", "trackio,wandb"])
    for seed in (0, 1):
        logged = rows_of(tmp_path / "two" / f"seed-{seed}")
        name = json.loads((tmp_path / "two" / f"seed-{seed}" / "tracking.json").read_text())["runs"]["trackio"]
        assert name.startswith(f"two-seed-{seed}-")
        assert [each["step"] for each in SQLiteStorage.get_logs("fastsac", name)] == [100, 200]
        assert [each["step"] for each in wandb_history(tmp_path / "two" / f"seed-{seed}")[0]] == [100, 200]
        assert [row["step"] for row in logged] == [100, 200]


def test_no_tracker_at_all(tmp_path):
    SAC(CONFIG).learn(100, tmp_path / "run", track="none")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("checkpoints", "config.json", "metrics.jsonl", "tracking.json")
    ]
    SAC.load(tmp_path / "run").learn(200, tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize(
    ("track", "message"),
    [
        (
            "wanb",
            "--track must be none, or any of tensorboard, wandb, trackio, mlflow, separated by commas; got 'wanb'; "
            "did you mean wandb?",
        ),
        (
            "",
            "--track must be none, or any of tensorboard, wandb, trackio, mlflow, separated by commas; got ''",
        ),
        ("none,wandb", "--track must be none, or any of"),
        ("mlflow", "--track mlflow needs a package that is not installed: pip install mlflow"),
    ],
)
def test_what_cannot_be_tracked_is_said_before_anything_is_written(track, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--track", track, "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"fastsac: {message}")
    assert not (tmp_path / "run").exists()


def test_nothing_to_track_without_a_run_directory():
    with pytest.raises(UsageError, match="need a run_dir"):
        SAC(CONFIG).learn(100, track="wandb")
    assert Tracking.of("wandb,wandb", "p", False).names == ("wandb",)


class _Broken:
    stored, place = "id", ""

    def __getattr__(self, name):
        def fail(*arguments):
            raise ValueError(f"no\n{name}")

        return fail


def test_a_tracker_that_fails_leaves_training_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_tracker, "start", lambda run: _Broken())
    SAC(CONFIG).learn(200, tmp_path / "run", progress=True, track="wandb,tensorboard")
    told = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert told == ["warning: wandb: no log; training continues", "warning: wandb: no close; training continues"]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert len(events.Scalars("train/critic_loss")) == len(
        [row for row in rows_of(tmp_path / "run") if "critic_loss" in row]
    )


def test_a_tracker_that_cannot_be_started_ends_the_run(tmp_path, monkeypatch):
    def start(run):
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb_tracker, "start", start)
    for _ in range(2):  # and can be begun again
        with pytest.raises(
            FastsacError, match=r"^--track wandb could not be started: api_key not configured \(no-tty\)$"
        ):
            SAC(CONFIG).learn(200, tmp_path / "run", track="tensorboard,wandb")


def test_what_tracking_json_may_hold(tmp_path):
    """It may come from anybody."""
    run_dir = tmp_path / "run"
    SAC(CONFIG).learn(50, run_dir)
    assert not (run_dir / "tracking.json").exists()  # the default
    os.mkfifo(run_dir / "tracking.json")
    SAC.load(run_dir).learn(100, run_dir)  # would wait for ever
    (run_dir / "tracking.json").unlink()
    for text in ('{"active": ["os"], "runs": {"os": "x"}}', '{"active": 1}', "[]", "{"):
        (run_dir / "tracking.json").write_text(text)
        agent = SAC.load(run_dir)
        agent.learn(agent.steps + 20, run_dir)
    (run_dir / "wandb").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="symbolic link"):
        SAC.load(run_dir).learn(500, run_dir)


class _Named(_Broken):
    def __init__(self, run):
        self.stored, self.closed = run.stored or "first", []

    def log(self, lines):
        pass

    def close(self, outcome):
        time.sleep(0.2)
        self.closed.append(outcome)


def test_a_run_keeps_its_name_in_a_tracker_that_was_left_out_once(tmp_path, monkeypatch, caplog):
    made = []
    monkeypatch.setattr(wandb_tracker, "start", lambda run: made.append(_Named(run)) or made[-1])
    monkeypatch.setattr("fastsac.trackers.PATIENCE", 0.05)
    for steps, track in ((50, "wandb"), (100, "none"), (150, None), (200, "wandb")):
        agent = SAC(CONFIG) if steps == 50 else SAC.load(tmp_path / "run")
        agent.learn(steps, tmp_path / "run", track=track, track_project="mine" if steps == 50 else None)
        if made:
            made[-1].stored = "another"
    assert len(made) == 2
    assert json.loads((tmp_path / "run" / "tracking.json").read_text()) == {
        "active": ["wandb"],
        "project": "mine",
        "runs": {"wandb": "first"},
    }
    assert [each.closed for each in made] == [["finished"], ["finished"]]
    assert "still waiting for wandb to finish" in caplog.text


def test_trackers_that_were_started_are_closed_if_the_run_cannot_begin(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(wandb_tracker, "start", lambda run: made.append(_Named(run)) or made[-1])
    monkeypatch.setattr("fastsac.trackers._write", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SAC(CONFIG).learn(50, tmp_path / "run", track="wandb")
    assert made[0].closed == ["failed"]


def test_a_tracker_that_does_not_answer_does_not_hold_up_training(tmp_path, monkeypatch):
    answered, waited = threading.Event(), []

    class Slow(_Named):
        def log(self, lines):
            waited.append(answered.wait(10.0))

    class Answering(Callback):
        def on_step(self, agent):
            if agent.steps >= 150:
                answered.set()

    monkeypatch.setattr(wandb_tracker, "start", Slow)
    SAC(CONFIG).learn(200, tmp_path / "run", track="wandb", callback=Answering())
    assert waited == [True] * len(rows_of(tmp_path / "run"))  # and nothing was lost


def test_a_run_that_a_signal_stops_is_no_finished_one(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(wandb_tracker, "start", lambda run: made.append(_Named(run)) or made[-1])
    with stopped_at(monkeypatch, 60):
        SAC(CONFIG).learn(200, tmp_path / "run", track="wandb")
    assert made[0].closed == ["stopped"]


def test_no_video_of_a_policy_that_was_not_evaluated(tmp_path, caplog):
    class Stop(Callback):
        def on_step(self, agent):
            return agent.steps < 900

    config = dataclasses.replace(CONFIG, total_steps=2000)
    SAC(config).learn(run_dir=tmp_path / "run", track_video=True, callback=Stop())
    assert "no video of the last evaluation: the policy has changed since" in caplog.text
    assert not (tmp_path / "run" / "last_evaluation.mp4").exists()


def test_no_video_where_there_is_nothing_to_draw_with(tmp_path, monkeypatch, capsys):
    def get_writer(*arguments, **options):
        raise ValueError("All images must have one size")

    monkeypatch.setattr("imageio.get_writer", get_writer)
    SAC(CONFIG).learn(600, tmp_path / "run", progress=True, track_video=True)
    err = capsys.readouterr().err
    assert "warning: no video of the last evaluation: cannot write the video" in err
    assert "ValueError: All images must have one size" in err
    with pytest.raises(UsageError, match="--eval-every 0 never evaluates"):
        SAC(SMALL).learn(50, tmp_path / "other", track_video=True)
