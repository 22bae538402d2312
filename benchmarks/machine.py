"""What a benchmark ran on, for its JSON file (never a host name, never a path), and how that file is written."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastsac.machine import describe_cpu, describe_gpu, memory_gib, package_versions

PACKAGES = ("torch", "numpy", "triton", "gymnasium", "envpool", "fastsac")
NOT_RESULTS = ":(top,exclude)benchmarks/results"  # what a benchmark writes is no change of the code


def describe_machine() -> dict[str, Any]:
    """Hardware, operating system, package versions, commit, date and load: all values JSON-serialisable.

    What cannot be read (no /proc, no git, no GPU) is None rather than an error. Memory is in GiB.
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
    """1, 5 and 15 minute load averages, or None where the system has none."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def busy_cpu_seconds() -> float:
    """CPU seconds that all processes of the machine have used since it started; 0 where /proc does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    except OSError:
        return 0.0
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is contained in the first two
    ticks = [int(field) for field in fields]
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write the whole file or none of it, also when the run is stopped half-way."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)  # temporary files are private, results are not
    os.replace(file.name, path)


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
