"""Export of a trained policy to one file that runs without fastsac: ONNX, or a `torch.export` program."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import inspect
import json
import keyword
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fastsac.errors import FastsacError, UsageError, told
from fastsac.normalize import LARGEST
from fastsac.run_dir import temporary_sibling
from fastsac.spaces import Spaces

if TYPE_CHECKING:
    from fastsac.train import SAC

#: the kind of file for each suffix
KINDS = {".onnx": "onnx", ".pt2": "torch"}


class Policy(nn.Module):
    """The deterministic policy: maps the environment's observations to its actions, in the environment's own units.

    It concatenates the parts of an observation, normalises, applies tanh to the Gaussian's mean, and scales it.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    inverse: Tensor

    def __init__(
        self, names: Iterable[str], actor: nn.Module, spaces: Spaces, normalisation: tuple[Tensor, Tensor] | None
    ) -> None:
        """Copy the actor.

        Args:
            names: names of the observation's parts, in the order of the spaces; the parameters of `forward`.
            actor: obs [N, O] -> mean and log_std, each [N, A].
            spaces: the environment's spaces.
            normalisation: mean and inverse standard deviation of the observations, each [O], or None.
        """
        super().__init__()
        self.actor = copy.deepcopy(actor).cpu().eval()
        for each in [*self.actor.parameters(), *self.actor.buffers()]:
            each.data = each.data.contiguous().clone()  # not views of memory that the learner writes
            each.requires_grad_(False)
        self._normalises = normalisation is not None
        mean, inverse = normalisation or (torch.zeros(()), torch.ones(()))
        self.register_buffer("mean", mean.cpu().clone())
        self.register_buffer("inverse", inverse.cpu().clone())
        self.register_buffer("low", torch.from_numpy(spaces.action_low.copy()))
        self.register_buffer("high", torch.from_numpy(spaces.action_high.copy()))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])

        def forward(*parts: Tensor, **named: Tensor) -> Tensor:
            return self._act(signature.bind(*parts, **named).args)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward

    def _act(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return actions [N, *S] for the parts of N observations, each [N, *its shape]."""
        obs = torch.cat([part.reshape(part.shape[0], -1) for part in parts], 1)
        if self._normalises:
            obs = ((obs - self.mean) * self.inverse).clamp(-LARGEST, LARGEST)
        action = torch.tanh(self.actor(obs)[0]).reshape(-1, *self.low.shape)
        return torch.clamp(self.low + 0.5 * (action + 1.0) * (self.high - self.low), self.low, self.high)


class Exported(NamedTuple):
    """A description of the exported file."""

    path: Path
    inputs: dict[str, tuple[int, ...]]  # the shape of each part of one observation, by name
    output: tuple[int, ...]  # the shape of one action


def export_policy(agent: SAC, path: Path) -> Exported:
    """Export the agent's deterministic policy as ONNX (`.onnx`) or as a `torch.export` program (`.pt2`).

    Inputs are float32, [N, *shape] with any N: `obs`, or the parts of a Dict or Tuple observation by name, with `_` in
    place of characters other than letters and digits (`robot_arm`), and `obs_` in front of what is then no name of a
    Python argument (`obs_0` of a Tuple). The output is `action`, [N, *S], in the
    environment's own units.

    Raises:
        UsageError: if the suffix is unknown, a package is missing, or PyTorch cannot export your own actor.
        FastsacError: if the file cannot be written; no partial file is left behind.
    """
    if path.suffix not in KINDS:
        raise UsageError(f"the file name must end in .onnx or .pt2, got {path.name!r}")
    spaces = agent.spaces
    names = {_identifier(name): shape for name, shape in spaces.obs_shapes.items()}
    if len(names) != len(spaces.obs_shapes):
        raise UsageError(
            f"the observation's parts {', '.join(spaces.obs_shapes)} would not have unique names in the file"
        )
    with _naming_the_actor():
        policy = Policy(names, agent.actor, spaces, agent.learner.normalizer.obs_normalisation()).eval()
    example = {name: torch.zeros(2, *shape) for name, shape in names.items()}
    temporary = temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # fail before the work is done
        with _quietly(), torch.no_grad():
            if KINDS[path.suffix] == "torch":
                _write_torch(policy, example, temporary)
            else:
                _write_onnx(policy, example, _metadata(agent), temporary)
        temporary.replace(path)
    except OSError as error:
        raise FastsacError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return Exported(path, names, spaces.action_low.shape)


def _identifier(name: str) -> str:
    """Return the input's name for a part of the observation; a Box has one part without a name."""
    made = re.sub(r"\W", "_", name)
    if not made:
        return "obs"
    return made if made.isidentifier() and not keyword.iskeyword(made) and made != "self" else f"obs_{made}"


def _write_torch(policy: Policy, example: dict[str, Tensor], path: Path) -> None:
    batch = torch.export.Dim("batch")
    with _naming_the_actor(), path.open("wb") as file:
        shapes = {name: {0: batch} for name in example}
        torch.export.save(torch.export.export(policy, (), example, dynamic_shapes=shapes), file)


def _write_onnx(policy: Policy, example: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    if importlib.util.find_spec("onnxscript") is None:  # which torch.onnx needs
        raise UsageError("ONNX files need packages that are not installed: pip install onnx onnxscript")
    with _naming_the_actor():
        program = torch.onnx.export(
            policy,
            kwargs=example,
            input_names=list(example),
            output_names=["action"],
            dynamic_shapes={name: {0: "batch"} for name in example},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


@contextmanager
def _naming_the_actor() -> Iterator[None]:
    try:
        yield
    except (OSError, UsageError):
        raise
    except Exception as error:  # from PyTorch, or from the user's own actor
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # torch.onnx wraps the reason
        reason = re.sub("\x1b\\[[0-9;]*m", "", told(cause, __file__))
        raise UsageError(f"PyTorch cannot export this actor: {reason}") from error


def _metadata(agent: SAC) -> dict[str, str]:
    """Return metadata about the file's origin."""
    config = agent.config
    return {
        "env_id": config.env_id,
        "env_kwargs": json.dumps(config.env_kwargs),
        "estimator": config.estimator,
        "steps": str(agent.steps),
        "fastsac": importlib.metadata.version("fastsac"),
    }


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence PyTorch's messages about its own internals."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
