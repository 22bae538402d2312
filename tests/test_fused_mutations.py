"""The written-out gradients: exact in float64, and noticed if they are wrong on purpose."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsac.learner
from fastsac import estimators
from fastsac.config import Config
from fastsac.estimators import ESTIMATORS
from fastsac.learner import Learner
from tests.kernels.parity import mutate
from tests.test_fused import Fixed, Shape, float64

EXACT = [
    {},
    {"num_action_samples": 3, "num_critics": 3, "policy_delay": 2, "hidden_sizes": (8, 8, 8)},
    {"estimator": "score", "baseline": "loo"},
    {"estimator": "score", "baseline": "value"},
    {"estimator": "score", "baseline": "mean-action", "num_action_samples": 2},
    {"estimator": "score", "baseline": "mean-action", "entropy_split": 0.3},
    {"estimator": "score", "baseline": "value-as-printed", "entropy_split": 0.3},
    {"estimator": "pathwise", "entropy_split": 0.3, "num_action_samples": 2},
    {"estimator": "pathwise-stl"},
    {"estimator": "mix", "baseline": "mean-action"},
    {"activation": "silu"},
    {"activation": "elu", "hidden_sizes": (8,)},
]


def worst_difference(settings: dict[str, Any]) -> float:
    """In float64: how far an engine of its own and the reference are apart after four updates, relative to each tensor.

    The module is looked up anew: a test may have changed it.
    """
    shape = Shape(5, 3, 16, (8, 8), 2, 1)
    config = Config(batch_size=16, precision="fp32", **({"hidden_sizes": (8, 8)} | settings))
    kinds = Learner, importlib.import_module("fastsac.learner.fused").FusedLearner
    with float64():
        learners = [kind(config, shape.obs_size, shape.action_size) for kind in kinds]
        for seed in range(4):
            for learner in learners:
                learner.update(Fixed(shape, seed, torch.float64))
    expected, found = (learner.state()[0] | learner.metrics() for learner in learners)
    if expected.keys() != found.keys():
        return math.inf
    del expected["generator"]
    differences = [(found[key] - wanted).abs().max() / (1e-3 + wanted.abs().max()) for key, wanted in expected.items()]
    return torch.stack(differences).nan_to_num(nan=math.inf).max().item()


@pytest.mark.parametrize("settings", EXACT, ids=str)
def test_in_float64_nothing_is_left_to_rounding(settings: dict[str, Any]) -> None:
    assert worst_difference(settings) < 1e-12


MUTATIONS = [
    ("learner.stack", "times_derivative(d, kept[index])", "times_derivative(d, kept[-1])"),
    ("learner.stack", "torch.sum, d, 1, keepdim", "torch.mean, d, 1, keepdim"),
    ("learner.stack", "torch.sum, dy, 1, keepdim", "torch.mean, dy, 1, keepdim"),
    ("learner.stack", "torch.bmm, inputs[index].mT, d,", "torch.bmm, inputs[-1].mT, d,"),
    ("learner.stack", "torch.bmm, d, layer.weight.mT,", "torch.bmm, d, layer.weight,"),
    ("learner.stack", "torch.bmm, dy, last.weight.mT,", "torch.bmm, dy, -last.weight.mT,"),
    ("learner.stack", "torch.mul, dy, last.weight.mT,", "torch.div, dy, last.weight.mT,"),
    ("learner.stack", "+ first_row * tensor.stride(1)", "+ 0 * tensor.stride(1)"),
    ("learner.stack", "        keeps_input=True,\n", ""),
    ("learner.stack", "1.0, 1.0, 1.0, True, h", "1.0, 1.0, 1.0, False, h"),
    ("learner.flat", "beta2=beta2", "beta2=beta1"),
    ("learner.flat", "self.step += 1.0", "self.step += 2.0"),
    ("learner.fused", "2.0 / len(target)", "1.0 / len(target)"),
    ("learner.fused", "next_log_prob, value=-1.0", "next_log_prob, value=1.0"),
    ("learner.fused", "torch.where(batch.terminated, 0.0, next_value)", "next_value"),
    ("learner.fused", "sub_(math.log(2.0))", "sub_(math.log(3.0))"),
    ("learner.fused", "noise, noise, value=-0.5", "noise, noise, value=-0.25"),
    ("learner.fused", "torch.ops.aten.tanh_backward(grad_log_std, squashed)", "grad_log_std"),
    ("learner.fused", '["critic"].values, self.config.tau', '["critic"].values, 0.5 * self.config.tau'),
    ("learner.fused", "entropy - self.target_entropy", "entropy + self.target_entropy"),
    ("learner.fused", "value + f.mean(0)", "value - f.mean(0)"),
    ("learner.fused", "self.choice.value_sign * value", "-value"),
    ("learner.fused", "min_q.view(rows, batch)[-1]", "min_q.view(rows, batch)[0]"),
    ("learner.fused", "sample.log_prob[-1]", "sample.log_prob[0]"),
    ("learner.fused", "squashed[-1]", "squashed[0]"),
    ("learner.fused", "self.updates % every == 0", "True"),
    ("learner.fused", "weight[:, -action_size:].mT", "weight[:, :action_size].mT"),
    ("learner.fused", "each[0] if samples == 1 else each.sum(0)", "each[0]"),
    ("learner.fused", "share /= share.sum(0)", "share *= 2.0"),
    ("estimators.pathwise", "value=2.0", "value=1.0"),
    ("estimators.pathwise", "sub_(alpha)", "add_(alpha)"),
    ("estimators.pathwise", "-4.0 * sample.decay", "-2.0 * sample.decay"),
    ("estimators.pathwise", "grad_mean * sample.deviation", "grad_mean * sample.noise"),
    ("estimators.score", "sample.noise / sample.sigma", "sample.noise * sample.sigma"),
    ("estimators.score", "square().sub_(1.0)", "square().sub_(0.5)"),
    ("estimators.score", "(log_normal(sample.noise, sample.log_std) * advantage)", "advantage"),
    ("estimators.score", "grad_log_std.sub_(exact)", "grad_log_std.add_(exact)"),
    ("estimators.score", "f = f - exact", "f = f + exact"),
    ("estimators.score", "baseline = shifted(baseline, sample.log_std[0], alpha, entropy_split)", "pass"),
    ("estimators.pathwise", "share * sample.noise / sample.sigma", "share * sample.noise"),
    ("estimators.pathwise", "share * (sample.noise.square() - 1.0)", "share * sample.noise.square()"),
    ("estimators.mix", "score[:, part], weight", "score[:, part], 1.0 - weight"),
]


@pytest.mark.parametrize(("module", "old", "new"), MUTATIONS)
def test_a_wrong_gradient_is_noticed(
    module: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, leaf = module.split(".")
    dependents = {"stack": ("fused",), "flat": ("stack", "fused")}.get(leaf, ())
    mutate(monkeypatch, tmp_path, leaf, old, new, dependents, getattr(fastsac, package))
    if package == "estimators":
        mutant = getattr(estimators, leaf)
        entry = ESTIMATORS[leaf]._replace(gradient=getattr(mutant, f"{leaf}_gradient"))
        monkeypatch.setitem(ESTIMATORS, leaf, entry)
    assert max(worst_difference(settings) for settings in EXACT) > 1e-6
