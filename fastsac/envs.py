"""EnvPool or Gymnasium behind one small vector-environment interface; the autoreset rule lives here.

Both libraries reset on the *next* step: at an episode's end the returned observation is the true last one, and the step
after it ignores the action, returns reward 0 and the reset observation. Those rows are marked `valid = False`: they are
no transitions and enter neither replay nor statistics.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastsac.errors import FastsacError, UsageError, did_you_mean

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


class Step(NamedTuple):
    """One step of every environment."""

    obs: Floats  # [N, O]; at an episode's end the true last observation
    reward: Floats  # [N]
    terminated: Bools  # [N]
    truncated: Bools  # [N]
    valid: Bools  # [N]; False where the environment was reset and the action ignored


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


class _Backend(Protocol):
    """What `VectorEnv` asks of a library; actions in the environment's own units."""

    @property
    def metadata(self) -> dict[str, Any]: ...
    def reset(self) -> Any: ...
    def send(self, action: Floats) -> None: ...
    def recv(self) -> tuple[Any, Any, Any, Any, Bools]: ...
    def render(self) -> Any: ...
    def close(self) -> None: ...


class VectorEnv:
    """N environments that step together, with checks before and after every step."""

    def __init__(self, env_id: str, spaces: Spaces, num_envs: int, backend: _Backend, backend_name: str) -> None:
        self.env_id = env_id
        self.spaces = spaces
        self.num_envs = num_envs
        self.backend_name = backend_name
        self._backend = backend
        self._steps = 0
        self._pending = False

    @property
    def render_fps(self) -> float:
        """Pictures a second at the environment's own speed, or 30 where it does not say."""
        return float(self._backend.metadata.get("render_fps") or 30.0)

    def reset(self) -> Floats:
        """Reset every environment and return the observations [N, O]."""
        with self._naming_the_environment():
            if self._pending:  # a step that was interrupted: its outcome must not be taken for the reset's
                self._backend.recv()
                self._pending = False
            obs = self.spaces.flatten(self._backend.reset())
        self._check_finite("observation", obs)
        return obs

    def send(self, action: Floats) -> None:
        """Start a step with actions [N, A] in [-1, 1]; `recv` returns its outcome.

        Raises:
            ValueError: if the shape or type is wrong (EnvPool itself accepts it without a word, or aborts).
            FastsacError: if an action is not finite.
        """
        shape = (self.num_envs, self.spaces.action_size)
        if action.shape != shape or action.dtype != np.float32:
            raise ValueError(f"actions must be float32 {list(shape)}, got {action.dtype} {list(action.shape)}")
        self._steps += 1
        self._check_finite("action", action)
        with self._naming_the_environment():
            self._backend.send(self.spaces.scale(action))
            self._pending = True

    def recv(self) -> Step:
        """Return the outcome of the step that `send` started.

        Raises:
            FastsacError: if the environment raised, or an observation or a reward is not finite.
        """
        with self._naming_the_environment():
            self._pending = False
            obs, reward, terminated, truncated, valid = self._backend.recv()
            step = Step(
                obs=self.spaces.flatten(obs),
                reward=np.asarray(reward, dtype=np.float32),
                terminated=np.asarray(terminated, dtype=np.bool_),
                truncated=np.asarray(truncated, dtype=np.bool_),
                valid=valid,
            )
            if len(step.obs) != self.num_envs or any(part.shape != (self.num_envs,) for part in step[1:]):
                raise ValueError(f"shapes {[part.shape for part in step]} for {self.num_envs} environments")
        self._check_finite("observation", step.obs)
        self._check_finite("reward", step.reward)
        return step

    def render(self) -> NDArray[np.uint8]:
        """Return a picture [H, W, 3] of the first environment, which must have been made with ``render=True``."""
        with self._naming_the_environment():
            return np.asarray(self._backend.render()[0], dtype=np.uint8)

    def close(self) -> None:
        """Give the environments' resources back."""
        self._backend.close()

    def _check_finite(self, what: str, values: Floats) -> None:
        if np.isfinite(values).all():
            return
        index, *column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
        value = f"{values[index, *column]}" + "".join(f" in column {i}" for i in column)
        raise FastsacError(f"{self.env_id}, environment {index}, step {self._steps}: {what} not finite: {value}")

    @contextmanager
    def _naming_the_environment(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise FastsacError(
                f"{self.env_id} failed at step {self._steps}: {type(error).__name__}: {_one_line(error)}"
            ) from error


class _EnvPool:
    def __init__(self, pool: Any, opengl_context: Any, camera: int | None) -> None:
        self._pool = pool
        self._camera = camera
        self._opengl_context = opengl_context  # destroyed with its last reference, and drawing aborts without it
        self.metadata: dict[str, Any] = pool.metadata

    def reset(self) -> Any:
        return self._pool.reset()[0]

    def send(self, action: Floats) -> None:
        self._pool.send(action.astype(self._pool.action_space.dtype))

    def recv(self) -> tuple[Any, Any, Any, Any, Bools]:
        *step, info = self._pool.recv()
        obs, reward, terminated, truncated = step
        return obs, reward, terminated, truncated, info["elapsed_step"] != 0

    def render(self) -> Any:
        return self._pool.render(camera_id=self._camera)

    def close(self) -> None:
        self._pool.close()


class _Gymnasium:
    def __init__(self, envs: Any, seeds: Sequence[int]) -> None:
        self._envs = envs
        self.metadata: dict[str, Any] = envs.metadata
        self._seeds: list[int] | None = list(seeds)
        self._done: Bools = np.zeros(envs.num_envs, dtype=np.bool_)
        self._action: Any = None

    def reset(self) -> Any:
        obs, _ = self._envs.reset(seed=self._seeds)
        self._seeds = None  # a second reset goes on with the streams
        self._done[:] = False
        return obs

    def send(self, action: Floats) -> None:
        self._action = action.astype(self._envs.action_space.dtype)

    def recv(self) -> tuple[Any, Any, Any, Any, Bools]:
        obs, reward, terminated, truncated, _ = self._envs.step(self._action)
        valid = ~self._done
        self._done = terminated | truncated
        return obs, reward, terminated, truncated, valid

    def render(self) -> Any:
        return self._envs.render()

    def close(self) -> None:
        self._envs.close()


def environment_seeds(seed: int, num_envs: int) -> list[int]:
    """Return one seed per environment such that runs with neighbouring seeds share none of their streams."""
    state = np.random.SeedSequence(seed).generate_state(num_envs)
    return [int(value) & 0x7FFFFFFF for value in state]


def make_envs(env_id: str, num_envs: int, seed: int, backend: str = "auto", render: bool = False) -> VectorEnv:
    """Create N environments.

    Args:
        env_id: an EnvPool or Gymnasium id, or `module:Id-v0` to import `module` first.
        num_envs: N.
        seed: the state of all environments' random streams follows from it.
        backend: "envpool", "gymnasium", or "auto": EnvPool where it has the id, else Gymnasium.
        render: whether pictures will be asked for; drawn off-screen.

    Raises:
        UsageError: if neither has it (with near matches), or its spaces are not supported.
        FastsacError: if it cannot be created.
    """
    seeds = environment_seeds(seed, num_envs)
    render_mode = "rgb_array" if render else None
    known: list[str] = []
    if backend != "gymnasium":
        import envpool

        known = envpool.list_all_envs()
    with warnings.catch_warnings():
        # about float64 bounds cast to float32, and ids with a newer version: nothing that a user could change
        warnings.simplefilter("ignore")
        if backend == "envpool" and env_id not in known:
            raise UsageError(f"EnvPool has no environment {env_id!r}{did_you_mean(env_id, known)}")
        if backend == "envpool" or (backend == "auto" and env_id in known):
            return _make_envpool(env_id, num_envs, seeds, render_mode)
        return _make_gymnasium(env_id, num_envs, seeds, render_mode, known)


def _make_envpool(env_id: str, num_envs: int, seeds: list[int], render_mode: str | None) -> VectorEnv:
    import envpool

    threads = min(num_envs, len(os.sched_getaffinity(0)))  # fewer gain at most 4 % (LOG.md)
    try:
        pool = envpool.make(
            env_id, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=seeds, render_mode=render_mode
        )
    except Exception as error:
        raise FastsacError(f"EnvPool could not create {env_id}: {_one_line(error)}") from error
    families = " ".join(base.__module__ for base in type(pool).__mro__)
    context = _make_opengl_context() if render_mode and ".mujoco." in families else None
    # dm_control's own camera follows the body; the free one that is EnvPool's default stays behind
    camera = 0 if "mujoco_dmc" in families else None
    spaces = read_spaces(env_id, pool.observation_space, pool.action_space)
    return VectorEnv(env_id, spaces, num_envs, _EnvPool(pool, context, camera), "envpool")


def _make_gymnasium(
    env_id: str, num_envs: int, seeds: list[int], render_mode: str | None, also_known: Sequence[str]
) -> VectorEnv:
    import gymnasium

    if render_mode:
        _draw_off_screen()
    try:
        module, _, name = env_id.rpartition(":")
        if module:
            importlib.import_module(module)
        gymnasium.spec(name)
        options: dict[str, Any] = {"render_mode": render_mode} if render_mode else {}
        envs = gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode="sync", **options)
    except ModuleNotFoundError as error:
        raise UsageError(f"cannot import {error.name!r} for environment {env_id!r}: is it on PYTHONPATH?") from error
    except gymnasium.error.DependencyNotInstalled as error:
        raise FastsacError(f"environment {env_id!r} lacks a package: {_one_line(error)}") from error
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.Error) as error:
        hint = did_you_mean(env_id, [*gymnasium.registry, *also_known]) or f": {_one_line(error)}"
        raise UsageError(f"unknown environment {env_id!r}{hint}") from error
    except Exception as error:
        raise FastsacError(f"Gymnasium could not create {env_id}: {_one_line(error)}") from error
    spaces = read_spaces(env_id, envs.single_observation_space, envs.single_action_space)
    return VectorEnv(env_id, spaces, num_envs, _Gymnasium(envs, seeds), "gymnasium")


def _draw_off_screen() -> None:
    """Tell MuJoCo and pygame that there may be no screen, unless the user has told them otherwise."""
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def _make_opengl_context() -> Any:
    """EnvPool's MuJoCo tasks draw into the current context, and abort the process if there is none."""
    _draw_off_screen()
    try:
        import mujoco

        context = mujoco.GLContext(64, 64)
        context.make_current()
    except Exception as error:
        raise FastsacError(
            f"no OpenGL to draw with off-screen (EGL or OSMesa is needed): {_one_line(error)}"
        ) from error
    return context


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
