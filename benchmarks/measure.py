"""How the benchmarks measure: wall-clock time, time on the device, cold caches, copy bandwidth, launches.

On CUDA the wall-clock time ends with a synchronisation, so it includes the host's share: Python, dispatch, launches.
The device time is measured with CUDA graphs, which have the same kernels without the host's share.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsac.learner.graphed import recording

Call = Callable[[], Any]
MEANING = {
    "wall_us": "p20, p50, p80 of a call in microseconds, back to back; on CUDA synchronised within the timed call",
    "device_us": "the same of the kernels alone: CUDA events around a CUDA graph of calls, divided by their number",
    "cold_us": "a single call behind a write over the caches; on a CPU wall-clock, on CUDA on the device",
    "bytes": "what the Triton kernels read and write, each tensor once (they draw their noise, which moves nothing)",
    "gb_per_s": "bytes over the median of device_us, or else of wall_us",
    "copy_share": "gb_per_s over copy_gb_per_s, what a large tensor's copy reaches (bytes read and written)",
    "launches": "what torch.profiler saw on the device: kernels, copies and fills",
}
GRAPH_CALLS = 20
MIB = 2**20


def quantiles(seconds: Sequence[float]) -> list[float]:
    """Return p20, p50 and p80 in microseconds, to four digits."""
    return [float(f"{value:.4g}") for value in np.quantile(np.array(seconds) * 1e6, (0.2, 0.5, 0.8))]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds_for(call: Call, device: torch.device, seconds: float, least: int = 5, most: int = 200) -> int:
    """Return how many calls fit into the time, after one that warms up."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return int(min(most, max(least, seconds / (time.perf_counter() - start))))


def flusher(device: torch.device) -> Call:
    """Return a call that writes a buffer larger than the device's caches."""
    buffer = torch.zeros((256 if device.type == "cuda" else 64) * MIB // 4, device=device)
    return lambda: buffer.add_(1.0)


def cold_wall_samples(call: Call, flush: Call, rounds: int) -> list[float]:
    """Return seconds of calls on a CPU whose caches hold something else."""
    samples = []
    for _ in range(rounds):
        flush()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def capture(call: Call, calls: int = 1, warm_ups: int = 3) -> Call:
    """Record calls as a CUDA graph and return what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with recording(graph, stream):
        for _ in range(calls):
            call()
    replay: Call = graph.replay
    return replay


def event_samples(replay: Call, calls: int, rounds: int, before: Call | None = None) -> list[float]:
    """Return seconds per call between CUDA events around each replay, all enqueued before the host waits."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    replay()
    for start, end in events:
        if before is not None:
            before()
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 / calls for start, end in events]


def measure(benchmark: Any, call: Call, device: torch.device, flush: Call, seconds: float = 0.3) -> dict[str, Any]:
    """Time the call for about `seconds`, through pytest-benchmark and beside it; return the row's times."""

    def synchronized() -> None:
        call()
        synchronize(device)

    synchronized()  # compiles
    times = {"wall_us": wall_quantiles(benchmark, synchronized, device, seconds)}
    if device.type == "cuda":
        replay = capture(call, GRAPH_CALLS)
        rounds = rounds_for(replay, device, seconds / 2, least=10, most=50)
        times["device_us"] = quantiles(event_samples(replay, GRAPH_CALLS, rounds))
        times["cold_us"] = quantiles(event_samples(capture(call), 1, rounds, flush))
    else:
        rounds = rounds_for(call, device, seconds / 2, least=3, most=30)
        times["cold_us"] = quantiles(cold_wall_samples(call, flush, rounds))
    return times


def wall_quantiles(
    benchmark: Any, synchronized: Call, device: torch.device, seconds: float, calls: int = 1
) -> list[float]:
    """Time a call, which makes `calls` of what is of interest, through pytest-benchmark."""
    benchmark.pedantic(synchronized, rounds=rounds_for(synchronized, device, seconds))
    if benchmark.stats is None:  # --benchmark-disable
        return []
    return quantiles([sample / calls for sample in benchmark.stats.stats.data])


def copy_bandwidth(device: torch.device) -> float:
    """Return the GB/s, read and written, of copying a tensor that no cache holds."""
    source = torch.ones((256 if device.type == "cuda" else 64) * MIB // 4, device=device)
    target = torch.zeros_like(source)
    samples = []
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        samples.append(time.perf_counter() - start)
    if device.type == "cuda":
        samples = event_samples(lambda: target.copy_(source), 1, 20)
    return float(f"{2 * source.nbytes / np.median(samples) / 1e9:.4g}")


def launched(call: Call) -> list[str]:
    """Return the names of the kernels, copies and fills that the call starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    work = [event.name for event in on_device if not getattr(event, "is_user_annotation", False)]
    return [name for name in work if "Sync" not in name and not name.startswith("Activity Buffer")]


def compile_obstacle(device: torch.device) -> str | None:
    """Return why torch.compile cannot run here, None if it can."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, but there is no {compiler}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "torch.compile needs Python's header files (Debian and Ubuntu: apt install python3-dev)"
    return None
