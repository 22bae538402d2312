"""Values that are not finite stop the run, and never reach a checkpoint."""

import dataclasses
import re
import time

import pytest
import torch

from fastsac import SAC, Config, FastsacError, checkpoint
from fastsac.divergence import finite_flags, refuse_divergence
from fastsac.errors import Divergence
from tests.runs import SMALL, rows_of

GOOD = {"critic_loss": 1.0, "q": 0.0, "actor_loss": 1.0, "entropy": 1.0, "alpha": 0.1}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("metrics", "finite", "config", "words"),
    [
        ({"critic_loss": NAN}, {}, {}, "critic_loss; a smaller --critic-lr than 0.0003 may help, or smaller rewards;"),
        ({"actor_loss": INF}, {}, {}, "actor_loss; a smaller --actor-lr than 0.0003 may help, or smaller rewards;"),
        ({"value_loss": NAN}, {}, {}, "value_loss; a smaller --value-lr than 0.001 may help"),
        ({"alpha": INF, "entropy": NAN}, {}, {}, "entropy, alpha; a smaller --actor-lr"),
        ({"critic_loss": NAN}, {}, {"alpha_lr": 10.0}, "critic_loss; a smaller --alpha-lr than 10 may help; there"),
        ({}, {"actor": 0.0}, {}, "parameters of actor; a smaller --actor-lr"),
        ({}, {"log_alpha": 0.0, "alpha": 0.0}, {}, "parameters of alpha; a smaller --alpha-lr"),
        ({"q": NAN}, {"critic": 0.0, "value": 0.0}, {}, "q, parameters of critic and value; a smaller --critic-lr"),
    ],
)
def test_what_is_told(metrics, finite, config, words):
    with pytest.raises(Divergence, match=re.escape(f"training diverged by step 7: not finite: {words}")):
        refuse_divergence(GOOD | metrics, {"actor": 1.0} | finite, Config(**config), "step 7", lambda: "there")


def test_what_is_finite_passes():
    refuse_divergence(GOOD, {"actor": 1.0}, Config(), "step 7", str)
    refuse_divergence({}, {}, Config(), "step 7", str)


def test_flags_name_groups():
    tensors = {
        "actor.w": torch.ones(3),
        "actor.b": torch.tensor([1.0, INF]),
        "critic.w": torch.ones(2),
        "optimizer.value.0.exp_avg_sq": torch.tensor([NAN]),
        "generator": torch.zeros(5, dtype=torch.uint8),
    }
    assert {name: flag.item() for name, flag in finite_flags(tensors).items()} == {
        "actor": False,
        "critic": True,
        "value": False,
    }


def poison(tensor, value):
    tensor[(0,) * tensor.ndim] = value


POISON = {
    "actor": lambda learner: next(learner.actor.parameters()),
    "target_critic": lambda learner: next(learner.target_critic.parameters()),
    "critic": lambda learner: learner.state()[0]["optimizer.critic.0.exp_avg_sq"],
    "alpha": lambda learner: learner.log_alpha,
}


def test_a_checkpoint_that_is_still_being_written_is_the_last_good_one(tmp_path, monkeypatch):
    save = checkpoint.save_checkpoint

    def slowly(*arguments, **named):
        time.sleep(1.0)
        save(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slowly)
    agent = SAC(dataclasses.replace(SMALL, checkpoint_every=48))
    step = SAC._step

    def poisoning(*arguments):
        if agent.steps == 48:
            with torch.no_grad():
                agent.learner.log_alpha.fill_(NAN)
        return step(*arguments)

    monkeypatch.setattr(SAC, "_step", poisoning)
    with pytest.raises(Divergence, match=r"good checkpoint is .*step-000000000048$"):
        agent.learn(total_steps=400, run_dir=tmp_path)


@pytest.mark.parametrize("engine", ["fused", "reference"])
@pytest.mark.parametrize("group", POISON)
def test_it_is_found_at_the_next_line_of_metrics(tmp_path, monkeypatch, engine, group):
    agent = SAC(dataclasses.replace(SMALL, engine=engine, checkpoint_every=100))
    step = SAC._step

    def poisoning(*arguments):
        outcome = yield from step(*arguments)
        if agent.steps == 148:
            with torch.no_grad():
                poison(POISON[group](agent.learner), NAN)
        return outcome

    monkeypatch.setattr(SAC, "_step", poisoning)
    with pytest.raises(Divergence, match=rf"by step 1(48|52) .*{group}.*good checkpoint is .*step-000000000100$"):
        agent.learn(total_steps=400, run_dir=tmp_path)
    assert SAC.load(tmp_path).steps == 100
    assert [row["step"] for row in rows_of(tmp_path)] == [52, 100]


def test_it_never_reaches_a_checkpoint(tmp_path, monkeypatch):
    agent = SAC(dataclasses.replace(SMALL, log_every=10**6, checkpoint_every=20))
    agent.learn(total_steps=100, run_dir=tmp_path)
    with torch.no_grad():
        poison(next(agent.learner.critic.parameters()), INF)
    with pytest.raises(Divergence, match="step-000000000100"):
        agent.save(tmp_path)
    monkeypatch.setattr(agent.learner, "act", lambda obs: torch.zeros(4, 1))  # else the policy's actions show it first
    with pytest.raises(Divergence, match=r"by step 120 .*step-000000000100"):
        agent.learn(total_steps=400, run_dir=tmp_path)
    assert SAC.load(tmp_path).steps == 100


@pytest.mark.parametrize("rate", ["actor_lr", "critic_lr"])
def test_a_learning_rate_that_is_too_large_is_named(tmp_path, rate):
    agent = SAC(dataclasses.replace(SMALL, **{rate: 1e30}))
    with pytest.raises(Divergence, match=rf"a smaller --{rate.replace('_', '-')} than 1e\+30 may help"):
        agent.learn(total_steps=400, run_dir=tmp_path)


def test_rewards_that_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "huge:20")
    agent = SAC(dataclasses.replace(SMALL, env_id="tests.faulty:Faulty-v0", checkpoint_every=40))
    with pytest.raises(FastsacError, match=r"diverged.*or smaller rewards; the last good checkpoint is"):
        agent.learn(total_steps=400, run_dir=tmp_path)
    assert SAC.load(tmp_path).steps >= 40


def test_a_fixed_alpha_of_zero_is_finite():
    SAC(dataclasses.replace(SMALL, alpha=0.0)).learn(total_steps=100)
