"""Transfers between host and GPU: several arrays to the GPU in one copy without waiting; back, with one wait.

A copy from pageable memory makes the host wait for the device. These copies go through pinned memory from PyTorch's
allocator, which does not reuse a block before all copies from it have finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HostArray = NDArray[Any] | Tensor
#: each array in the shared buffer starts at a multiple of this, in bytes
ALIGNMENT = 16


def to_device(arrays: Sequence[HostArray], device: torch.device) -> list[Tensor]:
    """Return host arrays as tensors on the device; on a GPU in one copy, without waiting.

    On a CPU the tensors share the arrays' memory.
    """
    if device.type == "cpu":
        return [array if isinstance(array, Tensor) else torch.from_numpy(array) for array in arrays]
    if any(isinstance(array, Tensor) and array.device.type != "cpu" for array in arrays):
        raise TypeError("arrays must be on the host, but a tensor is already on the device")
    numbers = [np.asarray(array) for array in arrays]
    starts, size = [], 0
    for array in numbers:
        starts.append(size)
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    memory = host.numpy()
    for start, array in zip(starts, numbers, strict=True):
        np.copyto(memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape), array)
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    buffer.copy_(host, non_blocking=True)
    return [
        buffer[start : start + array.nbytes].view(torch_dtype(array)).view(array.shape)
        for start, array in zip(starts, numbers, strict=True)
    ]


def torch_dtype(array: NDArray[Any]) -> torch.dtype:
    """Return the PyTorch dtype of the array."""
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


def to_host(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor as an array; on a GPU this waits until the device has computed it."""
    if tensor.device.type == "cpu":
        return tensor.numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host.numpy()
