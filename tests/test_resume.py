"""A resumed run is the run that was never stopped, bit for bit; where it cannot be, it says so."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fastsac import SAC, UsageError
from tests import faulty
from tests.runs import SMALL, metrics_of, parameters, rows_of, state_of, stopped_at

EXACT = dataclasses.replace(
    SMALL,
    total_steps=1240,
    learning_starts=100,
    buffer_size=830,
    eval_every=300,
    log_every=30,
    checkpoint_every=90,
    checkpoint_replay=True,
    utd=0.25,  # one update per step of the four environments
)
#: the middle of an episode, Pendulum's last step of the first one, the step after it, and after the ring has wrapped
CUTS = (137, 800, 804, 1000)
SLOW = pytest.mark.slow
#: for episodes of 1,000 steps, which have to be in the ring
LONG = {"buffer_size": 1100, "eval_every": 500, "eval_episodes": 1}


def exact(**changes):
    return dataclasses.replace(EXACT, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"utd": 1.0},
        {"estimator": "score", "engine": "reference", "policy_delay": 3, "utd": 0.3},
        {"env_id": "HalfCheetah-v5", **LONG},
        {"env_id": "Hopper-v5", "precision": "bf16", "hidden_sizes": (64, 64)},
        pytest.param({"env_id": "WalkerWalk-v1", "estimator": "score", "baseline": "value", **LONG}, marks=SLOW),
        {"env_backend": "gymnasium", "estimator": "score"},
        pytest.param({"env_backend": "gymnasium", "env_id": "Hopper-v5"}, marks=SLOW),
        pytest.param({"env_id": "tests.faulty:Faulty-v0", "num_envs": 1}, marks=SLOW),  # draws numbers in every step
        {"env_id": "tests.faulty:Faulty-v0", "env_backend": "gymnasium-async", "num_envs": 2},
        {"env_id": "Hopper-v5", "max_episode_steps": 30, "env_kwargs": {"healthy_reward": 2.0}},
        pytest.param({"learning_starts": 900}, marks=SLOW),
        {"normalize_obs": True, "normalize_reward": True, "reward_scale": 0.5, "n_step": 3, "lr_schedule": "cosine"},
        {
            **{"critic": "categorical", "v_min": -50.0, "v_max": 10.0, "critic_reduction": "mean", "layer_norm": True},
            **{"optimizer": "adamw", "adam_betas": (0.9, 0.95), "max_grad_norm": 1.0, "initial_alpha": 0.1},
            **{"utd": 0.4, "utd_end": 0.1, "n_step": 2, "normalize_obs": True},
        },
        pytest.param(
            {"utd": 0.05, "log_every": 4, "policy_delay": 2}, marks=SLOW
        ),  # lines repeat what was measured before the cut
    ],
    ids=str,
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, monkeypatch, capsys, changes):
    if changes.get("precision") == "bf16":  # also where it is emulated
        monkeypatch.setattr("fastsac.learner.device.has_bfloat16_products", lambda: True)
    config = exact(**changes)
    alone = SAC(config)
    alone.learn(run_dir=tmp_path / "alone")
    resumed = SAC(config)
    for cut in CUTS:
        with stopped_at(monkeypatch, cut):
            resumed.learn(run_dir=tmp_path / "resumed")
        assert resumed.stopped_by_signal
        resumed.close()
        resumed = SAC.load(tmp_path / "resumed", config)
    resumed.learn(run_dir=tmp_path / "resumed", progress=True)
    assert "cannot be resumed" not in capsys.readouterr().err
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "alone")
    assert any("eval_return" in row for row in metrics_of(tmp_path / "alone"))
    assert state_of(resumed) == state_of(alone)


def test_learning_in_two_calls_is_learning_in_one():
    once, twice = SAC(exact()), SAC(exact())
    once.learn()
    twice.learn(total_steps=402)
    twice.learn(total_steps=EXACT.total_steps)
    assert all(torch.equal(value, parameters(once)[name]) for name, value in parameters(twice).items())


def test_closing_in_between_changes_nothing():
    once, twice = SAC(exact()), SAC(exact())
    once.learn()
    twice.learn(total_steps=402)
    twice.close()
    twice.close()
    twice.learn(total_steps=EXACT.total_steps)
    assert state_of(twice) == state_of(once)


def test_evaluations_and_logging_leave_training_alone():
    plain, watched = SAC(exact(eval_every=0, log_every=10**6)), SAC(exact(eval_every=40, log_every=10))
    for agent in (plain, watched):
        agent.learn()
    assert all(torch.equal(value, parameters(plain)[name]) for name, value in parameters(watched).items())


def test_an_evaluation_depends_on_the_step_only():
    """And not on the evaluations before it, which a resumed run has not made."""
    often, seldom = SAC(exact(eval_every=40)), SAC(exact(eval_every=1240))
    for agent in (often, seldom):
        agent.learn()
    np.testing.assert_array_equal(often.last_evaluation.returns, seldom.last_evaluation.returns)
    before = often.evaluate(2).returns
    often._progress.steps += 1
    assert not np.array_equal(often.evaluate(2).returns, before)
    assert len(set(often.evaluate(2).returns) | set(often.evaluate(2, seed=7).returns)) == 4


def test_an_interrupted_evaluation_is_made_up_for(tmp_path, monkeypatch):
    alone, resumed = SAC(exact(eval_every=400)), SAC(exact(eval_every=400))
    alone.learn(run_dir=tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(resumed._heartbeat, "beat", lambda stop: resumed.steps >= 400 and (stop.append(15) or True))
        resumed.learn(run_dir=tmp_path / "resumed")
    assert resumed.steps == 400
    assert not any("eval_return" in row for row in rows_of(tmp_path / "resumed"))
    resumed = SAC.load(tmp_path / "resumed")
    resumed.learn(run_dir=tmp_path / "resumed")
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "alone")


def test_an_interrupted_last_evaluation_is_made_up_for(tmp_path, monkeypatch):
    agent = SAC(exact(eval_every=400, total_steps=400))
    with monkeypatch.context() as patch:
        patch.setattr(agent._heartbeat, "beat", lambda stop: agent.steps >= 400 and (stop.append(15) or True))
        agent.learn(run_dir=tmp_path / "run")
    assert agent.stopped_by_signal
    agent = SAC.load(tmp_path / "run")
    assert not agent.finished
    agent.learn(run_dir=tmp_path / "run")
    assert agent.finished
    assert rows_of(tmp_path / "run")[-1].keys() >= {"step", "eval_return"}


def test_a_target_that_was_reached_ends_a_resumed_run_too(tmp_path):
    agent = SAC(exact(eval_every=100, target_return=-1e9))
    agent.learn(run_dir=tmp_path / "run")
    assert (agent.steps, agent.finished) == (100, True)
    agent = SAC.load(tmp_path / "run")
    assert agent.finished
    agent.learn()
    assert agent.steps == 100
    agent = SAC.load(tmp_path / "run", exact(target_return=None))
    agent.learn(total_steps=140)
    assert agent.steps == 140


def resume(tmp_path, capsys, before, after=None):
    """Train, load and go on; return the agent and what it says."""
    agent = SAC(before)
    agent.learn(total_steps=402, run_dir=tmp_path / "run")
    agent = SAC.load(tmp_path / "run", after or before)
    capsys.readouterr()
    agent.learn(total_steps=502, run_dir=tmp_path / "run", progress=True)
    return agent, [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]


def test_a_simulator_that_draws_numbers_in_its_steps_starts_new_episodes(tmp_path, capsys):
    config = exact(env_id="LunarLanderContinuous-v3", eval_every=0, utd=1.0)  # flies long enough
    agent, said = resume(tmp_path, capsys, config)
    reason = "playing them again gives different observations"
    assert said == [f"warning: the current episodes cannot be resumed ({reason}): starting new ones"]
    assert agent.replay.size == 502
    assert agent._progress.episodes._length.sum() <= 104


def test_an_episode_longer_than_the_replay_starts_anew(tmp_path, capsys):
    _, said = resume(tmp_path, capsys, exact(env_id="HalfCheetah-v5", buffer_size=200, eval_every=0))
    assert said == [
        "warning: the current episodes cannot be resumed "
        "(one of them is no longer completely in the replay buffer): "
        "starting new ones"
    ]


def test_it_is_told_without_a_display_too(tmp_path, caplog):
    SAC(exact(env_id="LunarLanderContinuous-v3", eval_every=0)).learn(total_steps=402, run_dir=tmp_path / "run")
    SAC.load(tmp_path / "run").learn(total_steps=410)
    assert [record.levelname for record in caplog.records if "cannot be resumed" in record.message] == ["WARNING"]


def test_another_backend_starts_new_episodes(tmp_path, capsys):
    before = exact(env_id="Hopper-v5", eval_every=0)
    _, said = resume(tmp_path, capsys, before, dataclasses.replace(before, env_backend="gymnasium"))
    assert said == [
        "warning: the current episodes cannot be resumed "
        "(they ran in envpool, and now run in gymnasium): starting new ones"
    ]


def test_an_environment_that_was_changed_starts_new_episodes(tmp_path, capsys, monkeypatch):
    config = exact(env_id="tests.faulty:Faulty-v0", eval_every=0, num_envs=3)
    agent = SAC(config)
    agent.learn(total_steps=402, run_dir=tmp_path / "run")
    step = faulty.Faulty.step
    monkeypatch.setattr(faulty.Faulty, "step", lambda env, action: step(env, action * 1.001))
    agent = SAC.load(tmp_path / "run")
    agent.learn(total_steps=502, run_dir=tmp_path / "run", progress=True)
    assert "playing them again gives different observations" in capsys.readouterr().err


def test_an_environment_that_fails_when_played_again_starts_new_episodes(tmp_path, capsys, monkeypatch):
    config = exact(env_id="tests.faulty:Faulty-v0", eval_every=0, num_envs=3)
    SAC(config).learn(total_steps=402, run_dir=tmp_path / "run")
    monkeypatch.setenv("FAULT", f"raise:2:{tmp_path / 'marker'}")
    SAC.load(tmp_path / "run").learn(total_steps=502, run_dir=tmp_path / "run", progress=True)
    assert "cannot be resumed (tests.faulty:Faulty-v0 failed at step 0: ValueError: broken)" in capsys.readouterr().err


def test_without_the_replay_new_episodes_are_others(tmp_path):
    agent = SAC(exact(checkpoint_replay=False))
    agent.learn(total_steps=402, run_dir=tmp_path / "run")
    first = SAC(agent.config).envs.reset()
    resumed = SAC.load(tmp_path / "run")
    again = resumed.envs.reset()
    resumed.new_episodes(2)
    assert not any(np.array_equal(*pair) for pair in ((first, again), (again, resumed.envs.reset())))


@pytest.mark.parametrize("change", [{"num_envs": 6}, {"buffer_size": 900}, {"seed": 5}, {"estimator": "score"}])
def test_resuming_with_another_setting(tmp_path, change):
    SAC(EXACT).learn(total_steps=402, run_dir=tmp_path / "run")
    if change.keys() & {"num_envs", "buffer_size"}:
        with pytest.raises(UsageError, match="has a different --num-envs, --buffer-size"):
            SAC.load(tmp_path / "run", exact(**change))
        change = {**change, "checkpoint_replay": False}
    agent = SAC.load(tmp_path / "run", exact(**change))
    agent.learn(total_steps=804, run_dir=tmp_path / "run")
    assert agent.updates >= 150


CATEGORICAL = {"critic": "categorical", "v_min": -50.0, "v_max": 10.0, "engine": "reference"}


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, {"activation": "tanh"}, "--activation cannot be changed from relu to tanh"),
        ({}, {"normalize_obs": True}, "--normalize-obs cannot be changed from False to True"),
        ({"normalize_reward": True}, {"normalize_reward": False}, "--normalize-reward cannot be changed from True to"),
        (CATEGORICAL, {"v_min": -40.0}, "--v-min cannot be changed from -50.0 to -40.0"),
        (CATEGORICAL, {"v_max": 20.0}, "--v-max cannot be changed from 10.0 to 20.0"),
        (CATEGORICAL, {"num_atoms": 51}, "--num-atoms cannot be changed from 101 to 51"),
        ({}, CATEGORICAL, "--critic cannot be changed from scalar to categorical"),
        ({}, {"num_critics": 3}, "--num-critics cannot be changed from 2 to 3"),
        ({}, {"estimator": "score", "baseline": "value"}, "--baseline value needs a value network"),
        ({}, {"initial_alpha": 0.5}, "--initial-alpha cannot be changed: the run has already started"),
    ],
    ids=str,
)
def test_what_the_stored_networks_depend_on_stays(tmp_path, settings, change, message):
    config = exact(**settings)
    SAC(config).save(tmp_path / "run")
    with pytest.raises(UsageError, match=message):
        SAC.load(tmp_path / "run", dataclasses.replace(config, **change))


def test_alpha_may_become_fixed_and_learned_again(tmp_path):
    SAC(exact(initial_alpha=0.5)).save(tmp_path / "run")
    fixed = SAC.load(tmp_path / "run", exact(alpha=0.2))
    assert fixed.learner.alpha.item() == pytest.approx(0.2)
    fixed.save(tmp_path / "run2")
    assert SAC.load(tmp_path / "run2", exact()).learner.alpha.item() == pytest.approx(0.2)


def test_precision_is_measured_once_for_a_run(tmp_path, monkeypatch):
    agent = SAC(exact(precision="auto", hidden_sizes=(64, 64)))
    agent.learn(total_steps=202, run_dir=tmp_path / "run")
    path = next((tmp_path / "run" / "checkpoints").iterdir()) / "state.json"
    assert json.loads(path.read_text())["precision"] == agent.setup.precision
    monkeypatch.setattr("fastsac.learner.device.measure_updates", lambda *_: pytest.fail("measured"))
    resumed = SAC.load(tmp_path / "run")
    assert resumed.setup.precision == agent.setup.precision
    assert resumed.config.precision == "auto"


def test_a_run_saved_before_it_goes_on_can_still_be_resumed(tmp_path, monkeypatch):
    alone = SAC(exact())
    alone.learn()
    resumed = SAC(exact())
    with stopped_at(monkeypatch, 402):
        resumed.learn(run_dir=tmp_path / "run")
    SAC.load(tmp_path / "run").save(tmp_path / "run")
    resumed = SAC.load(tmp_path / "run")
    _ = resumed.envs  # made, but not yet brought to where they were
    resumed.save(tmp_path / "run")
    resumed = SAC.load(tmp_path / "run")
    resumed.learn()
    assert state_of(resumed)["tensors"] == state_of(alone)["tensors"]


def test_a_run_saved_before_its_first_step(tmp_path, capsys):
    alone, saved = SAC(exact()), SAC(exact())
    alone.learn(total_steps=300)
    saved.save(tmp_path / "run")
    resumed = SAC.load(tmp_path / "run")
    resumed.learn(total_steps=300, progress=True)
    assert "cannot be resumed" not in capsys.readouterr().err
    assert state_of(resumed) == state_of(alone)


def test_best_is_kept_beside_the_newest_two(tmp_path):
    config = exact(eval_every=100, checkpoint_every=100, total_steps=1000, estimator="score", baseline="none")
    agent = SAC(config)
    agent.learn(run_dir=tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["best", "step-000000000900", "step-000000001000"]
    returns = {row["step"]: row["eval_return"] for row in rows_of(tmp_path / "run") if "eval_return" in row}
    best = SAC.load(tmp_path / "run", best=True)
    assert best.steps == max(returns, key=returns.get)
    assert best.evaluate(2).returns.mean() == pytest.approx(max(returns.values()), rel=1e-6)
    assert best.updates < agent.updates
    with pytest.raises(Exception, match="already holds a run"):
        best.save(tmp_path / "run")
