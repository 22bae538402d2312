"""Settings shared by all tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # two threads per process stall on a busy machine
    torch.set_num_threads(1)
