import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsac.cli import main
from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.estimators import ESTIMATORS, Entry, choose, register
from fastsac.estimators.own import Own
from fastsac.lab.arms import parse_arm
from fastsac.train import SAC
from fastsac.types import Draw, Estimate, QFunction

PAIRS = [(name, baseline) for name, entry in ESTIMATORS.items() for baseline in entry.baselines or ("auto",)]
#: those whose expectation a grid of noise gives: not so where rows weigh each other, or where signs make edges
SMOOTH = [pair for pair in PAIRS if pair[0] not in ("mix", "measure-valued")]
every_pair = pytest.mark.parametrize(("name", "baseline"), PAIRS)
ALPHA = torch.tensor(0.3, dtype=torch.float64)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quadrature(nodes: int, samples: int, action_size: int) -> tuple[Tensor, Tensor]:
    """Every tuple of Gauss-Hermite nodes, as noise [K, B, A], and its weight [B]."""
    x, w = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(nodes))
    size = samples * action_size
    noise = torch.cartesian_prod(*[x] * size).view(-1, samples, action_size).transpose(0, 1)
    return noise, torch.cartesian_prod(*[w / w.sum()] * size).view(-1, size).prod(1)


def samples_of(name: str, noise: Tensor) -> int:
    """K for so many normal vectors."""
    entry = ESTIMATORS[name]
    return len(noise) * (2 if entry.pairs else 1) // entry.normals


def estimate(
    name: str,
    baseline: str | float,
    mean: Tensor,
    log_std: Tensor,
    noise: Tensor,
    q: QFunction,
    split: float | str = "auto",
) -> tuple[Tensor, Estimate]:
    """One state's parameters [A], repeated over noise [K, B, A]: the gradients [B, 2A] of each row, and the rest."""
    batch = noise.shape[1]
    mean, log_std = (each.expand(batch, -1).clone().requires_grad_() for each in (mean, log_std))
    b = tensor(baseline).expand(batch) if isinstance(baseline, float) else baseline
    result = choose(Config(estimator=name, entropy_split=split)).estimator(
        mean, log_std, Draw(noise, samples_of(name, noise)), q, ALPHA, b
    )
    return batch * torch.cat(torch.autograd.grad(result.loss, (mean, log_std)), 1), result


def moments(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    expectation = weights @ rows
    return expectation, weights @ (rows - expectation).square()


def squashed_log_prob(mean: Tensor, log_std: Tensor, u: Tensor) -> Tensor:
    log_jacobian = 2.0 * (math.log(2.0) - u - torch.logaddexp(tensor(0.0), -2.0 * u))
    return (torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - log_jacobian).sum(-1)


def lower_q(action: Tensor) -> Tensor:
    return torch.sin(2.0 * action).sum(-1) + action.prod(-1).exp()


def twin_q(action: Tensor) -> Tensor:
    """Critics that never cross: the integrand must be smooth for the quadrature to converge."""
    q = lower_q(action)
    return torch.stack([q + 0.5 + 0.8 * action.square().sum(-1) + 0.3 * action.sum(-1), q], dim=1)


def oracle(mean: Tensor, log_std: Tensor, nodes: int) -> Tensor:
    """The gradient [2A] of E[alpha log_prob - min q], through the reparameterised quadrature."""
    noise, weights = quadrature(nodes, 1, len(mean))
    mean, log_std = mean.clone().requires_grad_(), log_std.clone().requires_grad_()
    u = mean + log_std.exp() * noise[0]
    objective = weights @ (ALPHA * squashed_log_prob(mean, log_std, u) - lower_q(torch.tanh(u)))
    return torch.cat(torch.autograd.grad(objective, (mean, log_std)))


POLICIES = {
    "A=1": (tensor(0.4), tensor(-0.4)),
    "A=1, saturated": (tensor(-2.5), tensor(-0.3)),
    "A=2": (tensor(0.4, -0.7), tensor(-2.0, -1.8)),
}


@pytest.mark.parametrize("split", ["auto", 0.25])
@pytest.mark.parametrize(("name", "baseline"), SMOOTH)
@pytest.mark.parametrize("policy", POLICIES)
def test_expected_gradient(name: str, baseline: str, policy: str, split: float | str) -> None:
    mean, log_std = POLICIES[policy]
    split = "auto" if name == "pathwise-stl" else split
    samples = choose(Config(estimator=name, baseline=baseline)).num_noise
    expected = oracle(mean, log_std, 128)
    torch.testing.assert_close(oracle(mean, log_std, 64), expected, rtol=1e-9, atol=1e-9)
    nodes = 64 if samples * len(mean) <= 2 else 10
    for number in (nodes, 2 * nodes):
        noise, weights = quadrature(number, samples, len(mean))
        rows, _ = estimate(name, -0.7 if baseline == "value" else baseline, mean, log_std, noise, twin_q, split)
        torch.testing.assert_close(weights @ rows, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("split", ["auto", 0.25])
@pytest.mark.parametrize(("name", "baseline"), [pair for pair in PAIRS if pair not in SMOOTH])
def test_expected_gradient_by_sampling(name: str, baseline: str, split: float | str) -> None:
    mean, log_std = POLICIES["A=2"]
    choice, batch = choose(Config(estimator=name, baseline=baseline)), 200_000
    noise = torch.randn(choice.num_noise, batch, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rows, _ = estimate(name, -0.7 if baseline == "value" else baseline, mean, log_std, noise, twin_q, split)
    z = (rows.mean(0) - oracle(mean, log_std, 128)) / (rows.std(0) / math.sqrt(batch))
    assert z.abs().max() < 3.5


def test_the_mix_weighs_by_the_variances_of_the_other_states() -> None:
    problem = Problem(samples=3, batch=5)
    problem.run("mix", "none").loss.backward()
    found = torch.stack([problem.mean.grad, problem.log_std.grad])
    parts = {}
    for name in ("score", "pathwise"):
        each = Problem(samples=3, batch=5)
        per_sample = []
        for k in range(3):
            one = Problem(samples=3, batch=5)
            arguments = one.mean, one.log_std, Draw(each.vectors[k : k + 1], 1), one.q_function, ALPHA, "none"
            ESTIMATORS[name].estimator(*arguments, entropy_split=0.0).loss.backward()
            per_sample.append(5 * torch.stack([one.mean.grad, one.log_std.grad]))
        parts[name] = torch.stack(per_sample)  # [K, 2, B, A]
    variance = {name: part.var(0) for name, part in parts.items()}  # [2, B, A]
    expected = torch.zeros(2, 5, 2, dtype=torch.float64)
    for b in range(5):
        others = [other for other in range(5) if (other < 2) != (b < 2)]
        of_score, of_pathwise = (variance[name][:, others].mean(1) for name in ("score", "pathwise"))
        weight = of_pathwise / (of_score + of_pathwise)
        expected[:, b] = weight * parts["score"][:, :, b].mean(0) + (1 - weight) * parts["pathwise"][:, :, b].mean(0)
    torch.testing.assert_close(found, expected / 5)


def test_pathwise_stl_detaches_mean_and_log_std_in_the_gaussian_only() -> None:
    problem, naive = Problem(), Problem()
    problem.run("pathwise-stl", "auto").loss.backward()
    u = naive.mean + naive.log_std.exp() * problem.noise
    log_normal = torch.distributions.Normal(naive.mean.detach(), naive.log_std.detach().exp()).log_prob(u).sum(-1)
    log_prob = log_normal - 2.0 * (math.log(2.0) - u - torch.nn.functional.softplus(-2.0 * u)).sum(-1)
    (ALPHA * log_prob - naive.q_function(torch.tanh(u)).amin(1)).mean().backward()
    torch.testing.assert_close(problem.mean.grad, naive.mean.grad)
    torch.testing.assert_close(problem.log_std.grad, naive.log_std.grad)


def test_the_sticking_landing_has_no_noise_at_the_optimum() -> None:
    """Where the policy is proportional to exp(Q / alpha): here before squashing."""
    mean, log_std = tensor(0.3, -0.2), tensor(-0.5, -1.0)

    def q_function(action: Tensor) -> Tensor:
        return (ALPHA * squashed_log_prob(mean, log_std, torch.atanh(action))).unsqueeze(1)

    noise = torch.randn(1, 1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = {name: estimate(name, "auto", mean, log_std, noise, q_function)[0] for name in ("pathwise", "pathwise-stl")}
    assert rows["pathwise-stl"].abs().max() < 1e-9
    assert rows["pathwise"].abs().max() > 0.1


class Quadratic(NamedTuple):
    """Q(u) = q0 - (u - c)' H (u - c) / 2 without squashing: f is quadratic in eps, so all moments are known."""

    mean: Tensor
    log_std: Tensor
    H: Tensor
    c: Tensor
    q0: float = 1.7

    def q_function(self, action: Tensor) -> Tensor:
        """Takes the squashing back, so that alpha * log_prob - q = alpha * log N(u) - Q(u)."""
        d = torch.atanh(action) - self.c
        q = self.q0 - 0.5 * torch.einsum("...i,ij,...j", d, self.H, d) - ALPHA * torch.log1p(-action.square()).sum(-1)
        return torch.stack([q, q + 1.0], dim=1)

    def terms(self, entropy_share: float) -> tuple[Tensor, Tensor, Tensor]:
        """w and M, and E[f] at entropy_share = 1."""
        sigma = self.log_std.exp()
        DHD = sigma[:, None] * self.H * sigma
        d = self.mean - self.c
        entropy = (self.log_std + 0.5 * math.log(2.0 * math.pi * math.e)).sum()
        expected_f = -ALPHA * entropy - self.q0 + 0.5 * d @ self.H @ d + 0.5 * DHD.trace()
        return sigma * (self.H @ d), 0.5 * (DHD - entropy_share * ALPHA * torch.eye(len(d))), expected_f

    def score_moments(self, beta: Tensor | float) -> tuple[Tensor, Tensor]:
        """Of one sample's gradient [2A], with beta = E[f] - b."""
        w, M, _ = self.terms(1.0)
        m, m2, w_square, frobenius = M.diag(), (M @ M).diag(), w.square().sum(), M.square().sum()
        d_mean = beta**2 + 4 * beta * m + w_square + w**2 + 2 * frobenius + 8 * m2
        d_log_std = 2 * beta**2 + 16 * beta * m + 2 * w_square + 8 * w**2 + 4 * frobenius + 20 * m**2 + 32 * m2
        sigma = self.log_std.exp()
        return torch.cat([w / sigma, 2.0 * m]), torch.cat([d_mean / sigma**2, d_log_std])


def quadratic(action_size: int) -> Quadratic:
    root = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = (root @ root.T + 0.5 * torch.eye(3))[:action_size, :action_size]
    mean, log_std, c = tensor(0.3, -0.2, 0.5), tensor(-1.2, -0.8, -1.0), tensor(-0.4, 0.6, 0.1)
    return Quadratic(mean[:action_size], log_std[:action_size], H, c[:action_size])


@pytest.mark.parametrize(("baseline", "b"), [("none", 0.0), ("constant", -0.3), (1.1, 1.1), (-4.0, -4.0)])
def test_score_mean_and_variance_are_the_closed_form(baseline: str | float, b: float) -> None:
    problem = quadratic(3)
    noise, weights = quadrature(5, 1, 3)  # exact for a gradient squared, of degree 8
    rows, _ = estimate("score", baseline, problem.mean, problem.log_std, noise, problem.q_function)
    expected = problem.score_moments(problem.terms(1.0)[2] - b)
    torch.testing.assert_close(moments(rows, weights), expected)


@pytest.mark.parametrize(("samples", "action_size"), [(2, 3), (3, 2)])
def test_loo_mean_and_variance_are_the_closed_form(samples: int, action_size: int) -> None:
    problem = quadratic(action_size)
    noise, weights = quadrature(5, samples, action_size)
    rows, _ = estimate("score", "loo", problem.mean, problem.log_std, noise, problem.q_function)
    w, M, _ = problem.terms(1.0)
    expected, variance = problem.score_moments(0.0)
    var_score = torch.cat([torch.exp(-2.0 * problem.log_std), torch.full_like(problem.mean, 2.0)])
    var_of_others = expected**2 + (w.square().sum() + 2 * M.square().sum()) * var_score
    variance = variance / samples + var_of_others / (samples * (samples - 1))
    torch.testing.assert_close(moments(rows, weights), (expected, variance))


def test_pathwise_mean_and_variance_are_the_closed_form() -> None:
    problem = quadratic(3)
    noise, weights = quadrature(5, 1, 3)
    rows, _ = estimate("pathwise", "auto", problem.mean, problem.log_std, noise, problem.q_function)
    w, M, _ = problem.terms(0.0)
    m2 = (M @ M).diag()
    expected = torch.cat([w * torch.exp(-problem.log_std), 2.0 * M.diag() - ALPHA])
    variance = torch.cat([4 * m2 * torch.exp(-2.0 * problem.log_std), w**2 + 4 * M.diag() ** 2 + 4 * m2])
    torch.testing.assert_close(moments(rows, weights), (expected, variance))


def test_no_baseline_biases_and_the_notes_sign_only_adds_variance() -> None:
    (mean, log_std), (noise, weights) = POLICIES["A=1"], quadrature(64, 1, 1)

    def run(baseline: str | float) -> tuple[Tensor, Tensor, Estimate]:
        rows, result = estimate("score", baseline, mean, log_std, noise, lambda action: twin_q(action) + 20.0)
        return *moments(rows, weights), result

    expected, variance, result = run("none")
    value = (weights @ result.soft_value(ALPHA)).item()
    found = {name: run(b) for name, b in (("constant", "constant"), ("ours", -value), ("printed", value))}
    for gradient, _, _ in found.values():
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    assert (found["ours"][1] < 0.05 * variance).all()
    torch.testing.assert_close(found["printed"][1] / variance, tensor(4.0, 4.0), rtol=0.1, atol=0.0)


class Problem:
    """Random states [B] with K samples each, and crossing critics whose weights are leaves."""

    def __init__(self, samples: int = 4, batch: int = 5, action_size: int = 2) -> None:
        rng = torch.Generator().manual_seed(1)
        shapes = (batch, action_size), (batch, action_size), (3 * samples, batch, action_size), (2, action_size)
        leaves = [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]
        self.mean, self.log_std, self.noise, self.weight = leaves
        self.samples, self.vectors = samples, self.noise.detach()
        self.b = torch.linspace(-1.0, 1.0, batch, dtype=torch.float64).requires_grad_()

    def q_function(self, action: Tensor) -> Tensor:
        self.action = action
        return torch.einsum("kba,ea->keb", torch.sin(3.0 * action), self.weight)

    def run(self, name: str, baseline: str, alpha: Tensor = ALPHA) -> Estimate:
        argument = self.b if baseline == "value" else baseline
        entry = ESTIMATORS[name]
        drawn = self.vectors[: entry.num_noise(self.samples)]
        self.noise = torch.cat([drawn, -drawn]) if entry.pairs else drawn[-self.samples :]  # of the actions
        draw = Draw(drawn, self.samples)
        return entry.estimator(self.mean, self.log_std, draw, self.q_function, alpha, argument)


@every_pair
def test_the_parameters_alone_get_a_gradient(name: str, baseline: str) -> None:
    problem, alpha = Problem(), ALPHA.clone().requires_grad_()
    problem.run(name, baseline, alpha).loss.backward()
    assert alpha.grad is None
    assert problem.b.grad is None
    assert (problem.mean.grad != 0.0).all()
    assert (problem.log_std.grad != 0.0).all()


@every_pair
def test_log_prob_and_soft_value(name: str, baseline: str) -> None:
    problem = Problem()
    result = problem.run(name, baseline)
    u = problem.mean + problem.log_std.exp() * problem.noise
    log_prob = squashed_log_prob(problem.mean, problem.log_std, u).detach()
    q = problem.q_function(torch.tanh(u)).detach()
    assert 0 < (q[:, 0] < q[:, 1]).sum() < q[:, 0].numel()
    torch.testing.assert_close(result.log_prob, log_prob)
    torch.testing.assert_close(result.soft_value(ALPHA), (torch.minimum(q[:, 0], q[:, 1]) - ALPHA * log_prob).mean(0))
    assert not result.log_prob.requires_grad
    assert not result.soft_value(ALPHA).requires_grad


@pytest.mark.parametrize("baseline", ESTIMATORS["score"].baselines)
def test_score_keeps_the_action_and_the_critic_out_of_autograd(baseline: str) -> None:
    problem = Problem()
    problem.run("score", baseline).loss.backward()
    assert not problem.action.requires_grad
    assert problem.weight.grad is None


def test_pathwise_differentiates_the_critic_in_the_action() -> None:
    problem = Problem()
    loss = problem.run("pathwise", "auto", alpha=0.0 * ALPHA).loss
    assert problem.action.grad_fn is not None
    loss.backward()
    assert (problem.mean.grad != 0.0).all()


def test_loo_refuses_a_single_sample() -> None:
    with pytest.raises(ValueError, match="needs at least 2 action samples"):
        Problem(samples=1).run("score", "loo")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "pathwis"}, "unknown --estimator 'pathwis'; did you mean pathwise or pathwise-stl?"),
        ({"estimator": "xyz"}, f"unknown --estimator 'xyz'; known: {', '.join(ESTIMATORS)}"),
        ({"baseline": "loo"}, "--estimator pathwise takes no --baseline (it was given 'loo')"),
        ({"baseline": "none"}, "--estimator pathwise takes no --baseline (it was given 'none')"),
        ({"estimator": "score", "baseline": "valu"}, "unknown --baseline 'valu' for --estimator score; did you mean"),
        ({"estimator": "score", "baseline": ""}, "unknown --baseline '' for --estimator score; known: loo, value,"),
        ({"estimator": "pathwise-stl", "entropy_split": 0.5}, "takes no --entropy-split (it was given 0.5)"),
        ({"estimator": "pathwise-antithetic", "num_action_samples": 3}, "must be even, got 3"),
        ({"estimator": "score-antithetic", "num_action_samples": 2}, "--num-action-samples must be at least 4"),
        ({"estimator": "mix", "num_action_samples": 1}, "--num-action-samples must be at least 2"),
        ({"estimator": "mix", "batch_size": 1}, "--batch-size must be at least 2"),
        ({"estimator": "mix", "baseline": "value-as"}, "did you mean value?"),
        ({"estimator": "no_such_module:toy"}, "cannot import 'no_such_module' for --estimator no_such_module:toy"),
        ({"estimator": "math:toy"}, "math registers no estimator 'toy'"),
        ({"estimator": "score", "num_action_samples": 1}, "--num-action-samples must be at least 2"),
        ({"estimator": "score", "baseline": "loo", "num_action_samples": 1}, "--num-action-samples must be at least 2"),
    ],
)
def test_choose_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose(Config(**settings))
    assert message in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("settings", "resolved"),
    [
        ({}, ("pathwise", "none", 1)),
        ({"num_action_samples": 4}, ("pathwise", "none", 4)),
        ({"estimator": "score"}, ("score", "loo", 2)),
        ({"estimator": "score", "num_action_samples": 5}, ("score", "loo", 5)),
        *(
            ({"estimator": "score", "baseline": b}, ("score", b, 1))
            for b in ("none", "constant", "value", "mean-action")
        ),
        ({"estimator": "score", "entropy_split": 1}, ("score", "loo", 2)),
        ({"estimator": "pathwise-stl"}, ("pathwise-stl", "none", 1)),
        ({"estimator": "pathwise-antithetic"}, ("pathwise-antithetic", "none", 2)),
        ({"estimator": "score-antithetic"}, ("score-antithetic", "loo", 4)),
        ({"estimator": "score-antithetic", "baseline": "value"}, ("score-antithetic", "value", 2)),
        ({"estimator": "mix", "baseline": "none"}, ("mix", "none", 2)),
        ({"estimator": "measure-valued"}, ("measure-valued", "none", 1)),
        ({"estimator": "score", "baseline": "value-as-printed"}, ("score", "value-as-printed", 1)),
    ],
)
def test_choose_resolves_the_defaults(settings: dict[str, object], resolved: tuple[str, str, int]) -> None:
    name, *rest = resolved
    entry = ESTIMATORS[name]
    assert choose(Config(**settings))[:4] == (entry.estimator, *rest, entry.gradient)


def test_an_estimator_from_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/how-to/estimators.md describes it: one file, one line, and what is special about it in a test."""
    name = "tests.toy_estimator:normalized"
    assert len(Path("tests/toy_estimator.py").read_text().splitlines()) < 60
    command = [*("train", "--env-id", "Pendulum-v1", "--estimator", name, "--total-steps", "300"), "--num-envs", "2"]
    command += [*("--learning-starts", "100", "--eval-every", "0", "--hidden-sizes", "8")]
    command += ["--run-dir", str(tmp_path / "run")]
    try:
        main(command)
        agent = SAC.load(tmp_path / "run")
        assert (agent.config.estimator, agent.engine, agent.steps) == (name, "reference", 300)
        assert agent.updates > 150
        assert "no written-out gradient" in agent.engine_reason
        assert parse_arm(f"{name}:4") == (name, "auto", 4)
        with pytest.raises(ValueError, match="there is already an estimator 'normalized'"):
            register("normalized", Entry(ESTIMATORS["score"].estimator))
        # what is special about it: the gradient does not depend on the critics' scale
        gradients = []
        for scale in (1.0, 10.0):
            problem = Problem()
            q_function = problem.q_function
            problem.q_function = lambda action, q=q_function, scale=scale: scale * q(action)
            problem.run("normalized", "none", 0.0 * ALPHA).loss.backward()
            gradients.append(problem.mean.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    finally:
        ESTIMATORS.pop("normalized", None)
        sys.modules.pop("tests.toy_estimator", None)


def attached(mean, log_std, draw, q_function, alpha, baseline):
    """Plain `pathwise`, as one would write it first: nothing is detached."""
    action, log_prob = draw.sample(mean, log_std)
    q = q_function(action)
    return Estimate((alpha * log_prob - q.amin(1)).mean(), log_prob, q)


def test_what_an_own_estimator_returns_need_not_be_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(*inputs):
        found = attached(*inputs)
        return Estimate(found.loss, found.log_prob.detach(), found.q.detach())

    try:
        register("attached", Entry(attached))
        register("detached", Entry(detached))
        plain = Config(env_id="Pendulum-v1", total_steps=60, num_envs=2, learning_starts=40, eval_every=0, batch_size=8)
        plain = replace(plain, hidden_sizes=(8,), engine="reference", precision="fp32")
        parameters = []
        for name in ("attached", "detached"):
            agent = SAC(replace(plain, estimator=name))
            agent.learn()
            parameters.append(torch.cat([each.detach().flatten() for each in agent.actor.parameters()]))
            agent.close()
        torch.testing.assert_close(*parameters, rtol=0.0, atol=0.0)
    finally:
        ESTIMATORS.pop("attached", None)
        ESTIMATORS.pop("detached", None)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda e: 1 // 0, r"estimator own failed: ZeroDivisionError: .*\(test_estimators.py, line \d+\)"),
        (lambda e: e.loss, "estimator own returned a Tensor, not a fastsac.types.Estimate"),
        (lambda e: e._replace(loss=e.q.mean((0, 1))), "returned a loss that is not a scalar tensor"),
        (lambda e: e._replace(loss=e.loss.detach()), "returned a loss that is not a scalar tensor"),
        (
            lambda e: e._replace(log_prob=e.log_prob[0]),
            r"log_prob that is not a tensor of shape \[K, B\], here \[2, 9\]",
        ),
        (lambda e: e._replace(q=e.q[..., 1:]), r"a q that is not a tensor of shape \[K, E, B\], here \[2, E, 9\]"),
        (lambda e: e._replace(q=e.q[:, 0]), r"a q that is not a tensor of shape \[K, E, B\], here \[2, E, 9\]"),
    ],
)
def test_what_an_own_estimator_does_wrong_is_told_in_one_line(found: Any, message: str) -> None:
    mean, log_std = torch.zeros(9, 3, requires_grad=True), torch.zeros(9, 3, requires_grad=True)
    draw = Draw(torch.randn(2, 9, 3), 2)

    def q_function(action: Tensor) -> Tensor:
        return torch.stack([action.sum(-1), action.square().sum(-1)], 1)

    own = Own("own", lambda *inputs: found(attached(*inputs)))
    with pytest.raises(UsageError, match=message) as caught:
        own(mean, log_std, draw, q_function, torch.tensor(0.1), "none")
    assert "\n" not in str(caught.value)
    whole = Own("own", attached)(mean, log_std, draw, q_function, torch.tensor(0.1), "none")
    assert not whole.q.requires_grad
    assert not whole.log_prob.requires_grad
    with pytest.raises(UsageError, match="estimator own failed: TypeError"):
        Own("own", lambda mean: mean)(mean, log_std, draw, q_function, torch.tensor(0.1), "none")


@pytest.mark.parametrize(
    ("text", "arm", "label"),
    [
        ("pathwise", ("pathwise", "auto", None), "pathwise"),
        ("pathwise:2", ("pathwise", "auto", 2), "pathwise:2"),
        ("pathwise:1", ("pathwise", "auto", 1), "pathwise"),
        ("score", ("score", "auto", None), "score:loo:2"),
        ("score:4", ("score", "auto", 4), "score:loo:4"),
        ("score:none", ("score", "none", None), "score:none"),
        ("score:none:2", ("score", "none", 2), "score:none:2"),
        ("score:value-as-printed", ("score", "value-as-printed", None), "score:value-as-printed"),
        ("score-antithetic", ("score-antithetic", "auto", None), "score-antithetic:loo:4"),
        ("mix:mean-action", ("mix", "mean-action", None), "mix:mean-action"),
    ],
)
def test_arms(text: str, arm: tuple[object, ...], label: str) -> None:
    assert parse_arm(text) == arm
    assert parse_arm(text).label == label
    assert parse_arm(label).label == label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an arm is estimator[:baseline[:K]]"),
        ("score:", "an arm is estimator[:baseline[:K]]"),
        ("score:loo:2:2", "an arm is estimator[:baseline[:K]]"),
        ("scor:loo", "unknown --estimator 'scor'; did you mean score"),
        ("score:lo", "arm 'score:lo': unknown --baseline 'lo'"),
        ("score:loo:1", "--num-action-samples must be at least 2"),
        ("pathwise:none", "takes no --baseline"),
        ("pathwise:0", "--num-action-samples must be a whole number of at least 1"),
    ],
)
def test_arms_refuse(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_arm(text)
    assert message in str(caught.value)
