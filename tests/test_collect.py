"""What an agent plays, as a Minari dataset: read back with Minari, compared, and trained from."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest
from minari.namespace import list_local_namespaces

from fastsac import SAC
from fastsac.cli import main
from fastsac.collect import Recorder, collect
from fastsac.envs import VectorEnv
from fastsac.errors import FastsacError, UsageError
from tests.runs import SMALL


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def run(*arguments: Any) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def agent_for(env_id: str, **settings: Any) -> SAC:
    return SAC(dataclasses.replace(SMALL, env_id=env_id, **settings))


def told(root: Path, dataset_id: str) -> dict[str, Any]:
    return json.loads((root / dataset_id / "data/metadata.json").read_text())


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_what_was_played_is_what_is_read(root, backend):
    agent = agent_for("Pendulum-v1", env_backend=backend, max_episode_steps=20)
    result, path = collect(agent, "pendulum/tiny-v0", 3, 5, deterministic=True)
    dataset = minari.load_dataset("pendulum/tiny-v0")
    assert path == root / "pendulum/tiny-v0"
    assert (dataset.total_episodes, dataset.total_steps) == (3, 60)
    env = dataset.recover_environment()
    assert env.spec.max_episode_steps == 20
    assert dataset.observation_space == env.observation_space
    assert dataset.action_space == env.action_space
    env.reset()
    for episode in dataset:
        obs, action = episode.observations, episode.actions
        assert (obs.dtype, action.dtype, action.shape) == (np.float32, np.float32, (20, 1))
        np.testing.assert_allclose(action, agent.predict(obs[:-1]), atol=1e-5)
        env.unwrapped.state = np.array([np.arctan2(obs[0, 1], obs[0, 0]), obs[0, 2]])
        for t in range(20):  # also the last observation is the one before the reset
            next_obs, reward, *_ = env.unwrapped.step(action[t])
            np.testing.assert_allclose(next_obs, obs[t + 1], atol=1e-3)
            assert reward == pytest.approx(episode.rewards[t], abs=1e-3)
        assert not episode.terminations.any()
        assert episode.truncations.tolist() == [False] * 19 + [True]
    returns = [episode.rewards.sum() for episode in dataset]
    np.testing.assert_allclose(sorted(returns), sorted(result.returns), rtol=1e-5)
    assert told(root, "pendulum/tiny-v0").keys() == {
        *("total_episodes", "total_steps", "data_format", "jpeg_encoding", "observation_space", "action_space"),
        *("env_spec", "dataset_id", "minari_version", "algorithm_name", "description", "dataset_size"),
    }
    assert list(minari.list_local_datasets()) == ["pendulum/tiny-v0"]
    assert list_local_namespaces() == ["pendulum"]
    assert not [each for each in root.iterdir() if each.name.startswith(".")]


def test_episodes_of_all_lengths_are_whole(root):
    agent = agent_for("Hopper-v5")
    result, _ = collect(agent, "hopper/sampled-v0", 40, 0, deterministic=False)
    dataset = minari.load_dataset("hopper/sampled-v0")
    lengths = [len(episode) for episode in dataset]
    assert sorted(lengths) == sorted(result.lengths)
    assert len(set(lengths)) > 5
    assert dataset.total_episodes == 40
    for episode in dataset:
        assert episode.observations.dtype == np.float64  # as the environment gave them
        assert len(episode.observations) == len(episode) + 1
        assert episode.terminations.tolist() == [False] * (len(episode) - 1) + [True]
    again = agent_for("Hopper-v5")
    again.predict(np.zeros(11), deterministic=False)  # noise that was drawn before does not matter
    collect(again, "hopper/again-v0", 40, 0, deterministic=False)
    for one, other in zip(dataset, minari.load_dataset("hopper/again-v0"), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.observations, other.observations)


def test_dict_observations_of_envpool_alone(root):
    agent = agent_for("WalkerWalk-v1", max_episode_steps=6)
    collect(agent, "walker/walk-v0", 2, 0, deterministic=False)
    episode = minari.load_dataset("walker/walk-v0")[0]
    assert {key: part.shape for key, part in episode.observations.items()} == {
        "height": (7,),
        "orientations": (7, 14),
        "velocity": (7, 9),
    }
    assert "env_spec" not in told(root, "walker/walk-v0")  # Gymnasium has no such task
    there = agent_for("WalkerWalk-v1", max_episode_steps=6, offline="walker/walk-v0", total_steps=8)
    there.learn()
    np.testing.assert_allclose(
        there.replay.transitions().obs[0].numpy()[:1], [episode.observations["height"][0]], rtol=1e-6
    )


def test_wrapped_environments_have_no_specification(root):
    agent = agent_for("Pendulum-v1", env_wrappers=("gymnasium.wrappers:FlattenObservation",), max_episode_steps=5)
    collect(agent, "pendulum/wrapped-v0", 1, 0, deterministic=False)
    assert "env_spec" not in told(root, "pendulum/wrapped-v0")


def test_there_and_back_on_the_command_line(tmp_path, root, capsys):
    options = ["--env-id", "Pendulum-v1", "--num-envs", 2, "--hidden-sizes", 16, "--batch-size", 16, "--eval-every", 0]
    options += ["--max-episode-steps", 25, "--num-threads", 1, "--precision", "fp32", "--learning-starts", 0]
    assert run("train", *options, "--total-steps", 60, "--run-dir", tmp_path / "first") == 0
    assert run("collect", tmp_path / "first", "--out", "pendulum/sac-v0", "--episodes", 3) == 0
    out = capsys.readouterr().out
    assert "pendulum/sac-v0: 3 episodes, 75 steps, return -" in out
    assert "sampled actions of a SAC agent in Pendulum-v1" in told(root, "pendulum/sac-v0")["description"]
    second = ["--total-steps", 40, "--run-dir", tmp_path / "second", "--offline", "pendulum/sac-v0"]
    assert run("train", *options, *second) == 0
    assert "; offline data: 75 transitions of 3 episodes from pendulum/sac-v0; run dir" in capsys.readouterr().err
    assert SAC.load(tmp_path / "second").config.offline == "pendulum/sac-v0"
    for name in ("pendulum/sac-v0", "pendulum/sac", "../sac-v0", "p/../q-v0"):
        assert run("collect", tmp_path / "first", "--out", name) == 2
        message = capsys.readouterr().err
        assert ("already exists" if name == "pendulum/sac-v0" else "must be the id of a Minari dataset") in message
    assert run("collect", tmp_path / "first", "--out", "pendulum/x-v0", "--episodes", 0) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt("second signal"), OSError("no room")])
def test_an_interruption_leaves_nothing(root, monkeypatch, error):
    monkeypatch.setattr(Recorder, "describe", lambda *_: (_ for _ in ()).throw(error))
    agent = agent_for("Pendulum-v1", max_episode_steps=5)
    with pytest.raises(BaseException, match=str(error)):
        collect(agent, "pendulum/tiny-v0", 1, 0, deterministic=False)
    assert list(root.iterdir()) == []


def test_a_signal_leaves_nothing(root, monkeypatch):
    send = VectorEnv.send

    def killed(envs: VectorEnv, action: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        send(envs, action)

    monkeypatch.setattr(VectorEnv, "send", killed)
    with pytest.raises(FastsacError, match="interrupted: the dataset pendulum/tiny-v0 was not written"):
        collect(agent_for("Pendulum-v1"), "pendulum/tiny-v0", 1, 0, deterministic=False)
    assert list(root.iterdir()) == []


def test_two_that_write_one_name(root):
    collect(agent_for("Pendulum-v1", max_episode_steps=5), "pendulum/tiny-v0", 1, 0, deterministic=False)
    with pytest.raises(UsageError, match="already exists"):
        collect(agent_for("Pendulum-v1"), "pendulum/tiny-v0", 1, 0, deterministic=False)
