"""What a chip computes less exactly than the interpreter: parity must not depend on it.

``exp2`` compiles to ``ex2.approx.ftz.f32`` (PTX: at most 2 ulp, subnormal numbers become 0) and a division to
``div.full.f32`` (2 ulp); the interpreter has NumPy's, which are nearly exact.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastsac.config import Config
from fastsac.learner import compare, graphed
from fastsac_kernels.squashed_gaussian_triton import exp
from tests.kernels.parity import BASELINES, SIZES, check, sampler, score
from tests.kernels.whole import Problem, one_update, problem
from tests.pretend_cuda import pretended

RNG = np.random.default_rng(0)
SMALLEST_NORMAL = np.finfo(np.float32).tiny
#: how many units in the last place each result is off by
ERRORS: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "-2": lambda shape: np.full(shape, -2),
    "+2": lambda shape: np.full(shape, 2),
    "any": lambda shape: RNG.integers(-2, 3, shape),
}


@pytest.fixture(autouse=True, params=ERRORS)
def _perturbed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's exp2 and division be off by up to 2 ulp, and flush subnormal numbers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    error = ERRORS[request.param]

    def perturbed(name: str) -> Callable[..., Any]:
        exact = getattr(InterpreterBuilder, name)

        def approximate(builder: Any, *arguments: Any) -> Any:
            result = exact(builder, *arguments)
            if result.data.dtype == np.float64:  # that division is correctly rounded
                return result
            data = result.data.copy()
            assert data.dtype == np.float32
            finite = np.isfinite(data) & (data != 0.0)
            moved = (data.view(np.int32) + error(data.shape).astype(np.int32)).view(np.float32)
            data = np.where(finite, moved, data)
            return TensorHandle(np.where(np.abs(data) < SMALLEST_NORMAL, np.float32(0.0), data), result.dtype)

        return approximate

    for name in ("create_exp2", "create_fdiv"):
        monkeypatch.setattr(InterpreterBuilder, name, perturbed(name))


@pytest.mark.parametrize(("samples", "batch", "size"), SIZES)
def test_the_sampler_does_not_depend_on_them(samples: int, batch: int, size: int) -> None:
    check(sampler(samples, batch, size))


@pytest.mark.parametrize(("samples", "batch", "size"), SIZES)
@pytest.mark.parametrize("kind", BASELINES)
def test_the_score_loss_does_not_depend_on_them(samples: int, batch: int, size: int, kind: str) -> None:
    check(score(samples, batch, size, kind))


@pytest.mark.parametrize("case", [problem(), problem(5, 3, 33, (64, 64), estimator="score", baseline="value")], ids=str)
def test_a_whole_update_does_not_depend_on_them(case: Problem) -> None:
    assert one_update(case) == ""


@triton.jit
def _exp_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, exp(tl.load(x_ptr + index)))


def test_exp_is_right_to_one_unit_in_the_last_place() -> None:
    x = torch.cat([torch.linspace(-87.3, 88.7, 2**15), torch.linspace(-5.0, 2.0, 2**15)])
    found = torch.empty_like(x)
    _exp_kernel[(1,)](x, found, len(x))
    expected = torch.exp(x.double())
    ulp = torch.exp2(torch.floor(torch.log2(expected)) - 23.0)
    assert ((found.double() - expected).abs() / ulp).max() <= 1.0


@pytest.mark.filterwarnings("ignore:overflow encountered")  # by the interpreter
def test_exp_at_the_ends_of_its_range() -> None:
    x = torch.tensor([-math.inf, -200.0, -103.0, -90.0, 0.0, -0.0, 88.72, 89.0, 1e30, math.inf, math.nan, 1e-40])
    x = torch.cat([x, torch.zeros(4)])
    found = torch.empty_like(x)
    _exp_kernel[(1,)](x, found, len(x))
    torch.testing.assert_close(found, torch.exp(x.double()).float(), rtol=2e-7, atol=1e-44, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("_perturbed", ["any"], indirect=True)
def test_the_engines_check_gives_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (graphed, compare):
        monkeypatch.setattr(module, "UPDATES_PER_GRAPH", 2)
    config = Config(hidden_sizes=(16, 16), batch_size=64, num_envs=3, estimator="score", baseline="value")
    with pretended():
        assert compare.compare(graphed.GraphedLearner, config, 17, 6, torch.device("cuda")) == ""
