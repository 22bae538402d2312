"""The fused engine against the reference engine, which autograd differentiates."""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastsac import estimators
from fastsac.config import Config
from fastsac.estimators import ESTIMATORS
from fastsac.learner import FusedLearner, Learner, fused
from fastsac.learner.flat import HUGE_PAGE, Memory
from fastsac.learner.stack import ACTIVATIONS
from fastsac.networks import Critic
from fastsac.types import Batch, Draw
from tests.kernels.parity import mutate
from tests.test_graphed import StandIn, filled

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
EXACT = [("pathwise", "auto"), ("score", "loo"), ("score", "value")]


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


def in_float64(kind: type[Learner], config: Config, shape: Shape, seed: int) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        return kind(config, shape.obs_size, shape.action_size, seed=seed)
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
    oracle, written = (
        in_float64(Oracle, config, shape, 1),
        FusedLearner(config, shape.obs_size, shape.action_size, seed=1),
    )
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
