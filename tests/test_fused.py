"""The fused engine against the reference engine, which autograd differentiates."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.estimators import ESTIMATORS
from fastsac.learner import FusedCudaLearner, FusedLearner, GraphedLearner, Learner
from fastsac.learner.stack import ACTIVATIONS
from fastsac.types import Batch, Draw, Sampler
from tests.kernels.whole import as_tensor_cores
from tests.pretend_cuda import pretended
from tests.test_graphed import A, O, assert_equal, filled, tensors_of

WRITTEN_OUT = {name: entry for name, entry in ESTIMATORS.items() if entry.gradient is not None}
PAIRS = [(name, baseline) for name, entry in WRITTEN_OUT.items() for baseline in entry.baselines or ("auto",)]
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
CASES += [(name, "auto", "relu", shape) for name in WRITTEN_OUT for shape in SHAPES]
CASES = [case for case in CASES if case[0] != "mix" or case[3].batch_size > 1]  # which needs another state


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

    def _draw(self, purpose: int, num_samples: int, mean: Tensor, num_noise: int | None = None) -> Draw:
        draw = super()._draw(purpose, num_samples, mean, num_noise)
        self.noise.append(draw.rng)
        return draw

    def _descend(self, name: str, loss: Tensor) -> None:
        super()._descend(name, loss)
        parameters = self.optimizers[name].param_groups[0]["params"]
        self.grads[name] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


class Oracle(Noting):
    """The reference engine in float64, with another one's noise."""

    def _draw(self, purpose: int, num_samples: int, mean: Tensor, num_noise: int | None = None) -> Draw:
        return Draw(self.noise.pop(0).double(), num_samples)


def config_of(name: str, baseline: str, activation: str, shape: Shape, **settings: Any) -> Config:
    entry = WRITTEN_OUT[name]
    least = entry.least(entry.baselines[0] if baseline == "auto" and entry.baselines else baseline)
    given = shape._asdict() | {"num_action_samples": max(shape.num_action_samples, least)}
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


@pytest.mark.parametrize("policy_delay", [1, 2])
@pytest.mark.parametrize(("name", "baseline", "activation", "shape"), CASES, ids=str)
def test_an_update_is_as_exact_as_autograds(
    name: str, baseline: str, activation: str, shape: Shape, policy_delay: int
) -> None:
    """From one state, batch and noise; each parameter at most twice as far off as the reference engine's.

    Over several batches, or luck would decide where a tensor has few numbers.
    """
    config = config_of(name, baseline, activation, shape, policy_delay=policy_delay)
    eager = Noting(config, shape.obs_size, shape.action_size)
    eager.update(Fixed(shape), 4)  # targets and moments of some age
    written = FusedLearner(config, shape.obs_size, shape.action_size, seed=1)
    with float64():
        oracle = Oracle(config, shape.obs_size, shape.action_size)
    errors: dict[str, list[float]] = {}
    for seed in range(4 * policy_delay):  # with `policy_delay` 2 the actor's turn, and that of the critics alone
        for learner in (oracle, written):
            learner.load_state(*eager.state())
        eager.noise.clear()
        eager._measured.clear()
        eager.update(Fixed(shape, 1 + seed))
        oracle.noise = eager.noise
        oracle.update(Fixed(shape, 1 + seed, torch.float64))
        written.update(Fixed(shape, 1 + seed))
        by_eager, expected, found = (each.metrics() | everything(each) for each in (eager, oracle, written))
        assert expected.keys() == by_eager.keys() == found.keys()
        for key, wanted in expected.items():
            assert (found[key].dtype, found[key].shape) == (by_eager[key].dtype, wanted.shape), key
            differences = found[key] - wanted.double(), by_eager[key] - wanted.double(), wanted
            sizes = [difference.abs().max().item() for difference in differences]
            errors[key] = [max(pair) for pair in zip(errors.get(key, sizes), sizes, strict=True)]
    for key, (error, allowed, size) in errors.items():
        slack = 4.0 * torch.finfo(torch.float32).eps * size
        assert error <= 2.0 * allowed + slack, f"{key}: off by {error:.2e}, autograd by {allowed:.2e}"


class Shuffled(Learner):
    """The reference engine with each batch in another order: the same update, with its sums in another order."""

    def _order(self) -> Tensor:
        return torch.randperm(self.config.batch_size, generator=torch.Generator().manual_seed(self.updates))

    def _sample_batch(self, replay: Sampler) -> Batch:
        return Batch(*(part[self._order()] for part in super()._sample_batch(replay)[:5]))

    def _draw(self, purpose: int, num_samples: int, mean: Tensor, num_noise: int | None = None) -> Draw:
        draw = super()._draw(purpose, num_samples, mean, num_noise)
        return draw._replace(rng=draw.rng[:, self._order()])


def parameters(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for net in learner._networks().values() for p in net.parameters()])


@pytest.mark.parametrize("settings", [{}, {"policy_delay": 2}, {"estimator": "score"}], ids=str)
def test_two_hundred_updates_drift_as_reordered_sums_do(settings: dict[str, Any]) -> None:
    config = Config(batch_size=64, hidden_sizes=(32, 32), precision="fp32", **settings)
    learners = [kind(config, O, A) for kind in (Learner, Shuffled, FusedLearner)]
    start = parameters(learners[0])
    for learner in learners:
        learner.update(filled(device="cpu"), 200)
    expected, shuffled, found = map(parameters, learners)
    way = (expected - start).abs().mean()
    assert 0.0 < (shuffled - expected).abs().mean() < 0.01 * way
    assert (found - expected).abs().mean() < 3.0 * (shuffled - expected).abs().mean()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"policy_delay": 3}, {"estimator": "score"}], ids=str)
def test_updates_in_one_call_equal_those_in_many(settings: dict[str, Any], precision: str) -> None:
    config = Config(batch_size=16, hidden_sizes=(32, 32), precision=precision, **settings)
    together, apart = FusedLearner(config, O, A), FusedLearner(config, O, A)
    replays = filled(device="cpu"), filled(device="cpu")
    together.update(replays[0], 13)
    for _ in range(13):
        apart.update(replays[1])
    assert_equal(tensors_of(together), tensors_of(apart))
    assert_equal(together.metrics(), apart.metrics())


def test_many_large_batches_are_drawn_in_several_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, replay = [], filled(device="cpu")
    sample = replay.sample
    monkeypatch.setattr(replay, "sample", lambda size: sizes.append(size) or sample(size))
    FusedLearner(Config(batch_size=3000, hidden_sizes=(4,)), O, A).update(replay, 5)
    assert sizes == [6000, 6000, 3000]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("name", "baseline"), PAIRS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(17, 6, 256, (256, 256), 2, 2),  # a first layer that is not rounded
        Shape(200, 6, 256, (256, 256), 2, 2),  # and one that is
        Shape(111, 17, 133, (96, 65, 47), 3, 4),
        Shape(111, 1, 64, (130,), 1, 1),
    ],
    ids=str,
)
def test_bfloat16_products_stay_within_their_bound(name: str, baseline: str, activation: str, shape: Shape) -> None:
    """Losses and gradients are off by at most 2 % (of a gradient's norm): each factor of 8 bits is by up to 0.4 %.

    With ReLU a gradient may be off by 8 %: some units in a thousand are so close to zero that rounding opens or shuts
    them, and the error is of the order of the square root of their share.
    """
    bound = 0.08 if activation == "relu" else 0.02
    made = []
    for precision in ("fp32", "bf16"):
        config = config_of(name, baseline, activation, shape, precision=precision)
        learner = FusedLearner(config, shape.obs_size, shape.action_size)
        learner.update(Fixed(shape))
        made.append((learner.metrics(), gradients(learner)))
    (expected_metrics, expected), (metrics, found) = made
    assert expected.keys() == found.keys()
    for group, grads in expected.items():
        exact, rounded = (torch.cat([grad.flatten() for grad in each]) for each in (grads, found[group]))
        error = (rounded - exact).norm() / exact.norm()
        assert 0.0 < error < bound, f"{group}: {error}"
    for key, value in expected_metrics.items():
        assert metrics[key].item() == pytest.approx(value.item(), rel=0.02, abs=0.02), key


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        pytest.param({}, "bf16", marks=pytest.mark.slow),
        ({"estimator": "score", "baseline": "value"}, "fp32"),
    ],
    ids=str,
)
def test_checkpoints_go_from_any_engine_to_any_other(
    settings: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_tensor_cores(monkeypatch)  # the interpreter's own products of bfloat16 are wrong
    config = Config(batch_size=16, hidden_sizes=(64, 64), precision=precision, **settings)
    devices = {Learner: "cpu", FusedLearner: "cpu", GraphedLearner: "cuda", FusedCudaLearner: "cuda"}

    def state_of(learner: Learner) -> tuple[dict[str, Tensor], dict[str, int]]:
        """As it comes from a checkpoint."""
        tensors, counters = learner.state()
        return {name: tensor.cpu() for name, tensor in tensors.items()}, counters

    with pretended():
        for first, second in itertools.combinations(devices, 2):
            made, taken = first(config, O, A, devices[first], 0), second(config, O, A, devices[second], 1)
            replays = {device: filled(device=device) for device in ("cpu", "cuda")}
            made.update(replays[devices[first]], 3)
            taken.load_state(*state_of(made))
            before, after = tensors_of(made), tensors_of(taken)
            both = before.keys() & after.keys()
            assert_equal({name: before[name] for name in both}, {name: after[name] for name in both})
            assert before.keys() ^ after.keys() <= {"philox"}
            again = first(config, O, A, devices[first], 2)
            again.load_state(*state_of(taken))
            replays = {device: filled(device=device) for device in ("cpu", "cuda")}
            taken.update(replays[devices[second]], 2)
            again.update(filled(device=devices[first]), 2)
            assert (taken.updates, again.updates) == (5, 5)
            if precision == "fp32" and "cuda" not in (
                devices[first],
                devices[second],
            ):  # which draws other random numbers
                torch.testing.assert_close(parameters(again), parameters(taken), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("kind", [Learner, FusedLearner])
def test_a_learners_own_state_changes_nothing(kind: type[Learner]) -> None:
    learner = kind(Config(batch_size=16, hidden_sizes=(8, 8), precision="fp32"), O, A)
    learner.update(filled(device="cpu"), 3)
    before = {name: tensor.clone() for name, tensor in tensors_of(learner).items()}
    learner.load_state(*learner.state())
    assert_equal(before, tensors_of(learner))


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["critic", "actor"])
def test_what_is_not_finite_does_not_hide(where: str, precision: str) -> None:
    shape = Shape(17, 6, 32, (32, 32), 2, 1)
    learner = FusedLearner(config_of("pathwise", "auto", "relu", shape, precision=precision), 17, 6)
    learner._flat[where].values[200] = math.nan
    learner._flat[where].refresh()
    learner.update(Fixed(shape))
    assert not learner.metrics()["critic_loss"].isfinite()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_acts_as_the_reference_engine_does(precision: str) -> None:
    config = Config(hidden_sizes=(32, 32), num_envs=4, batch_size=16, precision=precision)
    learners, obs = [kind(config, O, A) for kind in (FusedLearner, Learner)], torch.randn(4, O)
    learners[0].update(filled(device="cpu"), 5)
    learners[1].load_state(*learners[0].state())
    for rows in (4, 4, 3):  # as many as there are environments, and another number
        actions = [learner.act(obs[:rows]) for learner in learners]
        torch.testing.assert_close(*actions, rtol=1e-5, atol=1e-6)
        assert not actions[0].is_inference()
    actions = [learner.act(obs, deterministic=True) for learner in learners]
    torch.testing.assert_close(*actions, rtol=1e-5, atol=1e-6)  # weights lie otherwise: some CPUs add up otherwise


def test_an_estimator_without_a_written_out_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ESTIMATORS, "pathwise", ESTIMATORS["pathwise"]._replace(gradient=None))
    with pytest.raises(ValueError, match="has no written-out gradient"):
        FusedLearner(Config(hidden_sizes=(4,)), O, A)
