"""What the kernels' launchers launch, as Triton's own binder sees it; recorded on a CPU, without running a kernel."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from fastsac_kernels import (
    PhiloxState,
    categorical_loss,
    categorical_loss_triton,
    descent_triton,
    launch,
    pathwise_loss,
    pathwise_loss_triton,
    replay_gather,
    replay_gather_triton,
    sample_squashed_gaussian,
    scale_triton,
    score_function_loss,
    score_function_loss_triton,
    squashed_gaussian_triton,
    td_loss,
    td_loss_triton,
    whole_update_launch,
    whole_update_triton,
)
from fastsac_kernels.whole_update import STAGES, Network, Plan, State, make_scratch, run_stage

MODULES = (
    categorical_loss_triton,
    descent_triton,
    pathwise_loss_triton,
    replay_gather_triton,
    scale_triton,
    score_function_loss_triton,
    squashed_gaussian_triton,
    td_loss_triton,
    whole_update_launch,
    whole_update_triton,
)
OPTIONS = ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion", "launch_cooperative_grid")


class Sizes(NamedTuple):
    """Batch, actions, action samples, critics, environments, observations."""

    B: int = 33
    A: int = 3
    K: int = 2
    E: int = 2
    N: int = 16
    O: int = 17  # noqa: E741


#: Pendulum, HalfCheetah and Humanoid as the learner has them, and a large problem
SHAPES = [
    Sizes(b, a, k, O=o) for b, o, a in ((256, 3, 1), (256, 17, 6), (256, 348, 17), (65536, 348, 32)) for k in (1, 2)
]


class Launch(NamedTuple):
    """One launch, as Triton's own binder sees it: what it compiles for, and its cache's key."""

    module: str
    kernel: str
    label: str
    key: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


class OnCuda(Tensor):
    """A tensor that says it is on a GPU, for code that only looks."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = torch.device("cuda", 0)  # type: ignore[assignment]


@functools.cache
def compiled_function(function: Callable[..., Any]) -> Any:
    """The kernel as Triton compiles it, also where the package's own is interpreted; nothing is kept in the latter."""
    return triton.JITFunction(function)


@contextlib.contextmanager
def recorded(keep: Callable[[Launch], None], label: Callable[[], str] = str) -> Iterator[None]:
    """Within, no kernel runs. What Triton would compile for each launch on an sm_90 is kept instead.

    Everything up to the compiler is real: the launchers' blocks for a GPU, `launch`, and the function by which Triton
    itself binds arguments (a 1 becomes a constant, multiples of 16 and aligned addresses are marked).
    """
    from triton.backends.compiler import GPUTarget  # private names are imported only where this runs, on a CPU
    from triton.runtime.driver import DriverConfig

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        constants = {fn.jit_function.arg_names[place]: value for (place,), value in compile["constants"].items()}
        options = {name: compile[name] for name in OPTIONS}
        if limit := re.search(r"'maxnreg': (\d+)", key):  # which the hook is not told of
            options["maxnreg"] = int(limit[1])
        what = compile["signature"], constants, compile["configs"][0], options
        keep(Launch(fn.module, fn.jit_function.fn.__name__, label(), key, *what))
        return True  # and so it is not compiled

    def launch_on_cuda(kernel: Any, programs: Any, *arguments: Any, **constants: Any) -> None:
        moved = [value.as_subclass(OnCuda) if isinstance(value, Tensor) else value for value in arguments]
        launch.launch(compiled_function(kernel.fn), programs, *moved, **constants)

    def row_block(rows: int, lanes: int, _: torch.device) -> tuple[int, int]:
        return launch.row_block(rows, lanes, OnCuda.device)

    with contextlib.ExitStack() as stack:
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.jit_cache_hook = note
        stack.enter_context(patch.object(DriverConfig, "active", Driver))
        stack.enter_context(patch.object(torch.cuda, "device", contextlib.nullcontext))
        cut = functools.partial(whole_update_launch.blocks_of, device=OnCuda.device)
        stack.enter_context(patch.object(whole_update_launch, "blocks_of", lambda plan, _: cut(plan)))
        for module in MODULES:
            for replacement in (launch_on_cuda, row_block):
                name = "launch" if replacement is launch_on_cuda else "row_block"
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, replacement))
        yield


def launches() -> tuple[list[Launch], list[Launch]]:
    """What the operations launch for the shapes above, and what else they launch in corner cases: each once."""
    found: dict[tuple[str, str], Launch] = {}
    label = ""

    def keep(launched: Launch) -> None:
        found.setdefault((launched.kernel, launched.key), launched)

    with recorded(keep, lambda: label):
        for sizes in SHAPES:
            label = " ".join(f"{name}={getattr(sizes, name)}" for name in "BOAK")
            call_ops(sizes)
        number = len(found)
        for name, arguments in corners().items():
            label = name
            call_ops(**arguments)
    return list(found.values())[:number], list(found.values())[number:]


def corners() -> dict[str, dict[str, Any]]:
    """What changes the code that is made, one at a time: sizes that are 1, other types, other kinds of arguments."""
    odd = Sizes()
    cases: dict[str, dict[str, Any]] = {f"{name}=1": {"sizes": odd._replace(**{name: 1})} for name in Sizes._fields}
    cases["odd"] = {"sizes": odd, "stream": 0, "log_prob": False}
    cases["all 1"] = {"sizes": Sizes(*[1] * len(odd)), "log_prob": False}
    cases["bfloat16"] = {"sizes": odd, "dtype": torch.bfloat16}
    cases["bfloat16, K=1"] = {"sizes": odd._replace(K=1), "dtype": torch.bfloat16}
    cases["float alpha, noise"] = {"sizes": odd, "alpha": 0.2, "noise": True}
    cases["16 divides the atoms"] = {"sizes": odd, "atoms": 48}
    cases["large bfloat16"] = {"sizes": SHAPES[-1], "dtype": torch.bfloat16, "noise": True}
    return cases


def call_ops(
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    alpha: float | None = None,
    noise: bool = False,
    stream: int = 1,
    log_prob: bool = True,
    atoms: int = 101,
) -> None:
    """Call every operation, forward and backward, with tensors laid out as the learner has them."""
    b, a, k, e, n, o = sizes
    zeros = functools.partial(torch.zeros, dtype=dtype)
    mean = zeros(b, 2 * a).chunk(2, 1)[0].requires_grad_()
    log_std, temperature = zeros(b, a).requires_grad_(), torch.zeros(()) if alpha is None else alpha
    rng = zeros(k, b, a) if noise else PhiloxState(stream=stream)
    action, sampled = sample_squashed_gaussian(mean, log_std, rng, k, "triton")
    torch.autograd.grad((action, sampled), (mean, log_std), (zeros(k, b, a), torch.zeros(k, b)))
    drawn = sampled.detach().requires_grad_()
    q = zeros(e, k, b).transpose(0, 1).requires_grad_()  # as the stacked critics return it
    torch.autograd.grad(pathwise_loss(drawn, q, temperature, "triton"), (drawn, q))
    for baseline in ("loo",) if k > 1 else ("none", "constant", zeros(b)):
        given = drawn if log_prob else None
        loss = score_function_loss(mean, log_std, rng, q, temperature, baseline, "triton", given)
        torch.autograd.grad(loss, (mean, log_std))
    critics, reward, flag = zeros(e, b).requires_grad_(), zeros(b), torch.zeros(b, dtype=torch.bool)
    for gamma in (0.99, zeros(b)):
        loss = td_loss(critics, reward, flag, zeros(e, b), drawn.detach()[0], temperature, gamma, "triton")
        torch.autograd.grad(loss, critics)
    logits, next_logits = zeros(e, b, atoms).requires_grad_(), zeros(e, b, atoms)
    columns = reward, flag, drawn.detach()[0], temperature
    for gamma, target in ((0.99, "own"), (0.99, "smallest"), (zeros(b), "own"), (zeros(b), "smallest")):
        loss, _ = categorical_loss(logits, next_logits, *columns, gamma, -20.0, 20.0, target, "triton")
        torch.autograd.grad(loss, logits)
    ring = zeros(64, n, o), zeros(64, n, a), zeros(64, n), torch.zeros(64, n, dtype=torch.bool)
    draws = torch.zeros(b, dtype=torch.int64) if noise else PhiloxState(stream=2)
    queue, span = torch.arange(64 * n), torch.tensor([0, 64 * n])
    for n_step in (1, 3):
        replay_gather(*ring, queue, span, draws, b, "triton", ring[3], n_step, 0.99)


def make_plan(**changes: Any) -> Plan:
    """HalfCheetah's, as the learner has it, but for the changes."""
    sizes = {"num_learners": 1, "obs_size": 17, "action_size": 6, "hidden_sizes": (256, 256)}
    update = {"batch_size": 256, "num_action_samples": 1, "estimator": "pathwise", "baseline": "none"}
    rates = {"gamma": 0.99, "tau": 0.005, "betas": (0.9, 0.999), "weight_decay": 0.0}
    alpha = {"learns_alpha": True, "target_entropy": -6.0}
    settings: dict[str, Any] = {**sizes, **update, **rates, **alpha, "precision": "tf32", "streams": (0, 1, 2)}
    return Plan(**{**settings, **changes})


def make_state(plan: Plan, num_rows: int = 8, num_envs: int = 16) -> State:
    """Zeros in the shapes of a learner's state and its replay."""
    learners, inputs, action_size = plan.num_learners, plan.obs_size, plan.action_size
    first, second = plan.hidden_sizes
    zeros = functools.partial(torch.zeros, learners)

    def network(number: int, inputs: int, outputs: int) -> Network:
        last = -(-number * (1 + second) * outputs // 32) * 32
        size = number * ((1 + inputs) * first + (1 + first) * second) + last
        values = zeros(size)
        weights = values.bfloat16() if plan.precision == "bf16" else values
        return Network(values, zeros(size), zeros(size), weights)

    shape, entries = (num_rows, num_envs), num_rows * num_envs
    both = [network(2, inputs + action_size, 1) for _ in range(2)]
    return State(
        *(zeros(*shape, inputs), zeros(*shape, action_size), zeros(*shape), zeros(*shape, dtype=torch.bool)),
        *(zeros(entries, dtype=torch.int64), *(zeros(2, dtype=torch.int64) for _ in range(3))),
        *(zeros(), zeros(), zeros(), zeros(4), zeros(4), zeros(6)),
        *(network(1, inputs, 2 * action_size), *both, network(1, inputs, 1)),
    )


#: what changes a whole update's kernels: on all chips, and corner cases
WHOLE_UPDATES: tuple[dict[str, Any], ...] = (
    {},
    {"precision": "fp32"},
    {"precision": "bf16"},
    {"estimator": "score", "baseline": "value"},
    {"estimator": "score", "baseline": "loo", "num_action_samples": 2},
    {"obs_size": 348, "action_size": 17},
    {"hidden_sizes": (512, 512)},
    {"hidden_sizes": (512, 512), "precision": "fp32"},
    {"hidden_sizes": (512, 512), "precision": "bf16"},
)
WHOLE_CORNERS: tuple[dict[str, Any], ...] = (
    {"obs_size": 3, "action_size": 1, "batch_size": 33, "learns_alpha": False},
    {"obs_size": 67, "action_size": 32, "hidden_sizes": (64, 192), "num_learners": 3},
    {"obs_size": 348, "action_size": 17, "precision": "bf16"},
    {"obs_size": 348, "action_size": 17, "hidden_sizes": (512, 512)},
    {"obs_size": 348, "action_size": 17, "hidden_sizes": (512, 512), "precision": "fp32"},
    {"obs_size": 223, "action_size": 38, "precision": "fp32"},
    {"obs_size": 223, "action_size": 38, "hidden_sizes": (512, 512), "precision": "bf16"},
    {"obs_size": 223, "action_size": 38, "batch_size": 8192, "estimator": "score", "baseline": "none"},
    {"obs_size": 348, "action_size": 17, "precision": "fp32", "estimator": "score", "baseline": "value"},
    {"batch_size": 8192},
    {"batch_size": 8192, "precision": "fp32"},
    {"batch_size": 8192, "precision": "bf16", "estimator": "score", "baseline": "loo", "num_action_samples": 4},
    {"hidden_sizes": (448, 512), "estimator": "score", "baseline": "constant", "precision": "fp32"},
    {"hidden_sizes": (320, 64), "estimator": "score", "baseline": "none", "precision": "bf16"},
)


def whole_launches() -> tuple[list[Launch], list[Launch]]:
    """What the stages of a whole update launch, and what in corner cases."""
    found: dict[tuple[str, str], Launch] = {}
    numbers, label = [], ""

    def keep(launched: Launch) -> None:
        found.setdefault((launched.kernel, launched.key), launched)

    with recorded(keep, lambda: label):
        for cases in (WHOLE_UPDATES, WHOLE_CORNERS):
            for changes in cases:
                plan = make_plan(**changes)
                sizes = plan.batch_size, plan.obs_size, plan.action_size, plan.num_action_samples
                label = " ".join(f"{name}={size}" for name, size in zip("BOAK", sizes, strict=True))
                label += f" {'x'.join(map(str, plan.hidden_sizes))} {plan.precision} {plan.estimator}"
                state, scratch = make_state(plan), make_scratch(plan, "cpu")
                for stage in STAGES:
                    run_stage(stage, state, scratch, plan)
            numbers.append(len(found))
    return list(found.values())[: numbers[0]], list(found.values())[numbers[0] :]
