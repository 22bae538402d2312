"""What the benchmarks measured, as compact JSON beside pytest-benchmark's own format, and a limit on their time.

    pytest benchmarks/ --benchmark-only --bench-json FILE [--bench-budget SECONDS]

The file is updated while they run, so an interrupted run loses no measurements. Cases that are not measured are listed
with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine import describe_machine, load_average, write_json
from benchmarks.measure import MEANING, Call, compile_obstacle, copy_bandwidth, flusher
from fastsac.learner import has_bfloat16_products, resolve_device

WRITE_EVERY_S = 5.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastsac")
    group.addoption("--bench-json", type=Path, metavar="FILE", help="write what was measured to this file")
    group.addoption("--bench-budget", type=float, metavar="SECONDS", help="start no further case after this time")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config), "fastsac-recorder")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # ours says more, and no host name
    machine_info.update(describe_machine())


class Recorder:
    """Collects rows and what is missing."""

    def __init__(self, config: pytest.Config) -> None:
        self.path: Path | None = config.getoption("--bench-json")
        self.budget: float | None = config.getoption("--bench-budget")
        self.out_of_time = f"the time budget of {self.budget or 0:.0f} s was used up"
        self.started = self.written = time.monotonic()
        self.not_measured: dict[str, list[str]] = {}
        self.failed: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {"machine": describe_machine(), "meaning": MEANING}
        if self.path is not None and not self.path.parent.is_dir():
            raise pytest.UsageError(f"--bench-json: no such folder: {self.path.parent}")

    def pytest_runtest_setup(self) -> None:
        if self.budget is not None and time.monotonic() - self.started > self.budget:
            pytest.skip(self.out_of_time)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.skipped and isinstance(report.longrepr, tuple):
            self.not_measured.setdefault(report.longrepr[2].removeprefix("Skipped: "), []).append(name)
        elif report.failed:
            self.failed[name] = str(report.longrepr).strip().splitlines()[-1][:500]
        if time.monotonic() - self.written > WRITE_EVERY_S:
            self.write()

    def pytest_sessionfinish(self) -> None:
        self.result["machine"]["load_average_at_end"] = load_average()
        self.write()

    def write(self) -> None:
        if self.path is not None:
            missing = {
                reason: names if reason == self.out_of_time else len(names)
                for reason, names in self.not_measured.items()
            }
            write_json(self.path, self.result | {"rows": self.rows, "not_measured": missing, "failed": self.failed})
        self.written = time.monotonic()


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    found = resolve_device("auto")
    recorder: Recorder = pytestconfig.pluginmanager.get_plugin("fastsac-recorder")
    recorder.result["copy_gb_per_s"] = copy_bandwidth(found)
    return found


@pytest.fixture(scope="session")
def flush(device: torch.device) -> Call:
    return flusher(device)


@pytest.fixture
def record(benchmark: Any, pytestconfig: pytest.Config) -> Callable[[dict[str, Any]], None]:
    """Keep a row, with its rate where it says how many bytes are moved."""
    recorder: Recorder = pytestconfig.pluginmanager.get_plugin("fastsac-recorder")

    def keep(row: dict[str, Any]) -> None:
        times = row.get("device_us", row["wall_us"])
        if not times:  # --benchmark-disable
            return
        if "bytes" in row:
            rate = row["bytes"] / times[1] / 1e3
            share = rate / recorder.result["copy_gb_per_s"]
            row |= {"gb_per_s": float(f"{rate:.4g}"), "copy_share": float(f"{share:.3g}")}
        benchmark.extra_info.update(row)
        recorder.rows.append(row)

    return keep


@pytest.fixture(scope="session")
def require() -> Callable[[str, torch.device], None]:
    """Skip the case if its backend or engine cannot run here."""

    def check(name: str, device: torch.device) -> None:
        if name in ("triton", "graphed") and device.type != "cuda":
            pytest.skip("needs a GPU")
        if "fused" in name and device.type != "cpu":
            pytest.skip("on a GPU benchmarks.engines_gpu times it")
        if "bf16" in name and not has_bfloat16_products():
            pytest.skip("needs a CPU that multiplies bfloat16")
        obstacle = compile_obstacle(device) if name == "compile" else None
        if obstacle:
            pytest.skip(obstacle)

    return check
