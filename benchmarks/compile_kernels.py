"""Compiles every kernel as the launchers would launch it, for three generations of chips, without a GPU.

    python -m benchmarks.compile_kernels

Prints registers, stack, shared memory and code size, writes them to benchmarks/results/kernel_resources.json, and fails
if a kernel spills registers to memory, or wants more shared memory than a block of threads may have.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.machine import write_json
from fastsac_kernels import (
    PhiloxState,
    pathwise_loss_triton,
    replay_gather_triton,
    scale_triton,
    score_function_loss_triton,
    squashed_gaussian_triton,
    td_loss_triton,
)
from fastsac_kernels.launch import row_block

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
#: compute capability and the shared memory, in bytes, that one block may have (CUDA programming guide, table 27)
CHIPS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: batch size, observations, actions: Pendulum, HalfCheetah and Humanoid as the learner has them, and a large problem
SHAPES = ((256, 3, 1), (256, 17, 6), (256, 348, 17), (65536, 348, 32))
#: how the last program comes by the others' sums: it acquires what they released, and reads behind its own cache
ORDERING = ("atom.global.gpu.acq_rel", "ld.global.cg")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    """One call of a launcher: the kernel's name and where it is, a label, its arguments' types, and its options."""

    module: str
    kernel: str
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]
    num_warps: int


def launches() -> list[Launch]:
    """What the launchers launch for the shapes above, recorded from calls with tensors that have no memory."""
    recorded: list[Launch] = []
    label = ""

    def record(kernel: Any, programs: Any, *arguments: Any, num_warps: int, **constants: Any) -> None:
        launch = describe(kernel, label, arguments, constants, num_warps)
        if launch._replace(label="") not in [each._replace(label="") for each in recorded]:
            recorded.append(launch)

    with torch.device("meta"):
        replacements = [patch.object(module, "launch", record) for module in MODULES]
        replacements += [
            patch.object(module, "row_block", lambda rows, lanes, _: row_block(rows, lanes, torch.device("cuda")))
            for module in MODULES
            if hasattr(module, "row_block")
        ]
        for replacement in replacements:
            replacement.start()
        for batch, obs_size, size in SHAPES:
            for samples in (1, 2):
                label = f"B={batch} A={size} K={samples}"
                call_actor_ops(batch, size, samples)
            label = f"B={batch} O={obs_size} A={size}"
            call_critic_ops(batch, obs_size, size)
        for replacement in replacements:
            replacement.stop()
    return recorded


def call_actor_ops(batch: int, size: int, samples: int) -> None:
    mean, log_std = torch.empty(batch, 2 * size).chunk(2, 1)[0], torch.empty(batch, size)  # as the actor returns them
    state, alpha = PhiloxState(device="cpu").state.to("meta"), torch.empty(())
    action, log_prob = squashed_gaussian_triton.forward(mean, log_std, state, 1, samples)
    squashed_gaussian_triton.backward(action, log_prob, mean, log_std, state, 1)
    q = torch.empty(2, samples, batch).transpose(0, 1)
    pathwise_loss_triton.forward(log_prob, q, alpha)
    baselines = ["none", "constant"] if samples == 1 else ["loo"]
    for baseline in baselines:
        score_function_loss_triton.forward(mean, log_std, state, 1, q, alpha, baseline, None)
    if samples == 1:
        score_function_loss_triton.forward(mean, log_std, state, 1, q, alpha, "tensor", torch.empty(batch))


def call_critic_ops(batch: int, obs_size: int, size: int) -> None:
    flag, q = torch.empty(batch, dtype=torch.bool), torch.empty(2, batch)
    td_loss_triton.forward(q, q[0], flag, q, q[0], torch.empty(()), 0.99)
    scale_triton.backward(q.flatten(), torch.empty(()), torch.float32)
    ring = (64, 16)
    parts = torch.empty(*ring, obs_size), torch.empty(*ring, size), torch.empty(ring), torch.empty(ring) > 0.0
    queue, span = torch.empty(ring[0] * ring[1], dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    replay_gather_triton.forward(*parts, queue, span, span, 2, batch)


def describe(kernel: Any, label: str, arguments: Any, constants: dict[str, Any], num_warps: int) -> Launch:
    """What Triton's own launcher would compile for these arguments, which are taken to be aligned."""
    signature, fixed, divisible = {}, dict(constants), []
    for index, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible.append(index)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            fixed[name] = 1
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                divisible.append(index)
    signature |= dict.fromkeys(fixed, "constexpr")
    ordered = {name: signature[name] for name in kernel.arg_names}
    module = kernel.fn.__module__
    return Launch(module, kernel.fn.__name__, label, ordered, fixed, tuple(divisible), num_warps)


def measure(launch: Launch, chip: int) -> dict[str, Any]:
    """Compile for one chip, and read off the binary what it needs."""
    kernel = getattr(sys.modules[launch.module], launch.kernel)
    attributes = {(index,): [["tt.divisibility", 16]] for index in launch.divisible}
    source = ASTSource(kernel, signature=launch.signature, constexprs=launch.constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = dump("-res-usage", file.name)
        sass = dump("-sass", file.name)
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    offsets = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/", sass, re.MULTILINE)
    return {
        "kernel": launch.kernel,
        "shape": launch.label,
        "baseline": launch.constants.get("BASELINE"),
        "chip": f"sm_{chip}",
        "warps": launch.num_warps,
        "registers": int(fields["REG"]),
        "stack_bytes": int(fields["STACK"]) + int(fields["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        "sass_bytes": int(offsets[-1], 16) + 16,
        "ordered": launch.constants.get("SINGLE", True) or all(word in compiled.asm["ptx"] for word in ORDERING),
    }


def dump(option: str, path: str) -> str:
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel, in words."""
    name = f"{row['kernel']} ({row['shape']}, {row['chip']})"
    limit = CHIPS[int(row["chip"].removeprefix("sm_"))]
    found = [f"{name} spills: {row['stack_bytes']} bytes of stack"] if row["stack_bytes"] else []
    if not row["ordered"]:
        found.append(f"{name} adds up other programs' sums without waiting for them")
    if row["shared_bytes"] > limit:
        found.append(f"{name} wants {row['shared_bytes']} bytes of shared memory, the chip has {limit}")
    return found


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    work = [(launch, chip) for launch in launches() for chip in CHIPS]
    kernels = {name for module in MODULES for name in vars(module) if name.startswith("_") and name.endswith("_kernel")}
    missing = kernels - {launch.kernel for launch, _ in work}
    if missing:
        sys.exit(f"error: not compiled: {', '.join(sorted(missing))}")
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = list(pool.map(measure, *zip(*work, strict=True)))
    rows.sort(key=lambda row: (row["kernel"], row["baseline"] or "", row["shape"], row["chip"]))
    print(f"{'kernel':38}{'baseline':10}{'shape':22}{'chip':8}warps  regs  stack  shared   SASS")
    for row in rows:
        print(
            f"{row['kernel']:38}{row['baseline'] or '':10}{row['shape']:22}{row['chip']:8}{row['warps']:5}"
            f"{row['registers']:6}{row['stack_bytes']:7}{row['shared_bytes']:8}{row['sass_bytes']:7}"
        )
    write_json(RESULT, {"command": "python -m benchmarks.compile_kernels", "triton": triton.__version__, "rows": rows})
    wrong = [fault for row in rows for fault in faults(row)]
    print(
        f"{len(rows)} binaries of {len(kernels)} kernels: {'; '.join(wrong) or 'no spill, shared memory within limits'}"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
