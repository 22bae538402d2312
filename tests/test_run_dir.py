"""Run directories that are shared, linked, full, read-only or hostile."""

import dataclasses
import hashlib
import json
import os
import platform
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastsac import SAC, FastsacError, UsageError, checkpoint
from fastsac.cli import main
from fastsac.run_dir import LOCK, RunLock, newest_step, read_config, write_config
from tests.runs import SMALL, rows_of

ROOT = Path(__file__).parents[1]
TINY = dataclasses.replace(SMALL, hidden_sizes=(8,), batch_size=8, checkpoint_replay=True, buffer_size=200)
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("stored") / "run"
    SAC(TINY).learn(total_steps=120, run_dir=run_dir)
    return run_dir


@pytest.fixture
def run_dir(stored, tmp_path):
    return Path(shutil.copytree(stored, tmp_path / "run"))


def command_line(*arguments):
    """The exit status, which is never a traceback's."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code or 0
    return 0


# shared


def test_two_processes_never_write_one_run(run_dir, capsys):
    lock = RunLock(run_dir)
    before = (run_dir / "metrics.jsonl").read_bytes()
    agent = SAC.load(run_dir)
    for write in (lambda: agent.learn(total_steps=200, run_dir=run_dir), lambda: agent.save(run_dir)):
        (run_dir / LOCK).write_text("process 1 on that")
        with pytest.raises(UsageError, match="is being written by process 1 on that: wait for it, or stop it"):
            write()
        (run_dir / LOCK).write_text(f"process {os.getpid()} on {platform.node()}")
        with pytest.raises(UsageError, match="is being written by this process itself: choose another directory"):
            write()
    assert command_line("train", "--resume", run_dir, "--total-steps", 200) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"fastsac: {run_dir} is being written by")
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert command_line("eval", run_dir, "--episodes", 1) == 0  # reading needs no lock
    lock.release()
    agent.learn(total_steps=200, run_dir=run_dir)
    assert not (run_dir / ".lock").exists()


def test_a_killed_process_holds_no_lock(tmp_path):
    code = f"from fastsac.run_dir import *; lock = RunLock(Path({str(tmp_path)!r})); print('held', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match=f"process {process.pid} on"):
        RunLock(tmp_path)
    process.kill()
    process.communicate()
    lock = RunLock(tmp_path)
    assert lock.holds()
    (tmp_path / ".lock").unlink()
    assert not lock.holds()
    lock.release()


# linked


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "tensorboard", "checkpoints", ".lock"])
def test_nothing_is_written_through_a_symbolic_link(run_dir, tmp_path, name):
    outside = tmp_path / "outside"
    if (run_dir / name).exists():
        (run_dir / name).rename(outside)
    else:
        outside.write_text("mine")
    (run_dir / name).symlink_to(outside)
    content = outside.read_bytes() if outside.is_file() else sorted(outside.iterdir())
    with pytest.raises(FastsacError, match="symbolic link"):
        SAC.load(run_dir).learn(total_steps=200, run_dir=run_dir)
    assert content == (outside.read_bytes() if outside.is_file() else sorted(outside.iterdir()))


def test_neither_the_best_checkpoint_nor_the_picture_leads_outside(run_dir, tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    best = run_dir / "checkpoints" / "best"
    best.symlink_to(outside)
    with pytest.raises(FastsacError, match="symbolic link"):
        SAC.load(run_dir).learn(total_steps=200, run_dir=run_dir)
    with pytest.raises(FastsacError, match="symbolic link"):
        SAC.load(run_dir, best=True)
    best.unlink()
    (tmp_path / "victim").write_text("mine")
    (run_dir / "learning_curve.png").symlink_to(tmp_path / "victim")
    assert command_line("train", "--resume", run_dir, "--total-steps", 200, "--eval-every", 50) == 0
    assert (tmp_path / "victim").read_text() == "mine"
    assert not list(outside.iterdir())
    assert (run_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_another_process_went_on_with_is_refused(run_dir):
    ours, other = SAC.load(run_dir), SAC.load(run_dir)
    other.learn(total_steps=200, run_dir=run_dir)
    other.learn(total_steps=240, run_dir=run_dir)
    for _ in range(2):
        with pytest.raises(UsageError, match="has changed since this run was loaded"):
            ours.learn(total_steps=160, run_dir=run_dir)
    assert SAC.load(run_dir).steps == 240


def test_another_run_in_the_place_of_ours_is_refused(run_dir):
    ours = SAC.load(run_dir)
    shutil.rmtree(run_dir)
    SAC(dataclasses.replace(TINY, seed=1)).learn(total_steps=120, run_dir=run_dir)
    with pytest.raises(UsageError, match="has changed since this run was loaded"):
        ours.learn(total_steps=160, run_dir=run_dir)
    shutil.rmtree(run_dir)
    ours.learn(total_steps=160, run_dir=run_dir)
    assert SAC.load(run_dir).steps == 160


@pytest.mark.parametrize("name", ["", "state.json", "learner.safetensors", "manifest.json", "replay.safetensors"])
def test_nothing_is_read_through_a_symbolic_link(run_dir, tmp_path, name):
    path = checkpoint.latest_checkpoint(run_dir) / name
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(FastsacError, match=r"symbolic link|not a regular file|is missing"):
        SAC.load(run_dir)


@pytest.mark.parametrize("name", ["config.json", "state.json", "manifest.json"])
def test_neither_pipes_nor_endless_files_are_read(run_dir, monkeypatch, name):
    path = run_dir / name if name == "config.json" else checkpoint.latest_checkpoint(run_dir) / name
    path.unlink()
    os.mkfifo(path)
    assert command_line("eval", run_dir, "--episodes", 1) in (1, 2)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: a terabyte of zeros
    assert command_line("eval", run_dir, "--episodes", 1) in (1, 2)


def test_a_run_directory_that_is_itself_a_link_is_used(run_dir, tmp_path):
    (tmp_path / "link").symlink_to(run_dir)
    SAC.load(tmp_path / "link").learn(total_steps=160, run_dir=tmp_path / "link")
    assert SAC.load(run_dir).steps == 160


# full, read-only


def mounted(path: Path, size: str) -> bool:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    return subprocess.run(command, capture_output=True).returncode == 0


TRAIN = (  # noqa: SIM905, a list is harder to read
    "train --env-id Pendulum-v1 --num-envs 4 --hidden-sizes 32 32 --batch-size 32 --learning-starts 100 --utd 0.05 "
    "--buffer-size 400000 --eval-every 0 --log-every 100 --num-threads 1 --precision fp32 --checkpoint-every 1000 "
    "--checkpoint-replay"
).split()


def train(run_dir, total_steps, preexec_fn=None):
    command = [sys.executable, "-m", "fastsac", *TRAIN, "--total-steps", str(total_steps), "--run-dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=preexec_fn)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
def test_a_file_system_that_is_full(tmp_path):
    """A small file system where one can be mounted, else a limit on the size of files."""
    disk = tmp_path / "disk"
    if not mounted(disk, "500k"):
        done = train(disk / "run", 12_000, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000)))
        check_full(done, disk / "run")
        return
    try:
        done = train(disk / "run", 12_000)
        check_full(done, disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def check_full(done, run_dir):
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert done.returncode == 1
    assert any("cannot save the checkpoint" in line for line in warnings)
    assert all(line.endswith(("with the next checkpoint", "with the next one")) for line in warnings)
    assert f"the last good checkpoint is {run_dir}/checkpoints/step-" in done.stderr.splitlines()[-1]
    steps = newest_step(run_dir)
    assert steps in range(1000, 12_000)
    assert SAC.load(run_dir).steps == steps
    assert not [path for path in run_dir.rglob("*") if ".tmp-" in path.name]


def test_metrics_that_cannot_be_written_wait(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    done = train(tmp_path / "run", 4000, limit)
    assert done.returncode == 1
    warnings = [line for line in done.stderr.splitlines() if "metrics.jsonl" in line]
    assert len(warnings) == 1  # not for every line
    assert warnings[0].startswith(
        f"warning: cannot write {tmp_path}/run/metrics.jsonl: File too large; training continues"
    )
    assert rows_of(tmp_path / "run")  # whole lines, up to the limit


def test_lines_that_waited_are_written_when_there_is_room(tmp_path, monkeypatch, capsys):
    """And TensorBoard shows them once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    agent, step, before = SAC(TINY), SAC._step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limiting(*arguments):
        outcome = yield from step(*arguments)
        if agent.steps == 200:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        if agent.steps == 500:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return outcome

    monkeypatch.setattr(SAC, "_step", limiting)
    try:
        agent.learn(total_steps=600, run_dir=tmp_path / "run", progress=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large; training continues" in capsys.readouterr().err
    rows = [row for row in rows_of(tmp_path / "run") if "critic_loss" in row]
    assert [row["step"] for row in rows] == [52, 100, 152, 200, 252, 300, 352, 400, 452, 500, 552, 600]
    scalars = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("train/critic_loss")
    assert [scalar.step for scalar in scalars] == [row["step"] for row in rows]


def test_a_read_only_run_can_be_evaluated_and_not_trained(run_dir, monkeypatch, capsys):
    def read_only(path, flags, *arguments, **options):
        if flags & os.O_CREAT:  # root may write anywhere, so permissions alone would not do
            raise OSError(30, "Read-only file system", str(path))
        return os_open(path, flags, *arguments, **options)

    os_open = os.open
    monkeypatch.setattr(os, "open", read_only)
    assert command_line("eval", run_dir, "--episodes", 1) == 0
    assert command_line("train", "--resume", run_dir, "--total-steps", 200) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"fastsac: cannot write to the run directory {run_dir}: Read-only file system"
    )


def test_settings_of_older_runs(run_dir):
    path = run_dir / "config.json"
    path.write_text(path.read_text().replace('"policy_delay": 1', '"actor_every": 3'))
    assert read_config(run_dir).policy_delay == 3


# hostile


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Replace a checkpoint's file and make the manifest agree with it."""
    (path / name).unlink()
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (path / "manifest.json").write_bytes(checkpoint._manifest_bytes(manifest))


def paths_in(value, path=()):
    """Every place in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
    | st.text(max_size=8)
    | st.sampled_from([2**31, 2**40, 2**62, -1, 0, "auto", "../x", "Pendulum-v1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def load_and_go_on(run_dir: Path) -> None:
    """Either it works, or it is refused in one line, with every engine."""
    for config in (None, dataclasses.replace(TINY, engine="reference")):
        message = ""
        try:
            agent = SAC.load(run_dir, config)
            agent.learn(total_steps=agent.steps + 8)
            agent.close()
        except FastsacError as error:
            message = str(error)
        assert "\n" not in message


@pytest.fixture(scope="module")
def target(stored, tmp_path_factory):
    """A copy whose files are put back after each example."""
    return Path(shutil.copytree(stored, tmp_path_factory.mktemp("target") / "run"))


@PROPERTY
@given(data=st.data())
def test_any_state_with_the_right_hash_loads_or_is_refused(target, data):
    """Whatever somebody writes into a checkpoint's state.json: an agent, or one line."""
    path = checkpoint.latest_checkpoint(target)
    content = (path / "state.json").read_bytes()
    state = json.loads(content)
    place = data.draw(st.sampled_from(list(paths_in(state))))
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    if isinstance(inner, dict) and data.draw(st.booleans()) and data.draw(st.booleans()):
        del inner[place[-1]]
    else:
        inner[place[-1]] = data.draw(json_values)
    rewrite(path, "state.json", json.dumps(state).encode())
    try:
        load_and_go_on(target)
    finally:
        rewrite(path, "state.json", content)


@PROPERTY
@given(data=st.data())
def test_any_tensors_with_the_right_hash_load_or_are_refused(target, data):
    path = checkpoint.latest_checkpoint(target)
    name = data.draw(st.sampled_from(sorted(entry.name for entry in path.glob("*.safetensors"))))
    content = (path / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    key = data.draw(st.sampled_from(sorted(header)))
    what = data.draw(st.sampled_from(["rename", "drop", "dtype", "shape", "offsets", "garbage", "another", "another"]))
    if what == "another":  # consistent in itself, and of another shape
        tensors = checkpoint.load_checkpoint(path, groups=[name.partition(".")[0]])[0][name.partition(".")[0]]
        shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
        tensors[key] = torch.zeros(shape, dtype=data.draw(st.sampled_from([torch.float32, torch.float64, torch.int64])))
        torch_file = path / "other.safetensors"
        save_file(tensors, torch_file)
        encoded = torch_file.read_bytes()
        torch_file.unlink()
        rewrite(path, name, encoded)
        try:
            load_and_go_on(target)
        finally:
            rewrite(path, name, content)
        return
    if what == "rename":
        header[data.draw(st.text(max_size=10))] = header.pop(key)
    elif what == "drop":
        del header[key]
    elif what == "dtype":
        header[key]["dtype"] = data.draw(st.sampled_from(["F32", "I64", "U8", "BOOL", "F64", "XX"]))
    elif what == "shape":
        header[key]["shape"] = data.draw(st.lists(st.integers(-1, 2**62), max_size=4))
    elif what == "offsets":
        header[key]["data_offsets"] = data.draw(st.lists(st.integers(0, 2**62), min_size=1, max_size=3))
    else:
        header[key] = data.draw(json_values)
    encoded = json.dumps(header).encode()
    rewrite(path, name, struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
    try:
        load_and_go_on(target)
    finally:
        rewrite(path, name, content)


def test_a_tensor_twice_in_one_file_is_refused(run_dir):
    path = checkpoint.latest_checkpoint(run_dir)
    content = (path / "learner.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(header)["log_alpha"]).encode()
    header = header[:-1] + b',"log_alpha":' + entry + b"}"
    rewrite(path, "learner.safetensors", struct.pack("<Q", len(header)) + header + content[8 + length :])
    with pytest.raises(FastsacError, match=r"learner.safetensors is damaged: a key occurs twice"):
        SAC.load(run_dir)


@pytest.mark.parametrize("engine", ["fused", "reference"])
@pytest.mark.parametrize("moment", ["step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("shape", [None, (1,), (7, 5)])
def test_moments_of_another_shape_are_refused(run_dir, engine, moment, shape):
    """PyTorch's fused Adam would write past their end."""
    path = checkpoint.latest_checkpoint(run_dir)
    groups, state = checkpoint.load_checkpoint(path)
    name = f"optimizer.critic.0.{moment}"
    del groups["learner"][name]
    if shape is not None:
        groups["learner"][name] = torch.zeros(shape)
    checkpoint.save_checkpoint(path, groups, state)
    with pytest.raises(UsageError, match="the checkpoint's optimisers do not fit this configuration"):
        SAC.load(run_dir, dataclasses.replace(TINY, engine=engine))


def test_an_unknown_tensor_is_refused(run_dir):
    path = checkpoint.latest_checkpoint(run_dir)
    groups, state = checkpoint.load_checkpoint(path)
    groups["learner"]["actor.backdoor/../x"] = torch.zeros(1)
    checkpoint.save_checkpoint(path, groups, state)
    with pytest.raises(UsageError, match=r"the checkpoint holds 'actor.backdoor/../x', which no learner has"):
        SAC.load(run_dir)


@pytest.mark.parametrize(
    "change", [{"hidden_sizes": [10**7, 10**7]}, {"num_critics": 10**9}, {"hidden_sizes": [2**40, 2**40]}]
)
def test_no_memory_is_taken_for_networks_that_the_checkpoint_does_not_hold(run_dir, change):
    path = checkpoint.latest_checkpoint(run_dir)
    groups, state = checkpoint.load_checkpoint(path)
    state["config"] |= change
    checkpoint.save_checkpoint(path, groups, state)
    with pytest.raises(FastsacError, match=r"do not fit this configuration|not a checkpoint of this version"):
        SAC.load(run_dir)


CONFIG = json.loads(json.dumps(dataclasses.asdict(TINY)))


@PROPERTY
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)) | st.text(max_size=6), json_values, max_size=3))
def test_any_config_json_is_read_or_refused(tmp_path_factory, changes):
    directory = tmp_path_factory.getbasetemp() / "config"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    message = ""
    try:
        read_config(directory)
    except UsageError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "[]", "3", '{"seed": 1, "seed": 2}', "[" * 100_000, "\xff", '{"seed": 1e999}'])
def test_odd_config_json(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_written_configuration_is_read_back(tmp_path):
    write_config(tmp_path, TINY)
    assert read_config(tmp_path) == TINY
    assert os.listdir(tmp_path) == ["config.json"]
