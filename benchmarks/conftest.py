"""What pytest-benchmark writes beside its timings: our own description of the machine, without a host name."""

from __future__ import annotations

from typing import Any

from benchmarks.machine import describe_machine


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(describe_machine())
