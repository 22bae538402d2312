"""Compiles every kernel as the launchers would launch it, for the chips that people have, without a GPU.

    python -m benchmarks.compile_kernels

With `--if-changed` nothing is done if the kernels, the launches and Triton are those of the result that is there: the
same sources and compiler give the same binaries on any machine. `make test` does that.

Registers, stack, shared memory and code size are written to benchmarks/results/kernel_resources.json, and those for
sm_90 printed. Fails if a kernel spills registers to memory, if it wants more shared memory than a block of threads may
have, or if the program that sums up reads the other programs' sums too early.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton

from benchmarks.kernel_launches import MODULES, Launch, launches, whole_launches
from benchmarks.machine import write_json

RESULT = Path(__file__).parent / "results" / "kernel_resources.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
#: compute capability and the shared memory, in KiB, that one block may have (CUDA programming guide, table of technical
#: specifications per compute capability): A100; RTX 30; RTX 40; H100; B200; RTX 50
CHIPS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
#: of those, on which corner cases are compiled too: the oldest, and the newest of the small ones
CORNER_CHIPS = (80, 120)


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
        "shape": variant(launched.constants) + launched.label,
        "baseline": launched.constants.get("BASELINE"),
        "chip": f"sm_{chip}",
        "warps": warps,
        "registers": int(fields["REG"]),
        "stack_bytes": int(fields["STACK"]) + int(fields["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        "sass_bytes": int(size[0], 16),
        "disorder": None if alone else disorder(compiled.asm["ptx"], warps),
    }


def variant(constants: dict[str, Any]) -> str:
    """What settings change in a kernel, in words; before the sizes, so that `paper_model.py` leaves it out."""
    steps = constants.get("N_STEP", 1)
    words = [(f"n={steps} ", steps > 1), ("discounts ", constants.get("GAMMA_IS_TENSOR", False))]
    return "".join(word for word, holds in [*words, ("smallest ", constants.get("SMALLEST", False))] if holds)


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


def source_hash() -> str:
    """Return a hash of all that the binaries follow from."""
    folder = Path(__file__).parent
    names = [*Path(MODULES[0].__file__ or "").parent.glob("*.py"), folder / "kernel_launches.py", Path(__file__)]
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(names):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compiled_of(sources: str, wrong: list[str]) -> dict[str, str]:
    """Return what the result says of its sources: nothing if a kernel is wrong, so that it is compiled again."""
    return {} if wrong else {"sources": sources}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--if-changed", action="store_true", help="do nothing if the result is of the same sources")
    sources = source_hash()
    if parser.parse_args().if_changed and RESULT.exists() and json.loads(RESULT.read_text()).get("sources") == sources:
        print(f"kernels compiled before: {RESULT.name} is of the same sources and the same Triton")
        return
    usual, rare = (ops + whole for ops, whole in zip(launches(), whole_launches(), strict=True))
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
    print(f"{'kernel, for sm_90':38}{'baseline':10}{'shape':34}warps  regs  stack  shared   SASS")
    for row in (row for row in shown if row["chip"] == "sm_90"):
        print(
            f"{row['kernel']:38}{row['baseline'] or '':10}{row['shape']:34}{row['warps']:5}"
            f"{row['registers']:6}{row['stack_bytes']:7}{row['shared_bytes']:8}{row['sass_bytes']:7}"
        )
    result = {"command": "python -m benchmarks.compile_kernels", "triton": triton.__version__}
    write_json(RESULT, result | compiled_of(sources, wrong) | {"corner_cases": len(rows) - number, "rows": shown})
    verdict = "; ".join(wrong) or "no spill, sums in order, shared memory within limits"
    print(f"{len(rows)} binaries of {len(kernels)} kernels: {verdict}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
