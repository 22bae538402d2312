"""Environments that come from Python: one, a vector of them, or a function that makes one."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fastsac.env_backends import Backend, EnvSpec, one_line
from fastsac.env_gymnasium import GymnasiumEnvs, Resumable
from fastsac.errors import UsageError
from fastsac.spaces import Spaces, read_spaces


def make_own(spec: EnvSpec, num_envs: int, seeds: list[int], render: bool) -> tuple[Spaces, Backend]:
    """Take environments from Python: one, a vector of them, or a function that makes one.

    Raises:
        UsageError: if they are none of these, or cannot be used.
    """
    own, env_id = spec.own, spec.env_id
    if isinstance(own, gymnasium.vector.VectorEnv):
        mode = own.metadata.get("autoreset_mode")
        if mode != AutoresetMode.NEXT_STEP:
            raise UsageError(f"{env_id} has the autoreset mode {mode}: fastsac needs AutoresetMode.NEXT_STEP")
        _refuse_blind(own, env_id, render)
        spaces = read_spaces(env_id, own.single_observation_space, own.single_action_space)
        return spaces, _OwnVector(own, seeds, borrowed=True)
    borrowed = isinstance(own, gymnasium.Env)
    make = (lambda: own) if borrowed else own
    makers = [functools.partial(Resumable.of, make, env_id, index) for index in range(num_envs)]
    try:
        envs = SyncVectorEnv(makers)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{env_id} could not be made: {type(error).__name__}: {one_line(error)}") from error
    _refuse_blind(envs, env_id, render)
    spaces = read_spaces(env_id, envs.single_observation_space, envs.single_action_space)
    return spaces, GymnasiumEnvs(envs, seeds, borrowed)


def _refuse_blind(envs: Any, env_id: str, render: bool) -> None:
    if render and envs.render_mode != "rgb_array":
        raise UsageError(f"{env_id} was made with render_mode {envs.render_mode!r}, and a video needs 'rgb_array'")


class Factory:
    """A user's function that makes an environment, watched: each time it must be a new one."""

    def __init__(self, make: Callable[[], Any], argument: str) -> None:
        """Take the function, and the name under which it was handed over."""
        self._make, self._argument = make, argument
        self.__name__ = str(getattr(make, "__name__", type(make).__name__))
        self._made: list[weakref.ref[Any]] = []

    def __call__(self) -> Any:
        """Make one; UsageError if it is none, or one that was made before."""
        env = self._make()
        if not isinstance(env, gymnasium.Env):
            raise UsageError(f"{self._argument} must make a gymnasium.Env, got {env!r}")
        self._made = [reference for reference in self._made if reference() is not None]
        if any(reference() is env.unwrapped for reference in self._made):
            raise UsageError(f"{self.__name__} gave the same environment twice, and must make a new one each time")
        self._made.append(weakref.ref(env.unwrapped))
        return env


def describe_own(envs: object) -> tuple[str, int | None]:
    """Return the name of environments from Python, and their number; None for a function that makes any number.

    Raises:
        UsageError: if they are none.
    """
    if not isinstance(envs, gymnasium.Env | gymnasium.vector.VectorEnv) and not callable(envs):
        raise UsageError(
            f"envs must be a gymnasium.Env, a gymnasium.vector.VectorEnv or a function that makes one Env, got {envs!r}"
        )
    if not isinstance(envs, gymnasium.Env | gymnasium.vector.VectorEnv):
        return str(getattr(envs, "__name__", type(envs).__name__)), None
    name = type(envs.unwrapped).__name__ if envs.spec is None else envs.spec.id
    return name, 1 if isinstance(envs, gymnasium.Env) else envs.num_envs


class _OwnVector(GymnasiumEnvs):
    """A vector environment of the user's own, of which no single environment can be reached."""

    cannot_rewind = "a vector environment of your own cannot be brought back to them"

    def reset(self, seeds: Sequence[int] | None) -> Any:
        seeds = self._seeds if seeds is None else seeds
        obs, _ = self._envs.reset(seed=None if seeds is None else seeds[0])  # not all take a list
        self._seeds = None
        self._done[:] = False
        return obs

    def streams(self) -> None:  # type: ignore[override]
        """Nothing is known of them."""
