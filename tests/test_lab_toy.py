"""The quadratic problem: every estimator against its closed form, from a printed seed."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastsac.cli import main
from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.estimators import ESTIMATORS, Choice, Entry, choose
from fastsac.lab import quadratic, toy
from fastsac.lab.arguments import Toy
from fastsac.lab.arms import parse_arm
from fastsac.lab.quadratic import Quadratic, closed_form, every_arm, gradients, measure
from fastsac.types import Estimate

SPLITS = ("auto", 0.35)
CASES = [
    (arm.label, split)
    for arm in every_arm()
    for split in SPLITS
    if split == "auto" or ESTIMATORS[arm.estimator].entropy_split is not None
]
#: figures in all cases: bias and variance of mean and log_std in three dimensions
ALLOWED = stats.norm.isf(stats.norm.sf(3.0) / (len(CASES) * 12))


def grid(choice: Choice, name: str) -> tuple[Tensor, Tensor]:
    """Noise [vectors, rows, A] and weights [rows] for which every closed form is exact, or nearly: A = 2 if it fits."""
    if name != "measure-valued":  # a polynomial of degree 8 at most in each normal number
        size = 2 if choice.num_noise <= 3 else 1
        x, weight = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(5))
        count = choice.num_noise * size
        noise = torch.cartesian_prod(*[x] * count).view(-1, choice.num_noise, size).transpose(0, 1)
        return noise, torch.cartesian_prod(*[weight / weight.sum()] * count).view(-1, count).prod(1)
    # it depends on |e| and the angle to e3, smoothly on either side of the equator
    x, weight = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(22))
    y, arc = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(8))
    radius, angle = 5.5 * (x + 1.0), torch.cat([y + 1.0, y + 3.0]) * math.pi / 4.0
    of_radius = weight * radius.square() * torch.exp(-0.5 * radius.square())
    both = torch.cartesian_prod(of_radius, arc.repeat(2) * torch.sin(angle)).prod(1)
    r, theta = torch.cartesian_prod(radius, angle).T
    noise = torch.stack([r * torch.sin(theta), torch.zeros_like(r), r * torch.cos(theta)])
    first, second = torch.cartesian_prod(torch.arange(len(both)), torch.arange(len(both))).T
    return torch.stack([noise[:, first], noise[:, second]], -1), both[first] * both[second] / both.sum() ** 2


def check_exactly(label: str, split: float | str) -> None:
    """To many digits, at the least K and at more."""
    arm = parse_arm(label)
    least = arm.choice.least_samples
    for samples in (least, 2 * least) if arm.estimator != "measure-valued" else (1,):
        choice = choose(arm._replace(num_action_samples=samples).config(Config(entropy_split=split)))
        noise, weights = grid(choice, arm.estimator)
        problem = Quadratic.random(11, noise.shape[-1], 1.0, 0.4)
        found, known = gradients(problem, choice, noise), closed_form(problem, choice, arm.estimator)
        mean = weights @ found
        torch.testing.assert_close(mean, problem.gradient(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(weights @ (found - mean).square(), known.variance, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("label", "split"),
    [
        (arm.label, split)
        for arm in every_arm()
        for split in ("auto", 0.0, 0.35, 1.0)
        if arm.estimator != "mix" and (split == "auto" or ESTIMATORS[arm.estimator].entropy_split is not None)
    ],
)
def test_closed_forms_by_quadrature(label: str, split: float | str) -> None:
    check_exactly(label, split)


def check(label: str, split: float | str, seed: int, error: float) -> None:
    """Bias within 3 standard errors, with Bonferroni's allowance; with an error given the variances, too, and 2 %."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    problem = Quadratic.random(seed, 3, rng.uniform(0.3, 2.0), rng.uniform(0.2, 0.8))
    arm = parse_arm(label)
    choice = choose(arm.config(Config(entropy_split=split)))
    found, known = measure(problem, choice, 50_000, seed, error), closed_form(problem, choice, arm.estimator)
    off = known is not None and ((found.variance - known.variance).abs() > ALLOWED * found.variance_error).any()
    if math.isfinite(error) and off:
        # Sample variances are skewed, and now and then one among hundreds looks wrong. As `lab toy` does, it is
        # measured again, with ten times the samples and other noise.
        found = measure(problem, choice, toy.AGAIN * 50_000, seed + 2, error)
    tiny = 1e-9 * problem.gradient().abs().max()
    assert ((found.mean - problem.gradient()).abs() <= ALLOWED * found.mean_error + tiny).all()
    assert (known is None) == (arm.estimator == "mix")
    if known is not None:
        tiny = 1e-9 * known.variance.max()  # where the variance is zero
        if math.isfinite(error):  # with few samples a variance over its standard error has a long lower tail
            assert ((found.variance - known.variance).abs() <= ALLOWED * found.variance_error + tiny).all()
        torch.testing.assert_close(known.mean, problem.gradient())
        assert found.trace == pytest.approx(known.variance.sum().item(), rel=0.02 if math.isfinite(error) else 0.1)


@pytest.mark.parametrize(("label", "split"), CASES)
def test_closed_forms(label: str, split: float | str) -> None:
    check(label, split, seed=11, error=math.inf)  # the quadrature above is what is sharp


@pytest.mark.slow
@pytest.mark.parametrize(("label", "split"), CASES)
def test_closed_forms_of_a_fresh_problem(label: str, split: float | str) -> None:
    check(label, split, seed=int(np.random.SeedSequence().generate_state(1)[0]), error=0.02 / ALLOWED)


def test_a_biased_estimator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline with the sample itself in its mean: K / (K - 1) too small a gradient."""

    def biased(mean, log_std, draw, q_function, alpha, baseline):
        with torch.no_grad():
            action, log_prob = draw.sample(mean, log_std)
            q = q_function(action)
            f = alpha * log_prob - q.amin(1)
            u = mean + log_std.exp() * draw.noise(mean)
        log_normal = torch.distributions.Normal(mean, log_std.exp()).log_prob(u).sum(-1)
        return Estimate((log_normal * (f - f.mean(0))).mean(), log_prob, q)

    monkeypatch.setitem(ESTIMATORS, "biased", Entry(biased, least_samples=4))
    rows = toy.sweep([parse_arm("biased"), parse_arm("score:none:4")], 0, 20_000)
    toy.judge(rows)
    assert not all(row["unbiased"] for row in rows if row["arm"] == "biased")
    assert all(row["unbiased"] for row in rows if row["arm"] != "biased")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("_score", "score:none"),
        ("_others", "score:loo:2"),
        ("_exact", "score:loo:2"),
        ("_exact", "score-antithetic:loo:4"),
        ("_baseline", "score:mean-action"),
    ],
)
def test_a_wrong_formula_is_found(name: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_exactly(label, 0.35)
    right = getattr(quadratic, name)
    monkeypatch.setattr(quadratic, name, lambda *args: 1.001 * right(*args))
    with pytest.raises(AssertionError):
        check_exactly(label, 0.35)


def test_a_batch_of_one_row_does_not_undo_the_mix() -> None:
    found = measure(Quadratic.random(0, 2, 1.0, 0.3), parse_arm("mix").choice, quadratic.ROWS + 1, 0)
    assert math.isfinite(found.trace)


def test_more_is_measured_until_it_is_known_well_enough() -> None:
    problem, choice = Quadratic.random(0, 2, 1.0, 0.3), choose(Config())
    error = measure(problem, choice, 1000, 0, error=0.01).variance_error.sum() / measure(problem, choice, 1000, 0).trace
    assert error < 0.02


class Rippled(Quadratic):
    """The problem in one dimension with a ripple on the critic."""

    height, frequency = 0.1, 1.0

    def q_function(self, action: Tensor) -> Tensor:
        return (
            super().q_function(action) + self.height * torch.sin(self.frequency * torch.atanh(action)).sum(-1)[:, None]
        )

    def value(self) -> Tensor:
        damped = math.exp(-0.5 * (self.frequency * toy.SIGMA) ** 2)
        return super().value() + self.height * torch.sin(self.frequency * self.mean).sum() * damped


def test_the_ripple_turns_the_order_over() -> None:
    """The registered estimators themselves, on both sides of the crossing."""
    one = torch.ones(1, dtype=torch.float64)
    problem = Rippled(toy.DISTANCE * one, math.log(toy.SIGMA) * one, one[:, None], 0.0 * one)
    crossing = toy.ripple(Rippled.height)["from"]
    choices = [
        choose(Config(estimator="pathwise")),
        choose(Config(estimator="score", baseline="value", entropy_split=0.0)),
    ]
    for frequency in (0.5 * crossing, 2.0 * crossing):
        Rippled.frequency = frequency
        sampled = [measure(problem, choice, 400_000, 0).variance[0].item() for choice in choices]
        assert toy.ripple_variances(Rippled.height, frequency) == pytest.approx(sampled, rel=0.03)
        assert (sampled[0] > sampled[1]) == (frequency > crossing)
    pathwise, score = toy.ripple_variances(Rippled.height, crossing)
    assert pathwise == pytest.approx(score)
    assert toy.ripple(1e-6)["from"] is None


def test_the_command(tmp_path, capsys) -> None:
    arguments = ["lab", "toy", "--arms", "pathwise", "score:loo:2", "mix", "--num-samples", "2000", "--seed", "3"]
    main([*arguments, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "toy.json").read_text())
    assert result["command"] == "fastsac lab toy --seed 3 --num-samples 2000 --arms pathwise score:loo:2 mix"
    assert {row["arm"] for row in result["rows"]} == {"pathwise", "score:loo:2", "mix:loo:2"}
    assert {row["K"] for row in result["rows"] if row["arm"] == "pathwise"} == {1, 2, 4, 8}
    assert all(word in printed for word in ("score:loo:2", "seed 3", "pathwise is noisier from omega"))
    for name in ("toy.png", "toy_ripple.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Toy(num_samples=10), "--num-samples must be from 1000 to"),
        (Toy(seed=-1), "--seed must be"),
        (Toy(arms=("scor",)), "unknown --estimator 'scor'; did you mean score"),
    ],
)
def test_wrong_options(options: Toy, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        toy.run(options)


def test_the_directory_is_made_before_anything_is_measured(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "sweep", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file: choose another --out"):
        toy.run(Toy(out=tmp_path / "file"))


def test_what_looks_wrong_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few samples a right formula looks wrong now and then, since sample variances are skewed."""
    measured, rows = [], toy._row
    monkeypatch.setattr(toy, "_row", lambda *args, **kw: measured.append(kw.get("noise_seed")) or rows(*args, **kw))
    result = toy.run(Toy(arms=("score-antithetic:none", "score:none"), num_samples=1000, seed=0))
    assert 0 < sum(seed == 2 for seed in measured) < 10
    assert all(row["unbiased"] and row.get("agrees", True) for row in result["rows"])


def test_pathwise_is_there_at_the_number_of_samples_of_loo_too():
    labels = [arm.label for arm in every_arm()]
    assert labels[:2] == ["pathwise", "pathwise:2"]
    assert len(set(labels)) == len(labels)
