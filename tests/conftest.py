"""Settings shared by all tests."""

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Unless it is the GPU's turn, kernels are interpreted on the CPU, and a GPU that is there is not seen: no graph can
    # hold an interpreted kernel. Read when triton is imported, and when CUDA is first asked for.
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    import triton  # noqa: F401  (importing it after an OpenGL context was made crashes)


@pytest.fixture
def quick_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pretended GPU, with few updates in a graph and before it: the interpreter takes its time."""
    from fastsac.learner import graphed
    from tests.pretend_cuda import pretended, trust_engines

    monkeypatch.setattr(graphed, "UPDATES_PER_GRAPH", 2)
    monkeypatch.setattr(graphed, "WARM_UPS", 1)
    trust_engines(monkeypatch)
    with pretended():
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # two threads per process stall on a busy machine
    torch.set_num_threads(1)
