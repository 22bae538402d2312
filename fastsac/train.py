"""The agent and its one training loop."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsac import checkpoint
from fastsac.config import Config
from fastsac.envs import Floats, Spaces, Step, VectorEnv, make_envs
from fastsac.errors import FastsacError, UsageError
from fastsac.estimators import choose
from fastsac.evaluate import Evaluation, evaluate, record_video
from fastsac.learner import ThreadTrial, choose_engine, make_learner, precisions, resolve_device, set_up_torch
from fastsac.logger import EpisodeStatistics, Logger
from fastsac.replay import Replay
from fastsac.run_dir import config_from_dict, refuse_if_taken, write_config
from fastsac.signals import stop_signals

# children of the one seed; the environments of a resumed run and of evaluations need streams of their own
_ENVS, _LEARNER, _REPLAY, _EXPLORATION, _EVALUATION = range(5)


class SAC:
    """Soft Actor-Critic: an environment, a replay and a learner."""

    def __init__(self, config: Config, spaces: Spaces | None = None) -> None:
        """Create the learner and, unless `spaces` are known from a checkpoint, the environments.

        Raises:
            UsageError: if the configuration cannot be served on this machine.
        """
        choose(config)  # refuses what does not go together before anything is started
        self.config = config
        self.device = resolve_device(config.device)
        _, self.engine_reason = choose_engine(config, self.device)
        precisions(config, self.device)
        self._envs: VectorEnv | None = None
        self._eval_envs: VectorEnv | None = None
        self.steps = 0
        self.spaces: Spaces = spaces  # type: ignore[assignment]
        if spaces is None:
            self.spaces = self.envs.spaces
        sizes = self.spaces.obs_size, self.spaces.action_size
        self.setup = set_up_torch(config, self.device, *sizes)
        resolved = dataclasses.replace(config, precision=self.setup.precision)
        self.learner = make_learner(resolved, *sizes, self.device, seed=_child_seed(config.seed, _LEARNER))
        measures = self.device.type == "cpu" and config.num_threads == 0
        self._trial = ThreadTrial(config.num_envs, config.utd) if measures else None
        self._replay: Replay | None = None
        self._exploration = np.random.default_rng(_child_seed(config.seed, _EXPLORATION))
        self._warm_up_left = config.learning_starts
        self._updates_due = 0.0
        self.time_s = 0.0
        self.stopped_by_signal = False
        self.last_evaluation: Evaluation | None = None
        self._run_dirs: set[Path] = set()

    @property
    def updates(self) -> int:
        """Gradient updates made."""
        return self.learner.updates

    @property
    def engine(self) -> str:
        """The engine that carries out the updates."""
        return self.learner.engine

    @property
    def num_threads(self) -> int:
        """PyTorch's threads on the CPU."""
        return self.setup.num_threads

    @property
    def envs(self) -> VectorEnv:
        """The training environments, created when they are first needed."""
        if self._envs is None:
            config = self.config
            seed = _child_seed(config.seed, _ENVS, self.steps)
            envs = make_envs(config.env_id, config.num_envs, seed, config.env_backend)
            if self.spaces is not None and not self.spaces.same_as(envs.spaces):
                envs.close()
                raise UsageError(f"{config.env_id} has other observations or actions than this agent was trained with")
            self._envs = envs
        return self._envs

    @property
    def replay(self) -> Replay:
        """The replay, allocated when it is first needed."""
        if self._replay is None:
            generator = torch.Generator(self.device).manual_seed(_child_seed(self.config.seed, _REPLAY, self.steps))
            sizes = self.spaces.obs_size, self.spaces.action_size
            self._replay = Replay(self.config.buffer_size, self.config.num_envs, *sizes, self.device, generator)
        return self._replay

    def learn(
        self, total_steps: int | None = None, run_dir: str | os.PathLike[str] | None = None, progress: bool = False
    ) -> None:
        """Train until `steps` reaches `total_steps`; a later call with a larger number goes on.

        SIGINT or SIGTERM finishes the current step, saves a checkpoint (with a `run_dir`) and returns.

        Args:
            total_steps: environment steps over all environments, counted from the very start; the configuration's
                number by default.
            run_dir: a new directory for configuration, metrics and checkpoints; None writes nothing.
            progress: whether a progress display goes to standard error.

        Raises:
            UsageError: if the replay does not fit, or `run_dir` already holds another run.
            FastsacError: if an environment fails or a file cannot be written.
        """
        if total_steps is not None:
            self.config = dataclasses.replace(self.config, total_steps=total_steps)
        config, total_steps = self.config, self.config.total_steps
        obs = self._begin()
        directory = None if run_dir is None else Path(run_dir)
        episodes, metrics = EpisodeStatistics(config.num_envs), dict[str, Tensor]()
        with (
            stop_signals() as stop,  # before anything is written
            Logger(directory and self._claim(directory), total_steps, self.steps, self.time_s, progress) as logger,
        ):
            if self.updates and self._warm_up_left:
                logger.say(f"the replay buffer is empty: {self._warm_up_left} steps refill it before the next update")
            logger.start_rates(self.steps, self.updates)
            if self._trial is not None:
                self._trial.begin_turn()
            reached = saved = False
            while self.steps < total_steps and not stop and not reached:
                before, started = self.steps, time.perf_counter()
                obs, step, new_metrics = self._step(obs)
                if self._trial is not None and self.updates and not self._warm_up_left:
                    self._try_threads(logger, time.perf_counter() - started, self.steps - before)
                metrics |= new_metrics
                episodes.add(step)
                done = self.steps >= total_steps
                if done or self._crossed(config.log_every, before):
                    logger.log(self.steps, self.updates, {**metrics, **episodes.take()})
                if config.eval_every and (done or self._crossed(config.eval_every, before)):
                    reached = self._evaluate_and_log(logger, stop)
                self.time_s = logger.time_s
                saved = self._crossed(config.checkpoint_every, before)
                if directory and saved:
                    self.save(directory)
            if self._trial is not None:  # it goes on with the next call
                torch.set_num_threads(self.num_threads)
            self.stopped_by_signal = self.steps < total_steps and not reached
            if directory and not saved:
                self.save(directory)

    def _begin(self) -> Tensor:
        """Reset the environments; return their observations [N, O] on the device."""
        if self.replay.size == 0:
            self._warm_up_left = self.config.learning_starts
        obs = torch.from_numpy(self.envs.reset()).to(self.device)
        self.replay.begin(obs)
        return obs

    def _step(self, obs: Tensor) -> tuple[Tensor, Step, dict[str, Tensor]]:
        """Step every environment once and make the updates that are due; return what follows obs [N, O]."""
        action = self._explore(obs)
        self.envs.send(action.cpu().numpy())
        # the environments step while the learner updates
        due = int(self._updates_due) if self._warm_up_left == 0 and self.replay.size else 0
        self._updates_due -= due
        metrics = self.learner.update(self.replay, due)
        step = self.envs.recv()
        next_obs = torch.from_numpy(step.obs).to(self.device)
        reward = torch.from_numpy(step.reward).to(self.device)
        terminated = torch.from_numpy(step.terminated).to(self.device)
        self.replay.add(action, reward, terminated, next_obs, step.valid)
        new_steps = int(step.valid.sum())
        self.steps += new_steps
        warming_up = min(new_steps, self._warm_up_left)
        self._warm_up_left -= warming_up
        self._updates_due += self.config.utd * (new_steps - warming_up)
        return next_obs, step, metrics

    def _try_threads(self, logger: Logger, seconds: float, steps: int) -> None:
        fastest = self._trial.record(seconds, steps) if self._trial is not None else None
        if fastest is None:
            return
        if fastest != self.num_threads:
            logger.say(f"threads: {fastest}, which is faster than {self.num_threads} while the environments run")
        self.setup, self._trial = self.setup._replace(num_threads=fastest), None

    def _explore(self, obs: Tensor) -> Tensor:
        if self._warm_up_left == 0 or self.updates > 0:
            return self.learner.act(obs)
        shape = (self.config.num_envs, self.spaces.action_size)
        return torch.from_numpy(self._exploration.uniform(-1.0, 1.0, shape).astype(np.float32)).to(self.device)

    def _crossed(self, interval: int, before: int) -> bool:
        return interval > 0 and self.steps // interval > before // interval

    def _evaluate_and_log(self, logger: Logger, stop: list[int]) -> bool:
        """Evaluate the deterministic policy, unless a signal stops it; return whether it reached the target."""
        self.last_evaluation = None
        evaluation = self.evaluate(self.config.eval_episodes, should_stop=lambda: bool(stop))
        if len(evaluation.returns) < self.config.eval_episodes:
            logger.say("the evaluation was interrupted")
            return False
        self.last_evaluation = evaluation
        mean = float(evaluation.returns.mean())
        spread = float(evaluation.returns.std())
        logger.log(self.steps, self.updates, {"eval_return": mean, "eval_return_std": spread})
        logger.start_rates(self.steps, self.updates)
        return self.config.target_return is not None and mean >= self.config.target_return

    def evaluate(
        self, episodes: int, seed: int | None = None, should_stop: Callable[[], bool] | None = None
    ) -> Evaluation:
        """Play episodes with the deterministic policy on environments of their own (see `fastsac.evaluate`)."""
        if episodes < 1:
            raise UsageError(f"an evaluation needs at least 1 episode, got {episodes}")
        if self._eval_envs is None or seed is not None:
            if self._eval_envs is not None:
                self._eval_envs.close()
            seed = _child_seed(self.config.seed, _EVALUATION) if seed is None else seed
            num_envs = min(episodes, 32)
            self._eval_envs = make_envs(self.config.env_id, num_envs, seed, self.config.env_backend)
        return evaluate(self._deterministic, self._eval_envs, episodes, should_stop)

    def record_video(self, path: str | os.PathLike[str], seed: int = 0) -> None:
        """Play one episode with the deterministic policy and write it as .mp4 or .gif (see `fastsac.evaluate`)."""
        envs = make_envs(self.config.env_id, 1, seed, self.config.env_backend, render=True)
        try:
            record_video(self._deterministic, envs, Path(path))
        finally:
            envs.close()

    def close(self) -> None:
        """Give the environments' resources back; they are created anew if they are needed again."""
        for envs in (self._envs, self._eval_envs):
            if envs is not None:
                envs.close()
        self._envs = self._eval_envs = None

    def _deterministic(self, obs: Floats) -> Floats:
        return self.learner.act(torch.from_numpy(obs).to(self.device), deterministic=True).cpu().numpy()

    def predict(self, obs: Any, deterministic: bool = True) -> NDArray[np.float32]:
        """Return actions in the environment's own units.

        Args:
            obs: one observation or a batch of them, as the environment returns it: an array, or a dict of arrays.
            deterministic: the squashed mean, or a sample.

        Returns:
            [A] for one observation, [N, A] for a batch.

        Raises:
            ValueError: if the observation's shape does not fit.
        """
        key, shape = next(iter(self.spaces.obs_shapes.items()))
        if key and (not isinstance(obs, Mapping) or key not in obs):
            raise ValueError(f"the observation must be a dict with the keys {list(self.spaces.obs_shapes)}")
        single = np.asarray(obs[key] if key else obs).ndim == len(shape)
        if single:
            obs = {k: np.asarray(v)[None] for k, v in obs.items()} if key else np.asarray(obs)[None]
        flat = torch.from_numpy(self.spaces.flatten(obs)).to(self.device)
        action = self.spaces.scale(self.learner.act(flat, deterministic).cpu().numpy())
        return action[0] if single else action

    def _claim(self, directory: Path) -> Path:
        """Make the run directory this agent's, unless it is another's."""
        if directory.resolve() not in self._run_dirs:
            refuse_if_taken(directory)
        write_config(directory, self.config)
        self._run_dirs.add(directory.resolve())
        return directory

    def save(self, run_dir: str | os.PathLike[str]) -> Path:
        """Write a checkpoint into `run_dir` (see `fastsac.checkpoint`) and return its directory.

        Raises:
            UsageError: if the directory holds another run.
            FastsacError: if it cannot be written; what was saved before stays.
        """
        directory = self._claim(Path(run_dir))
        tensors, counters = self.learner.state()
        groups = {"learner": tensors}
        state = {
            "config": dataclasses.asdict(self.config),
            "steps": self.steps,
            "time_s": self.time_s,
            "updates_due": self._updates_due,
            "warm_up_left": self._warm_up_left,
            "exploration": self._exploration.bit_generator.state,
            "learner": counters,
            "obs_shapes": self.spaces.obs_shapes,
            "action_low": self.spaces.action_low.tolist(),
            "action_high": self.spaces.action_high.tolist(),
        }
        if self.config.checkpoint_replay and self._replay is not None:
            groups["replay"], state["replay"] = self._replay.state()
        path = checkpoint.step_directory(directory, self.steps)
        checkpoint.save_checkpoint(path, groups, state)
        checkpoint.prune_checkpoints(directory, keep=2)
        return path

    @classmethod
    def load(cls, run_dir: str | os.PathLike[str], config: Config | None = None) -> SAC:
        """Load the newest checkpoint of a run.

        Args:
            run_dir: what `save` or a training run wrote.
            config: takes the place of the stored configuration, where its networks still fit.

        Raises:
            FastsacError: if there is none, or it is damaged.
            UsageError: if it does not fit the configuration.
        """
        directory = Path(run_dir)
        path = checkpoint.latest_checkpoint(directory)
        _, state = checkpoint.load_checkpoint(path, groups=())
        try:
            config = config or config_from_dict(state["config"])
            shapes = {key: tuple(shape) for key, shape in state["obs_shapes"].items()}
            bounds = (np.array(state[key], dtype=np.float32) for key in ("action_low", "action_high"))
            agent = cls(config, Spaces(shapes, *bounds))
            agent.steps, agent.time_s = state["steps"], state["time_s"]
            agent._updates_due, agent._warm_up_left = state["updates_due"], state["warm_up_left"]
            agent._exploration.bit_generator.state = state["exploration"]
            with_replay = config.checkpoint_replay and "replay" in state
            groups, _ = checkpoint.load_checkpoint(path, groups=("learner", "replay") if with_replay else ("learner",))
            agent.learner.load_state(groups["learner"], state["learner"])
            if with_replay:
                agent.replay.load_state(groups["replay"], state["replay"])
        except (KeyError, TypeError, ValueError) as error:
            raise FastsacError(f"{path} is not a checkpoint of this version: {error!r}") from error
        agent._run_dirs.add(directory.resolve())
        return agent


def _child_seed(seed: int, *path: int) -> int:
    return int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])
