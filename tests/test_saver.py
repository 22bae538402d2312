"""Checkpoints that are written beside the training, and their blocks of the replay."""

import dataclasses
import errno
import itertools
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from fastsac import SAC, FastsacError, UsageError, checkpoint, saver
from fastsac.evaluate import Evaluation
from fastsac.run_dir import RunLock
from tests.runs import SMALL, parameters, state_of, stopped_at

CONFIG = dataclasses.replace(SMALL, checkpoint_replay=True, checkpoint_every=100, buffer_size=600, utd=0.1)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(saver, "LEAST", 1)


def blocks(path):
    return {entry.name: entry.stat().st_ino for entry in path.iterdir() if entry.name.startswith("replay-")}


def newest(run_dir):
    return checkpoint.latest_checkpoint(run_dir)


def test_a_block_is_written_once_and_dropped_when_the_ring_has_passed_it(tmp_path):
    agent, seen, written = SAC(CONFIG), {}, 0
    rows = agent.replay.num_rows
    for total in range(100, 2000, 100):
        agent.learn(total_steps=total, run_dir=tmp_path)
        now = blocks(newest(tmp_path))
        written += len(set(now.values()) - set(seen.values()))
        spans = sorted(saver._span(name.removesuffix(".safetensors")) for name in now)
        assert spans[0][0] <= agent.replay.oldest
        assert spans[0][1] > agent.replay.oldest  # nothing that could be dropped
        assert spans[-1][1] == agent.replay.newest
        assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
        assert len(spans) <= saver.BLOCKS + 2
        seen = now
    length = -(-rows // saver.BLOCKS)
    assert written <= agent.replay.newest // length + 2 * 19  # each full one once, and the last one of each checkpoint
    assert sum(entry.stat().st_size for entry in newest(tmp_path).iterdir()) < 300_000
    loaded = SAC.load(tmp_path)
    assert state_of(loaded)["counters"] == state_of(agent)["counters"]
    assert state_of(loaded)["tensors"] == state_of(agent)["tensors"]


@pytest.mark.parametrize(
    ("buffer_size", "least"),
    [
        *[(4, 1), (20, 1024), (256, 1), (400, 1024)],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, 1024), (20, 1), (256, 1024), (400, 1)]),
    ],
)
def test_rings_of_any_size(tmp_path, monkeypatch, buffer_size, least):
    monkeypatch.setattr(saver, "LEAST", least)
    agent = SAC(dataclasses.replace(CONFIG, buffer_size=buffer_size, checkpoint_every=36))
    for total in (20, 300, 304, 700):
        agent.learn(total_steps=total, run_dir=tmp_path)
        assert state_of(SAC.load(tmp_path))["tensors"] == state_of(agent)["tensors"]


def test_a_resumed_run_goes_on_with_the_blocks_that_are_there(tmp_path):
    SAC(CONFIG).learn(total_steps=400, run_dir=tmp_path)
    before = blocks(newest(tmp_path))
    SAC.load(tmp_path).learn(total_steps=440, run_dir=tmp_path)
    after = blocks(newest(tmp_path))
    assert len(set(before.values()) & set(after.values())) >= len(before) - 1


def test_where_there_are_no_hard_links_blocks_are_copied(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    agent = SAC(CONFIG)
    agent.learn(total_steps=400, run_dir=tmp_path)
    assert state_of(SAC.load(tmp_path))["tensors"] == state_of(agent)["tensors"]


def test_a_checkpoint_holds_the_moment_at_which_it_was_taken(tmp_path, monkeypatch):
    """And not what training has done since: it is written slowly here, while training goes on."""
    snapshots, write = {}, checkpoint.save_checkpoint

    def slowly(path, *arguments, **options):
        time.sleep(0.3)
        write(path, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slowly)
    take = saver.Saver.save

    def save(self, contents):
        take(self, contents)
        snapshots[agent.steps] = state_of(agent)

    monkeypatch.setattr(saver.Saver, "save", save)
    agent = SAC(dataclasses.replace(CONFIG, utd=1.0, buffer_size=100, checkpoint_every=200))
    with stopped_at(monkeypatch, 500):
        agent.learn(total_steps=1000, run_dir=tmp_path)
    assert list(snapshots) == [200, 400, 500]
    for step in (500, 400):
        assert newest(tmp_path).name.endswith(str(step))
        assert state_of(SAC.load(tmp_path))["tensors"] == snapshots[step]["tensors"]
        shutil.rmtree(newest(tmp_path))


def test_the_checkpoint_before_is_what_it_was(tmp_path, monkeypatch):
    agent = SAC(dataclasses.replace(CONFIG, utd=1.0, buffer_size=100))
    agent.learn(total_steps=400, run_dir=tmp_path)
    then = state_of(agent)["tensors"]
    agent.learn(total_steps=440, run_dir=tmp_path)
    shutil.rmtree(newest(tmp_path))
    assert newest(tmp_path).name.endswith("400")
    assert state_of(SAC.load(tmp_path))["tensors"] == then


def test_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    release, steps = threading.Event(), []
    write = checkpoint.save_checkpoint

    def blocked(*arguments, **options):
        assert release.wait(30.0)
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", blocked)
    agent = SAC(CONFIG)
    step = SAC._step

    def counting(*arguments):
        outcome = yield from step(*arguments)
        steps.append(agent.steps)
        if agent.steps >= 180:  # the checkpoint of step 100 is still being written
            release.set()
        return outcome

    monkeypatch.setattr(SAC, "_step", counting)
    agent.learn(total_steps=400, run_dir=tmp_path)
    assert state_of(SAC.load(tmp_path))["tensors"] == state_of(agent)["tensors"]


def failing_writes(monkeypatch, which):
    """Make writes of checkpoints fail, counted from 0."""
    write, calls = checkpoint.save_checkpoint, []

    def failing(path, *arguments, **options):
        calls.append(path)
        if which(len(calls) - 1):
            raise FastsacError("cannot save the checkpoint: disk full")
        write(path, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", failing)
    return calls


def test_a_failed_save_is_a_warning_and_the_next_one_is_whole(tmp_path, monkeypatch, capsys):
    failing_writes(monkeypatch, lambda call: call in (1, 2))
    agent = SAC(CONFIG)
    agent.learn(total_steps=500, run_dir=tmp_path, progress=True)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert (
        warnings == ["warning: cannot save the checkpoint: disk full; it will be retried with the next checkpoint"] * 2
    )
    assert state_of(SAC.load(tmp_path))["tensors"] == state_of(agent)["tensors"]


@pytest.mark.parametrize("checkpoint_every", [100, 0])
def test_only_the_last_save_is_an_error(tmp_path, monkeypatch, checkpoint_every):
    agent = SAC(dataclasses.replace(CONFIG, checkpoint_every=checkpoint_every))
    agent.learn(total_steps=100, run_dir=tmp_path)
    calls = failing_writes(monkeypatch, lambda call: True)
    good = f"; the last good checkpoint is {checkpoint.step_directory(tmp_path, 100)}"
    with pytest.raises(FastsacError, match=f"disk full{good}$"):
        agent.learn(total_steps=280, run_dir=tmp_path)
    assert len(calls) == 2 + (checkpoint_every > 0)
    assert SAC.load(tmp_path).steps == 100


def test_a_last_save_that_works_at_the_second_try(tmp_path, monkeypatch):
    failing_writes(monkeypatch, lambda call: call == 0)
    SAC(dataclasses.replace(CONFIG, checkpoint_every=0)).learn(total_steps=120, run_dir=tmp_path)
    assert SAC.load(tmp_path).steps == 120


def test_an_error_that_is_none_of_ours_is_not_hidden(tmp_path, monkeypatch):
    def broken(*_):
        raise AssertionError("a mistake")

    monkeypatch.setattr(checkpoint, "save_checkpoint", broken)
    with pytest.raises(AssertionError, match="a mistake"):
        SAC(CONFIG).learn(total_steps=300, run_dir=tmp_path)


def test_blocks_that_somebody_removed_are_written_again(tmp_path):
    agent = SAC(CONFIG)
    agent.learn(total_steps=300, run_dir=tmp_path)
    for path in (tmp_path / "checkpoints").glob("step-*/replay-*"):
        path.unlink()
    agent.learn(total_steps=400, run_dir=tmp_path)
    assert state_of(SAC.load(tmp_path))["tensors"] == state_of(agent)["tensors"]


def test_a_run_directory_removed_in_mid_run_is_made_anew(tmp_path, monkeypatch, capsys):
    run_dir, step = tmp_path / "run", SAC._step
    agent = SAC(CONFIG)

    def removing(*arguments):
        if agent.steps == 240:
            run_dir.rename(tmp_path / "gone")
        return step(*arguments)

    monkeypatch.setattr(SAC, "_step", removing)
    agent.learn(total_steps=420, run_dir=run_dir, progress=True)
    assert f"warning: {run_dir} or its lock was removed; creating it again" in capsys.readouterr().err
    assert state_of(SAC.load(run_dir))["tensors"] == state_of(agent)["tensors"]
    assert sorted(os.listdir(run_dir)) == ["checkpoints", "config.json", "metrics.jsonl", "tensorboard"]


def test_a_best_policy_that_could_not_be_saved_is_saved_later(tmp_path, monkeypatch):
    write, failed = checkpoint.save_checkpoint, []

    def failing(path, *arguments, **options):
        if path.name == "best" and not failed:
            failed.append(path)
            raise FastsacError("cannot save the checkpoint: disk full")
        write(path, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", failing)
    agent = SAC(dataclasses.replace(CONFIG, eval_every=100, eval_episodes=1))
    returns = iter([5.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(agent, "evaluate", lambda *_, **__: Evaluation(np.array([next(returns)]), np.array([1])))
    agent.learn(total_steps=400, run_dir=tmp_path)
    assert SAC.load(tmp_path, best=True).steps == 100


def test_a_run_directory_that_cannot_be_made_anew_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    run_dir, step = tmp_path / "run", SAC._step
    agent = SAC(CONFIG)

    def removing(*arguments):
        if agent.steps == 240:
            run_dir.rename(tmp_path / "gone")
            run_dir.write_text("in the way")
        if agent.steps == 520:
            run_dir.unlink()
        return step(*arguments)

    monkeypatch.setattr(SAC, "_step", removing)
    agent.learn(total_steps=640, run_dir=run_dir, progress=True)
    err = capsys.readouterr().err
    assert f"warning: {run_dir} was removed, and cannot be created again" in err
    assert f"warning: {run_dir} or its lock was removed; creating it again" in err
    assert state_of(SAC.load(run_dir))["tensors"] == state_of(agent)["tensors"]


def test_a_run_directory_that_is_gone_at_the_end_is_an_error(tmp_path, monkeypatch):
    run_dir, step = tmp_path / "run", SAC._step
    agent = SAC(CONFIG)

    def removing(*arguments):
        if agent.steps == 360:
            run_dir.rename(tmp_path / "gone")
            run_dir.write_text("in the way")
        return step(*arguments)

    monkeypatch.setattr(SAC, "_step", removing)
    with pytest.raises(FastsacError, match=r"File exists|Not a directory"):
        agent.learn(total_steps=400, run_dir=run_dir)


def test_a_damaged_block_is_damaged_in_every_checkpoint_that_holds_it(tmp_path):
    agent = SAC(CONFIG)
    agent.learn(total_steps=300, run_dir=tmp_path)
    agent.learn(total_steps=340, run_dir=tmp_path)
    path = sorted(newest(tmp_path).glob("replay-*"))[5]
    assert path.stat().st_nlink == 2
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    advice = "--no-checkpoint-replay continues without the replay buffer"
    with pytest.raises(FastsacError, match=f"differs from the manifest; {advice}$"):
        SAC.load(tmp_path)
    assert SAC.load(tmp_path, dataclasses.replace(CONFIG, checkpoint_replay=False)).steps == 340


def test_saving_elsewhere_stores_the_whole_replay(tmp_path):
    agent = SAC(CONFIG)
    agent.learn(total_steps=900, run_dir=tmp_path / "run")
    agent.save(tmp_path / "other")
    agent.save(tmp_path / "other")
    shutil.rmtree(tmp_path / "run")
    assert state_of(SAC.load(tmp_path / "other"))["tensors"] == state_of(agent)["tensors"]


def test_a_directory_that_was_refused_stays_another_agents(tmp_path):
    SAC(CONFIG).learn(total_steps=40, run_dir=tmp_path)
    other = SAC(CONFIG)
    for _ in range(2):
        with pytest.raises(UsageError, match="already holds a run"):
            other.learn(total_steps=40, run_dir=tmp_path)
    lock = RunLock(tmp_path)  # nobody holds it any more
    lock.release()


@pytest.mark.parametrize("position", ["learner", "replay-", "replay.", "state", "manifest"])
def test_every_flipped_byte_of_a_real_checkpoint_is_refused(tmp_path, position):
    config = dataclasses.replace(CONFIG, hidden_sizes=(2,), buffer_size=60, num_envs=1, learning_starts=20)
    agent = SAC(config)
    agent.learn(total_steps=70, run_dir=tmp_path)
    expected = parameters(agent)
    path = min(entry for entry in newest(tmp_path).iterdir() if entry.name.startswith(position))
    content = path.read_bytes()
    # every byte is tried at the level of checkpoints in test_checkpoint.py; loading an agent for each takes longer
    for place in range(0, len(content), max(1, len(content) // 15)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(FastsacError, match=r"damaged|format"):
            SAC.load(tmp_path)
    path.write_bytes(content)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(SAC.load(tmp_path)).items())
