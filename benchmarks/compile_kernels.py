"""Compiles every kernel as the launchers would launch it, for the chips that people have, without a GPU.

    python -m benchmarks.compile_kernels

Registers, stack, shared memory and code size are written to benchmarks/results/kernel_resources.json, and those for
sm_90 printed. Fails if a kernel spills registers to memory, if it wants more shared memory than a block of threads may
have, or if the program that sums up reads the other programs' sums too early.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from benchmarks.machine import write_json
from fastsac_kernels import (
    PhiloxState,
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
)

RESULT = Path(__file__).parent / "results" / "kernel_resources.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MODULES = (
    pathwise_loss_triton,
    replay_gather_triton,
    scale_triton,
    score_function_loss_triton,
    squashed_gaussian_triton,
    td_loss_triton,
)
#: compute capability and the shared memory, in KiB, that one block may have (CUDA programming guide, table of technical
#: specifications per compute capability): A100; RTX 30; RTX 40; H100; B200; RTX 50
CHIPS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
#: of those, on which corner cases are compiled too: the oldest, and the newest of the small ones
CORNER_CHIPS = (80, 120)
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
    cases["large bfloat16"] = {"sizes": SHAPES[-1], "dtype": torch.bfloat16, "noise": True}
    return cases


def call_ops(
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    alpha: float | None = None,
    noise: bool = False,
    stream: int = 1,
    log_prob: bool = True,
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
    loss = td_loss(critics, reward, flag, zeros(e, b), drawn.detach()[0], temperature, 0.99, "triton")
    torch.autograd.grad(loss, critics)
    ring = zeros(64, n, o), zeros(64, n, a), zeros(64, n), torch.zeros(64, n, dtype=torch.bool)
    draws = torch.zeros(b, dtype=torch.int64) if noise else PhiloxState(stream=2)
    queue, span = torch.arange(64 * n), torch.tensor([0, 64 * n])
    replay_gather(*ring, queue, span, draws, b, "triton")


def measure(launched: Launch, chip: int) -> dict[str, Any]:
    """Compile for one chip, and read off the binary what it needs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(sys.modules[launched.module], launched.kernel)
    source = ASTSource(kernel, launched.signature, launched.constants, launched.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=launched.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-elf", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump))
    size = re.findall(r"^ *\w+ +\w+ +(\w+) .* PROGBITS .* \.text\.", dump, re.MULTILINE)  # after index and offset
    warps, alone = launched.options["num_warps"], launched.constants.get("SINGLE", True)
    return {
        "kernel": launched.kernel,
        "shape": launched.label,
        "baseline": launched.constants.get("BASELINE"),
        "chip": f"sm_{chip}",
        "warps": warps,
        "registers": int(fields["REG"]),
        "stack_bytes": int(fields["STACK"]) + int(fields["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        "sass_bytes": int(size[0], 16),
        "disorder": None if alone else disorder(compiled.asm["ptx"], warps),
    }


def disorder(ptx: str, num_warps: int) -> str | None:
    """What is wrong with the order in which the last program comes by the other programs' sums; None if nothing is.

    Each stores its sum, waits for its own threads, and arrives by an atomic operation that releases what was stored and
    acquires what others have; then all of its threads wait for the one that arrived, and read past their own cache.

    A program of one warp is one whose threads a barrier of the warp joins as well. It needs none before it arrives if
    the thread that stored is the one that arrives, as the same predicate says.
    """
    steps: list[tuple[str, str]] = []  # what is done, and the predicate under which it is
    for predicate, words in re.findall(r"^\s*(?:@(!?%p\d+)\s+)?([\w.$:]+)", ptx, re.MULTILINE):
        parts = words.split(".")
        if words.startswith("$L__BB"):
            steps.append(("label", ""))
        elif parts[0] in ("bar", "barrier") and "sync" in parts and not predicate:
            if num_warps == 1 or "warp" not in parts:
                steps.append(("barrier", ""))
        elif parts[0] == "atom" and {"global", "gpu", "acq_rel"} <= {*parts}:
            steps.append(("arrive", predicate))
        elif parts[:2] == ["st", "global"]:
            steps.append(("store", predicate))
        elif parts[:2] == ["ld", "global"]:
            steps.append(("load" if "cg" in parts else "cached load", predicate))
    kinds = [kind for kind, _ in steps]
    if kinds.count("arrive") != 1:
        return "does not arrive once, releasing and acquiring"
    arrive = kinds.index("arrive")
    block = max((place for place in range(arrive) if kinds[place] == "label"), default=-1)  # its straight line of code
    store = max((place for place in range(block + 1, arrive) if kinds[place] == "store"), default=None)
    if store is None:
        return "arrives before its sum is stored"
    same_thread = num_warps == 1 and steps[store][1] == steps[arrive][1]
    if "barrier" not in kinds[store:arrive] and not same_thread:
        return "arrives without waiting for its own threads"
    if "load" in kinds[:arrive] or "load" not in kinds[arrive:]:
        return "does not read the sums behind its arrival"
    read = kinds.index("load", arrive)
    if "barrier" not in kinds[arrive:read]:
        return "reads the sums without waiting for the thread that arrived"
    if "cached load" in kinds[arrive:]:
        return "reads through its own cache"
    return "stores after it has arrived" if "store" in kinds[arrive:read] else None


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel, in words."""
    name = f"{row['kernel']} ({row['shape']}, {row['chip']})"
    limit = 1024 * CHIPS[int(row["chip"].removeprefix("sm_"))]
    found = [f"{name} spills: {row['stack_bytes']} bytes of stack"] if row["stack_bytes"] else []
    if row["disorder"]:
        found.append(f"{name} {row['disorder']}")
    if row["shared_bytes"] > limit:
        found.append(f"{name} wants {row['shared_bytes']} bytes of shared memory, the chip has {limit}")
    return found


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    usual, rare = launches()
    work = [(launched, chip) for launched in usual for chip in CHIPS]
    number = len(work)
    work += [(launched, chip) for launched in rare for chip in CORNER_CHIPS]
    kernels = {name for module in MODULES for name in vars(module) if name.startswith("_") and name.endswith("_kernel")}
    missing = kernels - {launched.kernel for launched in usual}
    if missing:
        sys.exit(f"error: not compiled: {', '.join(sorted(missing))}")
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = list(pool.map(measure, *zip(*work, strict=True)))
    wrong = [fault for row in rows for fault in faults(row)]
    shown = sorted(rows[:number], key=lambda row: (row["kernel"], row["baseline"] or "", row["shape"], row["chip"]))
    print(f"{'kernel, for sm_90':38}{'baseline':10}{'shape':24}warps  regs  stack  shared   SASS")
    for row in (row for row in shown if row["chip"] == "sm_90"):
        print(
            f"{row['kernel']:38}{row['baseline'] or '':10}{row['shape']:24}{row['warps']:5}"
            f"{row['registers']:6}{row['stack_bytes']:7}{row['shared_bytes']:8}{row['sass_bytes']:7}"
        )
    result = {"command": "python -m benchmarks.compile_kernels", "triton": triton.__version__}
    write_json(RESULT, result | {"corner_cases": len(rows) - number, "rows": shown})
    verdict = "; ".join(wrong) or "no spill, sums in order, shared memory within limits"
    print(f"{len(rows)} binaries of {len(kernels)} kernels: {verdict}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
