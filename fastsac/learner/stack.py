"""Forward and backward passes through a flat stack of E networks, written out.

For input x [B, 1 + I] with a leading column of ones, hidden layers l = 0 ... L - 1 with activation f, and upstream
gradient dy [E, B, O]::

    forward                                 backward
    z_0 = x @ block_0                       dW_L = h_{L-1}^T dy           db_L = sum_B dy
    h_0 = f(z_0)                            d_{L-1} = (dy W_L^T) * f'(z_{L-1})
    z_l = h_{l-1} W_l + b_l                 dW_l = h_{l-1}^T d_l          db_l = sum_B d_l
    h_l = f(z_l)                            d_{l-1} = (d_l W_l^T) * f'(z_{l-1})
    y   = h_{L-1} W_L + b_L                 dblock_0 = x^T d_0            dx = d_0 W_0^T

With factors of bfloat16 in some layers, the results of those layers' products are bfloat16 too, with float32 sums
inside each product, and so are the activations on either side of them. The last layer's factors are never rounded,
nor are y, dy, dW_L and db_L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsac.learner.flat import FlatGradients, Layer, Memory

Call = Callable[[], Any]
_aten = torch.ops.aten


class Activation(NamedTuple):
    """An elementwise function and its derivative, as calls that are bound to their tensors."""

    function: Callable[[Tensor, Tensor], Call]  # z, h: h = f(z); h is z itself unless `keeps_input`
    times_derivative: Callable[[Tensor, Tensor], Call]  # d, kept: d *= f'
    keeps_input: bool = False  # whether `kept` is z, or h


class StackPass:
    """A pass of one input through a stack. All its tensors are allocated, and all calls bound to them, once."""

    def __init__(
        self,
        layers: Sequence[Layer],
        activation: Activation,
        x: Tensor,
        memory: Memory,
        name: str,
        grads: FlatGradients | None = None,
        first_row: int = 0,
    ) -> None:
        """Bind the calls.

        Args:
            layers: of the stack, as products use them.
            activation: of every hidden layer.
            x: [B, 1 + I], of the first layer's type, with a first column of ones.
            memory: where the buffers come from.
            name: passes of the same name overwrite each other's results.
            grads: where `backward` writes the parameters' gradients; None skips them.
            first_row: `backward` takes the rows from this one on, B - first_row, which it divides.
        """
        self._layers, self._memory, self._name = layers, memory, name
        self._networks = len(layers[0].weight)
        self._forward: list[Call] = []
        self._backward: list[Call] = []
        inputs, kept = self._bind_forward(activation, x)
        if first_row:
            inputs, kept = ([_rows_from(first_row, t) for t in tensors] for tensors in (inputs, kept))
        #: dy [E, B - first_row, O]; write it before calling `backward`
        self.grad_output = self._buffer("gradient dy", len(x) - first_row, layers[-1].weight)
        self._bind_backward(activation, inputs, kept, grads)

    def forward(self) -> Tensor:
        """Return y [E, B, O]."""
        for call in self._forward:
            call()
        return self._output

    def backward(self) -> Tensor:
        """Return d_0 [E, B - first_row, H_0] for `grad_output`, and write the parameters' gradients to `grads`."""
        for call in self._backward:
            call()
        return self._grad_first

    def _bind_forward(self, activation: Activation, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return each layer's input, and what each activation's derivative is taken from."""
        do, layers = self._forward.append, self._layers
        inputs, kept = [x.expand(self._networks, -1, -1)], list[Tensor]()
        for index, (layer, following) in enumerate(pairwise(layers)):
            z = self._buffer(f"{self._name} z{index}", len(x), layer.weight)
            if index:
                do(partial(torch.baddbmm, layer.bias, inputs[-1], layer.weight, out=z))
            else:
                do(partial(torch.bmm, inputs[-1], layer.block, out=z))
            z = self._converted(z, _narrower(layer.weight, following.weight), f"{self._name} z{index}", do)
            h = self._buffer(f"{self._name} h{index}", len(x), layer.weight, z.dtype) if activation.keeps_input else z
            do(activation.function(z, h))
            kept.append(z)  # which is h, unless the input is kept
            inputs.append(self._converted(h, following.weight.dtype, f"{self._name} h{index}", do))
        last = layers[-1]
        self._output = self._buffer(f"{self._name} y", len(x), last.weight)
        if last.weight.shape[2] > 1:
            do(partial(torch.baddbmm, last.bias, inputs[-1], last.weight, out=self._output))
        else:  # one column: a matrix-vector product for each network
            for h, column, y in zip(inputs[-1], last.weight.squeeze(2), self._output.squeeze(2), strict=True):
                do(partial(torch.mv, h, column, out=y))
            do(partial(torch.add, self._output, last.bias, out=self._output))
        return inputs, kept

    def _bind_backward(
        self, activation: Activation, inputs: list[Tensor], kept: list[Tensor], grads: FlatGradients | None
    ) -> None:
        do, layers, rows = self._backward.append, self._layers, self.grad_output.shape[1]
        last, dy = layers[-1], self.grad_output
        d = self._buffer(
            "gradient h", rows, layers[-2].weight, dy.dtype if last.weight.shape[2] > 1 else kept[-1].dtype
        )
        if grads is not None:
            do(partial(torch.bmm, dy.mT, inputs[-1], out=grads.layers[-1].weight.mT))
            do(partial(torch.sum, dy, 1, keepdim=True, out=grads.layers[-1].bias))
        if last.weight.shape[2] > 1:
            do(partial(torch.bmm, dy, last.weight.mT, out=d))
        else:  # one column: rounded in the same pass, where the activation is
            do(partial(torch.mul, dy, last.weight.mT, out=d))
        for index in reversed(range(len(kept))):
            layer = layers[index]
            d = self._converted(d, kept[index].dtype, f"gradient h{index}", do)
            do(activation.times_derivative(d, kept[index]))
            d = self._converted(d, layer.weight.dtype, f"gradient z{index}", do)
            if grads is not None and index:
                do(partial(torch.bmm, inputs[index].mT, d, out=grads.layers[index].weight))
                do(partial(torch.sum, d, 1, keepdim=True, out=grads.layers[index].bias))
            elif grads is not None:
                do(partial(torch.bmm, inputs[0].mT, d, out=grads.layers[0].block))
            if index:
                following = self._buffer(f"gradient h{index - 1}", rows, layers[index - 1].weight, d.dtype)
                do(partial(torch.bmm, d, layer.weight.mT, out=following))
                d = following
        if grads is not None:
            do(grads.widen)
        self._grad_first = d

    def _buffer(self, name: str, rows: int, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._memory.shared(name, (self._networks, rows, weight.shape[2]), dtype or weight.dtype)

    def _converted(self, tensor: Tensor, dtype: torch.dtype, name: str, do: Callable[[Call], None]) -> Tensor:
        """Return the tensor itself, or one of the other dtype to which it is copied first."""
        if tensor.dtype == dtype:
            return tensor
        other = self._memory.shared(name, tensor.shape, dtype)
        do(partial(torch.Tensor.copy_, other, tensor))
        return other


def _rows_from(first_row: int, tensor: Tensor) -> Tensor:
    """Return rows of a stack of one, without the stride that a slice would have: products of bfloat16 mind it."""
    return tensor.as_strided(
        (1, tensor.shape[1] - first_row, tensor.shape[2]),
        ((tensor.shape[1] - first_row) * tensor.stride(1), *tensor.stride()[1:]),
        tensor.storage_offset() + first_row * tensor.stride(1),
    )


def _narrower(*tensors: Tensor) -> torch.dtype:
    return min((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)


def _bits(tensor: Tensor) -> Tensor:
    """Return a bfloat16 tensor as integers: comparing those with zero and copying them is three times as fast."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _relu(z: Tensor, h: Tensor) -> Call:
    # As integers, -inf is -128 and other numbers below zero are less; numbers above zero and all NaN are more
    return partial(torch.threshold_, _bits(z), -128, 0) if z.dtype == torch.bfloat16 else partial(torch.relu_, z)


def _times_relu_derivative(d: Tensor, h: Tensor) -> Call:
    return partial(_aten.threshold_backward.grad_input, _bits(d), _bits(h), 0, grad_input=_bits(d))


#: derivatives are the ones that autograd uses
ACTIVATIONS = {
    "relu": Activation(_relu, _times_relu_derivative),
    "elu": Activation(
        lambda z, h: partial(_aten.elu.out, z, out=h),
        lambda d, h: partial(_aten.elu_backward.grad_input, d, 1.0, 1.0, 1.0, True, h, grad_input=d),
    ),
    "silu": Activation(
        lambda z, h: partial(_aten.silu.out, z, out=h),
        lambda d, z: partial(_aten.silu_backward.grad_input, d, z, grad_input=d),
        keeps_input=True,
    ),
    "tanh": Activation(
        lambda z, h: partial(torch.tanh, z, out=h),
        lambda d, h: partial(_aten.tanh_backward.grad_input, d, h, grad_input=d),
    ),
}
