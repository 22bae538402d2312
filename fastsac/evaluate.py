"""Evaluation of a policy in separate environments, and video recording."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsac.env_backends import EnvSpec
from fastsac.envs import Step, VectorEnv, make_envs
from fastsac.errors import FastsacError, UsageError, told
from fastsac.spaces import Bools, Floats, Spaces

LONGEST_EPISODE = 100_000  # steps
#: obs [N, O] -> action [N, A] in [-1, 1]
Policy = Callable[[Floats], Floats]
#: the environments; their last step, or None after the reset; and which of them [N] play an episode that counts
Watch = Callable[[VectorEnv, Step | None, Bools], None]


class Evaluation(NamedTuple):
    """Undiscounted returns and lengths in steps, one entry per episode."""

    returns: NDArray[np.float64]
    """In the environment's own rewards."""
    lengths: NDArray[np.int64]
    """In steps."""

    def summary(self) -> dict[str, Any]:
        """Return what `fastsac eval --json` prints."""
        return {
            "return_mean": float(self.returns.mean()),
            "return_std": float(self.returns.std()),
            "returns": self.returns.tolist(),
            "lengths": self.lengths.tolist(),
        }


def evaluate(
    policy: Policy,
    envs: VectorEnv,
    episodes: int,
    should_stop: Callable[[], bool] | None = None,
    seed: int | None = None,
    before_step: Callable[[], None] | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """Play complete episodes, starting with a reset.

    The number of episodes of each environment is fixed in advance: taking those that end first would favour short
    episodes.

    Args:
        policy: obs [N, O] -> action [N, A].
        envs: the environments, which are reset first.
        episodes: number of episodes, over all environments.
        should_stop: called before every step; if it returns True, only the episodes that have ended are returned.
        seed: random seed for the environments; None continues their random streams.
        before_step: called before every step, for rendering.
        watch: called after the reset and after every step, for recording.

    Raises:
        FastsacError: if an episode ends neither by itself nor by a time limit.
    """
    share = np.full(envs.num_envs, episodes // envs.num_envs)
    share[: episodes % envs.num_envs] += 1
    played = np.zeros_like(share)
    returns, lengths = [], []
    episode_return, episode_length = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=np.int64)
    obs = envs.reset(seed)
    if watch is not None:
        watch(envs, None, played < share)
    while (played < share).any() and not (should_stop is not None and should_stop()):
        if episode_length[played < share].max() >= LONGEST_EPISODE:
            raise FastsacError(
                f"{envs.env_id}: an episode has not ended after {LONGEST_EPISODE:,} steps, so it cannot be evaluated: "
                "give the environment a time limit (max_episode_steps), or disable evaluation (--eval-every 0)"
            )
        if before_step is not None:
            before_step()
        envs.send(policy(obs))
        step = envs.recv()
        obs = step.obs
        if watch is not None:
            watch(envs, step, played < share)
        episode_return += np.where(step.valid, step.reward, 0.0)
        episode_length += step.valid
        for index in np.flatnonzero((step.terminated | step.truncated) & step.valid):
            if played[index] < share[index]:
                played[index] += 1
                returns.append(float(episode_return[index]))
                lengths.append(int(episode_length[index]))
            episode_return[index], episode_length[index] = 0.0, 0
    return Evaluation(np.array(returns), np.array(lengths, dtype=np.int64))


def record_video(policy: Policy, envs: VectorEnv, path: Path) -> Evaluation:
    """Play one episode in environments created with ``render=True`` and save its frames as .mp4 or .gif.

    Raises:
        UsageError: for any other file type.
        FastsacError: if it cannot be rendered or written; no partial file is left behind.
    """
    import imageio

    check_video_path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    options: dict[str, Any] = {"duration": 1000.0 / envs.render_fps}
    if path.suffix.lower() == ".mp4":
        # H.264 needs even sides; by default, the encoder would rescale the frames to multiples of 16
        options = {"fps": envs.render_fps, "macro_block_size": 2}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # fail before the episode is played
        writer: Any = imageio.get_writer(temporary, **options)
        with writer:
            result = evaluate(policy, envs, episodes=1, before_step=lambda: writer.append_data(envs.render()))
        temporary.replace(path)
    except FastsacError:
        raise
    except OSError as error:
        raise FastsacError(f"cannot write the video {path}: {error.strerror or error}") from error
    except Exception as error:  # of the encoder: frames that change their size, for instance
        raise FastsacError(f"cannot write the video {path}: {told(error, __file__)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return result


class Evaluator:
    """Evaluates a policy in its own environments, which it keeps."""

    def __init__(self, spec: EnvSpec, spaces: Spaces) -> None:
        """Store the arguments; `spaces` are those of the policy. Environments are created later."""
        self._spec, self._spaces, self._made_for = spec, spaces, 0
        self._envs: VectorEnv | None = None

    def evaluate(
        self,
        policy: Policy,
        episodes: int,
        seed: int,
        should_stop: Callable[[], bool] | None = None,
        watch: Watch | None = None,
    ) -> Evaluation:
        """Play episodes that depend only on the policy and the seed; see the function `evaluate`.

        Raises:
            UsageError: if `episodes` is less than 1, or the environments do not fit the policy.
        """
        if episodes < 1:
            raise UsageError(f"an evaluation needs at least 1 episode, got {episodes}")
        num_envs = min(episodes, 32)
        if self._envs is not None and num_envs == self._made_for:
            return evaluate(policy, self._envs, episodes, should_stop, seed, watch=watch)
        self.close()
        self._made_for = num_envs  # the number of environments from Python is fixed
        self._envs = self._make(num_envs, seed)
        return evaluate(policy, self._envs, episodes, should_stop, watch=watch)

    def record_video(self, policy: Policy, path: Path, seed: int) -> None:
        """Play one episode and save it; see the function `record_video`."""
        envs = self._make(1, seed, render=True)
        try:
            record_video(policy, envs, path)
        finally:
            envs.close()

    def refuse_misfits(self) -> None:
        """Raise UsageError unless the environments can be created and fit the policy."""
        self._make(1, 0).close()

    def _make(self, num_envs: int, seed: int, render: bool = False) -> VectorEnv:
        if self._spec.backend == "python" and self._spec.own is None:
            raise UsageError(
                f"the environments {self._spec.env_id} come from Python, and none were passed for evaluations: "
                "use SAC(config, envs=..., eval_envs=...) or SAC.load(run_dir, envs=..., eval_envs=...)"
            )
        envs = make_envs(self._spec, num_envs, seed, render)
        if not self._spaces.same_as(envs.spaces):
            envs.close()
            own = self._spec.own is not None
            raise UsageError(
                f"{'the evaluation environments have' if own else f'{self._spec.env_id} has'} different "
                "observations or actions than this agent was trained with"
            )
        return envs

    def close(self) -> None:
        """Close the environments."""
        if self._envs is not None:
            self._envs.close()
            self._envs = None


def check_video_path(path: Path) -> None:
    """Raise UsageError unless the file's name ends in .mp4 or .gif."""
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise UsageError(f"--video writes .mp4 or .gif, not {path.name!r}")
