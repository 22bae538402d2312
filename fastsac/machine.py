"""Describes this machine for results, without host name or paths, and writes result files. None means unknown."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsac.system import allowed_cores

PACKAGES = ("torch", "numpy", "triton", "gymnasium", "envpool", "fastsac")
NOT_RESULTS = ":(top,exclude)benchmarks/results"  # a benchmark's output is not a change of the code
# The instruction sets that decide how fast a small fp32 or bf16 matrix product is.
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16")


def describe_machine() -> dict[str, Any]:
    """Hardware, operating system, package versions, commit, date and load: all values JSON-serialisable.

    Anything that cannot be read (no /proc, no git, no GPU) is None. Memory is in GiB.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": describe_cpu(),
        "memory_gib": memory_gib(),
        "gpu": describe_gpu(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "versions": package_versions(PACKAGES),
        "git": _describe_git(),
        "load_average": load_average(),
    }


def load_average() -> list[float] | None:
    """1, 5 and 15 minute load averages, or None if the system has none."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write the file completely or not at all, even if the run is stopped half-way."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)  # temporary files are private, results are not
    os.replace(file.name, path)


def portable(path: Path) -> str:
    """Return a relative path as it was given, or only the name of an absolute one, for a published command."""
    return path.as_posix() if not path.is_absolute() and path.name not in ("", "..") else path.resolve().name


def package_versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Return the installed version of each package, or None, without importing it."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    # The imported module knows more than the metadata, for example the build (+cpu, +cu126).
    loaded = {"torch": torch.__version__, "numpy": np.__version__}
    return versions | {name: str(version) for name, version in loaded.items() if name in versions}


def describe_cpu() -> dict[str, Any]:
    """Return the model, the cores, and the relevant instruction sets that are available."""
    fields = _first_fields(Path("/proc/cpuinfo"))
    present = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "family_and_model": [fields[key] for key in ("cpu family", "model") if key in fields],
        "cores": os.cpu_count(),
        "cores_allowed": allowed_cores(),
        "flags": [flag for flag in CPU_FLAGS if flag in present],
    }


def memory_gib() -> float | None:
    """Return the machine's memory in GiB."""
    total = _first_fields(Path("/proc/meminfo")).get("MemTotal")  # macOS and Windows have no such file
    return round(int(total.split()[0]) / 2**20, 1) if total else None


def describe_gpu() -> dict[str, Any] | None:
    """Return the GPU that PyTorch uses, or None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def nvidia_driver() -> str | None:
    """Return the version of NVIDIA's kernel driver."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def _first_fields(path: Path) -> dict[str, str]:
    """`key: value` lines of a /proc file; the first value of a repeated key (one block per core) is kept."""
    fields: dict[str, str] = {}
    try:
        text = path.read_text()
    except OSError:
        return fields
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _describe_git() -> dict[str, Any] | None:
    commit, status = _git("rev-parse", "--verify", "HEAD"), _git("status", "--porcelain", "--", ":/", NOT_RESULTS)
    if status is None:
        return None
    return {"commit": commit, "dirty": bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
