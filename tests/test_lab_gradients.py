"""Gradient diagnostics: against brute force, and with estimators that are wrong on purpose."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsac import SAC, Config
from fastsac.cli import main
from fastsac.errors import UsageError
from fastsac.estimators import ESTIMATORS, Entry, choose
from fastsac.lab import gradients
from fastsac.lab import head as module
from fastsac.lab.arguments import Gradients
from fastsac.lab.arms import parse_arm
from fastsac.lab.gradients import Trial, run
from fastsac.lab.head import Counted, Head, Moments, Oracle, oracles
from fastsac.run_dir import read_config
from fastsac.types import Draw, Estimate

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


def oracle_of(gradient: Tensor, error: float = 0.0) -> Oracle:
    """An oracle whose other direction is the last coordinate."""
    last = torch.zeros_like(gradient, dtype=torch.float64)
    last[-1] = 1.0
    directions = torch.stack([gradient.double() / gradient.double().norm(), last])
    return Oracle(gradient.double(), directions, torch.full((2,), error, dtype=torch.float64))


def statistics(estimates: Tensor, truth: Oracle) -> dict[str, float]:
    moments = Moments(truth)
    for part in estimates.split(7000):
        moments.add(part)
    return moments.statistics()


def test_statistics_of_numbers_drawn_by_hand() -> None:
    g, number = torch.Generator().manual_seed(0), 20_000
    gradient = torch.tensor([3.0, 4.0, 0.0])
    estimates = gradient + torch.tensor([1.0, 2.0, 0.5]) * torch.randn(number, 3, generator=g)
    found = statistics(estimates, oracle_of(gradient))
    assert found["variance"] == pytest.approx(np.trace(np.cov(estimates.double().numpy().T)) / 25, rel=1e-9)
    assert found["variance"] == pytest.approx((1 + 4 + 0.25) / 25, rel=0.03)
    assert found["signal_to_noise"] == pytest.approx(5 / 5.25**0.5, rel=0.03)
    assert abs(found["bias_sigmas"]) < 3.0
    assert abs(found["bias_random_sigmas"]) < 3.0
    cosines = torch.nn.functional.cosine_similarity(estimates, gradient.expand_as(estimates))
    assert found["cosine"] == pytest.approx(cosines.mean().item(), rel=1e-4)
    # off along the gradient, which is ten times as long then
    error = math.sqrt((0.6**2 * 1 + 0.8**2 * 4) / number)
    longer = statistics(estimates + 9 * gradient, oracle_of(gradient))
    assert longer["bias_sigmas"] - found["bias_sigmas"] == pytest.approx(45 / error, rel=0.03)
    assert longer["bias_random_sigmas"] == pytest.approx(found["bias_random_sigmas"], abs=1e-3)
    assert longer["signal_to_noise"] == pytest.approx(50 / 5.25**0.5, rel=0.03)
    assert longer["variance"] == pytest.approx(found["variance"], rel=1e-6)
    assert abs(statistics(estimates + 0.1 * gradient, oracle_of(gradient, 1.0))["bias_sigmas"]) < 1.0
    # off across it
    across = statistics(estimates + torch.tensor([0.0, 0.0, 0.1]), oracle_of(gradient))
    assert across["bias_sigmas"] == pytest.approx(found["bias_sigmas"], abs=1e-3)
    more = across["bias_random_sigmas"] - found["bias_random_sigmas"]
    assert more == pytest.approx(0.1 * math.sqrt(number) / 0.5, rel=0.03)


def test_a_mean_that_is_all_noise_is_no_signal() -> None:
    noise = torch.randn(400, 50, generator=torch.Generator().manual_seed(0))
    found = statistics(noise, oracle_of(torch.full((50,), 1e-3)))
    assert found["signal_to_noise"] < 0.5 * (noise.mean(0).norm() / noise.var(0).sum().sqrt()).item()


@pytest.mark.parametrize("arm", ["pathwise:2", "score:loo:3"])
def test_an_arm_against_brute_force(head: Head, arm: str) -> None:
    """Estimates made one by one as the learner makes them, all of them kept."""
    learner, choice, number = head.learner, parse_arm(arm).choice, 40
    truth = oracles(head, 1000)
    state = head.rng.get_state()
    trial = Trial(arm, choice, choice.baseline, truth)
    for _ in range(number):
        trial.add(head)
    head.rng.set_state(state)
    estimates: dict[str, list[Tensor]] = {"head": [], "parameters": []}
    for _ in range(number):
        outputs = learner.actor(head.obs)
        draw = Draw(head.noise(choice.num_noise), choice.num_action_samples)
        loss = choice.estimator(*outputs, draw, head.q_function, learner.alpha, choice.baseline).loss
        for name, inputs in (("head", outputs), ("parameters", tuple(learner.actor.parameters()))):
            found = torch.autograd.grad(loss, inputs, retain_graph=True)
            estimates[name].append(torch.cat([each.flatten() for each in found]))
    row = trial.row()
    for name, each in estimates.items():
        kept, gradient = torch.stack(each).double().numpy(), truth[name].gradient.numpy()
        size, mean, trace = np.linalg.norm(gradient), kept.mean(0), np.trace(np.cov(kept.T))
        assert row[name]["variance"] == pytest.approx(trace / size**2, rel=1e-4)
        signal = max(0.0, mean @ mean - trace / number)
        assert row[name]["signal_to_noise"] == pytest.approx(math.sqrt(signal / trace), rel=1e-4)
        cosines = kept @ gradient / size / np.linalg.norm(kept, axis=1)
        assert row[name]["cosine"] == pytest.approx(cosines.mean(), rel=1e-4, abs=1e-6)
        directions, errors = truth[name].directions.numpy(), truth[name].errors.numpy()
        for key, direction, error in zip(("bias_sigmas", "bias_random_sigmas"), directions, errors, strict=True):
            assert np.linalg.norm(direction) == pytest.approx(1.0)
            own = (kept @ direction).std(ddof=1) / math.sqrt(number)
            off = (mean - gradient) @ direction / math.hypot(own, error)
            assert row[name][key] == pytest.approx(off, rel=1e-3, abs=1e-4)


def test_the_parameters_gradient_is_that_of_the_loss(head: Head) -> None:
    """The gradient at the head, gone back through the actor, is what the learner's own backward pass would find."""
    learner, choice = head.learner, choose(Config(estimator="score", baseline="none"))
    state = head.rng.get_state()
    found = head.through(head.gradient(choice, "none"))
    head.rng.set_state(state)
    mean, log_std = learner.actor(head.obs)
    draw = Draw(head.noise(1), 1)
    estimate = choice.estimator(mean, log_std, draw, head.q_function, learner.alpha, "none")
    expected = torch.autograd.grad(estimate.loss, list(learner.actor.parameters()))
    torch.testing.assert_close(found, torch.cat([each.flatten() for each in expected]))


def test_the_oracle_is_the_mean_of_many_samples(head: Head) -> None:
    few, many = oracles(head, 2000), oracles(head, 20_000)
    for name in ("head", "parameters"):
        off = many[name].directions @ (few[name].gradient - many[name].gradient)
        assert (off.abs() < 4.0 * torch.hypot(few[name].errors, many[name].errors)).all()
        ratio = (few[name].errors / many[name].errors).tolist()
        assert ratio == pytest.approx([math.sqrt(10)] * 2, rel=0.5)
    # a single sample has the variance of `pathwise` with K = 1
    trial = Trial("pathwise", choose(Config()), "none", many)
    for _ in range(300):
        trial.add(head)
    along = torch.cat(trial._moments["head"]._along)
    assert (along.std(0) / math.sqrt(20_000)).tolist() == pytest.approx(many["head"].errors.tolist(), rel=0.4)


def test_an_oracle_is_sure_of_nothing_from_a_few_samples(head: Head) -> None:
    assert all((oracle.errors > 0.0).all() and oracle.errors.isfinite().all() for oracle in oracles(head, 100).values())


def test_memory_is_bounded(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    assert head.chunks(250) == [100, 100, 50]
    monkeypatch.setattr(module, "ROWS", 20)  # three samples of six states
    assert head.chunks(7) == [3, 3, 1]
    seen: list[int] = []
    q_function = head.q_function
    monkeypatch.setattr(head, "q_function", lambda action: seen.append(len(action)) or q_function(action))
    oracles(head, 700)
    head.value()
    assert set(seen) == {1, 3}
    assert sum(seen) == 700 + module.VALUE_SAMPLES


def test_the_value_without_lag(head: Head) -> None:
    """It is the mean of what the estimators hold against f."""
    draw = Draw(head.noise(4000), 4000)
    with torch.no_grad():
        action, log_prob = draw.sample(head.mean, head.log_std)
        soft = head.q_function(action).amin(1) - head.learner.alpha * log_prob
    error = soft.std(0) * math.sqrt(1 / module.VALUE_SAMPLES + 1 / 4000)
    assert ((head.value() - soft.mean(0)).abs() < 4.5 * error).all()


@pytest.mark.parametrize(
    ("arm", "evaluations"),
    [
        ("pathwise", 2),
        ("pathwise:3", 6),
        ("pathwise-stl", 2),
        ("score:none", 1),
        ("score:constant:2", 2),
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
    """In one dimension."""
    trial = Trial(arm, parse_arm(arm).choice, parse_arm(arm).choice.baseline, {})
    for _ in range(3):
        trial.add(head)
    row = trial.row()
    assert row["evaluations"] == evaluations
    assert row["K"] == parse_arm(arm).choice.num_action_samples


@pytest.mark.parametrize(
    ("arm", "evaluations"), [("measure-valued:2", 2 * (3 * 3 + 1)), ("pathwise:2", 4), ("score:mean-action:2", 3)]
)
def test_critic_evaluations_in_three_dimensions(arm: str, evaluations: int) -> None:
    choice, weight = parse_arm(arm).choice, torch.ones(3, requires_grad=True)  # as a critic's parameters
    mean, log_std = torch.zeros(5, 3, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    q_function = Counted(lambda action: (action @ weight).unsqueeze(1).expand(-1, 2, -1))
    draw = Draw(torch.randn(choice.num_noise, 5, 3), choice.num_action_samples)
    loss = choice.estimator(mean, log_std, draw, q_function, torch.tensor(0.1), choice.baseline).loss
    torch.autograd.grad(loss, (mean, log_std))
    assert q_function.evaluations == evaluations


def test_arms_take_turns(run_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    add = Trial.add
    monkeypatch.setattr(Trial, "add", lambda trial, head: turns.append(trial.label) or add(trial, head))
    rows = run(Gradients(run_dir, ("score:none", "score:loo"), 2, 10, 100))["rows"]
    labels = ["pathwise", "score:none", "score:loo:2"]
    checkpoints = sorted({row["checkpoint"] for row in rows})
    assert [(row["checkpoint"], row["arm"]) for row in rows] == [(at, arm) for at in checkpoints for arm in labels]
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert len(rounds) == 10 * len(checkpoints)
    assert all(sorted(each) == sorted(labels) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


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
        keys = "bias_sigmas", "bias_random_sigmas"
        worst = max(abs(row[name][key]) for name in ("head", "parameters") for key in keys)
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
    with pytest.raises(UsageError, match="is not a run directory"):
        run(Gradients(tmp_path / "none"))


def test_a_run_of_a_gpu_is_looked_at_without_one(run_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    of_gpu = replace(read_config(run_dir), device="cuda")
    monkeypatch.setattr(gradients, "read_config", lambda _: of_gpu)
    assert gradients._plain(run_dir).device == "auto"


def test_a_run_without_a_checkpoint(run_dir, tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_bytes((run_dir / "config.json").read_bytes())
    with pytest.raises(SystemExit, match="2"):
        main(["lab", "gradients", str(tmp_path)])
    assert capsys.readouterr().err == (
        f"fastsac: {tmp_path} has no checkpoint yet: train it for longer, or name another run\n"
    )


def test_a_directory_that_cannot_be_made_is_found_out_first(run_dir, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(gradients, "measure", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(SystemExit, match="2"):
        main(["lab", "gradients", str(run_dir), "--out", str(tmp_path / "file")])
    assert capsys.readouterr().err == f"fastsac: {tmp_path / 'file'} is a file: choose another --out\n"
