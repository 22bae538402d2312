"""Environments from Python: one, a vector environment, or a function that creates one."""

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
    """Use environments from Python: one, a vector environment, or a function that creates one.

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
        raise UsageError(f"{env_id} could not be created: {type(error).__name__}: {one_line(error)}") from error
    _refuse_blind(envs, env_id, render)
    spaces = read_spaces(env_id, envs.single_observation_space, envs.single_action_space)
    return spaces, GymnasiumEnvs(envs, seeds, borrowed)


def _refuse_blind(envs: Any, env_id: str, render: bool) -> None:
    if render and envs.render_mode != "rgb_array":
        raise UsageError(f"{env_id} was created with render_mode {envs.render_mode!r}, but a video needs 'rgb_array'")


class Factory:
    """A user's function that creates an environment, checked to return a new one on every call."""

    def __init__(self, make: Callable[[], Any], argument: str) -> None:
        """Store the function, and the name of the argument it was passed as."""
        self._make, self._argument = make, argument
        self.__name__ = str(getattr(make, "__name__", type(make).__name__))
        self._made: list[weakref.ref[Any]] = []

    def __call__(self) -> Any:
        """Create an environment; UsageError if it is not one, or was returned before."""
        env = self._make()
        if not isinstance(env, gymnasium.Env):
            raise UsageError(f"{self._argument} must return a gymnasium.Env, got {env!r}")
        self._made = [reference for reference in self._made if reference() is not None]
        if any(reference() is env.unwrapped for reference in self._made):
            raise UsageError(f"{self.__name__} returned the same environment twice: it must create a new one each time")
        self._made.append(weakref.ref(env.unwrapped))
        return env


def describe_own(envs: object) -> tuple[str, int | None]:
    """Return the name of environments from Python, and their number: None for a function, which creates any number.

    Raises:
        UsageError: if they are not environments.
    """
    if not isinstance(envs, gymnasium.Env | gymnasium.vector.VectorEnv) and not callable(envs):
        raise UsageError(
            f"envs must be a gymnasium.Env, a gymnasium.vector.VectorEnv or a function returning an Env, got {envs!r}"
        )
    if not isinstance(envs, gymnasium.Env | gymnasium.vector.VectorEnv):
        return str(getattr(envs, "__name__", type(envs).__name__)), None
    name = type(envs.unwrapped).__name__ if envs.spec is None else envs.spec.id
    return name, 1 if isinstance(envs, gymnasium.Env) else envs.num_envs


class _OwnVector(GymnasiumEnvs):
    """The user's own vector environment, whose single environments cannot be accessed."""

    cannot_rewind = "the state of your own vector environment cannot be restored"

    def reset(self, seeds: Sequence[int] | None) -> Any:
        seeds = self._seeds if seeds is None else seeds
        obs, _ = self._envs.reset(seed=None if seeds is None else seeds[0])  # not all accept a list
        self._seeds = None
        self._done[:] = False
        return obs

    def streams(self) -> None:  # type: ignore[override]
        """Their state is unknown."""
