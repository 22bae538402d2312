"""A Minari dataset in the replay buffer: transition by transition, and what a run makes of it."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Tuple
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from fastsac import SAC, Config
from fastsac.dataset import Dataset, deal, fill
from fastsac.errors import UsageError
from fastsac.normalize import Normalizer
from fastsac.replay import Replay
from fastsac.spaces import Spaces, read_spaces
from tests.runs import SMALL, state_of, stopped_at

LENGTHS = [5, 1, 9, 3, 3, 7, 2]
BOX = Box(-9.0, 9.0, (2,))
NESTED = Dict({"robot": Tuple((Box(-9.0, 9.0, (2,)), Box(-9.0, 9.0, (1, 2)))), "goal": Box(-9.0, 9.0, ())})
ACTION = Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))


def sampled(space: Any, number: int) -> Any:
    """A batch of the space's elements, as Minari stores them."""
    if isinstance(space, Dict):
        return {key: sampled(part, number) for key, part in space.items()}
    if isinstance(space, Tuple):
        return tuple(sampled(part, number) for part in space)
    return np.stack([space.sample() for _ in range(number)])


def write(path: Path, obs_space: Any = BOX, lengths: Any = LENGTHS, action_space: Any = ACTION, **changes: Any) -> Path:
    """A dataset of random numbers: each third episode terminates, the others are truncated."""
    for space in (obs_space, action_space):
        space.seed(0)
    path.mkdir()
    storage = MinariStorage.new(path / "data", observation_space=obs_space, action_space=action_space)
    storage.update_metadata({"dataset_id": "tests/random-v0", "minari_version": minari.__version__})
    rng = np.random.default_rng(0)
    for index, length in enumerate(lengths):
        last = np.arange(length) == length - 1
        episode = {
            "observations": sampled(obs_space, length + 1),
            "actions": sampled(action_space, length),
            "rewards": rng.normal(size=length),
            "terminations": last & (index % 3 == 0),
            "truncations": last & (index % 3 != 0),
        }
        storage.update_episodes([EpisodeBuffer(**(episode | changes))])
    return path


def expected(path: Path, spaces: Spaces, n_step: int = 1, gamma: float = 0.9) -> list[tuple[float, ...]]:
    """What each transition is to be, computed by itself from what Minari reads: obs, action, reward, next_obs, done."""
    found = []
    for episode in minari.MinariDataset(path / "data"):
        obs, length = spaces.flatten(episode.observations), len(episode)
        action = 2.0 * (episode.actions - ACTION.low) / (ACTION.high - ACTION.low) - 1.0
        for t in range(length):
            stop = min(t + n_step, length)
            reward = sum(gamma**k * episode.rewards[t + k] for k in range(stop - t))
            ended = bool(episode.terminations[stop - 1])
            found.append((*obs[t], *action[t], reward, *obs[stop], float(ended), gamma ** (stop - t)))
    return found


def in_order(rows: Any) -> np.ndarray:
    array = np.array(rows, dtype=np.float64)
    return array[np.lexsort(array.T[::-1])]


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("num_envs", [1, 2, 3, 16])
@pytest.mark.parametrize("obs_space", [BOX, NESTED], ids=["box", "nested"])
def test_every_transition_is_there_once(tmp_path, obs_space, num_envs, n_step):
    path = write(tmp_path / "data", obs_space)
    spaces = read_spaces("X", obs_space, ACTION)
    replay = Replay(200, num_envs, spaces.obs_size, 2, n_step=n_step, gamma=0.9)
    dataset = Dataset(str(path), "X", spaces)
    order, delays = dataset.arrange(replay.num_rows, num_envs)
    fill(replay, deal(dataset.episodes(order), delays, spaces.obs_size, 2))
    replay.begin(np.full((num_envs, spaces.obs_size), 99.0, np.float32))  # of the environments
    replay.add(
        *(np.full(shape, 77.0, np.float32) for shape in ((num_envs, 2), num_envs)),
        np.zeros(num_envs, bool),
        np.full((num_envs, spaces.obs_size), 98.0, np.float32),
        np.zeros(num_envs, bool),
    )
    batch = replay.transitions()
    single = np.column_stack([batch.obs, batch.action, batch.reward, batch.next_obs, batch.terminated])
    wanted = in_order(expected(path, spaces))[:, :-1]
    np.testing.assert_allclose(in_order(single), in_order(wanted), atol=1e-6)
    # sampling reaches each of them, and sums up to n rewards within the episode
    drawn = replay.sample(4000)
    discount = np.full(4000, 0.9) if drawn.discount is None else drawn.discount
    rows = np.column_stack([drawn.obs, drawn.action, drawn.reward, drawn.next_obs, drawn.terminated, discount])
    np.testing.assert_allclose(
        np.unique(rows.round(4), axis=0), in_order(expected(path, spaces, n_step)).round(4), atol=2e-4
    )


def filled(path: Path, capacity: int, num_envs: int, normalizer: Normalizer | None = None) -> Replay:
    spaces = read_spaces("X", BOX, ACTION)
    dataset, replay = Dataset(str(path), "X", spaces), Replay(capacity, num_envs, 2, 2)
    order, delays = dataset.arrange(replay.num_rows, num_envs)
    fill(replay, deal(dataset.episodes(order), delays, 2, 2), normalizer)
    return replay


@pytest.mark.parametrize("num_envs", [1, 2, 4])
def test_a_small_buffer_keeps_the_newest(tmp_path, num_envs):
    path = write(tmp_path / "data", lengths=[6] * 12)
    rewards = np.concatenate([episode.rewards for episode in minari.MinariDataset(path / "data")])
    kept = filled(path, 28, num_envs).transitions().reward.numpy()
    assert 28 - num_envs * 4 <= len(kept) <= 28
    np.testing.assert_allclose(sorted(kept), sorted(rewards.astype(np.float32)[-len(kept) :]))


def test_columns_of_unequal_lengths_end_together(tmp_path):
    """If they began together, a ring that is too small would lose the newest episode of the shorter column."""
    path = write(tmp_path / "data", lengths=[30, 3, 3])
    rewards = np.concatenate([episode.rewards for episode in minari.MinariDataset(path / "data")]).astype(np.float32)
    kept = filled(path, 20, 2).transitions().reward.tolist()
    assert set(rewards[-6:].tolist()) <= set(kept)
    assert len(kept) > 6


def test_what_is_done_in_mid_episode_ends_it(tmp_path):
    flags = np.array([False, True, False, False])
    path = write(tmp_path / "data", lengths=[4], terminations=flags, truncations=flags[::-1])
    replay = Replay(100, 1, 2, 2, n_step=3, gamma=1.0)
    dataset = Dataset(str(path), "X", read_spaces("X", BOX, ACTION))
    order, delays = dataset.arrange(replay.num_rows, 1)
    fill(replay, deal(dataset.episodes(order), delays, 2, 2))
    r = replay.transitions().reward.tolist()
    assert replay.transitions().terminated.tolist() == [False, True, False, False]
    sums = [r[0] + r[1], r[1], r[2], r[3]]  # of two steps, a termination, a truncation, the end
    np.testing.assert_allclose(
        sorted({round(each, 4) for each in replay.sample(300).reward.tolist()}), sorted(sums), atol=1e-3
    )


@pytest.mark.parametrize("num_envs", [1, 3, 16])
def test_normalisation_sees_each_observation_and_return_once(tmp_path, num_envs):
    path = write(tmp_path / "data")
    config = Config(normalize_obs=True, normalize_reward=True, gamma=0.9, num_envs=num_envs)
    normalizer = Normalizer(config, 2, num_envs, torch.device("cpu"))
    assert normalizer.fresh
    filled(path, 200, num_envs, normalizer)
    obs, returns = [], []
    for episode in minari.MinariDataset(path / "data"):
        obs.append(episode.observations)
        for t in range(len(episode)):
            returns.append(episode.rewards[t] + (0.9 * returns[-1] if t else 0.0))
    state, obs = normalizer.state(), np.concatenate(obs)
    assert not normalizer.fresh
    assert round(state["obs_count"].item()) == len(obs)
    assert round(state["return_count"].item()) == len(returns)
    np.testing.assert_allclose(state["obs_mean"], obs.mean(0), rtol=1e-4)
    np.testing.assert_allclose(state["obs_var"], obs.var(0), rtol=1e-4)
    np.testing.assert_allclose(state["return_var"], [np.var(returns)], rtol=1e-4)


def broken(number: float, shape: tuple[int, ...]) -> np.ndarray:
    array = np.zeros(shape)
    array[1] = number
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs_space": Box(-1.0, 1.0, (3,))}, r"the Minari dataset .* has observations \[3\], but X-v0 has \[2\]"),
        ({"obs_space": Dict({"a": BOX})}, r"has observations a \[2\], but X-v0 has \[2\]"),
        (
            {"action_space": Box(-2.0, 1.0, (2,))},
            r"has actions \[2\] from -2 to 1, but X-v0 has \[2\] from -2, 0 to 1, 2",
        ),
        ({"action_space": Box(-2.0, 1.0, (1,))}, r"has actions \[1\] from -2 to 1, but X-v0 has \[2\]"),
        ({"action_space": Discrete(3)}, "does not fit X-v0: it has a Discrete action space"),
        ({"lengths": []}, "has no transitions"),
        ({"lengths": [2], "observations": broken(np.nan, (3, 2))}, "observations that are not finite in episode 0"),
        ({"lengths": [2], "actions": broken(np.inf, (2, 2))}, "actions that are not finite in episode 0"),
        ({"lengths": [2], "rewards": broken(1e39, (2,))}, "rewards that are not finite in episode 0"),
        ({"lengths": [2], "observations": np.zeros((2, 2))}, "cannot be read: episode 0 has 2 rewards, 2 observations"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, changes, message):
    path = write(tmp_path / "data", **changes)
    with pytest.raises(UsageError, match=message) as refusal:
        list(Dataset(str(path), "X-v0", read_spaces("X-v0", BOX, ACTION)).episodes([0]))
    assert "\n" not in str(refusal.value)


def test_a_dataset_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "home"))
    spaces = read_spaces("X", BOX, ACTION)
    with pytest.raises(UsageError, match=r"xx/y-v0 is not in .*: `minari download xx/y-v0` downloads it"):
        Dataset("xx/y-v0", "X", spaces)
    with pytest.raises(UsageError, match=r"no Minari dataset at ./x"):
        Dataset("./x", "X", spaces)
    path = write(tmp_path / "data")
    file = path / "data/metadata.json"
    metadata = json.loads(file.read_text())
    del metadata["observation_space"]  # Minari would make the environment, whatever code that is
    file.write_text(json.dumps(metadata | {"env_spec": '{"entry_point": "os:abort"}'}))
    with pytest.raises(UsageError, match="does not contain its spaces"):
        Dataset(str(path), "X", spaces)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UsageError, match=r"\(h5py\): pip install 'minari\[hdf5\]'"):
        Dataset(str(path), "X", spaces)


@pytest.fixture(scope="module")
def swings(tmp_path_factory) -> str:
    """A dataset that fits Pendulum-v1."""
    obs, action = gymnasium.spaces.Box(-1, 1, (3,)), gymnasium.spaces.Box(-2, 2, (1,))
    return str(write(tmp_path_factory.mktemp("swings") / "data", obs, action_space=action))


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, swings, monkeypatch):
    settings = {"normalize_obs": True, "normalize_reward": True, "n_step": 3, "total_steps": 120, "buffer_size": 260}
    config = dataclasses.replace(SMALL, offline=swings, checkpoint_replay=True, learning_starts=0, **settings)
    whole = SAC(config)
    whole.learn(run_dir=tmp_path / "whole")
    assert whole.loaded_dataset.startswith("offline data: 30 transitions of 7 episodes from ")
    assert len(whole.replay) == 150
    part = SAC(config)
    with stopped_at(monkeypatch, 48):
        part.learn(run_dir=tmp_path / "part")
    resumed = SAC.load(tmp_path / "part")
    resumed.learn()
    assert not resumed.loaded_dataset  # not filled again
    assert state_of(resumed) == state_of(whole)


def test_saved_before_the_first_step(tmp_path, swings, caplog):
    config = dataclasses.replace(SMALL, offline=swings, checkpoint_replay=True, normalize_obs=True, total_steps=40)
    whole = SAC(config)
    whole.learn()
    for number, prepared in enumerate((True, False)):
        agent = SAC(config)
        if prepared:
            agent.prepare()
        agent.save(tmp_path / str(number))
        loaded = SAC.load(tmp_path / str(number))
        loaded.learn()
        assert state_of(loaded) == state_of(whole)
        assert not caplog.records  # there were no episodes that could not be resumed


def test_without_the_stored_replay_it_is_filled_again(tmp_path, swings, capsys):
    config = dataclasses.replace(SMALL, offline=swings, normalize_obs=True, total_steps=60)
    agent = SAC(config)
    agent.learn(run_dir=tmp_path)
    seen = agent.learner.normalizer.state()["obs_count"].item()
    resumed = SAC.load(tmp_path)
    resumed.learn(100, progress=True)
    assert "refill" not in capsys.readouterr().err
    assert len(resumed.replay) == 30 + 40
    assert resumed.updates == agent.updates + 40
    assert resumed.learner.normalizer.state()["obs_count"].item() == pytest.approx(seen + 44)  # not twice


def test_another_dataset_is_not_ignored(tmp_path, swings):
    config = dataclasses.replace(SMALL, checkpoint_replay=True, total_steps=40)
    SAC(config).learn(run_dir=tmp_path)
    with pytest.raises(UsageError, match="--offline needs an empty replay buffer"):
        SAC.load(tmp_path, dataclasses.replace(config, offline=swings))
    agent = SAC.load(tmp_path, dataclasses.replace(config, offline=swings, checkpoint_replay=False, total_steps=60))
    agent.learn()
    assert len(agent.replay) == 30 + 20


def test_an_interrupted_fill_leaves_nothing_behind(swings, monkeypatch):
    agent = SAC(dataclasses.replace(SMALL, offline=swings, normalize_obs=True, total_steps=8))
    read, calls = Dataset._read, []

    def interrupted(dataset: Dataset, episode: Any) -> Any:
        calls.append(episode)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return read(dataset, episode)

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            agent.prepare()
    assert len(agent.replay) == 0
    assert agent.learner.normalizer.fresh
    agent.learn()
    assert len(agent.replay) == 30 + 8


def test_each_rank_has_a_part(tmp_path):
    path = write(tmp_path / "data")
    dataset = Dataset(str(path), "X", read_spaces("X", BOX, ACTION))
    parts = [dataset.arrange(1000, 2, rank, 3)[0] for rank in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("wrong", [3, "", Path("x")])
def test_the_setting_is_a_name(wrong):
    with pytest.raises(UsageError, match="--offline must be the id or directory of a Minari dataset"):
        Config(offline=wrong)
