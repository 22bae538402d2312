"""Networks in flat buffers: the memory that written-out updates work on.

A stack of E networks is one buffer [n]: layer by layer its weights [E, I, O], then its biases [E, 1, O], each layer
starting at a multiple of 64 bytes (the padding between two layers is zero, and stays zero). The modules' parameters are
views of it. Gradients, Adam's moments and the copies of lower precision have buffers of the same layout, so that one
call handles a whole network: Adam, the target update, the cast to bfloat16.

The first layer is one block [E, 1 + I, O], with the bias as its first row. Its input has a leading column of ones, so
``[1 | x] @ block`` is ``bias + x @ weight``, and ``[1 | x]^T @ d`` is the gradient of both. (Hidden activations have no
such column: their rows would not be aligned.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsac.networks import Actor, StackedMLP

ALIGNMENT = 64  # bytes


class Memory:
    """Allocates tensors of zeros; passes that are never alive at the same time share theirs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._shared: dict[tuple[str, torch.dtype], Tensor] = {}

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of zeros."""
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def shared(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor that shares its memory with all others of this name and type; ask for the largest first."""
        size = math.prod(shape)
        if (name, dtype) not in self._shared or len(self._shared[name, dtype]) < size:
            self._shared[name, dtype] = self.zeros([size], dtype)
        return self._shared[name, dtype][:size].view(*shape)


class Row(Memory):
    """Allocates rows of tensors [L, ...] that L learners share: each asks for the same tensors in the same order.

    So the learners' tensors lie side by side, where one launch can reach them all.
    """

    def __init__(self, device: torch.device, tensors: list[Tensor], row: int, num_rows: int) -> None:
        """Begin with the first tensor.

        Args:
            device: where to make tensors that no learner has asked for yet.
            tensors: those that the learners share.
            row: index of this learner, from 0.
            num_rows: L.
        """
        super().__init__(device)
        self._tensors, self._row, self._num_rows = tensors, row, num_rows
        self._asked = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return this row of the next tensor."""
        if self._asked == len(self._tensors):
            self._tensors.append(super().zeros([self._num_rows, *shape], dtype))
        tensor = self._tensors[self._asked]
        self._asked += 1
        assert (tensor.shape[1:], tensor.dtype) == (tuple(shape), dtype)
        return tensor[self._row]

    def moved(self, tensor: Tensor) -> Tensor:
        """Return a copy in this memory."""
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)


def side_by_side(rows: Sequence[Tensor]) -> Tensor:
    """Return the tensor [L, ...] that has these rows, without copying; a single row may lie anywhere.

    Raises:
        ValueError: if the rows are not adjacent in memory.
    """
    first, size = rows[0], rows[0].numel()
    for number, row in enumerate(rows):
        place = first.untyped_storage().data_ptr(), first.storage_offset() + number * size
        found = row.untyped_storage().data_ptr(), row.storage_offset()
        if row.shape != first.shape or not row.is_contiguous() or found != place:
            raise ValueError("the learners' tensors do not lie side by side")
    return first.as_strided((len(rows), *first.shape), (size, *first.stride()), first.storage_offset())


class Layer(NamedTuple):
    """Views of one layer of a stack."""

    weight: Tensor  # [E, I, O]
    bias: Tensor  # [E, 1, O]
    block: Tensor  # [E, 1 + I, O]: both in one, for the first layer only


class FlatNetwork:
    """A network's parameters, and the factors that matrix products use."""

    def __init__(self, network: Actor | StackedMLP, memory: Memory, rounded_from: int | None = None) -> None:
        """Move the network's parameters into one buffer; they become views of it.

        Args:
            network: the actor, the critics or the value network.
            memory: where the buffers come from.
            rounded_from: from this layer on, but never for the last one, products use copies rounded to bfloat16; None
                rounds nothing.
        """
        stack = network.stack()
        weight = stack[0][0]
        self.shapes = [tuple(weight.shape) for weight, _ in stack]
        self.values = memory.zeros([_starts(self.shapes)[-1]], weight.dtype)
        #: the layers as they are
        self.exact = carve(self.values, self.shapes)
        for layer, (weight, bias) in zip(self.exact, stack, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        network.adopt([(layer.weight, layer.bias) for layer in self.exact])
        self.rounded_from = len(stack) - 1 if rounded_from is None else min(rounded_from, len(stack) - 1)
        #: the layers as products use them
        self.layers, self._values, self._rounded = self.with_rounded(self.values, memory)
        self.refresh()

    def with_rounded(self, buffer: Tensor, memory: Memory) -> tuple[list[Layer], Tensor, Tensor]:
        """Return a buffer's layers, some of them in a bfloat16 buffer, and the matching parts of both buffers."""
        layers, starts = carve(buffer, self.shapes), _starts(self.shapes)
        part = slice(starts[self.rounded_from], starts[-2])
        rounded = memory.zeros(buffer.shape if part.start < part.stop else [0], torch.bfloat16)
        if len(rounded):
            layers[self.rounded_from : -1] = carve(rounded, self.shapes)[self.rounded_from : -1]
        return layers, buffer[part], rounded[part]

    def refresh(self) -> None:
        """Round the values again; call this whenever they have changed."""
        if len(self._rounded):
            self._rounded.copy_(self._values)


class FlatGradients:
    """A network's gradients: views that products write into, in the dtypes of their factors."""

    def __init__(self, network: FlatNetwork, grads: Tensor, memory: Memory) -> None:
        """Lay views over `grads` [n]."""
        self.layers, self._grads, self._rounded = network.with_rounded(grads, memory)

    def widen(self) -> None:
        """Copy what was computed in bfloat16 to the buffer that Adam reads."""
        if len(self._rounded):
            self._grads.copy_(self._rounded)


class FlatMoments:
    """Adam's state over one buffer."""

    def __init__(self, values: Tensor, parameters: Sequence[nn.Parameter], memory: Memory) -> None:
        """Start with moments of zero.

        Args:
            values: [n], of which the parameters are views.
            parameters: in the order in which other engines' optimisers number them.
            memory: where the buffers come from.
        """
        self.values = values
        self.exp_avg, self.exp_avg_sq = (memory.zeros(values.shape, values.dtype) for _ in range(2))
        self.step = torch.zeros((), device=values.device)
        self._parameters = list(parameters)

    def of_parameters(self, buffer: Tensor) -> list[Tensor]:
        """Return views of a buffer of this layout in the parameters' shapes."""
        shift = buffer.storage_offset() - self.values.storage_offset()
        return [buffer.as_strided(p.shape, p.stride(), p.storage_offset() + shift) for p in self._parameters]

    def moments(self) -> dict[int, dict[str, Tensor]]:
        """Return the state that `torch.optim.Adam` would have; its tensors are views."""
        if not self.step.item():
            return {}
        moments = zip(self.of_parameters(self.exp_avg), self.of_parameters(self.exp_avg_sq), strict=True)
        return {
            index: {"step": self.step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            for index, (exp_avg, exp_avg_sq) in enumerate(moments)
        }

    def load_moments(self, moments: dict[int, dict[str, Tensor]]) -> None:
        """Load copies of what `moments` returned; where there is nothing, start from zero."""
        # copies, since they may belong to this learner
        moments = {index: {key: value.clone() for key, value in own.items()} for index, own in moments.items()}
        self.step.zero_()
        for name, buffer in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            buffer.zero_()
            for index, view in enumerate(self.of_parameters(buffer)):
                if index in moments:
                    view.copy_(moments[index][name])
                    self.step.copy_(moments[index]["step"])


class FlatAdam(FlatMoments):
    """Adam (Kingma and Ba, arXiv 1412.6980) over one buffer, as `torch.optim.Adam` and `AdamW` compute it."""

    def __init__(
        self,
        values: Tensor,
        parameters: Sequence[nn.Parameter],
        lr: float,
        memory: Memory,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        grads: Tensor | None = None,
    ) -> None:
        """Start with moments of zero.

        Args:
            values: [n], of which the parameters are views.
            parameters: in the order in which other engines' optimisers number them.
            lr: the learning rate, which may be changed later.
            memory: where the buffers come from.
            betas: decay rates of the moments.
            weight_decay: AdamW's, multiplied by the learning rate in each step (arXiv 1711.05101).
            max_grad_norm: gradients of a larger norm are scaled down to it first.
            grads: [n] of zeros, for the gradients; by default a new buffer.
        """
        super().__init__(values, parameters, memory)
        self.lr = lr
        self._betas, self._weight_decay, self._max_grad_norm = betas, weight_decay, max_grad_norm
        self.grads = memory.zeros(values.shape, values.dtype) if grads is None else grads

    def descend(self) -> None:
        """Take one step along the gradients."""
        self.step += 1.0
        if self._max_grad_norm is not None:  # as `torch.nn.utils.clip_grad_norm_` does
            self.grads *= (self._max_grad_norm / (self.grads.norm() + 1e-6)).clamp(max=1.0)
        beta1, beta2 = self._betas
        step = torch._fused_adamw_ if self._weight_decay else torch._fused_adam_
        step(
            [self.values],
            [self.grads],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.step],
            lr=self.lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=self._weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


def carve(buffer: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Layer]:
    """Return the layers' views of a buffer, for weights of these shapes [E, I, O]."""
    layers = []
    for index, (start, (networks, fan_in, fan_out)) in enumerate(zip(_starts(shapes), shapes, strict=False)):
        size, size_of_weight = networks * (1 + fan_in) * fan_out, networks * fan_in * fan_out
        block = buffer[start : start + size].view(networks, 1 + fan_in, fan_out)
        if index == 0:
            weight, bias = block[:, 1:], block[:, :1]
        else:  # bfloat16 products are only fast for weights without gaps
            weight = buffer[start : start + size_of_weight].view(networks, fan_in, fan_out)
            bias = buffer[start + size_of_weight : start + size].view(networks, 1, fan_out)
        layers.append(Layer(weight, bias, block))
    return layers


def _starts(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Return where each layer starts, and the length of the buffer."""
    numbers = ALIGNMENT // 2  # of the narrowest type
    sizes = (networks * (1 + fan_in) * fan_out for networks, fan_in, fan_out in shapes)
    return list(accumulate((-(-size // numbers) * numbers for size in sizes), initial=0))
