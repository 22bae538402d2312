"""The training environments, the replay buffer that they fill, and the progress of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.dataset import Dataset, deal, fill
from fastsac.env_backends import EnvSpec
from fastsac.envs import VectorEnv, make_envs
from fastsac.errors import EnvironmentFailure, UsageError
from fastsac.logger import EpisodeStatistics, Logger
from fastsac.normalize import Normalizer
from fastsac.progress import Progress
from fastsac.ranks import Ranks
from fastsac.replay import Replay
from fastsac.spaces import Floats, Spaces
from fastsac.transfer import to_device

#: children of the run's seed; new episodes of a resumed run and evaluations need their own random streams
ENVS, LEARNER, REPLAY, EXPLORATION, EVALUATION, RANK = range(6)
#: most resets of an environment that are repeated to restore its state: they take minutes
MOST_RESETS = 10_000_000


def child_seed(seed: int, *path: int) -> int:
    """Derive a seed from a run's seed."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])


class Rollout:
    """Steps the environments and writes the replay buffer; both are created when they are first needed."""

    def __init__(
        self, config: Config, spec: EnvSpec, device: torch.device, spaces: Spaces | None, ranks: Ranks | None = None
    ) -> None:
        """Create the environments, unless `spaces` are known from a checkpoint.

        With several `ranks`, the steps of all ranks are counted.

        Raises:
            UsageError: if the environments are not supported.
        """
        self.config, self._spec, self.device = config, spec, device
        self.progress = Progress(
            env_seed=child_seed(config.seed, ENVS, 0),
            exploration=np.random.default_rng(child_seed(config.seed, EXPLORATION)),
            warm_up_left=config.learning_starts,
            episodes=EpisodeStatistics(config.num_envs),
        )
        self._ranks = Ranks() if ranks is None else ranks
        self._envs: VectorEnv | None = None
        self._replay: Replay | None = None
        self.normalizer: Normalizer | None = None  # the learner's, which sees every step
        self._cut = False  # a step or reset was interrupted: the environments' state is unknown
        self._obs: Tensor | None = None  # [N, O] to continue from; None during a step or after an interrupted one
        self.stored_envs: dict[str, Any] | None = None  # the environments' state in the checkpoint that was loaded
        self._begun = False  # whether the environments' episodes have started
        self.seen: str | None = None  # the dataset that the stored normalisation has seen
        self.filled = ""  # what the replay buffer was filled with, in words
        self.spaces: Spaces = spaces  # type: ignore[assignment]
        if spaces is None:
            self.spaces = self.envs.spaces

    @property
    def envs(self) -> VectorEnv:
        """The training environments, created when they are first needed."""
        if self._envs is None:
            self._envs = self._make(self.config.num_envs, self.progress.env_seed)
        return self._envs

    def refuse_misfits(self) -> None:
        """Raise UsageError unless the environments can be created and fit the spaces."""
        self._make(1, 0).close()

    def _make(self, num_envs: int, seed: int) -> VectorEnv:
        envs = make_envs(self._spec, num_envs, seed)
        if self.spaces is not None and not self.spaces.same_as(envs.spaces):
            envs.close()
            raise UsageError(
                f"{self.config.env_id} has different observations or actions than this agent was trained with"
            )
        return envs

    @property
    def replay(self) -> Replay:
        """The replay buffer, allocated when it is first needed."""
        if self._replay is None:
            generator = torch.Generator(self.device).manual_seed(
                child_seed(self.config.seed, REPLAY, self.progress.steps)
            )
            sizes = self.spaces.obs_size, self.spaces.action_size
            config = self.config
            shape = config.buffer_size, config.num_envs, *sizes
            self._replay = Replay(*shape, self.device, generator, config.n_step, config.gamma)
        return self._replay

    def fill(self) -> bool:
        """Load the dataset that `offline` names into the replay buffer, if the buffer is still empty.

        Returns:
            False if the dataset did not fit completely, otherwise True.

        Raises:
            UsageError: if the dataset cannot be read, or does not fit the environment.
        """
        name, replay, ranks = self.config.offline, self.replay, self._ranks
        if name is None or replay.newest:
            return True
        dataset = Dataset(name, self.config.env_id, self.spaces)
        if dataset.num_episodes < ranks.size:
            raise UsageError(
                f"the Minari dataset {name} has {dataset.num_episodes} episodes, but each of {ranks.size} ranks needs 1"
            )
        normalizer = self.normalizer
        if normalizer is not None and (not normalizer.active or (self.seen == name and not normalizer.fresh)):
            normalizer = None
        indices, delays = dataset.arrange(replay.num_rows, replay.num_envs, ranks.rank, ranks.size)
        rows = deal(dataset.episodes(indices), delays, self.spaces.obs_size, self.spaces.action_size)
        before = {} if normalizer is None else {name: each.clone() for name, each in normalizer.state().items()}
        try:
            fill(replay, rows, normalizer)
            if not replay.size:
                raise UsageError(f"the Minari dataset {name} has no transitions")
        except BaseException:  # a partly filled buffer must not count as complete
            self._replay = None
            if normalizer is not None:
                normalizer.load_state(before)
            raise
        kept, total = ranks.sum(replay.size), dataset.num_steps
        number = f"the newest {kept:,} of {total:,}" if kept < total else f"{kept:,}"
        other = f" ({dataset.env_id})" if dataset.env_id not in ("", self.config.env_id.rpartition(":")[2]) else ""
        self.filled = f"offline data: {number} transitions of {dataset.num_episodes:,} episodes from {name}{other}"
        return kept == total

    def begin(self, updates: int, logger: Logger) -> Tensor:
        """Return the observations [N, O] to continue from, on the device: of the current episodes, or of new ones.

        Args:
            updates: number of updates so far.
            logger: warns the user if the current episodes cannot be resumed.
        """
        obs, self._obs = self._obs, None
        if obs is not None:
            return obs
        if self._cut:
            self.new_episodes()
        problem = ""
        if self.stored_envs is not None:
            stored, self.stored_envs = self.stored_envs, None
            if not (problem := self._restore(stored)):
                self._begun = True
                return self.replay.newest_obs()
            logger.warn(f"the current episodes cannot be resumed ({problem}): starting new ones")
            self.new_episodes()
        self.progress.episodes.restart()
        if self.replay.size == 0:
            steps = self.progress.warm_up_left = self.config.learning_starts
            if updates and steps:
                logger.say(
                    f"the replay buffer is empty: {steps} steps in new episodes refill it before updates continue"
                )
        self._cut = True
        obs = self.replay.begin(self.envs.reset())
        self._cut, self._begun = False, True
        if self.normalizer is not None and self.normalizer.active:
            self.normalizer.begin(obs)
        return obs

    def _restore(self, stored: dict[str, Any]) -> str:
        """Restore the environments' state from the checkpoint; return why that fails, or an empty string."""
        episodes = [self.replay.episode(index, length) for index, length in enumerate(stored["elapsed"])]
        found = [episode for episode in episodes if episode is not None]
        if len(found) < len(episodes):
            return "one of them is no longer completely in the replay buffer"
        try:
            return self.envs.restore(stored, found, most_resets=min(self.replay.newest, MOST_RESETS))
        except EnvironmentFailure as error:
            return str(error)

    def new_episodes(self, tries: int = 0) -> None:
        """Make the next call of `learn` start new episodes in newly created environments.

        Args:
            tries: a different number gives different episodes.
        """
        path = (self.progress.steps, tries) if tries else (self.progress.steps,)
        self.progress.env_seed = child_seed(self.config.seed, ENVS, *path)
        self.stored_envs = self._obs = None
        self._cut = self._begun = False
        if self._envs is not None:
            self._envs.close()
            self._envs = None

    def explore(self) -> Floats:
        """Return uniformly random actions [N, A]."""
        shape = (self.config.num_envs, self.spaces.action_size)
        return self.progress.exploration.uniform(-1.0, 1.0, shape).astype(np.float32)

    def send(self, action: Floats) -> None:
        """Start a step with actions [N, A] in [-1, 1]."""
        self._cut = True
        self.envs.send(action)

    def recv(self, action: Tensor | Floats) -> Tensor:
        """Finish the step that was started with this action, which may still be on the device.

        Returns:
            The next observations [N, O], on the device.
        """
        step = self.envs.recv()
        self._cut = False
        next_obs = self.replay.add(action, step.reward, step.terminated, step.obs, step.valid)
        progress, new_steps = self.progress, self._ranks.sum(int(step.valid.sum()))
        progress.episodes.add(step)
        progress.steps += new_steps
        warming_up = min(new_steps, progress.warm_up_left)
        progress.warm_up_left -= warming_up
        progress.updates_due += self._utd() * (new_steps - warming_up)
        if self.normalizer is not None and self.normalizer.active:
            self.normalizer.add(next_obs, *to_device([step.reward, step.valid], self.device))
        return next_obs

    def _utd(self) -> float:
        """Return the updates per step, which may change linearly during training."""
        first, last = self.config.utd, self.config.utd_end
        if last is None:
            return first
        return first + (last - first) * min(self.progress.steps / self.config.total_steps, 1.0)

    def pause(self, obs: Tensor) -> None:
        """Keep the observations for the next `begin`."""
        self._obs = obs

    def close(self) -> None:
        """Close the environments; they are created again, in the same state, when they are needed."""
        if self._envs is None:
            return
        if self._obs is not None:
            try:
                stored = self._envs.state()
            except EnvironmentFailure:  # an environment has died, and cannot be restored
                self.new_episodes()
                return
            self.stored_envs, self._obs = stored, None
        self._envs.close()
        self._envs = None

    def envs_state(self) -> dict[str, Any] | None:
        """Return the environments' state for a checkpoint that holds the replay buffer."""
        if self.stored_envs is not None:  # not restored yet
            return self.stored_envs
        return self._envs.state() if self._envs is not None and self._begun else None
