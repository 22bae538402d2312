"""The actor, the stacked critics and the value network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsac.config import Config

LOG_STD_MIN = -5.0
LOG_STD_MAX = 2.0
LOG_STD_HALF_RANGE = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)

#: a layer of a stack of E networks: weight [E, I, O] and bias [E, 1, O]
StackLayer = tuple[Tensor, Tensor]

#: in place if autograd allows it, because the derivative is computed from the output
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "elu": F.elu_,
    "silu": F.silu,
    "tanh": torch.tanh_,
}


class StackedLayerNorm(nn.Module):
    """Layer normalisation (arXiv 1607.06450) of E networks' activations [E, B, H], each with a scale and a shift."""

    def __init__(self, num_networks: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_networks, 1, size))
        self.bias = nn.Parameter(torch.zeros(num_networks, 1, size))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Return the normalised x [E, B, H]; `frozen` keeps scale and shift out of autograd."""
        weight, bias = (self.weight.detach(), self.bias.detach()) if frozen else (self.weight, self.bias)
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)


class StackedMLP(nn.Module):
    """E independent networks of equal shape; each layer is one batched matrix product."""

    def __init__(self, num_networks: int, sizes: Sequence[int], activation: str, layer_norm: bool = False) -> None:
        """Initialise like `torch.nn.Linear`: uniform within 1 / sqrt(fan-in), weights and biases."""
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            bound = 1.0 / math.sqrt(fan_in)
            self.weights.append(nn.Parameter(torch.empty(num_networks, fan_in, fan_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(num_networks, 1, fan_out).uniform_(-bound, bound)))
        self.norms = nn.ModuleList(StackedLayerNorm(num_networks, size) for size in sizes[1:-1]) if layer_norm else None

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Map x [B, I] to [E, B, last size]. `frozen` passes gradients to x, but not to the weights."""
        x = x.expand(self.weights[0].shape[0], *x.shape)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            x = torch.baddbmm(bias, x, weight)
            if layer < last:
                x = self.activation(x if self.norms is None else self.norms[layer](x, frozen))
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

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        activation: str,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        sizes = [obs_size, *hidden_sizes, 2 * action_size]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in hidden_sizes) if layer_norm else None

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log_std; tanh keeps log_std in [-5, 2], since a clamp has no gradient outside."""
        x = obs
        for index, layer in enumerate(self.layers[:-1]):
            x = layer(x)
            x = self.activation(x if self.norms is None else self.norms[index](x))
        mean, raw = self.layers[-1](x).chunk(2, dim=-1)
        return mean, LOG_STD_MIN + LOG_STD_HALF_RANGE * (1.0 + torch.tanh(raw))

    def stack(self) -> list[StackLayer]:
        """Return the parameters' values as a stack of one network; the last layer outputs mean and raw log_std."""
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
        self,
        num_critics: int,
        obs_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        activation: str,
        layer_norm: bool = False,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_critics, [obs_size + action_size, *hidden_sizes, num_outputs], activation, layer_norm)

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:  # type: ignore[override]
        """Return q [E, B] for obs [B, O] and action [B, A]; `frozen` keeps the weights out of autograd."""
        return super().forward(torch.cat([obs, action], dim=-1), frozen).squeeze(-1)


class CategoricalCritic(Critic):
    """E critics that each predict a distribution of the return over M fixed values, the atoms (arXiv 1707.06887)."""

    def __init__(
        self,
        num_critics: int,
        obs_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        activation: str,
        layer_norm: bool,
        v_min: float,
        v_max: float,
        num_atoms: int,
    ) -> None:
        """Create the critics; `v_min` and `v_max` are the lowest and highest atom, `num_atoms` is M."""
        super().__init__(num_critics, obs_size, action_size, hidden_sizes, activation, layer_norm, num_atoms)
        self.v_min, self.v_max = v_min, v_max
        self.register_buffer("atoms", torch.linspace(v_min, v_max, num_atoms), persistent=False)
        self.atoms: Tensor

    def logits(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """Return the distributions before the softmax, [E, B, M]."""
        return super().forward(obs, action, frozen)

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:  # type: ignore[override]
        """Return the distributions' means q [E, B] for obs [B, O] and action [B, A]."""
        return torch.softmax(self.logits(obs, action, frozen), -1) @ self.atoms


def q_of_samples(critic: nn.Module, obs: Tensor, action: Tensor) -> Tensor:
    """Return a critic's q [K, E, B] for obs [B, O] and K actions per state [K, B, A], with the weights frozen."""
    num_samples, batch, _ = action.shape
    q: Tensor = critic(obs.repeat(num_samples, 1), action.flatten(0, 1), frozen=True)
    return q.view(-1, num_samples, batch).transpose(0, 1)


class ValueNetwork(StackedMLP):
    """The soft value V(s), for the score function's learned baseline."""

    def __init__(self, obs_size: int, hidden_sizes: Sequence[int], activation: str) -> None:
        super().__init__(1, [obs_size, *hidden_sizes, 1], activation)

    def forward(self, obs: Tensor, frozen: bool = False) -> Tensor:
        """Return V [B] for obs [B, O]; `frozen` keeps the weights out of autograd."""
        return super().forward(obs, frozen).view(-1)


def make_actor(config: Config, obs_size: int, action_size: int) -> Actor:
    """Return the actor that the configuration describes, with random weights."""
    return Actor(obs_size, action_size, config.hidden_sizes, config.activation, config.layer_norm)


def make_critic(config: Config, obs_size: int, action_size: int) -> Critic:
    """Return the critics that the configuration describes, with random weights."""
    shape = config.num_critics, obs_size, action_size, config.hidden_sizes, config.activation, config.layer_norm
    if config.critic == "scalar":
        return Critic(*shape)
    assert config.v_min is not None
    assert config.v_max is not None
    return CategoricalCritic(*shape, config.v_min, config.v_max, config.num_atoms)
