"""The agent and its one training loop."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsac import checkpoint, shared_policy
from fastsac.callbacks import Callback, Hooks
from fastsac.config import Config
from fastsac.divergence import read_finite
from fastsac.env_backends import EnvSpec
from fastsac.envs import OwnEnvs, VectorEnv
from fastsac.errors import FastsacError, UsageError
from fastsac.estimators import choose
from fastsac.evaluate import Evaluation, Evaluator, Watch
from fastsac.learner import (
    ThreadTrial,
    choose_engine,
    make_learner,
    precisions,
    refuse_other_networks,
    resolve_device,
    self_check,
    set_up_torch,
)
from fastsac.logger import Logger
from fastsac.metrics import read_scalars
from fastsac.own_networks import OwnNetworks
from fastsac.progress import Progress
from fastsac.ranks import Ranks, for_ranks
from fastsac.replay import Replay
from fastsac.rollout import EVALUATION, EXPLORATION, LEARNER, RANK, Rollout, child_seed
from fastsac.run_dir import CONFIG, VIDEO, config_from_dict, give_up, newest_step
from fastsac.saver import Contents, Ours, Saver, first_row
from fastsac.signals import BUSY, Heartbeat, stop_signals
from fastsac.spaces import Floats, Spaces
from fastsac.stored_state import refuse_other_settings, refuse_other_state
from fastsac.trackers import BY_DEFAULT, Tracking
from fastsac.transfer import to_device, to_host

if TYPE_CHECKING:
    from fastsac.export import Exported


class SAC:
    """Soft Actor-Critic: environments, a replay buffer and a learner."""

    def __init__(
        self,
        config: Config,
        spaces: Spaces | None = None,
        *,
        envs: Any = None,
        eval_envs: Any = None,
        actor: nn.Module | None = None,
        critic: nn.Module | None = None,
    ) -> None:
        """Create the learner and, unless `spaces` are known from a checkpoint, the environments.

        Args:
            config: the run's settings. With `envs`, `env_backend` becomes "python" and `env_id` their name.
            spaces: the spaces stored in a checkpoint.
            envs: a function that creates a `gymnasium.Env`, called `config.num_envs` times and also for evaluations; or
                one `Env`; or a `gymnasium.vector.VectorEnv` with autoreset mode `NEXT_STEP`. The latter two are
                not closed, and set `config.num_envs`.
            eval_envs: separate environments for evaluations, of the same kinds.
            actor: your own module, obs [B, O] -> mean and log_std of a Gaussian before squashing, each [B, A]. It
                is moved to the device and trained in place.
            critic: your own module, obs [B, O] and action [B, A] in [-1, 1] -> q [E, B], where E is
                `config.num_critics`. The target critics are a copy of it.

        Raises:
            UsageError: if this machine does not support the configuration, or a network does not fit.
        """
        if not isinstance(config, Config):
            raise UsageError(f"config must be a fastsac.Config, got {config!r}")
        choose(config)  # refuses invalid combinations before anything is started
        self._own = own = OwnNetworks(actor, critic)
        if critic is not None and config.critic != "scalar":
            raise UsageError(f"your own critic returns one value, but --critic is {config.critic}: use scalar")
        own_envs = OwnEnvs.of(envs, eval_envs)
        config = own_envs.config(config)
        spec = EnvSpec.of(config, own_envs.envs)
        self.config = config
        self.device = resolve_device(config.device)
        self._ranks = Ranks.join()
        self._ranks.refuse_other_settings(dataclasses.asdict(config))
        config = for_ranks(config, self._ranks, self.device)
        _, self.engine_reason = choose_engine(config, self.device, own)
        precisions(config, self.device, own)
        self._rollout = Rollout(self._of_rank(config), spec, self.device, spaces, self._ranks)
        if spaces is not None and envs is not None:
            self._rollout.refuse_misfits()
        self._evaluator = Evaluator(spec._replace(own=own_envs.for_evaluation), self.spaces)
        if eval_envs is not None:
            self._evaluator.refuse_misfits()
        sizes = self.spaces.obs_size, self.spaces.action_size
        self.setup = set_up_torch(config, self.device, *sizes, own)
        resolved = dataclasses.replace(config, precision=self.setup.precision)
        self.learner = make_learner(resolved, *sizes, self.device, child_seed(config.seed, LEARNER), own)
        self._rollout.normalizer = self.learner.normalizer
        if not self._ranks.alone:
            self.learner.average = self._ranks.average
            self._draw_apart()
            if self.config.precision == "auto":
                self.setup = self.setup._replace(precision_reason="the default of several ranks")
        measures = self.device.type == "cpu" and config.num_threads == 0
        self._trial = ThreadTrial(config.num_envs, config.utd) if measures else None
        self.stopped_by_signal = False
        self.last_evaluation: Evaluation | None = None
        self._evaluated_at = -1  # the step of the last evaluation
        self._run_dirs: dict[Path, Ours] = {}
        self._heartbeat = Heartbeat()
        self._prepared = self._learns = self._policy_only = False

    def _of_rank(self, config: Config) -> Config:
        """Return the settings of this rank's environments, exploration and replay buffer."""
        rank = self._ranks.rank
        return dataclasses.replace(config, seed=child_seed(config.seed, RANK, rank)) if rank else config

    def _draw_apart(self) -> None:
        """Give each rank its own noise."""
        rank, seed, steps = self._ranks.rank, self.config.seed, self.steps
        self.learner.reseed(child_seed(seed, RANK, LEARNER, rank, steps))
        if rank:
            self._progress.exploration = np.random.default_rng(child_seed(seed, RANK, EXPLORATION, rank, steps))

    @property
    def spaces(self) -> Spaces:
        """How the policy's observations and actions map to the environment's."""
        return self._rollout.spaces

    @property
    def envs(self) -> VectorEnv:
        """The training environments, created when they are first needed."""
        return self._rollout.envs

    @property
    def replay(self) -> Replay:
        """The replay buffer, allocated when it is first needed."""
        return self._rollout.replay

    @property
    def _progress(self) -> Progress:
        return self._rollout.progress

    @property
    def steps(self) -> int:
        """Environment steps so far, summed over all environments."""
        return self._progress.steps

    @property
    def loaded_dataset(self) -> str:
        """What `prepare` has loaded into the replay buffer, in words; empty if nothing."""
        return self._rollout.filled

    @property
    def finished(self) -> bool:
        """Whether `total_steps` or `target_return` of the configuration has been reached."""
        config, progress = self.config, self._progress
        at_target = config.target_return is not None and progress.reached == config.target_return
        return (at_target or self.steps >= config.total_steps) and not progress.evaluation_due

    @property
    def time_s(self) -> float:
        """Seconds of training."""
        return self._progress.time_s

    @property
    def updates(self) -> int:
        """Gradient updates so far."""
        return self.learner.updates

    @property
    def metrics(self) -> dict[str, float]:
        """The latest `critic_loss`, `q`, `actor_loss`, `alpha`, `entropy` and so on, read from the device now.

        Empty before the first update. A value that is not finite ends training at the next line of metrics.jsonl.
        """
        return read_scalars({**self._progress.metrics, **self.learner.metrics()})

    @property
    def policy_only(self) -> bool:
        """Whether it was loaded from a directory that holds only a policy: it can act, but not continue training."""
        return self._policy_only

    @property
    def actor(self) -> nn.Module:
        """The policy's network, an ordinary `torch.nn.Module` on `device`: obs [N, O] -> mean and log_std, each [N, A].

        The action is tanh(mean + exp(log_std) * eps), scaled from [-1, 1] to the environment's bounds; `predict` does
        all of this. With `normalize_obs`, the network expects normalised observations.
        """
        return self.learner.actor

    @property
    def engine(self) -> str:
        """The engine that computes the updates."""
        return self.learner.engine

    @property
    def num_threads(self) -> int:
        """The number of CPU threads that PyTorch uses."""
        return self.setup.num_threads

    def prepare(self, say: Callable[[str], None] | None = None) -> None:
        """Prepare for training: allocate the replay buffer, load the offline dataset and, on a GPU, check the engine.

        `learn` calls this method.

        GPU engines are compared with the reference engine, once for each GPU, driver and version, which may take
        minutes (see `fastsac.learner.self_check`). If they differ, `--engine auto` uses the next engine.

        Args:
            say: shows messages to the user; by default only problems are shown, through the logger "fastsac".

        Raises:
            UsageError: if the replay buffer does not fit into memory, the engines differ and this one was requested, or
                the dataset that `offline` names cannot be read or does not fit the environment.
        """
        if self._policy_only:
            raise UsageError(
                "this directory holds only a policy, without critics, so it cannot continue training: resume the run "
                "that it was saved from"
            )
        if not self._prepared:
            self._heartbeat.send(BUSY)
            asked = self.config.engine != "auto"
            sizes = self.spaces.obs_size, self.spaces.action_size
            self.learner, problem = self_check.right_engine(
                *(self.learner, asked, *sizes, say, self._own), in_tf32=self.config.precision == "tf32"
            )
            self._rollout.normalizer = self.learner.normalizer
            if problem:
                self.engine_reason = problem
                self.setup = self.setup._replace(precision=self.learner.config.precision)  # type: ignore[arg-type]
            self._prepared = True
        if not self._rollout.fill() and say is None:
            logging.getLogger("fastsac").warning(self.loaded_dataset)

    def learn(
        self,
        total_steps: int | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        progress: bool = False,
        callback: Callback | Sequence[Callback] | None = None,
        track: str | None = None,
        track_project: str | None = None,
        track_video: bool = False,
    ) -> None:
        """Train until `steps` reaches `total_steps`; a later call with a larger number continues training.

        SIGINT or SIGTERM finishes the current step, saves a checkpoint (with a `run_dir`) and returns.

        Args:
            total_steps: environment steps over all environments, counted from the start of the run. Default:
                `config.total_steps`.
            run_dir: a new directory for the configuration, metrics and checkpoints; None writes nothing.
            progress: whether to show progress on standard error.
            callback: called during training, and may end it (see `fastsac.Callback`); or several, called in this order.
            track: where to log metrics besides metrics.jsonl, with a `run_dir`: "tensorboard", "wandb", "trackio" and
                "mlflow", separated by commas, or "none". None: the run's trackers so far, or TensorBoard.
            track_project: project name for Weights & Biases and Trackio, experiment name for MLflow. None means the
                one so far, or "fastsac".
            track_video: whether to record an episode of the last evaluation as `run_dir/last_evaluation.mp4` and
                for the trackers.

        Raises:
            UsageError: if the replay buffer does not fit into memory, `run_dir` holds another run or is in use by
                another process, a tracker is unknown or not installed, or a callback raises an exception or calls this
                method.
            FastsacError: if a tracker cannot be started, an environment fails, training diverges or the last checkpoint
                cannot be written.
        """
        self._refuse_in_callback("learn")
        tracking = Tracking.of(track, track_project, track_video)
        if run_dir is None and (track is not None or track_video):
            raise UsageError("track and track_video need a run_dir")
        if track_video and not self.config.eval_every:
            raise UsageError("--track-video records an evaluation, and --eval-every 0 never evaluates")
        if total_steps is not None:
            self.config = dataclasses.replace(self.config, total_steps=total_steps)
            self._rollout.config = dataclasses.replace(self._rollout.config, total_steps=total_steps)
        if callback is not None and not self._ranks.alone:
            raise UsageError("callbacks need a single process: train without torchrun")
        directory = None if run_dir is None or not self._ranks.leads else Path(run_dir)
        hooks = None if callback is None else Hooks(self, callback)
        self.prepare()  # before anything is written
        with (
            stop_signals() as stop,  # before anything is written
            self.training(directory, stop, progress and self._ranks.leads, hooks, tracking=tracking) as steps,
        ):
            for due in steps:
                self.learner.update(self.replay, due)

    @contextmanager
    def training(
        self,
        directory: Path | None,
        stop: list[int],
        progress: bool = False,
        hooks: Hooks | None = None,
        name: str = "",
        tracking: Tracking = BY_DEFAULT,
    ) -> Iterator[Iterator[int]]:
        """Lock the run directory, and yield an iterator that trains one step at a time, as `learn` does.

        It yields the number of updates that are due while the environments step. The caller makes these updates.

        Args:
            directory: the run directory; None writes nothing.
            stop: signals received so far.
            progress: whether to show progress on standard error.
            hooks: the callbacks.
            name: prefix of all messages.
            tracking: the trackers.
        """
        new = directory is not None and not (directory / CONFIG).exists()
        with nullcontext() if directory is None else self._saver(directory) as saver, ExitStack() as stack:
            try:
                logger = stack.enter_context(
                    Logger(
                        *(directory, self.config.total_steps, self.steps, self.time_s, progress, name, tracking),
                        settings=dataclasses.asdict(self.config),
                    )
                )
            except FastsacError:
                if new and directory is not None:  # the same command may be given again
                    give_up(directory)
                raise
            if saver is not None:
                saver.warn_user = logger.warn
            self._learns = True
            try:
                yield self._learn(logger, stop, saver, hooks, directory)
            finally:
                self._learns = False
                if self._trial is not None:  # it continues in the next call
                    torch.set_num_threads(self.num_threads)

    def _refuse_in_callback(self, method: str) -> None:
        if self._learns:
            raise UsageError(f"agent.{method} must not be called during training, for example by a callback")

    def _learn(
        self, logger: Logger, stop: list[int], saver: Saver | None, hooks: Hooks | None, directory: Path | None
    ) -> Iterator[int]:
        config, total_steps, progress = self.config, self.config.total_steps, self._progress
        self._heartbeat.send(BUSY)  # restoring the environments' state may take long
        self._ranks.refuse_differences(self._parameters())  # the user's own networks may have started differently
        obs = self._rollout.begin(self.updates, logger)
        logger.start_rates(self.steps, self.updates)
        if self._trial is not None:
            self._trial.begin_turn()
        reached = config.target_return is not None and progress.reached == config.target_return
        if progress.evaluation_due and not self._stops(stop):
            reached = self._evaluate_and_log(logger, stop, saver, hooks)
        while self.steps < total_steps and not self._stops(stop) and not reached:
            before, started = self.steps, time.perf_counter()
            obs = yield from self._step(obs, saver)
            if self._trial is not None and self.updates and not progress.warm_up_left:
                self._try_threads(logger, time.perf_counter() - started, self.steps - before)
            done = self.steps >= total_steps
            if done or self._crossed(config.log_every, before):
                self._ranks.refuse_differences(self._parameters())
                logger.log(self.steps, self.updates, {**self._read_metrics(saver), **progress.episodes.take()})
            if config.eval_every and (done or self._crossed(config.eval_every, before)):
                reached = self._evaluate_and_log(logger, stop, saver, hooks)
            progress.time_s = logger.time_s
            if saver is not None:
                if self._crossed(config.checkpoint_every, before):
                    self._heartbeat.send(BUSY)
                    saver.save(lambda: self._state(saver))
                saver.warn()
            if hooks is not None:
                hooks.checkpoints([] if saver is None else saver.take_written())
                reached |= hooks.call("on_step")
            self._heartbeat.beat(stop)
        self._rollout.pause(obs)
        self.stopped_by_signal = progress.evaluation_due or (self.steps < total_steps and not reached)
        logger.stopped = self.stopped_by_signal
        self._heartbeat.send(BUSY)
        if hooks is not None and hooks.ended_by:
            logger.say(f"{hooks.ended_by} ends training at step {self.steps:,}")
        if saver is not None:
            saver.finish(lambda: self._state(saver), self.steps)
        self._ranks.sum(0)  # wait until the checkpoint is there for all ranks
        if saver is not None and hooks is not None:
            hooks.checkpoints(saver.take_written())
        if directory is not None and logger.wants_video and not self.stopped_by_signal:
            self._show_evaluation(logger, directory / VIDEO)

    def _show_evaluation(self, logger: Logger, path: Path) -> None:
        """Record the first episode of the last evaluation, for the trackers."""
        if self._evaluated_at != self.steps:
            logger.warn("no video of the last evaluation: the policy has changed since, because training ended early")
            return
        try:
            self.record_video(path, child_seed(self.config.seed, EVALUATION, self.steps))
        except FastsacError as error:  # rendering may not be possible here
            logger.warn(f"no video of the last evaluation: {error}")
            return
        logger.video(self.steps, path)

    def _stops(self, stop: list[int]) -> bool:
        """Return whether a signal has reached this process or another rank."""
        stops = bool(self._ranks.sum(int(bool(stop))))  # a signal that arrives now counts next time, on all ranks
        if stops and not stop:
            stop.append(signal.SIGTERM)
        return stops

    def _parameters(self) -> dict[str, Tensor]:
        """Return the parameters that must be equal on every rank; empty in a single process."""
        if self._ranks.alone:
            return {}
        prefixes = ("actor.", "critic.", "target_critic.", "value.", "log_alpha")
        return {name: tensor for name, tensor in self.learner.state()[0].items() if name.startswith(prefixes)}

    def new_episodes(self, tries: int = 0) -> None:
        """Make the next call of `learn` start new episodes in newly created environments.

        Args:
            tries: a different number gives different episodes.
        """
        self._refuse_in_callback("new_episodes")
        self._rollout.new_episodes(tries)

    def _step(self, obs: Tensor, saver: Saver | None) -> Generator[int, None, Tensor]:
        """Step every environment once; yield the number of updates due meanwhile, and return the next obs [N, O].

        On a GPU, the host waits only once: for the actions.
        """
        progress, acts = self._progress, self._progress.warm_up_left == 0 or self.updates > 0
        action = self.learner.act(obs) if acts else self._rollout.explore()
        host_action = to_host(action) if isinstance(action, Tensor) else action
        if not np.isfinite(host_action).all():
            self._read_metrics(saver)
        self._rollout.send(host_action)
        # the environments step while the learner updates
        due = int(progress.updates_due) if progress.warm_up_left == 0 and self.replay.size else 0
        progress.updates_due -= due
        if self.config.lr_schedule != "constant":
            self.learner.set_progress(self.steps / self.config.total_steps)
        yield due
        return self._rollout.recv(action)

    def _read_metrics(self, saver: Saver | None) -> dict[str, float]:
        """Read the latest metrics from the device.

        Raises:
            Divergence: if any of them, or anything in the learner's state, is not finite.
        """
        self._progress.metrics |= self.learner.metrics()
        state, _ = self.learner.state()
        if not self.learner.learns_alpha:
            del state["log_alpha"]  # for a fixed alpha of 0 it is minus infinity
        where = f"step {self.steps:,} ({self.updates:,} updates)"
        nothing = "nothing was saved" if self._ranks.leads else "the run directory has the last good checkpoint, if any"
        last_good = (lambda: nothing) if saver is None else saver.last_good
        return read_finite(self._progress.metrics, state, self.config, where, last_good)

    def _try_threads(self, logger: Logger, seconds: float, steps: int) -> None:
        fastest = self._trial.record(seconds, steps) if self._trial is not None else None
        if fastest is None:
            return
        if fastest != self.num_threads:
            logger.say(f"threads: {fastest}, faster than {self.num_threads} while the environments run")
        self.setup, self._trial = self.setup._replace(num_threads=fastest), None

    def _crossed(self, interval: int, before: int) -> bool:
        return interval > 0 and self.steps // interval > before // interval

    def _evaluate_and_log(self, logger: Logger, stop: list[int], saver: Saver | None, hooks: Hooks | None) -> bool:
        """Evaluate the deterministic policy, unless a signal stops it; return whether training should end."""
        self.last_evaluation = None
        self._read_metrics(saver)  # a policy that has diverged cannot be evaluated
        target = self.config.target_return
        if not self._ranks.leads:
            due, mean = self._ranks.of_leader([0.0, 0.0])
            self._progress.evaluation_due = bool(due)
            reached = target is not None and not due and mean >= target
            self._progress.reached = target if reached else self._progress.reached
            return reached
        evaluation = self.evaluate(self.config.eval_episodes, should_stop=lambda: self._heartbeat.beat(stop))
        due = len(evaluation.returns) < self.config.eval_episodes
        self._progress.evaluation_due = due
        self._ranks.of_leader([float(due), 0.0 if due else float(evaluation.returns.mean())])
        if due:
            logger.say("the evaluation was interrupted")
            return False
        self.last_evaluation, self._evaluated_at = evaluation, self.steps
        mean = float(evaluation.returns.mean())
        spread = float(evaluation.returns.std())
        logger.log(self.steps, self.updates, {"eval_return": mean, "eval_return_std": spread})
        logger.start_rates(self.steps, self.updates)
        reached = target is not None and mean >= target
        if reached:
            self._progress.reached = target
        if saver is not None and mean > saver.best_return:
            saver.save_best(lambda: self._state(saver), mean)
        return reached if hooks is None else hooks.call("on_evaluation", evaluation) or reached

    def evaluate(
        self,
        episodes: int,
        seed: int | None = None,
        should_stop: Callable[[], bool] | None = None,
        *,
        deterministic: bool = True,
        watch: Watch | None = None,
    ) -> Evaluation:
        """Play episodes in separate environments (see `fastsac.evaluate`).

        Args:
            episodes: number of episodes.
            seed: random seed for the environments; by default it depends on the run's seed and the number of steps.
            should_stop: called before every step; if it returns True, only the episodes that have ended are returned.
            deterministic: whether actions are the squashed mean or a sample, which uses the agent's random numbers.
            watch: called for every step.
        """
        seed = child_seed(self.config.seed, EVALUATION, self.steps) if seed is None else seed
        policy = self._deterministic if deterministic else self._sampling
        return self._evaluator.evaluate(policy, episodes, seed, should_stop, watch)

    def record_video(self, path: str | os.PathLike[str], seed: int = 0) -> None:
        """Play one episode with the deterministic policy and save it as .mp4 or .gif (see `fastsac.evaluate`)."""
        self._evaluator.record_video(self._deterministic, Path(path), seed)

    def close(self) -> None:
        """Close the environments; they are created again, in the same state, when they are needed."""
        self._refuse_in_callback("close")
        self._evaluator.close()
        self._rollout.close()

    def _deterministic(self, obs: Floats) -> Floats:
        return to_host(self.learner.act(to_device([obs], self.device)[0], deterministic=True))

    def _sampling(self, obs: Floats) -> Floats:
        return to_host(self.learner.act(to_device([obs], self.device)[0]))

    def predict(self, obs: Any, deterministic: bool = True) -> NDArray[np.float32]:
        """Return actions in the environment's own units.

        Args:
            obs: one observation or a batch of observations, as the environment returns them: an array, or a dict of
                arrays.
            deterministic: whether to return the squashed mean or a sample.

        Returns:
            Actions in the environment's own shape, such as [A] for one observation or [N, A] for a batch.

        Raises:
            ValueError: if the observation does not have the expected shape.
        """
        flat, single = self.spaces.batch(obs)
        scaled = self.spaces.scale(to_host(self.learner.act(to_device([flat], self.device)[0], deterministic)))
        return scaled[0] if single else scaled

    @contextmanager
    def _saver(self, directory: Path) -> Iterator[Saver]:
        """Lock the run directory for this agent, unless it belongs to another one."""
        place = directory.resolve()
        with Saver(directory, self.config, self._run_dirs.get(place), logging.getLogger("fastsac").warning) as saver:
            try:
                yield saver
            finally:
                saver.wait()
                self._run_dirs[place] = Ours.newest(directory)

    def _state(self, saver: Saver | None) -> Contents:
        """Return everything that a resumed run needs; Divergence if anything is not finite."""
        metrics = self._read_metrics(saver)
        tensors, counters = self.learner.state()
        replay = self.replay if self.config.checkpoint_replay and not self._policy_only else None
        state = {
            "config": dataclasses.asdict(self.config),
            "learner": counters,
            "precision": self.setup.precision,
            "obs_shapes": self.spaces.obs_shapes,
            "action_low": self.spaces.action_low.tolist(),
            "action_high": self.spaces.action_high.tolist(),
            "metrics": metrics,
            "envs": self._rollout.envs_state() if replay is not None else None,
            **self._progress.state(),
        }
        return {"learner": tensors}, state, replay

    def save(
        self, run_dir: str | os.PathLike[str], policy_only: bool = False, evaluation: Evaluation | None = None
    ) -> Path:
        """Write a checkpoint into `run_dir` (see `fastsac.checkpoint`) and return its directory.

        Args:
            run_dir: a new directory, or this agent's own run directory.
            policy_only: write only what is needed to act: the actor's weights, the observation normalisation and the
                settings, plus README.md, a model card with task, evaluation, settings and versions. `load` and
                `fastsac eval` can read such a directory; `learn` raises a UsageError.
            evaluation: for the model card; by default the last one, if the policy has not changed since.

        Raises:
            UsageError: if the directory holds another run, or another process is using it.
            FastsacError: if it cannot be written (earlier checkpoints are kept), or if training has diverged.
        """
        directory = Path(run_dir)
        if self._policy_only and not policy_only:
            raise UsageError("this agent has only a policy: save it with policy_only=True")
        if self._ranks.leads and policy_only:
            if evaluation is None and self._evaluated_at == self.steps:
                evaluation = self.last_evaluation
            groups, state, _ = self._state(None)
            shared_policy.write(directory, self.config, self.spaces, groups["learner"], state, evaluation)
        elif self._ranks.leads:
            with self._saver(directory) as saver:
                saver.finish(lambda: self._state(saver), self.steps)
        self._ranks.sum(0)  # wait until it is there for all ranks
        return checkpoint.step_directory(directory, self.steps)

    def export(self, path: str | os.PathLike[str]) -> Exported:
        """Write the deterministic policy as one file that runs without fastsac: see `fastsac.export.export_policy`."""
        from fastsac.export import export_policy

        return export_policy(self, Path(path))

    @classmethod
    def load(
        cls,
        run_dir: str | os.PathLike[str],
        config: Config | None = None,
        best: bool = False,
        *,
        envs: Any = None,
        eval_envs: Any = None,
        actor: nn.Module | None = None,
        critic: nn.Module | None = None,
    ) -> SAC:
        """Load the newest checkpoint of a run.

        Args:
            run_dir: a directory written by `save` or by a training run.
            config: replaces the stored configuration, as long as the stored networks fit it.
            best: load the policy with the highest evaluation return instead, to act with; the run cannot be resumed
                from it.
            envs: environments to continue training in, if the run was trained with environments from Python.
            eval_envs: the same for evaluations.
            actor: a module of the same structure, if the run was trained with your own; the stored weights are loaded
                into it.
            critic: the same for the critic.

        Raises:
            FastsacError: if there is no checkpoint, or it is damaged.
            UsageError: if it does not fit the configuration.
        """
        directory = Path(run_dir)
        path = checkpoint.best_checkpoint(directory) if best else checkpoint.latest_checkpoint(directory)
        if best and (wrong := checkpoint.problem(path)):
            raise FastsacError(wrong)
        identity = checkpoint.identity(path)
        _, state = checkpoint.load_checkpoint(path, groups=())
        try:
            own = {"envs": envs, "eval_envs": eval_envs, "actor": actor, "critic": critic}
            agent = cls._of_state(path, state, config, own)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            if "memory" in str(error):
                raise
            raise FastsacError(f"{path} is not a checkpoint of this version: {error!r}") from error
        if not best:
            agent._run_dirs[directory.resolve()] = Ours(path, identity)
        return agent

    @classmethod
    def resume(cls, run_dir: str | os.PathLike[str], config: Config, **own: Any) -> SAC:
        """Load the newest checkpoint of a run, or start the run again if it has no checkpoint yet.

        Args:
            run_dir: the run directory.
            config: replaces the stored configuration.
            own: `envs`, `eval_envs`, `actor` and `critic`, as for `load`.

        Raises:
            FastsacError: if the checkpoint is damaged.
            UsageError: if it does not fit the configuration.
        """
        directory = Path(run_dir)
        if newest_step(directory) is not None:
            return cls.load(directory, config, **own)
        agent = cls(config, **own)
        agent._run_dirs[directory.resolve()] = Ours(None)
        return agent

    @classmethod
    def _of_state(cls, path: Path, state: dict[str, Any], config: Config | None, own: dict[str, Any]) -> SAC:
        refuse_other_state(state)
        stored = config_from_dict(state["config"])
        if len(state["episodes"]["returns"]) != stored.num_envs:
            raise ValueError(f"it has {len(state['episodes']['returns'])} environments, not {stored.num_envs}")
        config = config or stored
        shapes = {key: tuple(shape) for key, shape in state["obs_shapes"].items()}
        bounds = (np.array(state[key], dtype=np.float32) for key in ("action_low", "action_high"))
        spaces = Spaces(shapes, *bounds)
        if not (spaces.obs_size and spaces.action_size):
            raise ValueError("it has no observations or no actions")
        # before any memory is taken for them
        sizes = spaces.obs_size, spaces.action_size
        networks = OwnNetworks(own["actor"], own["critic"])
        networks.refuse_misfits(*sizes, config.num_critics)
        refuse_other_settings(config, stored, state)
        policy_only = "policy" in checkpoint.groups_of(path)
        group = "policy" if policy_only else "learner"
        refuse_other_networks(config, *sizes, checkpoint.tensor_shapes(path, group), networks, policy_only)
        choices = precisions(config, resolve_device(config.device), networks)
        if config.precision == "auto" and state["precision"] in choices:  # a new measurement could choose another
            agent = cls(dataclasses.replace(config, precision=state["precision"]), spaces, **own)
            agent.config = dataclasses.replace(agent.config, precision=config.precision)
            agent.setup = agent.setup._replace(precision_reason="as stored in the run")
        else:
            agent = cls(config, spaces, **own)
        agent._progress.load_state(state, state["metrics"])
        agent._rollout.seen = stored.offline
        if (config.estimator, config.baseline) != (stored.estimator, stored.baseline):
            agent._progress.metrics.clear()  # another estimator may have other metrics
        stored_tensors = checkpoint.load_checkpoint(path, groups=[group])[0][group]
        if policy_only:
            stored_tensors = shared_policy.completed(stored_tensors, agent.learner.state()[0], path)
        agent.learner.load_state(stored_tensors, state["learner"])
        agent._policy_only = policy_only
        if not agent._ranks.alone:
            agent._draw_apart()
        if not (config.checkpoint_replay and state["replay"] is not None):
            agent.new_episodes()
            return agent
        for name in state["replay"]["blocks"]:
            rows = checkpoint.load_checkpoint(path, groups=[name])[0][name]
            agent.replay.load_rows(first_row(name), rows)
        groups, _ = checkpoint.load_checkpoint(path, groups=["replay"])
        agent.replay.load_state(groups["replay"], state["replay"])
        agent._rollout.stored_envs = state["envs"]
        agent._progress.episodes.load_state(state["episodes"])
        return agent
