"""EnvPool or Gymnasium behind one small vector-environment interface; the autoreset rule lives here.

Both libraries reset on the *next* step: at an episode's end the returned observation is the true last one, and the step
after it ignores the action, returns reward 0 and the reset observation. Those rows are marked `valid = False`: they are
no transitions and enter neither replay nor statistics.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastsac.errors import EnvironmentFailure, FastsacError, UsageError, did_you_mean
from fastsac.spaces import Bools, Floats, Spaces, read_spaces

#: observations [L + 1, O] and actions [L, A] of the episode under way
Episode = tuple[Floats, Floats]


class Step(NamedTuple):
    """One step of every environment."""

    obs: Floats  # [N, O]; at an episode's end the true last observation
    reward: Floats  # [N]
    terminated: Bools  # [N]
    truncated: Bools  # [N]
    valid: Bools  # [N]; False where the environment was reset and the action ignored


class _Backend(Protocol):
    """What `VectorEnv` asks of a library; actions in the environment's own units."""

    @property
    def metadata(self) -> dict[str, Any]: ...
    def reset(self, seeds: Sequence[int] | None) -> Any: ...
    def streams(self) -> Any: ...
    def rewind(self, resets: NDArray[np.int64], streams: Any) -> Any: ...
    def step_some(self, indices: NDArray[np.int64], action: Floats) -> Any: ...
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
        self._resets = np.zeros(num_envs, dtype=np.int64)
        self._elapsed = np.zeros(num_envs, dtype=np.int64)  # actions since each environment's last reset

    @property
    def render_fps(self) -> float:
        """Pictures a second at the environment's own speed, or 30 where it does not say."""
        return float(self._backend.metadata.get("render_fps") or 30.0)

    def reset(self, seed: int | None = None) -> Floats:
        """Reset every environment and return the observations [N, O].

        Args:
            seed: begins the environments' random streams anew; None goes on with them.
        """
        with self._naming_the_environment():
            if self._pending:  # a step that was interrupted: its outcome must not be taken for the reset's
                self._backend.recv()
                self._pending = False
            seeds = None if seed is None else environment_seeds(seed, self.num_envs)
            obs = self.spaces.flatten(self._backend.reset(seeds))
        self._resets = self._resets + 1 if seed is None else np.ones_like(self._resets)
        self._elapsed[:] = 0
        self._check_finite("observation", obs)
        return obs

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs beside the episodes under way, for JSON."""
        return {
            "backend": self.backend_name,
            "resets": self._resets.tolist(),
            "elapsed": self._elapsed.tolist(),
            "streams": self._backend.streams(),
        }

    def restore(self, state: Mapping[str, Any], episodes: Sequence[Episode]) -> str:
        """Bring environments that were just made from the same seed to where `state` was taken.

        Each is reset as often as it had been, and its episode under way is played again. That is exact if a step draws
        no random numbers; Gymnasium's environments may draw them, too, from their `np_random`. Every observation of
        these episodes is compared, bit for bit.

        Returns:
            An empty string, or why it could not be done. They are to be reset then.
        """
        if state["backend"] != self.backend_name:
            return f"they ran in {state['backend']}, and now in {self.backend_name}"
        resets, elapsed = np.array(state["resets"], dtype=np.int64), np.array(state["elapsed"], dtype=np.int64)
        if resets.shape != (self.num_envs,) or elapsed.tolist() != [len(action) for _, action in episodes]:
            return "the checkpoint holds others"
        with self._naming_the_environment():
            start = self.spaces.flatten(self._backend.rewind(resets, state["streams"]))
            same = np.array_equal(start, np.stack([obs[0] for obs, _ in episodes]))
            for step in range(max(elapsed)):
                indices = np.flatnonzero(elapsed > step)
                under_way = [episode for episode in episodes if len(episode[1]) > step]
                action = self.spaces.scale(np.stack([action[step] for _, action in under_way]))
                obs = self.spaces.flatten(self._backend.step_some(indices, action))
                same = same and np.array_equal(obs, np.stack([obs[step + 1] for obs, _ in under_way]))
                if not same:
                    break
        self._resets, self._elapsed = resets, elapsed
        return "" if same else "played again, they give other observations"

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
        self._resets += ~valid
        self._elapsed = np.where(valid, self._elapsed + 1, 0)
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
        raise EnvironmentFailure(f"{self.env_id}, environment {index}, step {self._steps}: {what} not finite: {value}")

    @contextmanager
    def _naming_the_environment(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise EnvironmentFailure(
                f"{self.env_id} failed at step {self._steps}: {type(error).__name__}: {_one_line(error)}"
            ) from error


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
        raise FastsacError(f"EnvPool could not create {env_id}: {_one_line(error)}") from error
    families = " ".join(base.__module__ for base in type(pool).__mro__)
    context = _make_opengl_context() if render_mode and ".mujoco." in families else None
    # dm_control's own camera follows the body; the free one that is EnvPool's default stays behind
    camera = 0 if "mujoco_dmc" in families else None
    spaces = read_spaces(env_id, pool.observation_space, pool.action_space)
    return VectorEnv(env_id, spaces, num_envs, _EnvPool(make, pool, context, camera), "envpool")


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
