"""The mapping between a policy's and an environment's observations and actions, and which spaces are supported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsac.errors import OtherShape, UsageError

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
#: how to convert other spaces
FLATTEN = (
    "convert it with --env-wrappers gymnasium.wrappers:FlattenObservation, or wrap an environment from Python in "
    "gymnasium.wrappers.FlattenObservation"
)


class Spaces(NamedTuple):
    """The mapping between the policy's and the environment's observations and actions."""

    obs_shapes: dict[str, tuple[int, ...]]  # of each part, such as "robot/arm/0", sorted by name; a single "" for a Box
    action_low: Floats  # in the environment's own shape S
    action_high: Floats  # S

    @property
    def obs_size(self) -> int:
        """O, the length of a flattened observation."""
        return sum(math.prod(shape) for shape in self.obs_shapes.values())

    @property
    def action_size(self) -> int:
        """A."""
        return self.action_low.size

    def same_as(self, other: Spaces) -> bool:
        """Return whether observations and actions have the same shapes and bounds."""
        bounds = zip(self[1:], other[1:], strict=True)
        return self.obs_shapes == other.obs_shapes and all(np.array_equal(ours, theirs) for ours, theirs in bounds)

    def flatten(self, obs: Any) -> Floats:
        """Flatten observations, arrays or nested dicts and tuples of them with leading dimension N, to [N, O] float32.

        Raises:
            OtherShape: if a part is missing or has the wrong shape; a ValueError.
        """
        columns = []
        for (key, part), shape in zip(self._parts(obs).items(), self.obs_shapes.values(), strict=True):
            if part.shape[1:] != shape:
                wanted = ", ".join(map(str, ("N", *shape)))
                raise OtherShape(f"observation {key or 'array'} must be [{wanted}], got {list(part.shape)}")
            columns.append(part.reshape(len(part), -1))
        return np.concatenate(columns, axis=1, dtype=np.float32, casting="same_kind")

    def check(self, obs: Any) -> None:
        """Raise OtherShape, a ValueError, unless one observation has the space's shape."""
        for (key, part), shape in zip(self._parts(obs).items(), self.obs_shapes.values(), strict=True):
            if part.shape != shape:
                raise OtherShape(f"observation {key or 'array'} must be {list(shape)}, got {list(part.shape)}")

    def batch(self, obs: Any) -> tuple[Floats, bool]:
        """Flatten one observation or a batch of observations; return [N, O] and whether it was a single one.

        Raises:
            OtherShape: if a part is missing or has the wrong shape; a ValueError.
        """
        parts = self._parts(obs)
        key, shape = next(iter(self.obs_shapes.items()))
        single = parts[key].ndim == len(shape)
        if single:
            parts = {name: part[None] for name, part in parts.items()}
        return self.flatten(parts if key else parts[""]), single

    def scale(self, action: Floats) -> Floats:
        """Map actions [N, A] from the policy's [-1, 1] to the environment's own shape and units, [N, *S]."""
        action = action.reshape(len(action), *self.action_low.shape)
        scaled = self.action_low + 0.5 * (action + 1.0) * (self.action_high - self.action_low)
        return np.clip(scaled, self.action_low, self.action_high)  # rounding must not leave the space

    def unscale(self, action: NDArray[Any]) -> Floats:
        """Map actions [N, *S] from the environment's units to the policy's, [N, A], clipped to [-1, 1]."""
        low, high = self.action_low.astype(np.float64), self.action_high.astype(np.float64)
        unit = 2.0 * (action - low) / (high - low) - 1.0
        return unit.clip(-1.0, 1.0).astype(np.float32).reshape(len(action), self.action_size)

    def _parts(self, obs: Any) -> dict[str, NDArray[Any]]:
        """Return the observation's parts in the order of the shapes."""
        if "" in self.obs_shapes:
            return {"": np.asarray(obs)}
        found: dict[str, Any] = {}
        self._collect(obs, "", found)
        if not set(self.obs_shapes) <= set(found):
            if "" in found:
                kind = type(obs).__name__
                raise OtherShape(f"the observation must have the keys {list(self.obs_shapes)}, got a {kind}")
            raise OtherShape(f"the observation has the keys {sorted(found)}, expected {list(self.obs_shapes)}")
        return {key: np.asarray(found[key]) for key in self.obs_shapes}

    def _collect(self, obs: Any, path: str, found: dict[str, Any]) -> None:
        if path in self.obs_shapes or not isinstance(obs, Mapping | tuple):
            found[path] = obs
            return
        for key, part in obs.items() if isinstance(obs, Mapping) else enumerate(obs):
            self._collect(part, f"{path}/{key}" if path else str(key), found)


def read_spaces(env_id: str, obs_space: Any, action_space: Any) -> Spaces:
    """Check one environment's Gymnasium spaces and return what is needed from them.

    Raises:
        UsageError: for a discrete or unbounded action space, or observations that are not numbers.
    """
    kind = type(action_space).__name__
    if kind != "Box":
        raise UsageError(f"{env_id} has a {kind} action space; SAC needs a bounded Box of floats")
    if action_space.dtype.kind != "f" or not 1 <= len(action_space.shape) <= 4:
        what = f"{action_space.dtype} {list(action_space.shape)}"
        raise UsageError(f"{env_id} has a Box of {what} as its action space; SAC needs a bounded Box of floats")
    # rounded inwards: an environment may reject actions just outside its own bounds
    low, high = _rounded(action_space.low, np.inf), _rounded(action_space.high, -np.inf)
    # some specifications use the largest finite number for "unbounded"
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (high - low < 1e30).all()):
        raise UsageError(f"{env_id} has an unbounded action space; SAC needs finite bounds")
    if not (low < high).all():
        raise UsageError(f"{env_id} has an action whose low bound is not below its high bound: remove it")
    shapes: dict[str, tuple[int, ...]] = {}
    _read_obs(env_id, obs_space, "", shapes)
    if not sum(math.prod(shape) for shape in shapes.values()):
        raise UsageError(f"{env_id} has empty observations")
    return Spaces({key: shapes[key] for key in sorted(shapes)}, low, high)


def _rounded(bound: NDArray[Any], towards: float) -> Floats:
    with np.errstate(over="ignore"):  # bounds beyond float32 count as unbounded
        single = bound.astype(np.float32)
    beyond = single < bound if towards > 0.0 else single > bound
    return np.where(beyond, np.nextafter(single, np.float32(towards)), single)


def _read_obs(env_id: str, space: Any, path: str, shapes: dict[str, tuple[int, ...]]) -> None:
    kind = type(space).__name__
    if kind in ("Dict", "Tuple"):
        parts = space.spaces.items() if kind == "Dict" else enumerate(space.spaces)
        for key, part in parts:
            if key == "":
                raise UsageError(f"{env_id} has an observation with an empty name")
            _read_obs(env_id, part, f"{path}/{key}" if path else str(key), shapes)
    elif kind != "Box":
        raise UsageError(f"{env_id} has a {kind} observation {path}".rstrip() + f", but SAC needs a Box: {FLATTEN}")
    elif len(space.shape) > 2:
        raise UsageError(f"{env_id} has observations of shape {space.shape}: pixels are not supported")
    elif path in shapes:
        raise UsageError(f"{env_id} has two observations that are both named {path!r} after flattening")
    else:
        shapes[path] = tuple(space.shape)
