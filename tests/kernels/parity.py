"""One problem per op, and the rule by which a kernel passes: at most twice eager PyTorch's own error.

A case makes the op's inputs; `call` runs the op forward and backward, with upstream gradients that are not 1. The
oracle is the reference in float64.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsac_kernels
from fastsac_kernels import PhiloxState

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: samples, batch, action size
SIZES = [(1, 1, 1), (2, 33, 3), (1, 1000, 7), (3, 33, 8), (2, 1000, 17), (1, 33, 32), (2, 3, 300)]
BASELINES = ["none", "constant", "loo", "tensor"]


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def strided(x: Tensor) -> Tensor:
    """The same numbers, with gaps between them and the dimensions in reverse order in memory."""
    order = tuple(range(x.dim()))[::-1]
    storage = torch.full((*x.permute(order).shape, 3), math.nan, dtype=x.dtype, device=x.device)
    storage[..., 1] = x.permute(order)
    return storage[..., 1].permute(order)


def misaligned(x: Tensor) -> Tensor:
    """The same numbers, at an address that is a multiple of nothing but their own size."""
    storage = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype, device=x.device)
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "strided": strided,
    "misaligned": misaligned,
}


@dataclass
class Case:
    """An op's floating-point inputs by name, those that get gradients, and everything else that it takes."""

    op: str
    floats: dict[str, Tensor]
    leaves: tuple[str, ...]
    rest: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str, layout: str = "contiguous") -> Case:
        floats = {name: LAYOUTS[layout](x.to(device, dtype)) for name, x in self.floats.items()}
        rest = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.rest.items()}
        if isinstance(rest.get("rng"), PhiloxState):
            rest["rng"] = PhiloxState(rest["rng"].state[0].item(), device, rest["rng"].stream)
            rest["rng"].advance(self.rest["rng"].state[1].item())
        return Case(self.op, floats, self.leaves, rest)

    def call(self, backend: str) -> dict[str, Tensor]:
        """The op's outputs, and the gradients of its leaves."""
        arguments = {name: x.detach() for name, x in self.floats.items()}
        leaves = {name: arguments[name].requires_grad_() for name in self.leaves}
        outputs = getattr(fastsac_kernels, self.op)(**arguments, **self.rest, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        if leaves:
            learned = [output for output in outputs if output.requires_grad]
            grads = torch.autograd.grad(learned, list(leaves.values()), [ramp(output) for output in learned])
            results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return results


def ramp(like: Tensor) -> Tensor:
    """Upstream gradients that differ everywhere; -2.5 for a scalar, expanded as a mean's are."""
    if like.dim() == 0:
        return torch.full_like(like, -2.5)
    values = torch.linspace(-1.0, 2.0, like.shape[-1], dtype=torch.float64, device=like.device).to(like.dtype)
    return values.expand(like.shape)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def policy(batch: int, size: int) -> dict[str, Tensor]:
    return {"mean": 2.0 * normal(batch, size, seed=1), "log_std": 0.8 * normal(batch, size, seed=2) - 1.0}


def state(seed: int = 2**40 + 3, offset: int = 2**33 + 5, stream: int = 3) -> PhiloxState:
    rng = PhiloxState(seed, stream=stream)
    rng.advance(offset)
    return rng


def sampler(samples: int = 2, batch: int = 33, size: int = 3, noise: bool = False) -> Case:
    floats, rest = policy(batch, size), {}
    if noise:
        floats["rng"] = normal(samples, batch, size, seed=3)
    else:
        rest = {"rng": state(), "num_samples": samples}
    return Case("sample_squashed_gaussian", floats, ("mean", "log_std"), rest)


def pathwise(samples: int = 2, batch: int = 33, critics: int = 2, alpha: Any = 0.37) -> Case:
    q = normal(samples, critics, batch, seed=4)
    q[:, -1, ::5] = q[:, 0, ::5]  # equal critics share the gradient
    floats = {"log_prob": 3.0 * normal(samples, batch, seed=5), "q": q}
    return Case("pathwise_loss", floats, ("log_prob", "q"), {"alpha": alpha})


def score(
    samples: int = 2,
    batch: int = 33,
    size: int = 3,
    kind: str = "loo",
    noise: bool = False,
    alpha: Any = 0.37,
    critics: int = 2,
    given: bool = False,
) -> Case:
    samples = max(samples, 2) if kind == "loo" else samples
    floats, rest = policy(batch, size), {"alpha": alpha, "baseline": kind}
    floats["q"] = 40.0 + normal(samples, critics, batch, seed=6)  # an offset that the baseline should take away
    if noise:
        floats["rng"] = normal(samples, batch, size, seed=3)
    else:
        rest["rng"] = state()
    if kind == "tensor":
        floats["baseline"] = -40.0 + normal(batch, seed=7)
        del rest["baseline"]
    if given:
        floats["log_prob"] = 3.0 * normal(samples, batch, seed=8)
    return Case("score_function_loss", floats, ("mean", "log_std"), rest)


def td(
    critics: int = 2, batch: int = 33, alpha: Any = 0.37, flag: torch.dtype = torch.bool, discounts: bool = False
) -> Case:
    terminated = torch.arange(batch) % 3 == 0
    next_q, next_log_prob = 3.0 * normal(critics, batch, seed=3), normal(batch, seed=4)
    next_q[:, terminated], next_log_prob[terminated] = math.nan, math.inf  # behind the end there is nothing to read
    floats = {"q": normal(critics, batch, seed=1), "reward": 5.0 * normal(batch, seed=2)}
    floats |= {"next_q": next_q, "next_log_prob": next_log_prob}
    rest: dict[str, Any] = {"terminated": terminated.to(flag), "alpha": alpha}
    if discounts:
        floats["gamma"] = normal(batch, seed=5).sigmoid()
    else:
        rest["gamma"] = 0.9
    return Case("td_loss", floats, ("q",), rest)


def categorical(
    critics: int = 2,
    batch: int = 9,
    size: int = 7,
    alpha: Any = 0.37,
    flag: torch.dtype = torch.bool,
    discounts: bool = False,
    target: str = "own",
) -> Case:
    """`size` is the number of atoms. Some rewards lead beyond both ends, and some rows lie on atoms exactly."""
    case = td(critics, batch, alpha, flag, discounts)
    next_logits = 2.0 * normal(critics, batch, size, seed=6)
    next_logits[:, case.rest["terminated"].bool()] = math.nan
    floats = {"logits": normal(critics, batch, size, seed=7), "next_logits": next_logits}
    floats |= {name: case.floats[name] for name in case.floats if name not in ("q", "next_q")}
    floats["reward"][::4] = 0.5  # an atom of 4 - 1 of them or of 7
    floats["next_log_prob"][::8] = 0.0
    rest = case.rest | {"v_min": -4.0, "v_max": 5.0, "target": target}
    return Case("categorical_loss", floats, ("logits",), rest)


def gather(
    batch: int = 33, obs_size: int = 5, size: int = 3, rows: int = 20, positions: bool = False, n_step: int = 1
) -> Case:
    floats = {"obs": normal(rows, 3, obs_size), "action": normal(rows, 3, size), "reward": normal(rows, 3)}
    span = torch.tensor([3 * rows - 7, 3 * rows])  # all of the ring, the last row's next one is the first
    rest = {"terminated": normal(rows, 3, seed=2) > 0.0, "span": span, "batch_size": batch, "rng": state()}
    rest["queue"] = torch.randperm(3 * rows, generator=torch.Generator().manual_seed(0))
    if positions:
        rest["rng"] = torch.arange(batch) % (3 * rows)
    if n_step > 1:
        rest["terminated"] = normal(rows, 3, seed=2) > 1.0
        rest |= {"valid": normal(rows, 3, seed=3) > -1.0, "n_step": n_step, "gamma": 0.9}
    return Case("replay_gather", floats, (), rest)


MODULES = {
    "sampler": "squashed_gaussian_triton",
    "pathwise": "pathwise_loss_triton",
    "score": "score_function_loss_triton",
    "td": "td_loss_triton",
    "td_discounts": "td_loss_triton",
    "categorical": "categorical_loss_triton",
    "categorical_smallest": "categorical_loss_triton",
    "gather": "replay_gather_triton",
    "gather_n_step": "replay_gather_triton",
}
CASES: dict[str, Callable[..., Case]] = {"sampler": sampler, "pathwise": pathwise, "score": score}
CASES |= {"td": td, "td_discounts": functools.partial(td, discounts=True)}
CASES |= {"categorical": categorical}
CASES |= {"categorical_smallest": functools.partial(categorical, critics=3, target="smallest", discounts=True)}
CASES |= {"gather": gather, "gather_n_step": functools.partial(gather, n_step=3)}
CATEGORICAL = ("categorical", "categorical_smallest")
#: sums over single elements, without an action size
SUMS = ("pathwise", "td", "td_discounts")


def rows(op: str, batch: int) -> int:
    """The batch size of a test. The categorical loss has a program for every row, and interpreted ones are slow."""
    return min(batch, 9) if op in CATEGORICAL and not torch.cuda.is_available() else batch


def check(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> None:
    """Raise AssertionError unless the kernel's values and gradients pass."""
    rounded = case.to(dtype, "cpu")
    oracle = rounded.to(torch.float64, "cpu").call("reference")
    eager = rounded.call("reference")
    kernel = case.to(dtype, device, layout).call("triton")
    assert kernel.keys() == oracle.keys()
    for name, expected in oracle.items():
        found, by_eager = kernel[name].cpu(), eager[name]
        assert found.dtype == by_eager.dtype, name
        assert found.shape == expected.shape, name
        error, allowed = ((x.double() - expected.double()).abs().max() for x in (found, by_eager))
        slack = 2.0 * torch.finfo(torch.float32).eps * expected.double().abs().max()
        if found.dtype == torch.bfloat16 and device == "cpu":  # the interpreter rounds towards zero
            slack += torch.finfo(torch.bfloat16).eps * expected.double().abs().max()
        assert error <= 2.0 * allowed + slack, f"{name}: off by {error:.2e}, eager by {allowed:.2e}"


class Guarded:
    """Hands out memory full of NaN, with canaries before and behind it."""

    def __init__(self) -> None:
        self.blocks: list[tuple[Tensor, int]] = []

    def __call__(self, *size: Any, dtype: torch.dtype = torch.float32, device: Any = None, **_: Any) -> Tensor:
        shape = size[0] if len(size) == 1 else size
        numel = math.prod(shape) if isinstance(shape, list | tuple | torch.Size) else shape
        poison = math.nan if dtype.is_floating_point else 1
        block = torch.full((numel + 128,), poison, dtype=dtype, device=device)
        block[:64], block[-64:] = 77, 77
        self.blocks.append((block, numel))
        return block[64:-64].view(shape)

    def check(self) -> None:
        assert self.blocks
        for block, numel in self.blocks:
            canary = torch.full((64,), 77, dtype=block.dtype, device=block.device)
            assert torch.equal(block[:64], canary)
            assert torch.equal(block[-64:], canary)
            assert not block[64 : 64 + numel].isnan().any()


def mutate(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    module: str,
    old: str,
    new: str,
    dependents: tuple[str, ...] = (),
    package: ModuleType = fastsac_kernels,
) -> None:
    """Put a changed copy of a package's module in its place, and load anew what has imported from it."""
    for name in (module, *dependents):
        original = importlib.import_module(f"{package.__name__}.{name}")
        source = Path(str(original.__file__)).read_text()
        if name == module:
            assert source.count(old) == 1, f"{old!r} is in {name} {source.count(old)} times"
            source = source.replace(old, new)
        (folder / f"{name}.py").write_text(source)
        spec = importlib.util.spec_from_file_location(original.__name__, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        mutant = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, original.__name__, mutant)
        monkeypatch.setattr(package, name, mutant)
        spec.loader.exec_module(mutant)
