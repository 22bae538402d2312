"""Agents that differ only in their random seed, and train in one loop: `fastsac train --num-learners`.

Each has its own environments, replay buffer, random numbers and run directory, and trains exactly as it would alone,
bit for bit. They share only the launches of their updates (see `fastsac.learner.together`).
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from fastsac.callbacks import Callback, Hooks
from fastsac.config import Config
from fastsac.errors import EnvironmentFailure, FastsacError, UsageError
from fastsac.learner import FusedCudaLearner
from fastsac.learner.together import Together
from fastsac.replay import check_memory
from fastsac.signals import stop_signals
from fastsac.trackers import BY_DEFAULT, Tracking
from fastsac.train import SAC


class Learner(NamedTuple):
    """One of the agents, and its run directory."""

    agent: SAC
    run_dir: Path

    @property
    def name(self) -> str:
        """The name in messages."""
        return f"seed {self.agent.config.seed}"


class _Running(NamedTuple):
    """A learner that is still training."""

    steps: Iterator[int]  # see `SAC.training`
    held: ExitStack  # its run directory and files


class Seeds:
    """Several agents in one loop. `failures` maps a run directory to its error; the other agents continue."""

    def __init__(self, num_learners: int) -> None:
        """Prepare for up to `num_learners` agents."""
        self.learners: list[Learner] = []
        self.failures: dict[Path, FastsacError] = {}
        self._num_learners = num_learners
        self._together = Together(num_learners)

    @property
    def how(self) -> str:
        """How the updates are made, in words; available once all agents have been added."""
        agent = self.learners[0].agent
        if len(self.learners) == 1:
            return "by itself"
        if isinstance(agent.learner, FusedCudaLearner):
            return "updated together, with the launches of one"
        if agent.device.type == "cpu":
            return "updated one after the other; on a CPU, separate processes are faster"
        return f"updated one after the other, because engine {agent.engine} cannot update several in one launch"

    def add(self, config: Config, run_dir: Path, resume: bool, say: Callable[[str], None] | None = None) -> SAC | None:
        """Create or load the next agent, and allocate the memory that it needs.

        Args:
            config: differs from that of the other agents only in the seed.
            run_dir: its run directory.
            resume: whether to resume the run that is there; if it is damaged, it is added to `failures`.
            say: tells the user what takes time, and what has failed.

        Returns:
            The agent, or None if it cannot be resumed.

        Raises:
            UsageError: as for `SAC` and `SAC.prepare`; and if the replay buffers do not all fit into memory.
        """
        first, measured, several = None, config, self._num_learners > 1
        if self.learners:
            first = self.learners[0].agent
        if first is not None and first.device.type == "cpu":  # measured once for all agents
            precision = first.setup.precision if config.precision == "auto" else config.precision
            measured = dataclasses.replace(config, num_threads=first.num_threads, precision=precision)
        try:
            agent = SAC.resume(run_dir, measured) if resume else SAC(measured)
        except FastsacError as error:
            if not (resume and several) or isinstance(error, UsageError):  # options are the same for all
                raise
            self._fail(run_dir, config.seed, error, say)
            return None
        agent.config = config
        agent.prepare(say)
        if first is None and several:
            # on a GPU, the rings are copied side by side; on a CPU, memory is taken only when it is written
            rings = self._num_learners if agent.device.type == "cuda" else self._num_learners - 1
            sizes = agent.replay.num_rows, config.num_envs, agent.spaces.obs_size, agent.spaces.action_size
            check_memory(*sizes, agent.device, config.n_step, rings)
        self._together.add(agent.learner, agent.replay)
        self.learners.append(Learner(agent, run_dir))
        return agent

    def learn(
        self,
        make_callbacks: Callable[[], Sequence[Callback]] = tuple,
        say: Callable[[str], None] | None = None,
        progress: bool = False,
        supervised: bool = False,
        tracking: Tracking = BY_DEFAULT,
    ) -> None:
        """Train all agents to the end, as `SAC.learn` does for one.

        Args:
            make_callbacks: creates the callbacks of each agent.
            say: tells the user about a failed learner, in one line.
            progress: whether to show the progress of the first learner.
            supervised: whether all agents stop and save when an environment of one of them fails.
            tracking: the trackers of each agent.

        Raises:
            UsageError: if a run directory holds another run, or is in use by another process.
        """
        self._together.complete()
        several = len(self.learners) > 1
        with stop_signals() as stop, ExitStack() as all_held:
            running = dict[int, _Running]()
            for number, (agent, run_dir) in enumerate(self.learners):
                if several and agent.finished:
                    continue
                hooks = Hooks(agent, callbacks) if (callbacks := make_callbacks()) else None
                held = all_held.enter_context(ExitStack())
                name = self.learners[number].name if several else ""
                training = agent.training(run_dir, stop, progress and not running, hooks, name, tracking)
                running[number] = _Running(held.enter_context(training), held)
            while running:
                dues = [0] * len(self.learners)
                for number, learner in list(running.items()):
                    agent, run_dir = self.learners[number]
                    try:
                        dues[number] = next(learner.steps)
                        continue
                    except StopIteration:
                        pass
                    except FastsacError as error:
                        self._fail(run_dir, agent.config.seed, error, say)
                        if supervised and isinstance(error, EnvironmentFailure):
                            stop.append(signal.SIGTERM)
                    del running[number]
                    try:
                        learner.held.close()
                    except FastsacError as error:
                        self._fail(run_dir, agent.config.seed, error, say)
                self._together.update(dues)

    def _fail(self, run_dir: Path, seed: int, error: FastsacError, say: Callable[[str], None] | None) -> None:
        if run_dir not in self.failures:
            self.failures[run_dir] = error
            if say is not None:
                say(f"seed {seed}: {error}")
