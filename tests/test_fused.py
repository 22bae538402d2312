"""The fused engine against the reference engine, which autograd differentiates."""

import importlib
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastsac.learner
from fastsac import estimators
from fastsac.config import Config
from fastsac.estimators import ESTIMATORS
from fastsac.learner import FusedLearner, Learner
from fastsac.learner.flat import ALIGNMENT, HUGE_PAGE, Memory
from fastsac.learner.reference import Metrics
from fastsac.learner.stack import ACTIVATIONS
from fastsac.types import Batch, Draw, Sampler
from tests.kernels.parity import mutate
from tests.test_graphed import A, O, StandIn, assert_equal, filled, tensors_of

PAIRS = [(name, baseline) for name, entry in ESTIMATORS.items() for baseline in entry.baselines or ("auto",)]
RATES = {"actor_lr": 1e-3, "critic_lr": 1e-3, "value_lr": 1e-3, "alpha_lr": 1e-3}


class Shape(NamedTuple):
    obs_size: int
    action_size: int
    batch_size: int
    hidden_sizes: tuple[int, ...]
    num_critics: int
    num_action_samples: int


#: odd widths and batch sizes, A from 1 to 32, E and K from 1 to 4, one to three hidden layers, a wide input
SHAPES = [
    Shape(5, 3, 33, (17, 7), 2, 2),
    Shape(1, 1, 1, (1,), 1, 1),
    Shape(17, 6, 64, (33, 64), 2, 1),
    Shape(3, 7, 100, (31, 9, 5), 3, 3),
    Shape(111, 17, 37, (16, 15), 4, 4),
    Shape(11, 32, 129, (64, 3), 2, 4),
]
CASES = [
    (*pair, activation, SHAPES[index % len(SHAPES)])
    for index, (pair, activation) in enumerate(itertools.product(PAIRS, ACTIVATIONS))
]
CASES += [(name, "auto", "relu", shape) for name in ESTIMATORS for shape in SHAPES]


class Fixed:
    """The same random batches in every precision."""

    def __init__(self, shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        g, size = torch.Generator().manual_seed(seed), shape.batch_size
        self.batch = Batch(
            obs=torch.randn(size, shape.obs_size, generator=g, dtype=torch.float32).to(dtype),
            action=(torch.rand(size, shape.action_size, generator=g, dtype=torch.float32) * 2 - 1).to(dtype),
            reward=torch.randn(size, generator=g, dtype=torch.float32).to(dtype),
            next_obs=torch.randn(size, shape.obs_size, generator=g, dtype=torch.float32).to(dtype),
            terminated=torch.rand(size, generator=g) < 0.3,
        )

    def sample(self, batch_size: int, *_: Any) -> Batch:
        assert batch_size == len(self.batch.obs)
        return self.batch


class Noting(Learner):
    """The reference engine, with its noise noted and each group's gradients kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noise: list[Tensor] = []
        self.grads: dict[str, list[Tensor]] = {}

    def _draw(self, purpose: int, num_samples: int, mean: Tensor) -> Draw:
        draw = super()._draw(purpose, num_samples, mean)
        self.noise.append(draw.rng)
        return draw

    def _descend(self, name: str, loss: Tensor) -> None:
        super()._descend(name, loss)
        parameters = self.optimizers[name].param_groups[0]["params"]
        self.grads[name] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


class Oracle(Noting):
    """The reference engine in float64, with another one's noise."""

    def _draw(self, purpose: int, num_samples: int, mean: Tensor) -> Draw:
        return Draw(self.noise.pop(0).double(), num_samples)


def config_of(name: str, baseline: str, activation: str, shape: Shape, **settings: Any) -> Config:
    samples = max(shape.num_action_samples, 2) if (name, baseline) in (("score", "loo"), ("score", "auto")) else None
    given = shape._asdict() | {"num_action_samples": samples or shape.num_action_samples}
    sizes = {key: given[key] for key in ("batch_size", "hidden_sizes", "num_critics", "num_action_samples")}
    fixed = {"estimator": name, "baseline": baseline, "activation": activation, "precision": "fp32"}
    return Config(**(fixed | sizes | RATES | settings))


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def gradients(learner: Learner) -> dict[str, list[Tensor]]:
    if isinstance(learner, FusedLearner):
        return {name: adam.of_parameters(adam.grads) for name, adam in learner._adams.items()}
    assert isinstance(learner, Noting)
    return learner.grads


def everything(learner: Learner) -> dict[str, Tensor]:
    """What an update left: gradients, parameters, targets and moments."""
    found = {name: tensor for name, tensor in learner.state()[0].items() if name != "generator"}
    for group, grads in gradients(learner).items():
        found |= {f"gradient of {group}.{index}": grad for index, grad in enumerate(grads)}
    return found


@pytest.mark.parametrize("actor_every", [1, 2])
@pytest.mark.parametrize(("name", "baseline", "activation", "shape"), CASES, ids=str)
def test_an_update_is_as_exact_as_autograds(
    name: str, baseline: str, activation: str, shape: Shape, actor_every: int
) -> None:
    """From one state, batch and noise; each parameter at most twice as far off as the reference engine's.

    Over several batches, or luck would decide where a tensor has few numbers.
    """
    config = config_of(name, baseline, activation, shape, actor_every=actor_every)
    eager = Noting(config, shape.obs_size, shape.action_size)
    eager.update(Fixed(shape), 4)  # targets and moments of some age
    written = FusedLearner(config, shape.obs_size, shape.action_size, seed=1)
    with float64():
        oracle = Oracle(config, shape.obs_size, shape.action_size)
    errors: dict[str, list[float]] = {}
    for seed in range(4 * actor_every):  # with `actor_every` 2 the actor's turn, and that of the critics alone
        for learner in (oracle, written):
            learner.load_state(*eager.state())
        eager.noise.clear()
        by_eager = eager.update(Fixed(shape, 1 + seed)) | everything(eager)
        oracle.noise = eager.noise
        expected = oracle.update(Fixed(shape, 1 + seed, torch.float64)) | everything(oracle)
        found = written.update(Fixed(shape, 1 + seed)) | everything(written)
        assert expected.keys() == by_eager.keys() == found.keys()
        for key, wanted in expected.items():
            assert (found[key].dtype, found[key].shape) == (by_eager[key].dtype, wanted.shape), key
            differences = found[key] - wanted.double(), by_eager[key] - wanted.double(), wanted
            sizes = [difference.abs().max().item() for difference in differences]
            errors[key] = [max(pair) for pair in zip(errors.get(key, sizes), sizes, strict=True)]
    for key, (error, allowed, size) in errors.items():
        slack = 4.0 * torch.finfo(torch.float32).eps * size
        assert error <= 2.0 * allowed + slack, f"{key}: off by {error:.2e}, autograd by {allowed:.2e}"


EXACT = [
    {},
    {"num_action_samples": 3, "num_critics": 3, "actor_every": 2, "hidden_sizes": (8, 8, 8)},
    {"estimator": "score", "baseline": "loo"},
    {"estimator": "score", "baseline": "value"},
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
            metrics = [learner.update(Fixed(shape, seed, torch.float64)) for learner in learners]
    expected, found = (learner.state()[0] | each for learner, each in zip(learners, metrics, strict=True))
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
    ("learner.flat", "beta2=0.999", "beta2=0.99"),
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
    ("learner.fused", "baseline = -value", "baseline = value"),
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
    ("estimators.score", "(log_normal * advantage)", "advantage"),
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


class Shuffled(Learner):
    """The reference engine with each batch in another order: the same update, with its sums in another order."""

    def _order(self) -> Tensor:
        return torch.randperm(self.config.batch_size, generator=torch.Generator().manual_seed(self.updates))

    def _sample_batch(self, replay: Sampler) -> Batch:
        return Batch(*(part[self._order()] for part in super()._sample_batch(replay)))

    def _draw(self, purpose: int, num_samples: int, mean: Tensor) -> Draw:
        draw = super()._draw(purpose, num_samples, mean)
        return draw._replace(rng=draw.rng[:, self._order()])


def parameters(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for net in learner._networks().values() for p in net.parameters()])


@pytest.mark.parametrize("settings", [{}, {"actor_every": 2}, {"estimator": "score"}], ids=str)
def test_two_hundred_updates_drift_as_reordered_sums_do(settings: dict[str, Any]) -> None:
    config = Config(batch_size=64, hidden_sizes=(32, 32), precision="fp32", **settings)
    learners = [kind(config, O, A) for kind in (Learner, Shuffled, FusedLearner)]
    start = parameters(learners[0])
    for learner in learners:
        learner.update(filled(), 200)
    expected, shuffled, found = map(parameters, learners)
    way = (expected - start).abs().mean()
    assert 0.0 < (shuffled - expected).abs().mean() < 0.01 * way
    assert (found - expected).abs().mean() < 3.0 * (shuffled - expected).abs().mean()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"actor_every": 3}, {"estimator": "score"}], ids=str)
def test_updates_in_one_call_equal_those_in_many(settings: dict[str, Any], precision: str) -> None:
    config = Config(batch_size=16, hidden_sizes=(32, 32), precision=precision, **settings)
    together, apart = FusedLearner(config, O, A), FusedLearner(config, O, A)
    replays = filled(), filled()
    metrics = together.update(replays[0], 13)
    kept: Metrics = {}
    for _ in range(13):
        kept |= apart.update(replays[1])
    assert_equal(tensors_of(together), tensors_of(apart))
    assert_equal(metrics, kept)


def test_many_large_batches_are_drawn_in_several_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, replay = [], filled()
    sample = replay.sample
    monkeypatch.setattr(replay, "sample", lambda size: sizes.append(size) or sample(size))
    FusedLearner(Config(batch_size=3000, hidden_sizes=(4,)), O, A).update(replay, 5)
    assert sizes == [6000, 6000, 3000]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("name", "baseline"), PAIRS)
@pytest.mark.parametrize("obs_size", [17, 200])  # a first layer that is rounded, and one that is not
def test_bfloat16_products_stay_within_their_bound(name: str, baseline: str, activation: str, obs_size: int) -> None:
    """Losses and gradients are off by at most 2 % (of a gradient's norm): each factor of 8 bits is by up to 0.4 %.

    With ReLU a gradient may be off by 8 %: some units in a thousand are so close to zero that rounding opens or shuts
    them, and the error is of the order of the square root of their share.
    """
    bound = 0.08 if activation == "relu" else 0.02
    shape = Shape(obs_size, 6, 256, (256, 256), 2, 2)
    made = []
    for precision in ("fp32", "bf16"):
        learner = FusedLearner(config_of(name, baseline, activation, shape, precision=precision), obs_size, 6)
        made.append((learner.update(Fixed(shape)), gradients(learner)))
    (expected_metrics, expected), (metrics, found) = made
    assert expected.keys() == found.keys()
    for group, grads in expected.items():
        exact, rounded = (torch.cat([grad.flatten() for grad in each]) for each in (grads, found[group]))
        error = (rounded - exact).norm() / exact.norm()
        assert 0.0 < error < bound, f"{group}: {error}"
    for key, value in expected_metrics.items():
        assert metrics[key].item() == pytest.approx(value.item(), rel=0.02, abs=0.02), key


@pytest.mark.parametrize(("obs_size", "rounded"), [(17, [False, True, True, False]), (200, [True, True, True, False])])
def test_what_is_rounded(obs_size: int, rounded: list[bool]) -> None:
    """Hidden layers are, and the first one of a wide input; the last ones, parameters, moments and sums never."""
    shape = Shape(obs_size, 6, 8, (16, 16, 16), 2, 1)
    learner = FusedLearner(config_of("score", "value", "relu", shape, precision="bf16"), obs_size, 6)
    learner.update(Fixed(shape))
    for network in learner._flat.values():
        assert [layer.weight.dtype == torch.bfloat16 for layer in network.layers] == rounded
        for layer, exact in zip(network.layers, network.exact, strict=True):
            assert torch.equal(layer.weight, exact.weight.to(layer.weight.dtype))
            assert torch.equal(layer.bias, exact.bias.to(layer.bias.dtype))
    tensors, _ = learner.state()
    assert {tensor.dtype for name, tensor in tensors.items() if name != "generator"} == {torch.float32}
    plain = FusedLearner(config_of("score", "value", "relu", shape, precision="fp32"), obs_size, 6)
    assert not any(dtype == torch.bfloat16 for _, dtype in plain._memory._shared)
    assert all(layer.weight.dtype == torch.float32 for net in plain._flat.values() for layer in net.layers)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_modules_are_views_of_the_buffers(precision: str) -> None:
    learner = FusedLearner(Config(batch_size=16, hidden_sizes=(32, 32), precision=precision), O, A)
    reference = Learner(Config(batch_size=16, hidden_sizes=(32, 32), precision="fp32"), O, A)
    for name, network in learner._networks().items():
        values = learner._flat[name].values
        for own, other in zip(network.parameters(), reference._networks()[name].parameters(), strict=True):
            assert own.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
            assert torch.equal(own, other)  # drawn as the reference engine's
        with torch.no_grad():
            values += 1.0
        for own, other in zip(network.parameters(), reference._networks()[name].parameters(), strict=True):
            assert torch.equal(own, other + 1.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"estimator": "score", "baseline": "value"}], ids=str)
def test_checkpoints_go_from_any_engine_to_any_other(settings: dict[str, Any], precision: str) -> None:
    config = Config(batch_size=16, hidden_sizes=(8, 8), precision=precision, **settings)
    replay, kinds = filled(), (Learner, FusedLearner, StandIn)
    for first, second in itertools.permutations(kinds, 2):
        made, taken = first(config, O, A, "cpu", 0), second(config, O, A, "cpu", 1)
        made.update(replay, 3)
        taken.load_state(*made.state())
        before, after = tensors_of(made), tensors_of(taken)
        assert_equal({k: v for k, v in before.items() if k in after}, {k: v for k, v in after.items() if k in before})
        assert before.keys() ^ after.keys() <= {"philox"}
        again = first(config, O, A, "cpu", 2)
        again.load_state(*taken.state())
        taken.update(replay, 2)
        again.update(replay, 2)
        assert (taken.updates, again.updates) == (5, 5)
        if precision == "fp32":
            torch.testing.assert_close(parameters(again), parameters(taken), rtol=0.0, atol=3e-3)


def test_a_loaded_state_is_rounded_anew() -> None:
    config = Config(batch_size=16, hidden_sizes=(8, 8), precision="bf16")
    first, second = FusedLearner(config, O, A, seed=0), FusedLearner(config, O, A, seed=1)
    second.load_state(*first.state())
    for name, network in second._flat.items():
        for layer, other in zip(network.layers, first._flat[name].layers, strict=True):
            assert torch.equal(layer.weight, other.weight)


def test_equal_critics_share_the_actions_gradient() -> None:
    shape = Shape(O, A, 16, (8, 8), 3, 1)
    config, learners = config_of("pathwise", "auto", "relu", shape, critic_lr=1e-30), []
    with float64():
        for kind in (Learner, FusedLearner):
            learner = kind(config, O, A)
            with torch.no_grad():
                for parameter in learner.critic.parameters():
                    parameter[1] = parameter[0]  # two of three
            if isinstance(learner, FusedLearner):
                learner._flat["critic"].refresh()
            learner.update(Fixed(shape, dtype=torch.float64))
            learners.append(parameters(learner))
    torch.testing.assert_close(*learners, rtol=0.0, atol=1e-12)


def test_relu_on_bits_is_relu() -> None:
    z = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)  # every number there is
    expected, h = torch.relu(z), z.clone()
    ACTIVATIONS["relu"].function(h, h)()
    assert torch.equal(h.isnan(), z.isnan())
    assert torch.equal(h[~z.isnan()], expected[~z.isnan()])
    d = torch.randn(len(z)).to(torch.bfloat16)
    slope = (z > 0).to(torch.bfloat16)
    gradient = d.clone()
    ACTIVATIONS["relu"].times_derivative(gradient, h)()
    assert torch.equal(gradient[~z.isnan()], (d * slope)[~z.isnan()])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["critic", "actor"])
def test_what_is_not_finite_does_not_hide(where: str, precision: str) -> None:
    shape = Shape(17, 6, 32, (32, 32), 2, 1)
    learner = FusedLearner(config_of("pathwise", "auto", "relu", shape, precision=precision), 17, 6)
    learner._flat[where].values[200] = math.nan
    learner._flat[where].refresh()
    metrics = learner.update(Fixed(shape))
    assert not metrics["critic_loss"].isfinite()


def test_memory_comes_in_aligned_pieces_that_are_shared_by_name() -> None:
    memory = Memory(torch.device("cpu"))
    tensors = [
        memory.zeros(shape, dtype) for shape in ((3, 5), (1,), (2**20,)) for dtype in (torch.float32, torch.bfloat16)
    ]
    assert all(tensor.data_ptr() % ALIGNMENT == 0 and not tensor.any() for tensor in tensors)
    assert tensors[0].data_ptr() % HUGE_PAGE == 0
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
    assert all((tensor == index).all() for index, tensor in enumerate(tensors))
    large = memory.shared("a", (4, 6), torch.float32)
    assert memory.shared("a", (2, 3), torch.float32).data_ptr() == large.data_ptr()
    assert memory.shared("b", (2, 3), torch.float32).data_ptr() != large.data_ptr()
    assert memory.shared("a", (2, 3), torch.bfloat16).data_ptr() != large.data_ptr()
    assert memory.shared("a", (5, 6), torch.float32).data_ptr() != large.data_ptr()  # too small for this one


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_acts_as_the_reference_engine_does(precision: str) -> None:
    config = Config(hidden_sizes=(32, 32), num_envs=4, batch_size=16, precision=precision)
    learners, obs = [kind(config, O, A) for kind in (FusedLearner, Learner)], torch.randn(4, O)
    learners[0].update(filled(), 5)
    learners[1].load_state(*learners[0].state())
    for rows in (4, 4, 3):  # as many as there are environments, and another number
        actions = [learner.act(obs[:rows]) for learner in learners]
        torch.testing.assert_close(*actions, rtol=1e-5, atol=1e-6)
        assert not actions[0].is_inference()
    assert torch.equal(*(learner.act(obs, deterministic=True) for learner in learners))


def test_an_estimator_without_a_written_out_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ESTIMATORS, "pathwise", ESTIMATORS["pathwise"]._replace(gradient=None))
    with pytest.raises(ValueError, match="has no written-out gradient"):
        FusedLearner(Config(hidden_sizes=(4,)), O, A)
