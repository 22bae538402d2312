"""Running moments against NumPy over everything seen, and the discounted return against a walk over the episodes."""

import math

import numpy as np
import pytest
import torch

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.normalize import Normalizer
from fastsac.types import Batch

N, O, GAMMA = 3, 4, 0.9  # noqa: E741
CPU = torch.device("cpu")
BOTH = {"normalize_obs": True, "normalize_reward": True, "reward_scale": 2.5}


def make(**settings):
    return Normalizer(Config(gamma=GAMMA, **settings), O, N, CPU)


class Played:
    """Random steps of N environments: episodes end at random, and the step after an end is a reset."""

    def __init__(self, steps, seed=0):
        rng = np.random.default_rng(seed)
        self.first = rng.normal(3.0, 5.0, (N, O)).astype(np.float32)
        self.steps, ended = [], np.zeros(N, bool)
        for _ in range(steps):
            valid = ~ended
            ended = valid & (rng.random(N) < 0.3)
            obs = rng.normal(3.0, 5.0, (N, O)).astype(np.float32)
            reward = np.where(valid, rng.normal(-2.0, 3.0, N), 0.0).astype(np.float32)
            self.steps.append((obs, reward, ended, valid))

    def show(self, normalizer, begin=True, part=slice(None)):
        if begin:
            normalizer.begin(torch.from_numpy(self.first))
        for obs, reward, _, valid in self.steps[part]:
            normalizer.add(*map(torch.from_numpy, (obs, reward, valid)))

    def observations(self):
        return np.concatenate([self.first, *(step[0] for step in self.steps)]).astype(np.float64)

    def discounted_returns(self):
        found = []
        for env in range(N):
            so_far = 0.0
            for _, reward, done, valid in self.steps:
                if valid[env]:
                    so_far = GAMMA * so_far + float(reward[env])
                    found.append(so_far)
                if done[env]:
                    so_far = 0.0
        return np.array(found)


def moments(numbers, prior=1e-4):
    """Of the numbers together with `prior` ones of mean 0 and variance 1."""
    count = len(numbers) + prior
    mean = numbers.sum(0) / count
    return mean, ((numbers**2).sum(0) + prior) / count - mean**2


@pytest.mark.parametrize("steps", [0, 1, 50])
def test_observations_are_normalised_by_the_moments_of_all_that_was_seen(steps):
    played, normalizer = Played(steps), make(normalize_obs=True)
    played.show(normalizer)
    mean, var = moments(played.observations())
    state = normalizer.state()
    np.testing.assert_allclose(state["obs_mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(state["obs_var"], var, rtol=1e-11)
    obs = torch.randn(7, O, dtype=torch.float64) * 20.0
    expected = np.clip((obs.numpy() - mean) / np.sqrt(var + 1e-8), -10.0, 10.0)
    np.testing.assert_allclose(normalizer.obs(obs), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(normalizer.obs(obs.float()), expected, rtol=1e-5, atol=1e-5)
    assert normalizer.obs(obs.float()).dtype == torch.float32


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    played, normalizer = Played(60), make(normalize_reward=True, reward_scale=2.5)
    played.show(normalizer)
    _, var = moments(played.discounted_returns())
    np.testing.assert_allclose(normalizer.state()["return_var"], [var], rtol=1e-11)
    reward = torch.randn(B := 9) * 1e3
    batch = Batch(torch.randn(B, O), torch.randn(B, 2), reward, torch.randn(B, O), torch.zeros(B, dtype=torch.bool))
    found = normalizer.batch(batch)
    np.testing.assert_allclose(found.reward, 2.5 * reward.numpy() / math.sqrt(var + 1e-8), rtol=1e-6)
    for name in ("obs", "action", "next_obs", "terminated", "discount"):
        assert getattr(found, name) is getattr(batch, name)


def test_a_batch_has_both_observations_normalised():
    played, normalizer = Played(5), make(**BOTH)
    played.show(normalizer)
    batch = Batch(torch.randn(2, O), torch.randn(2, 2), torch.randn(2), torch.randn(2, O), torch.tensor([True, False]))
    found = normalizer.batch(batch)
    assert torch.equal(found.obs, normalizer.obs(batch.obs))
    assert torch.equal(found.next_obs, normalizer.obs(batch.next_obs))


def test_without_the_settings_there_is_nothing_to_do():
    normalizer, obs = make(), torch.randn(2, O)
    assert not normalizer.active
    assert normalizer.obs(obs) is obs
    assert normalizer.state() == {}
    for settings in ({"normalize_obs": True}, {"normalize_reward": True}, {"reward_scale": 0.1}):
        assert make(**settings).active


def test_a_new_beginning_forgets_the_returns_and_keeps_the_moments():
    played, normalizer = Played(20), make(**BOTH)
    played.show(normalizer)
    before = {name: tensor.clone() for name, tensor in normalizer.state().items()}
    assert before["returns"].any()
    normalizer.begin(torch.from_numpy(played.first))
    assert not normalizer.state()["returns"].any()
    assert torch.equal(normalizer.state()["return_var"], before["return_var"])
    assert normalizer.state()["obs_count"] == before["obs_count"] + N


def test_graphs_find_what_they_read_where_it_was():
    normalizer = make(**BOTH)
    places = [tensor.data_ptr() for tensor in vars(normalizer).values() if isinstance(tensor, torch.Tensor)]
    Played(5).show(normalizer)
    normalizer.load_state({name: tensor.clone() for name, tensor in normalizer.state().items()})
    assert places == [tensor.data_ptr() for tensor in vars(normalizer).values() if isinstance(tensor, torch.Tensor)]


def test_stored_and_loaded_it_goes_on_bit_for_bit():
    played, alone, first, second = Played(40), make(**BOTH), make(**BOTH), make(**BOTH)
    played.show(alone)
    played.show(first, part=slice(17))
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    played.show(second, begin=False, part=slice(17, None))
    for name, tensor in alone.state().items():
        assert torch.equal(tensor, second.state()[name]), name
    obs = torch.randn(3, O)
    assert torch.equal(alone.obs(obs), second.obs(obs))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("obs_mean", torch.zeros(O + 1, dtype=torch.float64)),
        ("obs_mean", torch.zeros(O)),
        ("obs_var", -torch.ones(O, dtype=torch.float64)),
        ("return_var", torch.full((1,), math.nan, dtype=torch.float64)),
        ("obs_count", torch.tensor(-1.0, dtype=torch.float64)),
    ],
)
def test_what_cannot_be_moments_is_refused(name, value):
    normalizer = make(**BOTH)
    with pytest.raises(UsageError, match=f"does not fit this configuration: {name}"):
        normalizer.load_state({name: value})


def test_a_step_in_which_all_are_reset_brings_no_return():
    normalizer = make(**BOTH)
    Played(3).show(normalizer)
    before = normalizer.state()["return_var"].clone()
    none = torch.zeros(N, dtype=torch.bool)
    normalizer.add(torch.randn(N, O), torch.zeros(N), none)
    assert torch.equal(normalizer.state()["return_var"], before)
