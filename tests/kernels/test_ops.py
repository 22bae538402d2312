"""The ops as PyTorch sees them: registration, torch.compile, CUDA graphs, the losses' shapes behind both backends."""

import functools
import importlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsac_kernels
from fastsac_kernels import (
    PhiloxState,
    categorical_loss,
    launch,
    pathwise_loss,
    replay_gather,
    sample_squashed_gaussian,
    td_loss,
)
from fastsac_kernels.categorical_loss import categorical_loss_op
from fastsac_kernels.pathwise_loss import pathwise_loss_op, scale_op
from fastsac_kernels.philox import philox_normal_op
from fastsac_kernels.replay_gather import replay_gather_n_step_op, replay_gather_op, uniform_positions_op
from fastsac_kernels.score_function_loss import score_function_loss_op
from fastsac_kernels.squashed_gaussian import squashed_gaussian_backward_op, squashed_gaussian_op
from fastsac_kernels.td_loss import td_loss_op
from tests.kernels.parity import BASELINES, CASES, DEVICES, MODULES, SUMS, Case, categorical, pathwise, score, td

every_device = pytest.mark.parametrize("device", DEVICES)
every_op = pytest.mark.parametrize("op", CASES)


def op_arguments(device: str) -> list[tuple[Any, tuple[Any, ...]]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)

    samples, batch, size, critics = 2, 5, 3, 2
    mean, log_std = normal(batch, size).requires_grad_(), normal(batch, size).requires_grad_()
    state, alpha = PhiloxState(3, device).state, torch.tensor(0.3, device=device)
    log_prob, q = normal(samples, batch), normal(critics, samples, batch).transpose(0, 1)
    ring = normal(4, 2, 6), normal(4, 2, 3), normal(4, 2), normal(4, 2) > 0
    queue, span = torch.arange(8, device=device), torch.tensor([3, 5], device=device)
    ends = torch.zeros(batch, dtype=torch.bool, device=device)
    target = normal(batch), ends, q[1].detach(), normal(batch)
    logits = normal(critics, batch, 7).requires_grad_(), normal(critics, batch, 7)
    columns = normal(batch), ends, normal(batch)
    return [
        (squashed_gaussian_op, (mean, log_std, state, 1, samples)),
        (squashed_gaussian_op, (mean, log_std, normal(samples, batch, size), 0, samples)),
        (
            squashed_gaussian_backward_op,
            (normal(samples, batch, size), log_prob, mean.detach(), log_std.detach(), state, 1),
        ),
        (pathwise_loss_op, (log_prob.detach().requires_grad_(), q.detach().requires_grad_(), alpha, 0.0)),
        (score_function_loss_op, (mean, log_std, state, 1, q.detach(), None, 0.3, "loo", None, log_prob.detach())),
        (score_function_loss_op, (mean, log_std, state, 1, q.detach(), alpha, 0.0, "tensor", normal(batch), None)),
        (td_loss_op, (q[0].detach().requires_grad_(), *target, alpha, 0.0, None, 0.9)),
        (td_loss_op, (q[0].detach().requires_grad_(), *target, None, 0.3, normal(batch), 0.0)),
        (categorical_loss_op, (*logits, *columns, alpha, 0.0, None, 0.9, -2.0, 3.0, False)),
        (categorical_loss_op, (*logits, *columns, None, 0.3, normal(batch), 0.0, -2.0, 3.0, True)),
        (scale_op, (normal(7), alpha, torch.bfloat16, [mean.detach()])),
        (replay_gather_op, (*ring, queue, span, state, 1, 4)),
        (replay_gather_op, (*ring, queue, span, torch.arange(4, device=device), -1, 4)),
        (replay_gather_n_step_op, (*ring, queue, span, state, 1, 4, ring[3], 3, 0.9)),
        (uniform_positions_op, (state, 1, 5, span[1])),
        (philox_normal_op, (state, 1, 5, 7)),
    ]


@every_device
@pytest.mark.parametrize("index", range(16))
def test_opcheck(index: int, device: str) -> None:
    torch.library.opcheck(*op_arguments(device)[index])


@every_device
@every_op
def test_compiles_into_one_graph(op: str, device: str) -> None:
    case = CASES[op]().to(torch.float32, device)
    if "alpha" in case.rest:
        case.rest["alpha"] = torch.tensor(0.37, device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    function = getattr(fastsac_kernels, case.op)

    def surrounded(**arguments: Any) -> Any:
        results = function(**arguments, backend="triton")
        results = results if isinstance(results, tuple) else (results,)
        return tuple(2.0 * result if result.is_floating_point() else result for result in results)

    def run(call: Callable[..., Any]) -> list[Tensor]:
        arguments = {name: x.detach() for name, x in case.floats.items()}
        leaves = [arguments[name].requires_grad_() for name in case.leaves]
        outputs = call(**arguments, **case.rest)
        grads = torch.autograd.grad([o.sum() for o in outputs if o.requires_grad], leaves) if leaves else ()
        return [*outputs, *grads]

    torch._dynamo.reset()  # or else the same source, compiled for one case after the other, gives up
    compiled = torch.compile(surrounded, fullgraph=True, backend=backend)
    for found, expected in zip(run(compiled), run(surrounded), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_compiler_does_not_look_into_the_generator(backend: Any) -> None:
    """It would round differently, and on a CPU its vectorised code of the polynomials is wrong."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    sample, gather = CASES["sampler"]().to(torch.float32, "cpu"), CASES["gather"]().to(torch.float32, "cpu")

    def both(rng: PhiloxState) -> Any:
        drawn = gather.rest | {"rng": rng}
        return (
            *sample_squashed_gaussian(*sample.floats.values(), rng, 2, backend),
            *replay_gather(**gather.floats, **drawn, backend=backend),
        )

    rng = sample.rest["rng"]
    for found, expected in zip(torch.compile(both, backend=keep, fullgraph=True)(rng), both(rng), strict=True):
        assert torch.equal(found, expected)
    calls = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    ops = {"reference": ("philox_normal", "uniform_positions"), "triton": ("squashed_gaussian", "replay_gather")}
    assert {f"fastsac_kernels.{op}" for op in ops[backend]} <= {call.removesuffix(".default") for call in calls}
    assert not any(word in call for call in calls for word in ("xor", "shift", "and_"))


def replayed(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A captured call's results after poisoning and a replay, and those of the same call without a graph."""
    expected = case.call("triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.call("triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.call("triton")
    for _ in range(2):
        for tensor in found.values():
            tensor.fill_(True if tensor.dtype == torch.bool else float("nan"))
        graph.replay()
    return found, expected


@pytest.mark.gpu
@every_op
@pytest.mark.parametrize("batch", [33, 6000])
def test_a_cuda_graph_repeats_the_call(op: str, batch: int) -> None:
    found, expected = replayed(CASES[op](batch=batch).to(torch.float32, "cuda"))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BASELINES)
def test_a_cuda_graph_repeats_every_baseline(kind: str) -> None:
    found, expected = replayed(score(kind=kind, alpha=torch.tensor(0.2, device="cuda")).to(torch.float32, "cuda"))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.gpu
def test_a_cuda_graph_draws_new_numbers_at_every_replay() -> None:
    rng, mean = PhiloxState(0, "cuda"), torch.zeros(5, 3, device="cuda")
    expected, ahead = [], rng.clone()
    for _ in range(4):
        expected.append(sample_squashed_gaussian(mean, mean, ahead)[0])
        ahead.advance()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action, _ = sample_squashed_gaussian(mean, mean, rng)
        rng.advance()
    for wanted in expected:
        graph.replay()
        assert torch.equal(action, wanted)


@pytest.mark.gpu
@every_op
def test_one_kernel_forward_and_one_backward_on_a_gpu(op: str) -> None:
    case = CASES[op](batch=1000).to(torch.float32, "cuda")
    case.call("triton")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.call("triton")
        torch.cuda.synchronize()
    ours = [event.name for event in profile.events() if event.name.startswith("_") and event.name.endswith("_kernel")]
    assert len(ours) == (2 if case.leaves else 1), ours


def test_launches_that_may_overlap_share_no_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    like: Any = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    devices: list[Any] = []

    class Guarded(dict[Any, Any]):
        def get(self, *arguments: Any) -> Any:
            assert launch._tickets_lock.locked()  # of two threads, both could take the same one
            assert devices[-1] == like.device  # whose stream is asked for
            return super().get(*arguments)

    monkeypatch.setattr(launch, "_tickets", Guarded())
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first = launch.new_ticket(like).data_ptr()
    assert launch.new_ticket(like).data_ptr() == first
    stream.cuda_stream = 8
    second = launch.new_ticket(like).data_ptr()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = [launch.new_ticket(like).data_ptr() for _ in range(3)]
    found = {first, second, *captured}
    assert len(found) == 5
    assert all((address - first) % 16 == 0 for address in found)  # alike aligned: nothing is compiled anew
    pool = launch._tickets[like.device].zeros
    monkeypatch.setattr(launch, "TICKETS", 5)  # all taken
    assert launch.new_ticket(like).untyped_storage().data_ptr() != pool.untyped_storage().data_ptr()


@pytest.mark.parametrize("op", ["pathwise_loss", "score_function_loss", "td_loss", "categorical_loss"])
def test_the_compilers_own_graphs_leave_out_what_takes_a_ticket(op: str) -> None:
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fastsac_kernels, op).default.tags


@pytest.mark.parametrize("op", ["sampler", "pathwise", "score", "td", "td_discounts", "categorical"])
def test_second_derivatives_are_refused(op: str) -> None:
    case = CASES[op]().to(torch.float32, "cpu")
    arguments = {name: x.detach() for name, x in case.floats.items()}
    leaves = [arguments[name].requires_grad_() for name in case.leaves]
    outputs = getattr(fastsac_kernels, case.op)(**arguments, **case.rest, backend="triton")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(output.sum() for output in outputs if output.requires_grad)
    grads = torch.autograd.grad(total, leaves, create_graph=True)
    penalised = total + sum(grad.square().sum() for grad in grads)  # a first derivative, too: nothing may be left out
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(penalised, leaves)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_constants_of_any_kind_give_the_same(backend: Any) -> None:
    for make in (pathwise, score, td, categorical):
        expected = make(alpha=0.25).to(torch.float32, "cpu").call(backend)
        for alpha in (torch.full((1, 1, 1), 0.25), torch.tensor(0.25, requires_grad=True), torch.tensor(0.25).double()):
            found = make(alpha=alpha).to(torch.float32, "cpu").call(backend)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, check_dtype=name != "output 0")
        with pytest.raises(TypeError, match=r"alpha must be a number or a scalar tensor, got '0\.3'"):
            make(alpha="0.3").to(torch.float32, "cpu").call(backend)
    mean, noise = torch.zeros(2, 3, requires_grad=True), torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True)
    action, log_prob = sample_squashed_gaussian(mean, mean, noise, backend=backend)
    assert action.dtype == log_prob.dtype == torch.float32
    (action.sum() + log_prob.sum()).backward()
    assert noise.grad is None  # a constant


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rng": 0}, r"rng must be a PhiloxState or noise \[K, B, A\], got int"),
        ({"rng": torch.Generator()}, r"rng must be a PhiloxState or noise \[K, B, A\], got Generator"),
        ({"num_samples": 2.0}, "num_samples must be a whole number, got 2.0"),
        ({"mean": torch.zeros(2, 3, dtype=torch.int64)}, "mean must be floating-point, got torch.int64"),
    ],
)
def test_arguments_of_another_kind_are_refused(changes: dict[str, Any], message: str, backend: Any) -> None:
    mean = torch.zeros(2, 3)
    arguments: dict[str, Any] = {"mean": mean, "log_std": mean, "rng": PhiloxState(), "num_samples": 2} | changes
    with pytest.raises(TypeError, match=message):
        sample_squashed_gaussian(**arguments, backend=backend)
    gathered = CASES["gather"]().to(torch.float32, "cpu")
    with pytest.raises(TypeError, match=r"rng must be a PhiloxState or positions \[B\], got int"):
        replay_gather(**gathered.floats, **gathered.rest | {"rng": 0}, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_span_may_have_gaps(backend: Any) -> None:
    case = CASES["gather"]().to(torch.float32, "cpu")
    expected = case.call(backend)
    case.rest["span"] = torch.stack([case.rest["span"], torch.zeros(2, dtype=torch.int64)], 1)[:, 0]
    for name, value in case.call(backend).items():
        assert torch.equal(value, expected[name])


def test_many_samples_of_one_state(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[int] = []
    monkeypatch.setattr(
        "fastsac_kernels.squashed_gaussian_triton.launch", lambda _, programs, *a, **k: grids.append(programs)
    )
    sample_squashed_gaussian(torch.zeros(1, 3), torch.zeros(1, 3), PhiloxState(), 100_000, backend="triton")
    assert grids == [100_000]  # in the one dimension that allows so many


def grids(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many programs a GPU would get in each launch, forward and backward."""
    found: list[int] = []

    def noting(kernel: Any, programs: Any, *arguments: Any, **constants: Any) -> None:
        found.append(math.prod(programs) if isinstance(programs, tuple) else programs)

    on_gpu = functools.partial(launch.row_block, device=torch.device("cuda"))
    for module in (*MODULES.values(), "scale_triton"):
        imported = importlib.import_module(f"fastsac_kernels.{module}")
        monkeypatch.setattr(imported, "launch", noting)
        monkeypatch.setattr(imported, "row_block", lambda rows, lanes, _: on_gpu(rows, lanes), raising=False)
    case.to(torch.float32, "cpu").call("triton")
    return found


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("batch", [4096, 65536])
def test_a_large_problem_is_spread_over_the_gpu(op: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The H100 has 132 multiprocessors; a program is not worth less than 256 elements."""
    sizes = {"size": 6} if op not in SUMS else {}
    found = grids(CASES[op](batch=batch, **sizes), monkeypatch)
    assert min(found) >= min(132, batch // 256), found


def test_many_samples_are_no_work_for_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grids(score(samples=2, batch=256, size=6), monkeypatch)[0] == 1
    assert grids(score(samples=8, batch=256, size=6), monkeypatch)[0] == 16


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_empty_problems_are_refused(backend: Any) -> None:
    none, q = torch.zeros(0, 3), torch.zeros(1, 2, 0)
    with pytest.raises(ValueError, match="must not be empty"):
        sample_squashed_gaussian(none, none, PhiloxState(), backend=backend)
    with pytest.raises(ValueError, match="must not be empty"):
        pathwise_loss(torch.zeros(1, 0), q, 0.1, backend=backend)
    with pytest.raises(ValueError, match="must not be empty"):
        td_loss(q[0], q[0, 0], q[0, 0], q[0], q[0, 0], 0.1, 0.9, backend=backend)
    with pytest.raises(ValueError, match="must not be empty"):
        categorical_loss(*[torch.zeros(2, 0, 5)] * 2, *[q[0, 0]] * 3, 0.1, 0.9, 0.0, 1.0, "own", backend)


def test_the_number_of_samples_comes_from_the_noise_or_is_given() -> None:
    mean = torch.zeros(2, 3)
    assert sample_squashed_gaussian(mean, mean, PhiloxState())[0].shape == (1, 2, 3)
    assert sample_squashed_gaussian(mean, mean, PhiloxState(), 4)[0].shape == (4, 2, 3)
    assert sample_squashed_gaussian(mean, mean, torch.zeros(5, 2, 3))[0].shape == (5, 2, 3)
    with pytest.raises(ValueError, match=r"noise must have K = 4 samples, got \[5, 2, 3\]"):
        sample_squashed_gaussian(mean, mean, torch.zeros(5, 2, 3), 4)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        sample_squashed_gaussian(mean, mean, PhiloxState(), 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("action", torch.zeros(4, 3, 2), "obs, action, reward, terminated must be"),
        ("reward", torch.zeros(4, 2, 1), "obs, action, reward, terminated must be"),
        ("queue", torch.zeros(7, dtype=torch.int64), r"queue must be \[8\]"),
        ("span", torch.zeros(3, dtype=torch.int64), r"span \[2\]"),
        ("batch_size", 0, "batch_size at least 1"),
        ("n_step", 0, r"n_step must be at least 1, .* got 0 and None"),
        ("n_step", 3, r"above 1 valid must be \[rows, N\] = \[4, 2\], got 3 and None"),
        ("valid", torch.zeros(8) > 0, r"above 1 valid must be \[rows, N\] = \[4, 2\], got 2 and \[8\]"),
        ("rng", torch.zeros(3, dtype=torch.int64), r"positions must be \[5\], got \[3\]"),
    ],
)
def test_gather_refuses_wrong_shapes(name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {"obs": torch.zeros(4, 2, 6), "action": torch.zeros(4, 2, 3)}
    arguments |= {"reward": torch.zeros(4, 2), "terminated": torch.zeros(4, 2, dtype=torch.bool)}
    arguments |= {"queue": torch.arange(8), "span": torch.tensor([0, 8]), "rng": PhiloxState(), "batch_size": 5}
    arguments |= {"n_step": 2, "gamma": 0.9} if name == "valid" else {}
    with pytest.raises(ValueError, match=message):
        replay_gather(**arguments | {name: value})


def test_the_gather_wants_a_contiguous_ring() -> None:
    ring = torch.zeros(6, 2, 4).transpose(0, 2), torch.zeros(4, 2, 3), torch.zeros(4, 2), torch.zeros(4, 2) > 0
    with pytest.raises(ValueError, match="the ring must be contiguous, obs is not"):
        replay_gather(*ring, torch.arange(8), torch.tensor([0, 8]), PhiloxState(), 5, backend="triton")
    ring = torch.zeros(4, 2, 6), *ring[1:]
    for reward, valid, error, message in (
        (ring[2], ring[3].t().contiguous().t(), ValueError, "the ring must be contiguous, valid is not"),
        (ring[2].double(), ring[3], TypeError, "reward is torch.float64"),
    ):
        arguments = (*ring[:2], reward, ring[3], torch.arange(8), torch.tensor([0, 8]), PhiloxState(), 5, "triton")
        with pytest.raises(error, match=message):
            replay_gather(*arguments, valid, 3, 0.9)
