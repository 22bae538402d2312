"""Every kernel against its reference, what it reads and writes, and how often it is launched."""

import math
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.launches import Interpreted
from fastsac_kernels import PhiloxState, categorical_loss, launch, sample_squashed_gaussian
from tests.kernels.parity import (
    BASELINES,
    CASES,
    CATEGORICAL,
    DEVICES,
    LAYOUTS,
    MODULES,
    SIZES,
    SUMS,
    Case,
    Guarded,
    categorical,
    check,
    gather,
    pathwise,
    rows,
    sampler,
    score,
    td,
)

every_device = pytest.mark.parametrize("device", DEVICES)
every_size = pytest.mark.parametrize(("samples", "batch", "size"), SIZES)
every_op = pytest.mark.parametrize("op", CASES)
bfloat16 = torch.bfloat16


@every_device
@every_size
@pytest.mark.parametrize("noise", [False, True])
def test_sampler(samples: int, batch: int, size: int, noise: bool, device: str) -> None:
    check(sampler(samples, batch, size, noise), device)


@every_device
@every_size
@pytest.mark.parametrize("kind", BASELINES)
def test_score_function_loss(samples: int, batch: int, size: int, kind: str, device: str) -> None:
    check(score(samples, batch, size, kind), device)


@every_device
@pytest.mark.parametrize("kind", BASELINES)
def test_score_function_loss_takes_the_samplers_log_prob(kind: str, device: str) -> None:
    check(score(3, 33, 8, kind, given=True), device)
    case = score(3, 33, 8, kind).to(torch.float32, device)
    expected = case.call("triton")
    _, case.floats["log_prob"] = sample_squashed_gaussian(
        case.floats["mean"], case.floats["log_std"], case.rest["rng"], 3, "triton"
    )
    for name, value in case.call("triton").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@every_device
@pytest.mark.parametrize("critics", [1, 3])
def test_score_function_loss_with_other_numbers_of_critics(critics: int, device: str) -> None:
    check(score(critics=critics), device)


@every_device
@pytest.mark.parametrize(("samples", "batch", "critics"), [(1, 1, 1), (3, 33, 2), (2, 1000, 3), (1, 5000, 2)])
def test_pathwise_loss(samples: int, batch: int, critics: int, device: str) -> None:
    check(pathwise(samples, batch, critics), device)


@every_device
@pytest.mark.parametrize(("critics", "batch"), [(1, 1), (2, 33), (3, 1000), (2, 5000)])
@pytest.mark.parametrize("flag", [torch.bool, torch.uint8])
@pytest.mark.parametrize("discounts", [False, True])
def test_td_loss(critics: int, batch: int, flag: torch.dtype, discounts: bool, device: str) -> None:
    check(td(critics, batch, flag=flag, discounts=discounts), device)


@every_device
@pytest.mark.parametrize(
    ("target", "critics", "batch", "atoms"),
    [
        *[("own", 1, 1, 2), ("smallest", 2, 9, 3), ("own", 1, 9, 51), ("smallest", 2, 9, 101), ("own", 3, 5, 128)],
        *(
            pytest.param(*case, marks=pytest.mark.slow)  # the other target
            for case in [
                *[("smallest", 1, 1, 2), ("own", 2, 9, 3), ("smallest", 1, 9, 51), ("own", 2, 9, 101)],
                ("smallest", 3, 5, 128),
            ]
        ),
    ],
)
def test_categorical_loss(critics: int, batch: int, atoms: int, target: str, device: str) -> None:
    for flag, discounts in ((torch.bool, False), (torch.uint8, True)):
        check(categorical(critics, batch, atoms, flag=flag, discounts=discounts, target=target), device)


@pytest.mark.parametrize("far", ["logits", "next_logits"])
def test_atoms_may_be_more_than_31_bits_apart(far: str) -> None:
    case = categorical(1, 1, 3).to(torch.bfloat16, "cpu")
    case.rest["terminated"] = torch.zeros(1, dtype=torch.bool)
    case.floats["next_logits"] = case.floats["logits"].flip(2)
    strided = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((1, 1, 3), (0, 0, 2**30))  # little is touched
    case.floats[far] = strided.copy_(case.floats[far])
    arguments = case.floats | case.rest
    losses = [categorical_loss(**arguments, backend=name)[0] for name in ("triton", "reference")]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@every_device
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["logits", "next_logits", "next_log_prob", "reward"])
@pytest.mark.parametrize("target", ["own", "smallest"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter
def test_the_categorical_loss_hides_no_nan(name: str, target: str, backend: str, device: str) -> None:
    case = categorical(3, 4, target=target).to(torch.float32, device)
    assert case.call(backend)["output 0"].isfinite()
    going = case.floats[name][..., 1, 0] if case.floats[name].dim() == 3 else case.floats[name][1]
    going.fill_(math.nan)  # of a row that is not terminated
    assert case.call(backend)["output 0"].isnan()


@every_device
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, bfloat16], ids=str)
def test_equal_discounts_are_the_number(dtype: torch.dtype, backend: str, device: str) -> None:
    case = td(batch=5000).to(dtype, device)
    case.rest["gamma"] = 0.875 if dtype == bfloat16 else 0.99
    expected = case.call(backend)
    case.floats["gamma"] = torch.full((5000,), case.rest.pop("gamma"), dtype=dtype, device=device)
    for name, value in case.call(backend).items():
        assert torch.equal(value, expected[name]), name


@every_device
@pytest.mark.parametrize(
    ("batch", "obs_size", "size"), [(1, 1, 1), (33, 5, 3), (1000, 17, 6), (33, 376, 17), (7, 3, 9)]
)
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("n_step", [1, 2, 7, 50])
def test_gather_is_exact(batch: int, obs_size: int, size: int, positions: bool, n_step: int, device: str) -> None:
    case = gather(batch, obs_size, size, positions=positions, n_step=n_step).to(torch.float32, device)
    for found, expected in zip(case.call("triton").values(), case.call("reference").values(), strict=True):
        assert torch.equal(found, expected)
    check(gather(batch, obs_size, size, positions=positions, n_step=n_step), device)


@every_device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "noise"),
    [
        *(("sampler", False), ("sampler", True), ("pathwise", False), ("score", False), ("score", True)),
        *(("td", False), ("td_discounts", False), ("categorical", False), ("categorical_smallest", False)),
    ],
)
def test_layouts_and_dtypes(op: str, layout: str, dtype: torch.dtype, noise: bool, device: str) -> None:
    arguments = {"noise": True} if noise else {}
    if op == "score":
        arguments |= {"kind": "tensor", "given": noise}
    check(CASES[op](**arguments), device, dtype, layout)


@every_device
def test_mixed_dtypes(device: str) -> None:
    for case, name in (
        (sampler(), "mean"),
        (score(), "log_std"),
        (pathwise(), "q"),
        (td(), "reward"),
        (categorical(), "logits"),
    ):
        case = case.to(torch.float32, device)
        results = []
        for backend in ("reference", "triton"):
            case.floats[name] = case.floats[name].to(bfloat16)
            results.append(case.call(backend))
        for found, expected in zip(*(each.values() for each in results), strict=True):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@every_device
@pytest.mark.parametrize("make", [pathwise, score, td, categorical])
def test_alpha_may_be_a_device_tensor(make: Any, device: str) -> None:
    number = make(alpha=0.25).to(torch.float32, device).call("triton")
    for shape in ((), (1,)):
        alpha = torch.full(shape, 0.25, device=device, requires_grad=True)
        for key, found in make(alpha=alpha).to(torch.float32, device).call("triton").items():
            assert torch.equal(found, number[key])


@every_device
@pytest.mark.parametrize("op", ["pathwise", "score", "td", "categorical"])
def test_a_sum_over_several_programs(op: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[op](batch=rows(op, 6000)) if op != "score" else score(batch=700, size=7)
    check(case, device)
    monkeypatch.setattr("fastsac_kernels.scale_triton.MAX_PROGRAMS", 3)  # so that each takes several turns
    if op == "score":
        monkeypatch.setattr("fastsac_kernels.score_function_loss_triton.row_block", lambda *_: (64, 1))
    for _ in range(2):  # the ticket is back at zero
        check(case, device)


@every_device
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter
def test_a_bad_value_is_not_hidden(bad: float, device: str) -> None:
    for make in (pathwise, score, td):
        case = make().to(torch.float32, device)
        case.floats["q"][..., 0, 3] = bad
        found, expected = case.call("triton"), case.call("reference")
        assert not found["output 0"].isfinite() or (bad > 0.0 and make is not td)  # a minimum passes over infinity
        if make is pathwise:
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, equal_nan=True)


@every_device
@every_op
def test_results_repeat_bit_for_bit(op: str, device: str) -> None:
    case = CASES[op](batch=5000 if op in SUMS else rows(op, 100)).to(torch.float32, device)
    first, second = case.call("triton"), case.call("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("op", CASES)
def test_programs_may_run_in_any_order(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted programs run one after the other; on a GPU nobody knows which comes first."""
    import triton.runtime.interpreter as interpreter

    sizes = {"size": 7} if op not in SUMS else {}
    case = CASES[op](batch=5000 if op in SUMS else rows(op, 200), **sizes).to(torch.float32, "cpu")
    if op not in (*SUMS, *CATEGORICAL):
        monkeypatch.setattr(f"fastsac_kernels.{MODULES[op]}.row_block", lambda *_: (32, 1))
    expected, orders = case.call("triton"), []

    def shuffled(*bounds: int) -> list[int]:
        numbers = list(range(*bounds))
        if sys._getframe(1).f_code.co_name != "__call__":  # not the loop over programs
            return numbers
        random.Random(len(orders)).shuffle(numbers)
        orders.append(numbers)
        return numbers

    monkeypatch.setattr(interpreter, "range", shuffled, raising=False)
    for _ in range(3):
        for name, value in case.call("triton").items():
            assert torch.equal(value, expected[name]), name
    assert any(order != sorted(order) for order in orders)


@every_device
@pytest.mark.parametrize(("op", "batch", "block"), [("sampler", 20, 1), ("sampler", 20, 8), ("score", 300, 32)])
def test_block_sizes_do_not_matter(
    op: str, batch: int, block: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[op](batch=batch, size=7).to(torch.float32, device)
    expected = case.call("triton")
    monkeypatch.setattr(f"fastsac_kernels.{MODULES[op]}.row_block", lambda *_: (block, 1))
    found = case.call("triton")
    if op == "score":  # a sum over programs depends on what each of them adds up
        torch.testing.assert_close(found.pop("output 0"), expected.pop("output 0"))
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@every_device
@pytest.mark.parametrize("u", [0.0, 1e-4, 0.62, 0.63, 5.0, 8.0, 9.01, 20.0, 50.0])
@pytest.mark.parametrize("log_std", [-5.0, -1.0, 2.0])
def test_saturation(u: float, log_std: float, device: str) -> None:
    """Relative errors, where autograd's own 1 - tanh^2 has none of its digits left."""
    for sign, eps in ((1.0, 0.0), (-1.0, 0.0), (1.0, 0.3), (-1.0, -0.3)):
        mean = torch.tensor([[sign * u]], device=device, requires_grad=True)
        scale = torch.tensor([[log_std]], device=device, requires_grad=True)
        noise = torch.tensor([[[eps]]], device=device)
        action, log_prob = sample_squashed_gaussian(mean, scale, noise, backend="triton")
        slope = torch.autograd.grad(action, mean, retain_graph=True)[0]
        found = [action, log_prob, slope, *torch.autograd.grad(log_prob, (mean, scale))]
        moved = torch.tensor(mean.item() + math.exp(log_std) * noise.item(), dtype=torch.float64)
        log_slope = 2.0 * (math.log(2.0) - moved.abs() - torch.log1p(torch.exp(-2.0 * moved.abs())))
        expected = [
            torch.tanh(moved),
            -0.5 * noise.item() ** 2 - log_std - 0.5 * math.log(2.0 * math.pi) - log_slope,
            1.0 / torch.cosh(moved) ** 2,
            2.0 * torch.tanh(moved),
            2.0 * torch.tanh(moved) * math.exp(log_std) * noise.item() - 1.0,
        ]
        # log_prob and d_log_std are differences of terms of size 1; slopes may lie below float32's normal numbers
        floors = {"action": 0.0, "log_prob": 1e-6, "slope": 1.2e-38, "d_mean": 0.0, "d_log_std": 1e-6}
        for (name, floor), x, y in zip(floors.items(), found, expected, strict=True):
            assert abs(x.item() - y.item()) <= 1e-5 * abs(y.item()) + floor, (name, sign, eps)


@every_device
@every_op
@pytest.mark.parametrize("batch", [1, 33, 1000])
def test_everything_is_written_and_nothing_else(
    op: str, batch: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[op](batch=rows(op, batch)).to(torch.float32, device)
    expected, guarded = case.call("triton"), Guarded()
    monkeypatch.setattr(torch, "empty", guarded)
    found = case.call("triton")
    monkeypatch.undo()
    guarded.check()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@every_op
@pytest.mark.parametrize("batch", [33, 1000])
def test_one_launch_forward_and_one_backward(op: str, batch: int) -> None:
    case = CASES[op](batch=rows(op, batch)).to(torch.float32, "cpu")
    with Interpreted() as traffic:
        case.call("triton")
    assert traffic.launches == (2 if case.leaves else 1)


def forward_and_backward(case: Case) -> tuple[int, int]:
    """Bytes moved by the forward pass, and by the backward pass."""
    case = case.to(torch.float32, "cpu")
    with Interpreted() as both:
        case.call("triton")
    with torch.no_grad(), Interpreted() as forward:
        Case(case.op, case.floats, (), case.rest).call("triton")
    return forward.bytes, both.bytes - forward.bytes


@pytest.mark.parametrize("size", [1, 6, 17, 32])
def test_the_sampler_moves_no_more_than_it_must(size: int) -> None:
    rows, overhead = 500, 200  # bytes: the generator's state, once a program
    forward, backward = forward_and_backward(sampler(1, rows, size))
    assert forward <= 4 * rows * (3 * size + 1) + overhead
    assert backward <= 4 * rows * (5 * size + 1) + overhead


@pytest.mark.parametrize("size", [1, 6, 17])
def test_the_losses_move_no_more_than_they_must(size: int) -> None:
    rows, samples, critics, overhead = 500, 3, 2, 200
    forward, backward = forward_and_backward(score(samples, rows, size))
    assert forward <= 4 * rows * (4 * size + samples * critics) + overhead
    assert backward <= 4 * rows * 4 * size + 4 * -(-2 * rows * size // 256)  # the upstream gradient, once a program
    forward, backward = forward_and_backward(pathwise(samples, rows, critics))
    # q is read a second time, behind its minimum, from the cache
    assert forward <= 4 * rows * samples * (3 * critics + 2) + overhead
    assert backward <= 8 * rows * samples * (critics + 1) + overhead
    forward, backward = forward_and_backward(td(critics, rows))
    assert forward <= 4 * rows * (3 * critics + 2) + rows + overhead
    assert backward <= 8 * rows * critics + overhead


@pytest.mark.parametrize("target", ["own", "smallest"])
def test_the_categorical_loss_moves_no_more_than_it_must(target: str) -> None:
    batch, critics, atoms = 20, 3, 11
    forward, backward = forward_and_backward(categorical(critics, batch, atoms, target=target))
    # the target's logits are read again, from the cache: for the sum, and for each mass
    numbers = critics * atoms * 3 + (critics if target == "own" else 2) * atoms + critics + 2
    assert forward <= 4 * batch * numbers + 16 * batch
    assert backward <= 8 * batch * critics * atoms + 200


def test_auto_follows_the_device() -> None:
    on_cuda: Any = SimpleNamespace(is_cuda=True)
    assert launch.use_triton("auto", on_cuda)
    assert not launch.use_triton("reference", on_cuda)
    assert not launch.use_triton("auto", torch.zeros(1))
    assert launch.use_triton("triton", torch.zeros(1))


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="all tensors must be on one device, got cpu and meta"):
        launch.launch(None, 1, torch.zeros(1), torch.zeros(1, device="meta"), num_warps=1)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="backend must be 'auto', 'reference' or 'triton', got 'cuda'"):
        sample_squashed_gaussian(mean, mean, PhiloxState(), backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"take float32 and bfloat16, but mean is torch\.float64: backend='reference' takes any"
    ):
        sample_squashed_gaussian(mean.double(), mean.double(), PhiloxState(), backend="triton")
    monkeypatch.setattr(launch, "_is_interpreted", lambda kernel: False)
    with pytest.raises(RuntimeError, match="needs a CUDA GPU, but the tensors are on 'cpu'"):
        sample_squashed_gaussian(mean, mean, PhiloxState(), backend="triton")
    sample_squashed_gaussian(mean, mean, PhiloxState())  # "auto" follows the device
