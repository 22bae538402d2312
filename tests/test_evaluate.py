"""Evaluation, against a stand-in for the environments whose episodes have given lengths."""

import numpy as np
import pytest

from fastsac.envs import Step
from fastsac.errors import FastsacError
from fastsac.evaluate import evaluate


class Environments:
    """Episodes of `lengths` steps, one entry per environment; reward 1 a step, and 100 where it must not count."""

    env_id = "Stub-v0"

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.num_envs = np.array(lengths), len(lengths)
        self.time = np.zeros(self.num_envs, dtype=np.int64)

    def reset(self, seed: int | None = None) -> np.ndarray:
        self.time[:] = 0
        return np.zeros((self.num_envs, 1), np.float32)

    def send(self, action: np.ndarray) -> None:
        over = self.time == self.lengths
        self.time = np.where(over, 0, self.time + 1)

    def recv(self) -> Step:
        valid = self.time > 0
        reward = np.where(valid, 1.0, 100.0).astype(np.float32)
        # a reset row's flags must not count either
        terminated = (self.time == self.lengths) | ~valid
        return Step(np.zeros((self.num_envs, 1), np.float32), reward, terminated, np.zeros_like(valid), valid)


def play(envs: Environments, episodes: int):
    return evaluate(lambda obs: obs, envs, episodes)  # type: ignore[arg-type]


def test_each_environment_plays_its_share_and_reset_rows_stay_out() -> None:
    envs = Environments([1, 4, 30])
    for _ in range(2):  # the second time from the middle of episodes on
        result = play(envs, 5)
        assert sorted(result.lengths) == [1, 1, 4, 4, 30]
        np.testing.assert_array_equal(result.returns, result.lengths)


def test_the_summary() -> None:
    summary = play(Environments([3, 12]), 2).summary()
    assert summary == {"return_mean": 7.5, "return_std": 4.5, "returns": [3.0, 12.0], "lengths": [3, 12]}


def test_an_episode_that_never_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsac.evaluate.LONGEST_EPISODE", 50)
    assert list(play(Environments([3, 50]), 2).lengths) == [3, 50]
    with pytest.raises(FastsacError, match="has not ended after 50 steps"):
        play(Environments([3, 51]), 2)
