"""The agent and its loop, on real environments; small networks, since nothing here needs to learn well."""

import dataclasses
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastsac import SAC, FastsacError, UsageError
from fastsac.run_dir import write_config
from fastsac.saver import Saver
from tests.runs import SMALL, parameters, rows_of


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(("utd", "updates"), [(1.0, 156), (0.25, 39), (2.0, 312)])
def test_updates_per_step(utd, updates):
    agent = SAC(small(utd=utd))
    agent.learn(total_steps=200)
    assert agent.steps == 200
    # the updates for the last step of all four environments fall due on the step after it
    assert agent.updates == updates


def test_updates_per_step_may_go_linearly_from_one_number_to_another():
    agent = SAC(small(utd=2.0, utd_end=0.5, total_steps=200))
    agent.learn()
    # four environments, from the end of the warm-up to the last step but one
    assert agent.updates == int(sum(4 * (2.0 - 1.5 * steps / 200) for steps in range(44, 200, 4)))
    agent.learn(400)  # goes on along the line that leads to the new end
    due = sum(4 * (2.0 - 1.5 * steps / 200) for steps in range(44, 201, 4))
    assert agent.updates == int(due + sum(4 * (2.0 - 1.5 * steps / 400) for steps in range(204, 400, 4)))


def test_a_run_learns_from_n_step_returns_with_its_own_discount():
    agent = SAC(small(n_step=3, gamma=0.5, num_envs=2))
    agent.learn(total_steps=300)  # no episode has ended
    single, batch = agent.replay.transitions(), agent.replay.sample(2000)
    assert set(batch.discount.tolist()) == {0.5, 0.25, 0.125}
    index = torch.cdist(batch.obs, single.obs).argmin(1)
    assert torch.equal(single.obs[index], batch.obs)
    for steps in (1, 2, 3):
        drawn, first = batch.discount == 0.5**steps, index[batch.discount == 0.5**steps]
        total = sum(0.5**k * single.reward[first + 2 * k] for k in range(steps))  # two environments
        torch.testing.assert_close(batch.reward[drawn], total)
        assert torch.equal(batch.next_obs[drawn], single.next_obs[first + 2 * (steps - 1)])


def test_learning_rates_go_down_with_the_steps():
    agent = SAC(small(lr_schedule="linear", engine="reference", critic_lr=4e-4, total_steps=200))
    agent.learn()
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in agent.learner.optimizers.items()}
    assert rates["critic"] == pytest.approx(4e-4 * (1.0 - 196 / 200))
    assert rates["alpha"] == pytest.approx(3e-4 * (1.0 - 196 / 200))


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_normalisation_sees_each_observation_once_and_none_of_evaluations(engine):
    settings = {"normalize_obs": True, "normalize_reward": True, "reward_scale": 3.0, "engine": engine}
    agent = SAC(small(**settings, eval_every=100, total_steps=1000))
    agent.learn()
    replay, state = agent.replay, agent.learner.normalizer.state()
    seen = replay._obs[1 : replay.newest + 1].flatten(0, 1).double()
    assert replay.newest > 200  # episodes have ended
    torch.testing.assert_close(state["obs_mean"], seen.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state["obs_var"], seen.var(0, correction=0), rtol=1e-5, atol=1e-6)
    assert replay.transitions().reward.min() < -5.0  # raw
    discounted, current = [], np.zeros(replay.num_envs)
    for reward, valid in zip(replay._reward[: replay.newest].numpy(), replay._valid[: replay.newest], strict=True):
        current = np.where(valid, 0.99 * current + reward, 0.0)
        discounted.extend(current[valid])
    assert state["return_mean"].item() == pytest.approx(np.mean(discounted), rel=1e-5)
    assert state["return_var"].item() == pytest.approx(np.var(discounted), rel=1e-5)
    obs = agent.envs.reset()
    normalised = ((torch.from_numpy(obs) - seen.mean(0)) / seen.std(0, correction=0)).float().clamp(-10.0, 10.0)
    expected = 2.0 * torch.tanh(agent.actor(normalised)[0])
    np.testing.assert_allclose(agent.predict(obs), expected.detach(), rtol=1e-4, atol=1e-5)
    before = {name: tensor.clone() for name, tensor in state.items()}
    agent.evaluate(2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.learner.normalizer.state().items())


def test_reset_rows_are_no_steps():
    agent = SAC(small())
    agent.learn(total_steps=4 * 205)
    assert agent.steps == 4 * 205
    assert agent.replay.size == 4 * 205


CHOICES = [{"estimator": "score", "baseline": baseline} for baseline in ("none", "constant", "value", "loo")]
CHOICES = [{"estimator": "pathwise"}, *CHOICES]
BF16 = {"precision": "bf16", "num_threads": 2, "hidden_sizes": (64, 64)}


@pytest.mark.parametrize(
    ("choice", "setup"),
    [
        *((choice, {}) for choice in CHOICES),
        *((choice, BF16) for choice in (CHOICES[0], CHOICES[-1])),
        *(pytest.param(choice, BF16, marks=pytest.mark.slow) for choice in CHOICES[1:-1]),
    ],
    ids=str,
)
def test_same_seed_same_parameters(choice, setup, monkeypatch):
    if "precision" in setup:  # also where it is emulated
        monkeypatch.setattr("fastsac.learner.device.has_bfloat16_products", lambda: True)
    agents = [SAC(small(**choice, **setup, seed=seed)) for seed in (3, 3, 4)]
    for agent in agents:
        agent.learn(total_steps=120)
    first, second, other = (parameters(agent) for agent in agents)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["actor.layers.0.weight"], other["actor.layers.0.weight"])


def test_learn_goes_on():
    agent = SAC(small())
    agent.learn(total_steps=100)
    before = parameters(agent)
    agent.learn(total_steps=100)
    assert all(torch.equal(value, before[name]) for name, value in parameters(agent).items() if name != "generator")
    agent.learn(total_steps=200)
    assert agent.steps == 200
    assert agent.updates > 100


def test_metrics_file(tmp_path):
    agent = SAC(small(eval_every=100))
    agent.learn(total_steps=900, run_dir=tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert all({"step", "updates", "time_s"} <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "eval_return" in row] == list(range(100, 1000, 100))
    logged = [row for row in rows if "critic_loss" in row]
    assert {"actor_loss", "alpha", "entropy", "steps_per_s", "updates_per_s"} <= logged[-1].keys()
    (episodes,) = [row for row in rows if "episode_return" in row and row["step"] < 850]
    assert episodes["episode_length"] == 200


def test_tensorboard_shows_what_metrics_hold_also_after_going_on(tmp_path):
    agent = SAC(small())
    agent.learn(total_steps=600, run_dir=tmp_path / "run")
    agent._progress.steps = 400  # as if the run had been cut after its checkpoint at step 400
    agent.learn(total_steps=900, run_dir=tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = [row for row in rows_of(tmp_path / "run") if "critic_loss" in row]
    scalars = events.Scalars("train/critic_loss")
    assert [scalar.step for scalar in scalars] == [row["step"] for row in rows]
    assert [scalar.value for scalar in scalars] == pytest.approx([row["critic_loss"] for row in rows])
    assert rows[-1]["step"] == 900


def test_target_return_ends_the_run():
    agent = SAC(small(eval_every=100, target_return=-1e9))
    agent.learn(total_steps=400)
    assert agent.steps == 100


def test_predict_in_the_environments_units():
    agent = SAC(small())
    obs = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, -3.0]], dtype=np.float32)
    action = agent.predict(obs)
    assert action.shape == (2, 1)
    np.testing.assert_allclose(agent.predict(obs[0]), action[0], rtol=1e-5)
    with torch.no_grad():
        mean, _ = agent.learner.actor(torch.from_numpy(obs))
    np.testing.assert_allclose(action, 2.0 * np.tanh(mean.numpy()), rtol=1e-5)
    assert not np.array_equal(agent.predict(obs, deterministic=False), agent.predict(obs, deterministic=False))
    with pytest.raises(ValueError, match="must be"):
        agent.predict(np.zeros((2, 4), dtype=np.float32))


def test_predict_dict_observations():
    agent = SAC(small(env_id="WalkerWalk-v1"))
    obs = {"height": np.float64(1.2), "orientations": np.zeros(14), "velocity": np.ones(9)}
    one = agent.predict(obs)
    many = agent.predict({key: np.stack([value] * 3) for key, value in obs.items()})
    assert one.shape == (6,)
    np.testing.assert_allclose(many, np.stack([one] * 3), rtol=1e-5)
    for wrong in (np.zeros(24), {"velocity": np.ones(9)}, {"height": 1.2, "orientations": np.zeros(14)}):
        with pytest.raises(ValueError, match="the keys"):
            agent.predict(wrong)


def test_an_evaluation_of_nothing():
    with pytest.raises(UsageError, match="at least 1 episode, got 0"):
        SAC(small()).evaluate(0)


def test_save_and_load(tmp_path):
    agent = SAC(small(estimator="score", baseline="value"))
    agent.learn(total_steps=120)
    agent.save(tmp_path / "saved")
    loaded = SAC.load(tmp_path / "saved")
    assert (loaded.steps, loaded.updates, loaded.config) == (agent.steps, agent.updates, agent.config)
    for name, value in parameters(agent).items():
        assert torch.equal(parameters(loaded)[name], value), name
    obs = np.array([0.3, 0.2, 0.1], dtype=np.float32)
    np.testing.assert_array_equal(loaded.predict(obs), agent.predict(obs))
    with pytest.raises(UsageError, match="already holds a run"):
        SAC(small()).save(tmp_path / "saved")


def test_resume_refills_the_replay(tmp_path, capsys):
    run_dir = tmp_path / "run"
    agent = SAC(small())
    agent.learn(total_steps=100, run_dir=run_dir)
    resumed = SAC.load(run_dir)
    updates = resumed.updates
    resumed.learn(total_steps=140, run_dir=run_dir, progress=True)
    assert resumed.updates == updates
    assert "the replay buffer is empty: 40 steps in new episodes refill it" in capsys.readouterr().err
    resumed.learn(total_steps=200, run_dir=run_dir)
    # the four updates that were due at the save are made then
    assert resumed.updates == updates + 4 + 56
    assert [row["step"] for row in rows_of(run_dir)] == [52, 100, 140, 152, 200]


def test_resume_with_replay(tmp_path):
    config = small(checkpoint_replay=True)
    agent = SAC(config)
    agent.learn(total_steps=100, run_dir=tmp_path / "run")
    resumed = SAC.load(tmp_path / "run")
    assert resumed.replay.size == 100
    resumed.learn(total_steps=140)
    assert resumed.updates == agent.updates + 40
    assert resumed.replay.size == 140


def test_a_crash_leaves_a_loadable_run(tmp_path):
    agent = SAC(small(checkpoint_every=100))

    def fail():
        raise RuntimeError("the simulator broke\nin two lines")

    agent.learn(total_steps=60, run_dir=tmp_path / "run")
    agent.envs._backend.recv = fail
    with pytest.raises(FastsacError, match="Pendulum-v1 failed at step 16: RuntimeError: the simulator broke in two"):
        agent.learn(total_steps=400, run_dir=tmp_path / "run")
    assert SAC.load(tmp_path / "run").steps == 60


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_returns(tmp_path, number):
    agent, handler = SAC(small()), signal.getsignal(number)  # a shell's background jobs ignore SIGINT

    def interrupt():
        while agent.updates < 20:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    agent.learn(total_steps=10**9, run_dir=tmp_path / "run")
    thread.join()
    assert agent.stopped_by_signal
    assert SAC.load(tmp_path / "run").steps == agent.steps
    assert signal.getsignal(number) is handler


def test_a_signal_before_the_first_step_leaves_a_run_to_go_on_with(tmp_path, monkeypatch):
    def write(*arguments):
        monkeypatch.undo()
        write_config(*arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("fastsac.saver.write_config", write)
    SAC(small()).learn(total_steps=10**9, run_dir=tmp_path / "run")
    assert SAC.load(tmp_path / "run").steps == 0


def test_the_last_checkpoint_is_written_once(tmp_path, monkeypatch):
    saved = []
    agent = SAC(small(checkpoint_every=100))
    write = Saver._write

    def noting(saver, path, snapshot):
        saved.append(snapshot.state["steps"])
        write(saver, path, snapshot)

    monkeypatch.setattr(Saver, "_write", noting)
    agent.learn(total_steps=200, run_dir=tmp_path / "a")
    agent.learn(total_steps=240, run_dir=tmp_path / "b")
    assert saved == [100, 200, 240]


@pytest.mark.slow
def test_memory_stays_flat():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    agent = SAC(small(env_id="HalfCheetah-v5", num_envs=16, buffer_size=5000, utd=0.25))
    agent.learn(total_steps=10_000)
    before = resident()
    agent.learn(total_steps=60_000)
    assert resident() < before + 5.0


def test_a_checkpoint_of_another_device_loads(tmp_path):
    agent = SAC(small())
    agent.learn(total_steps=60)
    tensors, counters = agent.learner.state()
    tensors["generator"] = torch.zeros(16, dtype=torch.uint8)  # the size of a CUDA generator's state
    other = SAC(small(seed=1))
    other.learner.load_state(tensors, counters)
    assert torch.equal(other.learner.actor.layers[0].weight, agent.learner.actor.layers[0].weight)


def test_resuming_on_another_environment_is_refused(tmp_path):
    agent = SAC(small())
    agent.learn(total_steps=60, run_dir=tmp_path / "run")
    resumed = SAC.load(tmp_path / "run", small(env_id="MountainCarContinuous-v0"))
    with pytest.raises(UsageError, match="different observations or actions"):
        resumed.learn(total_steps=100)


def test_an_automatic_alpha_does_not_stay_at_zero(tmp_path):
    agent = SAC(small(alpha=0.0))
    agent.learn(total_steps=60)
    agent.save(tmp_path / "run")
    resumed = SAC.load(tmp_path / "run", small(alpha="auto"))
    assert resumed.learner.alpha == 1.0


def test_a_signal_stops_an_evaluation(tmp_path):
    agent = SAC(small(eval_every=100, eval_episodes=10**6))
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    agent.learn(total_steps=1000, run_dir=tmp_path / "run")
    assert agent.stopped_by_signal
    assert agent.last_evaluation is None
    assert SAC.load(tmp_path / "run").steps == agent.steps == 100
