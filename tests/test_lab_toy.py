"""The quadratic problem: every estimator against its closed form, from a printed seed."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from fastsac.cli import main
from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.estimators import ESTIMATORS, Entry, choose
from fastsac.lab import quadratic, toy
from fastsac.lab.arguments import Toy
from fastsac.lab.arms import parse_arm
from fastsac.lab.quadratic import ALPHA, Quadratic, closed_form, every_arm, measure
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


def check(label: str, split: float | str, seed: int, error: float) -> None:
    """Bias and variances within 3 standard errors, with Bonferroni's allowance; the trace within 2 %, too."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    problem = Quadratic.random(seed, 3, rng.uniform(0.3, 2.0), rng.uniform(0.2, 0.8))
    arm = parse_arm(label)
    choice = choose(arm.config(Config(entropy_split=split)))
    found, known = measure(problem, choice, 50_000, seed, error), closed_form(problem, choice, arm.estimator)
    tiny = 1e-9 * problem.gradient().abs().max()
    assert ((found.mean - problem.gradient()).abs() <= ALLOWED * found.mean_error + tiny).all()
    assert (known is None) == (arm.estimator == "mix")
    if known is not None:
        tiny = 1e-9 * known.variance.max()  # where the variance is zero
        assert ((found.variance - known.variance).abs() <= ALLOWED * found.variance_error + tiny).all()
        torch.testing.assert_close(known.mean, problem.gradient())
        assert found.trace == pytest.approx(known.variance.sum().item(), rel=0.02)


@pytest.mark.parametrize(("label", "split"), CASES)
def test_closed_forms(label: str, split: float | str) -> None:
    check(label, split, seed=11, error=0.02 / 3)


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


@pytest.mark.parametrize("name", ["_score", "_others", "_baseline"])
def test_a_wrong_formula_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(quadratic, name)
    monkeypatch.setattr(quadratic, name, lambda *args: 1.3 * right(*args))
    label = {"_score": "score:none", "_others": "score:loo:2", "_baseline": "score:mean-action"}[name]
    with pytest.raises(AssertionError):
        check(label, "auto", seed=11, error=0.01)


def test_more_is_measured_until_it_is_known_well_enough() -> None:
    problem, choice = Quadratic.random(0, 2, 1.0, 0.3), choose(Config())
    error = measure(problem, choice, 1000, 0, error=0.01).variance_error.sum() / measure(problem, choice, 1000, 0).trace
    assert error < 0.02


def test_the_ripple_turns_the_order_over() -> None:
    """Against sampling, on both sides of the crossing."""
    height = 0.1
    crossing = toy.ripple(height)["from"]
    eps = np.random.default_rng(0).standard_normal(400_000)
    u = toy.DISTANCE + toy.SIGMA * eps
    for frequency in (0.5 * crossing, 2.0 * crossing):
        slope = u - height * frequency * np.cos(frequency * u)
        f = 0.5 * u**2 - height * np.sin(frequency * u)
        sampled = slope.var(), ((f - f.mean()) * eps / toy.SIGMA).var()
        assert toy.ripple_variances(height, frequency) == pytest.approx(sampled, rel=0.03)
        assert (sampled[0] > sampled[1]) == (frequency > crossing)
    pathwise, score = toy.ripple_variances(height, crossing)
    assert pathwise == pytest.approx(score)
    assert toy.ripple(1e-6)["from"] is None
    plain = Quadratic(torch.tensor([0.5]), torch.tensor([0.3]).log(), torch.ones(1, 1), torch.zeros(1))
    found = closed_form(plain._replace(**{k: getattr(plain, k).double() for k in ("mean", "log_std", "H", "c")}),
                        choose(Config()), "pathwise")  # fmt: skip
    assert toy.ripple_variances(0.0, 1.0)[0] == pytest.approx(found.variance[0].item())
    assert math.isfinite(ALPHA)


def test_the_command(tmp_path, capsys) -> None:
    arguments = ["lab", "toy", "--arms", "pathwise", "score:loo:2", "mix", "--num-samples", "2000", "--seed", "3"]
    main([*arguments, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "toy.json").read_text())
    assert result["command"] == "fastsac lab toy --seed 3 --num-samples 2000 --arms pathwise score:loo:2 mix"
    assert {row["arm"] for row in result["rows"]} == {"pathwise", "score:loo:2", "mix:loo:2"}
    assert {row["K"] for row in result["rows"] if row["arm"] == "pathwise"} == {1, 2, 4, 8}
    assert all(word in printed for word in ("score:loo:2", "seed 3", "pathwise is the noisier one from omega"))
    for name in ("toy.png", "toy_ripple.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Toy(num_samples=10), "--num-samples must be at least 1000"),
        (Toy(seed=-1), "--seed must be"),
        (Toy(arms=("scor",)), "unknown --estimator 'scor'; did you mean score"),
    ],
)
def test_wrong_options(options: Toy, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        toy.run(options)
