"""The actor, the stacked critics and the value network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_STD_MIN = -5.0
LOG_STD_MAX = 2.0
LOG_STD_HALF_RANGE = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)

#: a layer of a stack of E networks: weight [E, I, O] and bias [E, 1, O]
StackLayer = tuple[Tensor, Tensor]

#: in place where autograd allows it: its derivative is taken from the output
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "elu": F.elu_,
    "silu": F.silu,
    "tanh": torch.tanh_,
}


class StackedMLP(nn.Module):
    """E independent networks of equal shape, each layer one batched product."""

    def __init__(self, num_networks: int, sizes: Sequence[int], activation: str) -> None:
        """Initialise like `torch.nn.Linear`: uniform within 1 / sqrt(fan-in), weights and biases."""
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            bound = 1.0 / math.sqrt(fan_in)
            self.weights.append(nn.Parameter(torch.empty(num_networks, fan_in, fan_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(num_networks, 1, fan_out).uniform_(-bound, bound)))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Map x [B, I] to [E, B, last size]. `frozen` lets gradients through to x, but not to the weights."""
        x = x.expand(self.weights[0].shape[0], *x.shape)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            x = torch.baddbmm(bias, x, weight)
            if layer < last:
                x = self.activation(x)
        return x

    def stack(self) -> list[StackLayer]:
        """Return the parameters' values, layer by layer."""
        return [(w.detach(), b.detach()) for w, b in zip(self.weights, self.biases, strict=True)]

    def adopt(self, stack: Sequence[StackLayer]) -> None:
        """Make these tensors the parameters' memory."""
        for weight, bias, layer in zip(self.weights, self.biases, stack, strict=True):
            weight.data, bias.data = layer


class Actor(nn.Module):
    """The policy's network: obs [B, O] -> mean and log_std of a Gaussian before squashing, each [B, A]."""

    def __init__(self, obs_size: int, action_size: int, hidden_sizes: Sequence[int], activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        sizes = [obs_size, *hidden_sizes, 2 * action_size]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log_std; the latter within [-5, 2] by tanh, since a clamp has no gradient outside."""
        x = obs
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        mean, raw = self.layers[-1](x).chunk(2, dim=-1)
        return mean, LOG_STD_MIN + LOG_STD_HALF_RANGE * (1.0 + torch.tanh(raw))

    def stack(self) -> list[StackLayer]:
        """Return the parameters' values as a stack of one network; the last layer makes mean and raw log_std."""
        stack = []
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            stack.append((layer.weight.detach().T[None], layer.bias.detach()[None, None]))
        return stack

    def adopt(self, stack: Sequence[StackLayer]) -> None:
        """Make these tensors the parameters' memory."""
        for layer, (weight, bias) in zip(self.layers, stack, strict=True):
            layer.weight.data, layer.bias.data = weight[0].T, bias[0, 0]


class Critic(StackedMLP):
    """E critics (twins by default): obs and action -> q."""

    def __init__(
        self, num_critics: int, obs_size: int, action_size: int, hidden_sizes: Sequence[int], activation: str
    ) -> None:
        super().__init__(num_critics, [obs_size + action_size, *hidden_sizes, 1], activation)

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:  # type: ignore[override]
        """Return q [E, B] for obs [B, O] and action [B, A]; `frozen` keeps the weights out of autograd."""
        return super().forward(torch.cat([obs, action], dim=-1), frozen).squeeze(-1)

    def of_samples(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return q [K, E, B] for obs [B, O] and K actions per state [K, B, A], with the weights frozen."""
        num_samples, batch, _ = action.shape
        q: Tensor = self(obs.repeat(num_samples, 1), action.flatten(0, 1), frozen=True)
        return q.view(-1, num_samples, batch).transpose(0, 1)


class ValueNetwork(StackedMLP):
    """The soft value V(s), for the score function's learned baseline."""

    def __init__(self, obs_size: int, hidden_sizes: Sequence[int], activation: str) -> None:
        super().__init__(1, [obs_size, *hidden_sizes, 1], activation)

    def forward(self, obs: Tensor, frozen: bool = False) -> Tensor:
        """Return V [B] for obs [B, O]; `frozen` keeps the weights out of autograd."""
        return super().forward(obs, frozen).view(-1)
