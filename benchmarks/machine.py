"""What the benchmarks need to know about the machine; see `fastsac.machine`."""

from __future__ import annotations

import os
from pathlib import Path

from fastsac.machine import describe_machine, load_average, write_json

__all__ = ["busy_cpu_seconds", "describe_machine", "load_average", "write_json"]


def busy_cpu_seconds() -> float:
    """CPU seconds that all processes of the machine have used since it started; 0 where /proc does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    except OSError:
        return 0.0
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is contained in the first two
    ticks = [int(field) for field in fields]
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")
