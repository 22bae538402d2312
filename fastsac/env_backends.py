"""What `VectorEnv` needs of EnvPool and of Gymnasium, and how their environments are made."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastsac.errors import FastsacError, UsageError, did_you_mean
from fastsac.spaces import Bools, Floats, Spaces, read_spaces


class Backend(Protocol):
    """What `VectorEnv` asks of a library; actions in the environment's own units."""

    @property
    def metadata(self) -> dict[str, Any]:
        """Of the environments."""

    def reset(self, seeds: Sequence[int] | None) -> Any:
        """Reset all environments, with random streams begun anew if there are seeds; return their observations."""

    def streams(self) -> Any:
        """Return for JSON what `rewind` needs to know of the random streams."""

    def rewind(self, resets: NDArray[np.int64], streams: Any) -> Any:
        """Bring new environments to their `resets`-th reset; return the observations after it."""

    def step_some(self, indices: NDArray[np.int64], action: Floats) -> Any:
        """Step some of the environments; return their observations."""

    def send(self, action: Floats) -> None:
        """Start a step."""

    def recv(self) -> tuple[Any, Any, Any, Any, Bools]:
        """Return observation, reward, terminated, truncated and whether it was a step and no reset."""

    def render(self) -> Any:
        """Return a picture of each environment."""

    def close(self) -> None:
        """Give the environments' resources back."""


class _EnvPool:
    def __init__(
        self, make: Callable[[Sequence[int]], Any], pool: Any, opengl_context: Any, camera: int | None
    ) -> None:
        self._make = make
        self._pool = pool
        self._camera = camera
        self._opengl_context = opengl_context  # destroyed with its last reference, and drawing aborts without it
        self.metadata: dict[str, Any] = pool.metadata

    def reset(self, seeds: Sequence[int] | None) -> Any:
        if seeds is not None:  # a pool cannot be seeded again
            self._pool.close()
            self._pool = self._make(seeds)
        return self._pool.reset()[0]

    def streams(self) -> None:
        """Their state cannot be had, but follows from the seed and the number of resets."""

    def rewind(self, resets: NDArray[np.int64], streams: None) -> Any:
        obs = self._pool.reset()[0]
        for done in range(1, max(resets)):
            indices = np.flatnonzero(resets > done)
            _put(obs, indices, self._pool.reset(indices.astype(np.int32))[0])
        return obs

    def step_some(self, indices: NDArray[np.int64], action: Floats) -> Any:
        return self._pool.step(action.astype(self._pool.action_space.dtype), indices.astype(np.int32))[0]

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
        #: of each environment's np_random as it was before the last reset; None if that was the seeded one
        self._streams: list[Any] = [None] * envs.num_envs

    def reset(self, seeds: Sequence[int] | None) -> Any:
        seeds = self._seeds if seeds is None else list(seeds)
        self._keep_streams(range(self._envs.num_envs), seeded=seeds is not None)
        obs, _ = self._envs.reset(seed=seeds)
        self._seeds = None  # a second reset goes on with the streams
        self._done[:] = False
        return obs

    def _keep_streams(self, indices: Iterable[int], seeded: bool = False) -> None:
        for index in indices:
            generator = _bit_generator(self._envs.envs[index])
            self._streams[index] = None if seeded or generator is None else generator.state

    def streams(self) -> list[Any]:
        return list(self._streams)

    def rewind(self, resets: NDArray[np.int64], streams: list[Any]) -> Any:
        seeds, self._seeds, self._streams = self._seeds or [], None, list(streams)
        obs = []
        for env, seed, stream in zip(self._envs.envs, seeds, streams, strict=True):
            first = env.reset(seed=seed)[0]
            if stream is not None:
                _bit_generator(env).state = stream
                first = env.reset()[0]
            obs.append(first)
        return _stack(obs)

    def step_some(self, indices: NDArray[np.int64], action: Floats) -> Any:
        obs = []
        for index, each in zip(indices, action.astype(self._envs.action_space.dtype), strict=True):
            after, _, terminated, truncated, _ = self._envs.envs[index].step(each)
            self._done[index] = terminated or truncated
            obs.append(after)
        self._envs._autoreset_envs = self._done.copy()  # what its own `step` would have left
        return _stack(obs)

    def send(self, action: Floats) -> None:
        self._action = action.astype(self._envs.action_space.dtype)

    def recv(self) -> tuple[Any, Any, Any, Any, Bools]:
        self._keep_streams(np.flatnonzero(self._done))
        obs, reward, terminated, truncated, _ = self._envs.step(self._action)
        valid = ~self._done
        self._done = terminated | truncated
        return obs, reward, terminated, truncated, valid

    def render(self) -> Any:
        return self._envs.render()

    def close(self) -> None:
        self._envs.close()


def _bit_generator(env: Any) -> Any:
    """Return what is behind the environment's `np_random`: its state is plain numbers if it is NumPy's default."""
    generator = getattr(getattr(env.unwrapped, "np_random", None), "bit_generator", None)
    return generator if isinstance(generator, np.random.PCG64) else None


def _stack(obs: Sequence[Any]) -> Any:
    """Join observations, arrays or dicts of arrays, to a batch."""
    if isinstance(obs[0], Mapping):
        return {key: _stack([each[key] for each in obs]) for key in obs[0]}
    return np.stack([np.asarray(each) for each in obs])


def _put(batch: Any, indices: NDArray[np.int64], some: Any) -> None:
    """Write some environments' observations over those of a batch."""
    if isinstance(batch, Mapping):
        for key in batch:
            _put(batch[key], indices, some[key])
    else:
        batch[indices] = some


def make_envpool(env_id: str, num_envs: int, seeds: list[int], render_mode: str | None) -> tuple[Spaces, Backend]:
    """Create EnvPool's environments; FastsacError if that fails."""
    import envpool

    threads = min(num_envs, len(os.sched_getaffinity(0)))  # fewer gain at most 4 % (LOG.md)

    def make(seeds: Sequence[int]) -> Any:
        return envpool.make(
            env_id,
            env_type="gymnasium",
            num_envs=num_envs,
            num_threads=threads,
            seed=list(seeds),
            render_mode=render_mode,
        )

    try:
        pool = make(seeds)
    except Exception as error:
        raise FastsacError(f"EnvPool could not create {env_id}: {one_line(error)}") from error
    families = " ".join(base.__module__ for base in type(pool).__mro__)
    context = _make_opengl_context() if render_mode and ".mujoco." in families else None
    # dm_control's own camera follows the body; the free one that is EnvPool's default stays behind
    camera = 0 if "mujoco_dmc" in families else None
    spaces = read_spaces(env_id, pool.observation_space, pool.action_space)
    return spaces, _EnvPool(make, pool, context, camera)


def make_gymnasium(
    env_id: str, num_envs: int, seeds: list[int], render_mode: str | None, also_known: Sequence[str]
) -> tuple[Spaces, Backend]:
    """Create Gymnasium's environments; UsageError if it does not know them, FastsacError if that fails."""
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
        raise FastsacError(f"environment {env_id!r} lacks a package: {one_line(error)}") from error
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.Error) as error:
        hint = did_you_mean(env_id, [*gymnasium.registry, *also_known]) or f": {one_line(error)}"
        raise UsageError(f"unknown environment {env_id!r}{hint}") from error
    except Exception as error:
        raise FastsacError(f"Gymnasium could not create {env_id}: {one_line(error)}") from error
    spaces = read_spaces(env_id, envs.single_observation_space, envs.single_action_space)
    return spaces, _Gymnasium(envs, seeds)


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
        raise FastsacError(f"no OpenGL to draw with off-screen (EGL or OSMesa is needed): {one_line(error)}") from error
    return context


def one_line(error: Exception) -> str:
    """Return the error's message without its line breaks."""
    return " ".join(str(error).split())
