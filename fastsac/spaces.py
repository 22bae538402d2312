"""How a policy's numbers map to an environment's, and which environments can be served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsac.errors import UsageError

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


class Spaces(NamedTuple):
    """How the policy's numbers map to the environment's."""

    obs_shapes: dict[str, tuple[int, ...]]  # by key in alphabetical order; a single "" for an array
    action_low: Floats  # [A]
    action_high: Floats  # [A]

    @property
    def obs_size(self) -> int:
        """O, the length of a flattened observation."""
        return sum(int(np.prod(shape)) for shape in self.obs_shapes.values())

    @property
    def action_size(self) -> int:
        """A."""
        return len(self.action_low)

    def same_as(self, other: Spaces) -> bool:
        """Return whether observations and actions have the same shapes and bounds."""
        bounds = zip(self[1:], other[1:], strict=True)
        return self.obs_shapes == other.obs_shapes and all(np.array_equal(ours, theirs) for ours, theirs in bounds)

    def flatten(self, obs: Any) -> Floats:
        """Flatten observations, an array or a dict of arrays with leading dimension N, to [N, O] float32.

        Raises:
            ValueError: if a key is missing or a shape does not fit.
        """
        parts = obs if isinstance(obs, Mapping) else {"": obs}
        if not set(self.obs_shapes) <= set(parts):
            raise ValueError(f"the observation has the keys {sorted(parts)}, expected {list(self.obs_shapes)}")
        columns = []
        for key, shape in self.obs_shapes.items():
            part = np.asarray(parts[key])
            if part.shape[1:] != shape:
                raise ValueError(f"observation {key or 'array'} must be [N, *{shape}], got {part.shape}")
            columns.append(part.reshape(len(part), -1))
        return np.concatenate(columns, axis=1, dtype=np.float32, casting="same_kind")

    def batch(self, obs: Any) -> tuple[Floats, bool]:
        """Flatten one observation or a batch of them; return [N, O] and whether it was one.

        Raises:
            ValueError: if a key is missing or a shape does not fit.
        """
        key, shape = next(iter(self.obs_shapes.items()))
        if key and (not isinstance(obs, Mapping) or key not in obs):
            raise ValueError(f"the observation must be a dict with the keys {list(self.obs_shapes)}")
        single = np.asarray(obs[key] if key else obs).ndim == len(shape)
        if single:
            obs = {k: np.asarray(v)[None] for k, v in obs.items()} if key else np.asarray(obs)[None]
        return self.flatten(obs), single

    def scale(self, action: Floats) -> Floats:
        """Map actions from the policy's [-1, 1] to the environment's own units."""
        scaled = self.action_low + 0.5 * (action + 1.0) * (self.action_high - self.action_low)
        return np.clip(scaled, self.action_low, self.action_high)  # rounding must not lead out of the space


def read_spaces(env_id: str, obs_space: Any, action_space: Any) -> Spaces:
    """Check one environment's Gymnasium spaces and return what is needed of them.

    Raises:
        UsageError: for a discrete or unbounded action space, or observations that are no numbers.
    """
    if type(action_space).__name__ != "Box":
        raise UsageError(f"{env_id} has a {type(action_space).__name__} action space; SAC needs a bounded Box")
    low, high = action_space.low.astype(np.float32).ravel(), action_space.high.astype(np.float32).ravel()
    if action_space.dtype.kind != "f" or len(action_space.shape) != 1:
        raise UsageError(f"{env_id} has actions {action_space.dtype}{action_space.shape}; SAC needs a vector of floats")
    # some specifications say "unbounded" with the largest finite number
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (high - low < 1e30).all() and (low < high).all()):
        raise UsageError(f"{env_id} has an unbounded action space; SAC needs finite bounds")
    parts = dict(obs_space.spaces) if type(obs_space).__name__ == "Dict" else {"": obs_space}
    for key, part in parts.items():
        if type(part).__name__ != "Box":
            kind = type(part).__name__
            raise UsageError(f"{env_id} has a {kind} observation {key}; only Box, or a Dict of Box, is supported")
        if len(part.shape) > 2:
            raise UsageError(f"{env_id} has observations of shape {part.shape}: pixels are not supported")
    return Spaces({key: tuple(parts[key].shape) for key in sorted(parts)}, low, high)
