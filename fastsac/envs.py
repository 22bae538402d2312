"""EnvPool or Gymnasium behind one small vector-environment interface; the autoreset rule lives here.

Both libraries reset on the *next* step: at an episode's end the returned observation is the true last one, and the step
after it ignores the action, returns reward 0 and the reset observation. Those rows are marked `valid = False`: they are
not transitions and never enter the replay buffer or the statistics.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsac.config import Config
from fastsac.env_backends import Backend, EnvSpec, envpool_tasks, make_envpool, one_line
from fastsac.errors import EnvironmentFailure, EnvironmentMisfit, OtherShape, UsageError, WorkerError, did_you_mean
from fastsac.spaces import Bools, Floats, Spaces

#: observations [L + 1, O] of one environment's current episode, and the L actions [L, A] between them
Episode = tuple[Floats, Floats]


class Step(NamedTuple):
    """One step of every environment."""

    obs: Floats  # [N, O]; at an episode's end the true last observation
    reward: Floats  # [N]
    terminated: Bools  # [N]
    truncated: Bools  # [N]
    valid: Bools  # [N]; False where the environment was reset and the action ignored


class Raw(NamedTuple):
    """The last step or reset in the environments' own types and units; the next one may overwrite it."""

    obs: Any  # arrays, or nested dicts and tuples of them, with leading dimension N
    action: Any = None  # [N, *S], as sent
    reward: Any = None  # [N]


class VectorEnv:
    """N environments that are stepped together, with checks before and after every step."""

    def __init__(self, env_id: str, num_envs: int, backend_name: str, spaces: Spaces, backend: Backend) -> None:
        self.env_id = env_id
        self.spaces = spaces
        self.num_envs = num_envs
        self.backend_name = backend_name
        self._backend = backend
        self._steps = 0
        self._pending = False
        self._sent: Any = None
        self.raw = Raw(None)
        self._resets = np.zeros(num_envs, dtype=np.int64)
        self._elapsed = np.zeros(num_envs, dtype=np.int64)  # actions since each environment's last reset

    @property
    def own_spaces(self) -> tuple[Any, Any]:
        """The Gymnasium observation and action space of one environment."""
        return self._backend.spaces

    @property
    def render_fps(self) -> float:
        """Frames per second at the environment's own speed, or 30 if it does not say."""
        return float(self._backend.metadata.get("render_fps") or 30.0)

    def reset(self, seed: int | None = None) -> Floats:
        """Reset every environment and return the observations [N, O].

        Args:
            seed: random seed for the environments; None continues their random streams.
        """
        with self._naming_the_environment():
            if self._pending:  # an interrupted step: its result must not be mistaken for that of the reset
                self._backend.recv()
                self._pending = False
            seeds = None if seed is None else environment_seeds(seed, self.num_envs)
            self.raw = Raw(self._backend.reset(seeds))
            obs = self.spaces.flatten(self.raw.obs)
        self._resets = self._resets + 1 if seed is None else np.ones_like(self._resets)
        self._elapsed[:] = 0
        self._check_finite("observation", obs)
        return obs

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs besides the current episodes, for JSON."""
        with self._naming_the_environment():
            return {
                "backend": self.backend_name,
                "resets": self._resets.tolist(),
                "elapsed": self._elapsed.tolist(),
                "streams": self._backend.streams(),
            }

    def restore(self, state: Mapping[str, Any], episodes: Sequence[Episode], most_resets: int) -> str:
        """Bring environments that were just created from the same seed to the point where `state` was taken.

        Each environment is reset as often as before, and its current episode is played again. This is exact if steps
        draw no random numbers; Gymnasium environments may also draw them from their `np_random`. Every observation of
        these episodes is compared, bit for bit.

        Args:
            state: what `state` returned.
            episodes: the current episode of each environment.
            most_resets: the highest possible number of resets of an environment.

        Returns:
            An empty string, or why it failed. In that case the environments must be reset.
        """
        if self._backend.cannot_rewind:
            return self._backend.cannot_rewind
        if state["backend"].removesuffix("-async") != self.backend_name.removesuffix("-async"):
            return f"they ran in {state['backend']}, and now run in {self.backend_name}"
        resets, elapsed = np.array(state["resets"], dtype=np.int64), np.array(state["elapsed"], dtype=np.int64)
        lengths = [len(action) for _, action in episodes]
        if resets.shape != (self.num_envs,) or elapsed.tolist() != lengths:
            return "the checkpoint holds different ones"
        if min(resets) < 1 or max(resets) > most_resets:
            return "the checkpoint has an impossible number of resets"
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
        return "" if same else "playing them again gives different observations"

    def send(self, action: Floats) -> None:
        """Start a step with actions [N, A] in [-1, 1]; `recv` returns the result.

        Raises:
            ValueError: if the shape or dtype is wrong (EnvPool itself silently accepts it, or aborts).
            FastsacError: if an action is not finite.
        """
        shape = (self.num_envs, self.spaces.action_size)
        if action.shape != shape or action.dtype != np.float32:
            raise ValueError(f"actions must be float32 {list(shape)}, got {action.dtype} {list(action.shape)}")
        self._steps += 1
        self._check_finite("action", action)
        with self._naming_the_environment():
            self._sent = self.spaces.scale(action)
            self._backend.send(self._sent)
            self._pending = True

    def recv(self) -> Step:
        """Return the result of the step that `send` started.

        Raises:
            FastsacError: if the environment raised an exception, or an observation or a reward is not finite.
        """
        with self._naming_the_environment():
            self._pending = False
            obs, reward, terminated, truncated, valid = self._backend.recv()
            self.raw = Raw(obs, self._sent, reward)
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
        """Return a frame [H, W, 3] of the first environment, which must have been created with ``render=True``."""
        with self._naming_the_environment():
            return np.asarray(self._backend.render()[0], dtype=np.uint8)

    def close(self) -> None:
        """Close the environments."""
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
            kind = EnvironmentMisfit if isinstance(error, OtherShape) else EnvironmentFailure
            named = [] if isinstance(error, OtherShape | WorkerError) else [type(error).__name__]
            told = ": ".join([*named, one_line(error)] if str(error) else named)
            raise kind(f"{self.env_id} failed at step {self._steps}: {told}") from error


class OwnEnvs(NamedTuple):
    """Environments from Python: for training, and for evaluations."""

    envs: Any
    eval_envs: Any

    @classmethod
    def of(cls, envs: Any, eval_envs: Any) -> OwnEnvs:
        """Check the environments that the user passed.

        Raises:
            UsageError: if one is not an environment, or both are the same.
        """
        if envs is None and eval_envs is None:
            return cls(None, None)
        from fastsac.own_envs import Factory, describe_own

        if envs is None:
            raise UsageError("eval_envs needs envs, the environments for training")
        is_function = [each is not None and describe_own(each)[1] is None for each in (envs, eval_envs)]
        if is_function[0]:
            envs, eval_envs = Factory(envs, "envs"), None if eval_envs is envs else eval_envs
        elif getattr(eval_envs, "unwrapped", None) is envs.unwrapped:
            raise UsageError("eval_envs must differ from envs: evaluations would disturb the training episodes")
        return cls(envs, Factory(eval_envs, "eval_envs") if is_function[1] and eval_envs is not None else eval_envs)

    @property
    def for_evaluation(self) -> Any:
        """The environments for evaluations, or a function that creates new ones."""
        from fastsac.own_envs import describe_own

        if self.eval_envs is not None or self.envs is None:
            return self.eval_envs
        return self.envs if describe_own(self.envs)[1] is None else None

    def config(self, config: Config) -> Config:
        """Return the configuration for these environments.

        Raises:
            UsageError: if evaluations would disturb the training episodes.
        """
        if self.envs is None:
            return config
        from fastsac.own_envs import describe_own

        name, number = describe_own(self.envs)
        if config.eval_every and self.for_evaluation is None:
            raise UsageError(
                "evaluations would disturb the training episodes in envs: pass eval_envs, too, or a function "
                "that creates an environment; or set eval_every to 0"
            )
        return dataclasses.replace(config, env_id=name, env_backend="python", num_envs=number or config.num_envs)


def environment_seeds(seed: int, num_envs: int) -> list[int]:
    """Return one seed per environment, such that runs with neighbouring seeds share no random streams."""
    state = np.random.SeedSequence(seed).generate_state(num_envs)
    return [int(value) & 0x7FFFFFFF for value in state]


def make_envs(spec: EnvSpec, num_envs: int, seed: int, render: bool = False) -> VectorEnv:
    """Create N environments.

    Args:
        spec: the environment: an EnvPool or Gymnasium id, or `module:Id-v0` to import `module` first. The backend
            "auto" uses EnvPool if it has the id, otherwise Gymnasium.
        num_envs: N; ignored for environments from Python whose number is fixed.
        seed: random seed that determines the random streams of all environments.
        render: whether the environments will be rendered, off-screen.

    Raises:
        UsageError: if neither library has it (with near matches), its spaces are not supported, or it does not accept
            the user's arguments.
        FastsacError: if it cannot be created.
    """
    seeds, env_id = environment_seeds(seed, num_envs), spec.env_id
    render_mode = "rgb_array" if render else None
    known: list[str] = []
    if spec.backend in ("auto", "envpool"):
        known = envpool_tasks(needed=spec.backend == "envpool")
    with warnings.catch_warnings():
        # about float64 bounds cast to float32, and ids with a newer version: nothing that a user can change
        warnings.simplefilter("ignore")
        if spec.backend == "envpool" and env_id not in known:
            raise UsageError(f"EnvPool has no environment {env_id!r}{did_you_mean(env_id, known)}")
        if env_id in known:
            return VectorEnv(env_id, num_envs, "envpool", *make_envpool(spec, num_envs, seeds, render_mode))
        from fastsac.env_gymnasium import make_gymnasium
        from fastsac.own_envs import describe_own, make_own

        if spec.backend == "python":
            if spec.own is None:
                raise UsageError(
                    f"the environments {env_id} come from Python, and none were passed: "
                    "use SAC(config, envs=..., eval_envs=...) or SAC.load(run_dir, envs=..., eval_envs=...)"
                )
            num_envs = describe_own(spec.own)[1] or num_envs
            seeds = environment_seeds(seed, num_envs)
            return VectorEnv(env_id, num_envs, "python", *make_own(spec, num_envs, seeds, render))
        name = "gymnasium" if spec.backend == "auto" else spec.backend
        return VectorEnv(env_id, num_envs, name, *make_gymnasium(spec, num_envs, seeds, render_mode, known))
