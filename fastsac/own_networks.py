"""The user's own networks, which replace the actor or the critics."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fastsac.errors import UsageError


class OwnNetworks(NamedTuple):
    """Modules that replace the actor and the critics; None keeps the network that the configuration describes."""

    actor: nn.Module | None = None  # obs [B, O] -> mean and log_std, each [B, A]
    critic: nn.Module | None = None  # obs [B, O], action [B, A] -> q [E, B]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self.actor is not None or self.critic is not None

    def refuse_misfits(self, obs_size: int, action_size: int, num_critics: int) -> None:
        """Raise UsageError unless the modules meet the requirements; they are tried on the device where they are."""
        for batch in (1 + max(num_critics, action_size), 1):  # the former is neither E nor A: [B, E] is not [E, B]
            if self.actor is not None:
                found, pair = _shapes("actor", self.actor, batch, [obs_size]), [[batch, action_size]] * 2
                if found != pair:
                    raise UsageError(
                        f"the actor must map obs [B, O] to mean and log_std, {pair} here, but returned {found}"
                    )
            if self.critic is not None:
                found, wanted = _shapes("critic", self.critic, batch, [obs_size, action_size]), [num_critics, batch]
                if found != wanted:
                    raise UsageError(
                        f"the critic must map obs [B, O] and action [B, A] to q [E, B], {wanted} here with "
                        f"--num-critics {num_critics}, but returned {found}"
                    )


STANDARD = OwnNetworks()


class OwnCritic(nn.Module):
    """The user's own critic, with the extra argument `frozen` that the update needs."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap a module that maps obs [B, O], action [B, A] -> q [E, B]."""
        super().__init__()
        self.module = module

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """Return q [E, B]; `frozen` keeps the weights out of autograd."""
        if not frozen:
            q: Tensor = self.module(obs, action)
            return q
        weights = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        frozen_q: Tensor = torch.func.functional_call(self.module, weights, (obs, action))
        return frozen_q


def _place(name: str, module: object) -> torch.device:
    if not isinstance(module, nn.Module):
        raise UsageError(f"the {name} must be a torch.nn.Module, got {module!r}")
    for part in module.modules():
        if isinstance(part, _BatchNorm | _DropoutNd) and part.training:
            raise UsageError(
                f"the {name} has a {type(part).__name__} in training mode, but must depend on its inputs alone: "
                "use layer normalisation, or call eval()"
            )
    parameters = list(module.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise UsageError(f"the {name} has no parameters to train")
    if others := [parameter.dtype for parameter in parameters if parameter.dtype != torch.float32]:
        raise UsageError(f"the {name}'s parameters must be float32, got {others[0]}")
    return parameters[0].device


def _shapes(name: str, module: nn.Module, batch: int, sizes: Sequence[int]) -> Any:
    """Return the shape of the output, or a list of shapes if there are several outputs.

    Raises:
        UsageError: if the module fails, draws random numbers, modifies its inputs or has no gradients.
    """
    place, generator = _place(name, module), torch.Generator().manual_seed(0)
    inputs = [(2.0 * torch.rand(batch, size, generator=generator) - 1.0).to(place) for size in sizes]
    try:
        with torch.no_grad():
            output = module(*inputs)  # lazy modules create their parameters now
        first, second = (_of_copy(module, inputs, seed) for seed in range(2))
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"the {name} failed for inputs {[list(each.shape) for each in inputs]}: {what}") from error
    if any(each._version for each in inputs):
        raise UsageError(f"the {name} modifies its inputs: remove in-place operations on them")
    if not any(isinstance(each, Tensor) and each.requires_grad for each in first):
        raise UsageError(f"the {name} returns outputs without gradients: remove no_grad and detach")
    for one, other in zip(first, second, strict=True):
        if isinstance(one, Tensor) and not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise UsageError(f"the {name} returns different outputs for equal inputs: remove dropout, or call eval()")
    shapes = [list(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in first]
    return shapes[0] if isinstance(output, Tensor) else shapes


def _of_copy(module: nn.Module, inputs: Sequence[Tensor], seed: int) -> Sequence[Any]:
    """Return the outputs of a copy; a different seed gives different random numbers if it draws any."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = copy.deepcopy(module)(*inputs)
    return output if isinstance(output, tuple | list) else [output]
