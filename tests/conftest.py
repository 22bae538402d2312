"""Settings shared by all tests."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Kernels are interpreted on the CPU, unless it is the GPU's turn; triton reads this when it is imported.
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401  (importing it after an OpenGL context was made crashes)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # two threads per process stall on a busy machine
    torch.set_num_threads(1)
