"""The environments of a run, the interface that `VectorEnv` needs from a library, and EnvPool."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastsac.config import Config
from fastsac.errors import FastsacError, UsageError
from fastsac.spaces import Bools, Floats, Spaces, read_spaces
from fastsac.system import allowed_cores

#: keyword arguments that a user must not set
RESERVED = {
    **dict.fromkeys(("num_envs", "vectorization_mode", "vector_kwargs"), "--num-envs and --env-backend set it"),
    **dict.fromkeys(("num_threads", "batch_size", "thread_affinity_offset"), "fastsac sets it"),
    **dict.fromkeys(("seed", "env_seed"), "--seed sets it"),
    **dict.fromkeys(("id", "task_id", "env_type"), "--env-id sets it"),
    **dict.fromkeys(("render_mode", "gym_reset_return_info", "autoreset_mode", "max_num_players"), "fastsac sets it"),
    "max_episode_steps": "--max-episode-steps sets it",
    "wrappers": "--env-wrappers sets it",
}


class EnvSpec(NamedTuple):
    """The environments of a run."""

    env_id: str
    backend: str = "auto"
    kwargs: Mapping[str, Any] = {}
    wrappers: tuple[str, ...] = ()
    max_episode_steps: int | None = None
    own: Any = None  # environments, or a function that makes one, from Python

    @classmethod
    def of(cls, config: Config, own: Any = None) -> EnvSpec:
        """Return the environments that the configuration describes.

        Raises:
            UsageError: for keyword arguments that a user must not set, or wrappers without Gymnasium.
        """
        for name in config.env_kwargs:
            if name in RESERVED:
                raise UsageError(f"--env-kwargs must not contain {name!r}: {RESERVED[name]}")
        backend = config.env_backend
        if config.env_wrappers and backend == "envpool":
            raise UsageError("--env-wrappers needs Gymnasium, but --env-backend is envpool: use gymnasium or auto")
        if config.env_wrappers and backend == "auto":
            backend = "gymnasium"
        given = {"--env-kwargs": config.env_kwargs, "--env-wrappers": config.env_wrappers}
        for option, value in {**given, "--max-episode-steps": config.max_episode_steps}.items():
            if value and backend == "python":
                raise UsageError(f"{option} has no effect on environments from Python: apply it before you pass them")
        return cls(config.env_id, backend, config.env_kwargs, config.env_wrappers, config.max_episode_steps, own)

    def refusal(self, library: str, error: Exception) -> FastsacError:
        """Return the error for an environment that cannot be created: a UsageError if the user gave arguments."""
        message = one_line(error)
        message = message if len(message) <= 200 else f"{message[:200]} ..."
        what = f"{library} could not create {self.env_id}"
        if self.kwargs or self.wrappers or self.max_episode_steps is not None:
            values = dict(self.kwargs), " ".join(self.wrappers), self.max_episode_steps
            names = "--env-kwargs", "--env-wrappers", "--max-episode-steps"
            options = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True) if value)
            return UsageError(f"{what} with {options}: {type(error).__name__}: {message}")
        return FastsacError(f"{what}: {message}")


class Backend(Protocol):
    """The interface that `VectorEnv` needs; actions are in the environment's own shape and units."""

    #: why the current episodes cannot be played again, or an empty string
    cannot_rewind: str

    @property
    def metadata(self) -> dict[str, Any]:
        """The environments' metadata."""

    @property
    def spaces(self) -> tuple[Any, Any]:
        """The Gymnasium observation and action space of one environment."""

    def reset(self, seeds: Sequence[int] | None) -> Any:
        """Reset all environments, with new random streams if seeds are given; return their observations."""

    def streams(self) -> Any:
        """Return what `rewind` needs to know about the random streams, for JSON."""

    def rewind(self, resets: NDArray[np.int64], streams: Any) -> Any:
        """Bring new environments to their `resets`-th reset; return the observations after it."""

    def step_some(self, indices: NDArray[np.int64], action: Floats) -> Any:
        """Step some of the environments, after `rewind`; return their observations."""

    def send(self, action: Floats) -> None:
        """Start a step."""

    def recv(self) -> tuple[Any, Any, Any, Any, Bools]:
        """Return observation, reward, terminated, truncated and whether it was a step rather than a reset."""

    def render(self) -> Any:
        """Return a frame of each environment."""

    def close(self) -> None:
        """Close the environments."""


class _EnvPool:
    cannot_rewind = ""

    def __init__(
        self, make: Callable[[Sequence[int]], Any], pool: Any, opengl_context: Any, camera: int | None
    ) -> None:
        self._make = make
        self._pool = pool
        self._camera = camera
        self._opengl_context = opengl_context  # destroyed with its last reference; rendering aborts without it
        self.metadata: dict[str, Any] = pool.metadata

    @property
    def spaces(self) -> tuple[Any, Any]:
        return self._pool.observation_space, self._pool.action_space

    def reset(self, seeds: Sequence[int] | None) -> Any:
        with warnings.catch_warnings():  # about float64 bounds cast to float32
            warnings.simplefilter("ignore")
            if seeds is not None:  # a pool cannot be seeded again
                self._pool.close()
                self._pool = self._make(seeds)
            return self._pool.reset()[0]

    def streams(self) -> None:
        """Their state is not accessible, but follows from the seed and the number of resets."""

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


def _put(batch: Any, indices: NDArray[np.int64], some: Any) -> None:
    """Replace some environments' observations in a batch."""
    if isinstance(batch, Mapping):
        for key in batch:
            _put(batch[key], indices, some[key])
    else:
        batch[indices] = some


def envpool_tasks(needed: bool) -> list[str]:
    """Return the ids of EnvPool's environments; none if EnvPool cannot be imported, with one warning.

    Raises:
        UsageError: if EnvPool is needed and cannot be imported.
    """
    try:
        import envpool
    except (ImportError, OSError) as error:
        obstacle = f"EnvPool cannot be imported ({one_line(error)})"
        if needed:
            advice = "pip install envpool, or use --env-backend auto"
            raise UsageError(f"--env-backend envpool: {obstacle}: {advice}") from error
        _warn_once(f"{obstacle}: using Gymnasium's environments instead")
        return []
    return list(envpool.list_all_envs())


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("fastsac").warning(message)


def make_envpool(spec: EnvSpec, num_envs: int, seeds: list[int], render_mode: str | None) -> tuple[Spaces, Backend]:
    """Create EnvPool's environments; FastsacError if that fails."""
    import envpool

    threads = min(num_envs, allowed_cores())  # fewer threads gain at most 4 % (LOG.md)
    options = dict(spec.kwargs)
    if spec.max_episode_steps is not None:
        options["max_episode_steps"] = spec.max_episode_steps

    def make(seeds: Sequence[int]) -> Any:
        return envpool.make(
            spec.env_id,
            env_type="gymnasium",
            num_envs=num_envs,
            num_threads=threads,
            seed=list(seeds),
            render_mode=render_mode,
            **options,
        )

    try:
        pool = make(seeds)
    except Exception as error:
        raise spec.refusal("EnvPool", error) from error
    families = " ".join(base.__module__ for base in type(pool).__mro__)
    context = _make_opengl_context() if render_mode and ".mujoco." in families else None
    # dm_control's own camera follows the body; EnvPool's default, the free camera, does not move
    camera = 0 if "mujoco_dmc" in families else None
    spaces = read_spaces(spec.env_id, pool.observation_space, pool.action_space)
    return spaces, _EnvPool(make, pool, context, camera)


def draw_off_screen() -> None:
    """Tell MuJoCo and pygame that there may be no screen, unless the user has configured them."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def _make_opengl_context() -> Any:
    """Make the OpenGL context that EnvPool's MuJoCo tasks need: without one, rendering aborts the process."""
    draw_off_screen()
    try:
        import mujoco

        context = mujoco.GLContext(64, 64)
        context.make_current()
    except Exception as error:
        raise FastsacError(f"no OpenGL for off-screen rendering (needs EGL or OSMesa): {one_line(error)}") from error
    return context


def one_line(error: Exception) -> str:
    """Return the error's message without its line breaks."""
    return " ".join(str(error).split())
