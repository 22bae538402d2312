"""Gradient diagnostics: against brute force, and with estimators that are wrong on purpose."""

import json
import math

import pytest
import torch
from torch import Tensor

from fastsac import SAC, Config
from fastsac.cli import main
from fastsac.errors import UsageError
from fastsac.estimators import ESTIMATORS, Entry, choose
from fastsac.lab import gradients
from fastsac.lab.arguments import Gradients
from fastsac.lab.arms import parse_arm
from fastsac.lab.gradients import Head, Oracle, measure_arm, oracles, run, statistics
from fastsac.types import Estimate

SIZES = {"hidden_sizes": (8, 8), "num_envs": 2, "learning_starts": 100, "eval_every": 200, "eval_episodes": 2}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "run"
    config = Config("Pendulum-v1", estimator="score", baseline="value", checkpoint_replay=True, num_threads=1, **SIZES)
    SAC(config).learn(total_steps=400, run_dir=directory)
    return directory


@pytest.fixture(scope="module")
def head(run_dir) -> Head:
    agent = SAC.load(run_dir, gradients._plain(run_dir))
    return Head(agent, gradients.states(agent, 6, 0)[0], 0)


def test_statistics_of_numbers_drawn_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    gradient = torch.tensor([3.0, 4.0, 0.0])
    estimates = gradient + torch.tensor([1.0, 2.0, 0.5]) * torch.randn(20_000, 3, generator=g)
    found = statistics(estimates, Oracle(gradient, 0.0))
    assert found["variance"] == pytest.approx((1 + 4 + 0.25) / 25, rel=0.03)
    assert found["signal_to_noise"] == pytest.approx(found["variance"] ** -0.5)
    assert abs(found["bias_sigmas"]) < 3.0
    cosines = torch.nn.functional.cosine_similarity(estimates, gradient.expand_as(estimates))
    assert found["cosine"] == pytest.approx(cosines.mean().item(), rel=1e-4)
    error = math.sqrt((0.6**2 * 1 + 0.8**2 * 4) / 20_000)
    shifted = statistics(estimates + 0.1 * gradient, Oracle(gradient, 0.0))["bias_sigmas"] - found["bias_sigmas"]
    assert shifted == pytest.approx(0.5 / error, rel=0.03)
    unsure = statistics(estimates + 0.1 * gradient, Oracle(gradient, 1.0))["bias_sigmas"]
    assert abs(unsure) < 1.0


def test_the_parameters_gradient_is_that_of_the_loss(head: Head) -> None:
    """The gradient at the head, gone back through the actor, is what the learner's own backward pass would find."""
    learner, choice = head.learner, choose(Config(estimator="score", baseline="none"))
    state = head.rng.get_state()
    found = head.through(head.gradient(choice, 1, 1, "none"))
    head.rng.set_state(state)
    mean, log_std = learner.actor(head.obs)
    draw = gradients.Draw(head.noise(1), 1)
    estimate = choice.estimator(mean, log_std, draw, head.q_function, learner.alpha, "none")
    expected = torch.autograd.grad(estimate.loss, list(learner.actor.parameters()))
    torch.testing.assert_close(found, torch.cat([each.flatten() for each in expected]))


def test_the_oracle_is_the_mean_of_many_samples(head: Head) -> None:
    few, many = oracles(head, 2000), oracles(head, 20_000)
    for name in ("head", "parameters"):
        direction = many[name].gradient / many[name].gradient.norm()
        off = ((few[name].gradient - many[name].gradient) @ direction).item()
        assert abs(off) < 4.0 * math.hypot(few[name].error, many[name].error)
        assert few[name].error == pytest.approx(math.sqrt(10) * many[name].error, rel=0.5)


@pytest.mark.parametrize(
    ("arm", "evaluations"),
    [
        ("pathwise", 2),
        ("pathwise:3", 6),
        ("score:none", 1),
        ("score:loo:2", 2),
        ("score:mean-action", 2),
        ("score:mean-action:3", 4),
        ("score-antithetic:loo:4", 4),
        ("pathwise-antithetic", 4),
        ("mix:loo:2", 4),
        ("measure-valued", 4),
    ],
)
def test_critic_evaluations_are_counted(head: Head, arm: str, evaluations: int) -> None:
    """In one dimension; measure-valued derivatives take 3 A + 1."""
    truth = {name: Oracle(torch.ones_like(of), 0.0) for name, of in _shapes(head).items()}
    choice = parse_arm(arm).choice
    assert measure_arm(head, choice, choice.baseline, truth, 10)["evaluations"] == evaluations


def _shapes(head: Head) -> dict[str, Tensor]:
    gradient = head.gradient(choose(Config()), 1, 1, "none")
    return {"head": gradient.flatten(), "parameters": head.through(gradient)}


def test_every_arm_is_unbiased_and_a_sample_that_keeps_its_graph_is_not(
    run_dir, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attached(mean, log_std, draw, q_function, alpha, baseline):  # trap 1: the mean's gradient vanishes
        action, log_prob = draw.sample(mean, log_std)
        q = q_function(action.detach())
        u = mean + log_std.exp() * draw.noise(mean)
        log_normal = torch.distributions.Normal(mean, log_std.exp()).log_prob(u).sum(-1)
        f = (alpha * log_prob - q.amin(1)).detach()
        return Estimate((log_normal * (f - f.mean())).mean(), log_prob.detach(), q.detach())

    monkeypatch.setitem(ESTIMATORS, "attached", Entry(attached))
    arms = "score:value", "score:loo:2", "pathwise-stl", "mix", "measure-valued", "attached"
    options = Gradients(run_dir, arms, 8, 400, 20_000, 0, tmp_path / "out")
    result = run(options)
    rows = [row for row in result["rows"] if row["checkpoint"] == 400]
    assert [row["arm"] for row in rows] == [
        *("pathwise", "score:value", "score:value (exact)", "score:loo:2", "pathwise-stl", "mix:loo:2"),
        *("measure-valued", "attached"),
    ]
    for row in rows:
        worst = max(abs(row[name]["bias_sigmas"]) for name in ("head", "parameters"))
        assert (worst > 6.0) == (row["arm"] == "attached"), row
        for name in ("head", "parameters"):
            share = row[name]["variance"] / rows[0][name]["variance"]
            assert row[name]["equal_evaluations"] == pytest.approx(share * row["evaluations"] / 2)
            assert row[name]["equal_time"] == pytest.approx(share * row["time_ms"] / rows[0]["time_ms"])
    assert json.loads((tmp_path / "out" / "gradients.json").read_text())["states"] == "the replay buffer"
    assert (tmp_path / "out" / "gradients.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_on_a_run_without_replay_and_value(tmp_path, capsys) -> None:
    run_dir = tmp_path / "run"
    SAC(Config("Pendulum-v1", num_threads=1, **SIZES)).learn(total_steps=200, run_dir=run_dir)
    numbers = ["--num-states", "4", "--num-replicates", "10", "--oracle-samples", "100"]
    main(["lab", "gradients", str(run_dir), "--arms", "score:value", *numbers])
    printed = capsys.readouterr().out
    assert "states from episodes of the stochastic policy: the checkpoint has no replay buffer" in printed
    assert "score:value was left out: the run was trained without a value network" in printed
    assert "score:value (exact)" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_states": 1}, "--num-states must be a whole number of at least 2"),
        ({"num_states": 100_000}, "--num-states must be at most"),
        ({"num_replicates": 1}, "--num-replicates must be"),
        ({"oracle_samples": 50}, "--oracle-samples must be a whole number of at least 100"),
        ({"arms": ("score:lo",)}, "unknown --baseline 'lo'"),
        ({"seed": -1}, "--seed must be"),
    ],
)
def test_wrong_options(run_dir, changes, message) -> None:
    with pytest.raises(UsageError, match=message):
        run(Gradients(**({"run_dir": run_dir} | changes)))


def test_no_run(tmp_path) -> None:
    with pytest.raises(UsageError, match="is no run directory"):
        run(Gradients(tmp_path / "none"))
