"""Gymnasium's environments, in this process or each in its own."""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import signal
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Real
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.vector.async_vector_env import _async_worker
from numpy.typing import NDArray

from fastsac.env_backends import Backend, EnvSpec, draw_off_screen, one_line
from fastsac.errors import FastsacError, OtherShape, UsageError, WorkerError, did_you_mean
from fastsac.spaces import Bools, Floats, Spaces, read_spaces

#: seconds for processes to end by themselves
PATIENCE = 5.0
#: above every level that Gymnasium logs at
SILENT = gymnasium.logger.ERROR + 1


class Resumable(gymnasium.Wrapper):
    """Keeps what is needed to restore an environment's state, and checks the shape of every observation."""

    def __init__(self, env: gymnasium.Env[Any, Any], env_id: str, index: int) -> None:
        """Wrap the environment with this index.

        Raises:
            UsageError: if its spaces are not supported.
        """
        super().__init__(env)
        self._index, self._spaces = index, read_spaces(env_id, env.observation_space, env.action_space)
        self._is_over = False  # an episode was played again to its end, so the next step is a reset
        #: the state of `np_random` before the last reset; None if that reset had a seed
        self.stream: Any = None

    @classmethod
    def of(cls, make: Callable[[], Any], env_id: str, index: int) -> Resumable:
        """Wrap what `make` returns."""
        return cls(make(), env_id, index)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; OtherShape if its observation does not fit."""
        generator = _bit_generator(self.env)
        self.stream = None if seed is not None or generator is None else generator.state
        self._is_over = False
        obs, info = _parts("reset", "obs, info", self.env.reset(seed=seed, options=options))
        self._spaces.check(obs)
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment; OtherShape if its observation does not fit."""
        if self._is_over:
            obs, info = self.reset()
            return obs, 0.0, False, False, info
        outcome = self.env.step(action)
        obs, reward, terminated, truncated, info = _parts("step", "obs, reward, terminated, truncated, info", outcome)
        self._spaces.check(obs)
        if not isinstance(reward, Real):
            reward = _one_number(reward)
        return obs, reward, terminated, truncated, info

    def rewind(self, seeds: Sequence[int], streams: Sequence[Any]) -> Any:
        """Go back to the start of an episode; return its first observation."""
        obs, _ = self.reset(seed=seeds[self._index])
        if (stream := streams[self._index]) is not None:
            generator = _bit_generator(self.env)
            if generator is not None:
                generator.state = stream
            obs, _ = self.reset()
        return obs

    def step_again(self, actions: Mapping[int, Any]) -> Any:
        """Make one step of the episode, if there is an action for this environment; return the observation."""
        if self._index not in actions:
            return None
        obs, _, terminated, truncated, _ = self.step(actions[self._index])
        self._is_over = bool(terminated or truncated)
        return obs

    def is_over(self) -> bool:
        """Return whether the episode that was played again has ended."""
        return self._is_over


class GymnasiumEnvs:
    """A vector of environments, each of which is a `Resumable`."""

    cannot_rewind = ""

    def __init__(self, envs: Any, seeds: Sequence[int], borrowed: bool = False) -> None:
        self._envs, self._borrowed = envs, borrowed
        self.metadata: dict[str, Any] = envs.metadata
        self._seeds: list[int] | None = list(seeds)
        self._done: Bools = np.zeros(envs.num_envs, dtype=np.bool_)
        self._action: Any = None

    @property
    def spaces(self) -> tuple[Any, Any]:
        """Return the spaces of one environment."""
        return self._envs.single_observation_space, self._envs.single_action_space

    def reset(self, seeds: Sequence[int] | None) -> Any:
        """Reset all environments; without seeds, their random streams continue."""
        seeds = self._seeds if seeds is None else list(seeds)
        obs, _ = self._envs.reset(seed=seeds)
        self._seeds = None  # a second reset continues the streams
        self._done[:] = False
        return obs

    def streams(self) -> list[Any]:
        """Return the state of each random stream as it was before the last reset."""
        return list(self._envs.get_attr("stream"))

    def rewind(self, resets: NDArray[np.int64], streams: list[Any]) -> Any:
        """Bring new environments to the start of their last episodes."""
        seeds, self._seeds = self._seeds or [], None
        return stack(self._envs.call("rewind", seeds, streams))

    def step_some(self, indices: NDArray[np.int64], action: Floats) -> Any:
        """Step some of the environments again, after `rewind`."""
        actions = dict(zip(indices.tolist(), action.astype(self._envs.action_space.dtype), strict=True))
        obs = self._envs.call("step_again", actions)
        self._done = np.array(self._envs.call("is_over"), dtype=np.bool_)
        return stack([obs[index] for index in indices])

    def send(self, action: Floats) -> None:
        """Keep the actions: these environments step in `recv`."""
        self._action = action.astype(self._envs.action_space.dtype)

    def recv(self) -> tuple[Any, Any, Any, Any, Bools]:
        """Step all environments, and return whether each made a step or was reset."""
        return self._finish(*self._envs.step(self._action))

    def _finish(
        self, obs: Any, reward: Any, terminated: Any, truncated: Any, _: Any
    ) -> tuple[Any, Any, Any, Any, Bools]:
        valid = ~self._done
        self._done = np.asarray(terminated, dtype=np.bool_) | np.asarray(truncated, dtype=np.bool_)
        return obs, reward, terminated, truncated, valid

    def render(self) -> Any:
        """Return a frame of each environment."""
        return self._envs.render()

    def close(self) -> None:
        """Close the environments, unless they belong to the user."""
        if not self._borrowed:
            self._envs.close()


class _Processes(AsyncVectorEnv):
    """Gymnasium's processes. Once `_Async` owns them, it ends them: either object may be collected first."""

    taken = False

    def __del__(self) -> None:
        """End the processes as Gymnasium does, unless `_Async` will."""
        if not self.taken:
            super().__del__()


class _Async(GymnasiumEnvs):
    """Each environment in its own process; they step while the learner updates."""

    def __init__(self, envs: Any, seeds: Sequence[int]) -> None:
        super().__init__(envs, seeds)
        envs.taken = True
        self._process = os.getpid()
        # at exit, `multiprocessing` sends SIGTERM, which our processes ignore, and waits for them to end
        close = weakref.WeakMethod(self.close)
        self._at_exit = atexit.register(lambda: (method := close()) and method())

    def __del__(self) -> None:
        """End the processes when the last reference is gone."""
        self.close()

    def reset(self, seeds: Sequence[int] | None) -> Any:
        with self._naming_the_dead():
            return super().reset(seeds)

    def streams(self) -> list[Any]:
        with self._naming_the_dead():
            return super().streams()

    def rewind(self, resets: NDArray[np.int64], streams: list[Any]) -> Any:
        with self._naming_the_dead():
            return super().rewind(resets, streams)

    def step_some(self, indices: NDArray[np.int64], action: Floats) -> Any:
        with self._naming_the_dead():
            return super().step_some(indices, action)

    def send(self, action: Floats) -> None:
        with self._naming_the_dead():
            self._envs.step_async(action.astype(self._envs.action_space.dtype))

    def recv(self) -> tuple[Any, Any, Any, Any, Bools]:
        with self._naming_the_dead():
            return self._finish(*self._envs.step_wait())

    @contextmanager
    def _naming_the_dead(self) -> Iterator[None]:
        """Say which process has ended; Gymnasium only reports a closed pipe, and prints tracebacks."""
        level, gymnasium.logger.min_level = gymnasium.logger.min_level, SILENT
        try:
            yield
        except (EOFError, ConnectionError) as error:
            traceback.clear_frames(error.__traceback__)  # or Python 3.12.0 and 3.12.1 may crash: gh-111049
            time.sleep(0.1)  # until the exit code is available
            ended = {index: process.exitcode for index, process in enumerate(self._envs.processes)}
            told = [
                f"the process of environment {index} has ended with status {code}"
                for index, code in ended.items()
                if code is not None
            ]
            raise ChildProcessError(", ".join(told)) from error
        finally:
            gymnasium.logger.min_level = level

    def close(self) -> None:
        """End the processes, by force if they do not end by themselves."""
        if self._envs.closed or os.getpid() != self._process:  # a forked process has only a copy
            return
        atexit.unregister(self._at_exit)
        self._envs.closed = True
        for pipe in self._envs.parent_pipes:
            if pipe is not None:
                with suppress(OSError):
                    pipe.send(("close", None))
        end = time.monotonic() + PATIENCE
        for process in self._envs.processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()


def _worker(index: int, env_fn: Any, pipe: Any, *others: Any) -> None:
    """Serve one environment until the parent closes its pipe or dies; only the parent handles signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    gymnasium.logger.min_level = SILENT
    with suppress(EOFError, ConnectionError):
        _async_worker(index, env_fn, pipe, *others)


class Isolated(Resumable):
    """An environment in its own process: its exceptions go to another process, which may not know their type."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; WorkerError with any exception that it raises."""
        with _for_another_process():
            return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment; WorkerError with any exception that it raises."""
        with _for_another_process():
            return super().step(action)


@contextmanager
def _for_another_process() -> Iterator[None]:
    try:
        yield
    except OtherShape:
        raise
    except Exception as error:
        raise WorkerError(f"{type(error).__name__}: {error}") from None


def make_gymnasium(
    spec: EnvSpec, num_envs: int, seeds: list[int], render_mode: str | None, also_known: Sequence[str]
) -> tuple[Spaces, Backend]:
    """Create Gymnasium's environments; UsageError if the id is unknown, FastsacError if that fails."""
    if render_mode:
        draw_off_screen()
    module, _, name = spec.env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gymnasium.spec(name)
        wrappers = [_import(place) for place in spec.wrappers]
        make = functools.partial(_make_one, spec, render_mode, wrappers)
        if spec.backend == "gymnasium-async":
            makers = [functools.partial(Isolated.of, make, spec.env_id, index) for index in range(num_envs)]
            envs: Any = _Processes(makers, context="spawn", worker=_worker, copy=False)
        else:
            envs = SyncVectorEnv(
                [functools.partial(Resumable.of, make, spec.env_id, index) for index in range(num_envs)]
            )
    except UsageError:
        raise
    except (EOFError, ConnectionError) as error:
        raise FastsacError(
            f"a process for {spec.env_id} ended at start-up; a script must create its environments inside "
            'if __name__ == "__main__":'
        ) from error
    except ModuleNotFoundError as error:
        raise UsageError(
            f"cannot import {error.name!r} for environment {spec.env_id!r}: is it on PYTHONPATH?"
        ) from error
    except gymnasium.error.DependencyNotInstalled as error:
        raise FastsacError(f"environment {spec.env_id!r} needs a missing package: {one_line(error)}") from error
    except gymnasium.error.Error as error:
        hint = did_you_mean(spec.env_id, [*gymnasium.registry, *also_known]) or f": {one_line(error)}"
        raise UsageError(f"unknown environment {spec.env_id!r}{hint}") from error
    except Exception as error:
        raise spec.refusal("Gymnasium", error) from error
    kind = _Async if spec.backend == "gymnasium-async" else GymnasiumEnvs
    return read_spaces(spec.env_id, envs.single_observation_space, envs.single_action_space), kind(envs, seeds)


def _import(place: str) -> Any:
    """Return the wrapper `module:Wrapper`."""
    module, _, name = place.partition(":")
    try:
        wrapper = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--env-wrappers {place}: {one_line(error)}") from error
    if not callable(wrapper):
        raise UsageError(f"--env-wrappers {place}: it is not callable")
    return wrapper


def _make_one(spec: EnvSpec, render_mode: str | None, wrappers: Sequence[Any]) -> Any:
    options = dict(spec.kwargs)
    if render_mode:
        options["render_mode"] = render_mode
    if spec.max_episode_steps is not None:
        options["max_episode_steps"] = spec.max_episode_steps
    env = gymnasium.make(spec.env_id, **options)
    for wrapper in wrappers:
        env = wrapper(env)
    return env


def _parts(method: str, names: str, outcome: Any) -> Any:
    number = names.count(",") + 1
    if not isinstance(outcome, tuple | list) or len(outcome) != number:
        found = f"{len(outcome)} values" if isinstance(outcome, tuple | list) else type(outcome).__name__
        raise TypeError(f"{method} must return {names} (Gymnasium's interface), got {found}")
    return outcome


def _one_number(reward: Any) -> Any:
    numbers = np.asarray(reward)
    if numbers.size != 1 or numbers.dtype.kind not in "fiub":
        raise TypeError(f"the reward must be one number, got {numbers.dtype} {list(numbers.shape)}")
    return numbers.item()


def _bit_generator(env: Any) -> Any:
    """Return the bit generator of the environment's `np_random`, if it is NumPy's default, whose state is numbers."""
    generator = None
    with suppress(Exception):  # an environment's own property may raise anything
        generator = env.unwrapped.np_random.bit_generator
    return generator if isinstance(generator, np.random.PCG64) else None


def stack(obs: Sequence[Any]) -> Any:
    """Stack observations, arrays or nested dicts and tuples of arrays, into a batch."""
    if isinstance(obs[0], Mapping):
        return {key: stack([each[key] for each in obs]) for key in obs[0]}
    if isinstance(obs[0], tuple):
        return tuple(stack(parts) for parts in zip(*obs, strict=True))
    return np.stack([np.asarray(each) for each in obs])
