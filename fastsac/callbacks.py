"""User code that `SAC.learn` calls during training."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastsac.errors import FastsacError, UsageError, did_you_mean, told

if TYPE_CHECKING:
    from fastsac.evaluate import Evaluation
    from fastsac.train import SAC


class Callback:
    """Base class for callbacks that `SAC.learn(callback=...)` calls during training. Override the methods you need.

    Returning False ends training; any other value, including None, continues it. Training ends as with
    `target_return`: the step is finished, the other callbacks are called, a last checkpoint is written if there is a
    run directory, and `learn` returns. A later call of `learn`, or `--resume`, continues the run.

    A callback may read everything public, such as `agent.steps`, `agent.updates`, `agent.metrics`, `agent.actor`,
    `agent.replay`, `agent.config` and `agent.last_evaluation`. It may call `agent.evaluate`, `agent.predict` and
    `agent.save`, the latter with a directory other than the run's own. It must not call `agent.learn`, `agent.close` or
    `agent.new_episodes`, or modify the learner or the replay buffer. `agent.replay.sample` and
    `agent.predict(obs, deterministic=False)` use the run's random numbers: training works as well as before, but is no
    longer bit for bit the run without the callback.

    A callback's own state is not saved in checkpoints. With --step-timeout, its time counts as time without a step.

    If a callback raises an exception, training ends without another checkpoint, and `learn` raises a UsageError that
    names the callback. Earlier checkpoints are kept; without one, the run can be resumed from the beginning. If `learn`
    is called again on the same agent, it starts new episodes.

    Example: early stopping, and copying metrics and checkpoints elsewhere::

        import math, shutil
        from fastsac import SAC, Callback, Config


        class StopWithoutProgress(Callback):
            best, waited = -math.inf, 0

            def on_evaluation(self, agent, evaluation):
                mean = evaluation.returns.mean()
                self.waited = 0 if mean > self.best else self.waited + 1
                self.best = max(self.best, mean)
                return self.waited < 5


        class CopyElsewhere(Callback):
            def on_step(self, agent):
                if agent.updates and agent.steps % 1000 < agent.config.num_envs:  # reading metrics waits for the device
                    with open("losses.csv", "a") as file:
                        print(agent.steps, agent.metrics["critic_loss"], sep=",", file=file)

            def on_checkpoint(self, agent, path):
                shutil.copytree(path, f"kept-{path.name}")


        agent = SAC(Config(env_id="Pendulum-v1", total_steps=20_000, eval_every=1000, checkpoint_every=5000))
        agent.learn(run_dir="runs/pendulum", callback=[StopWithoutProgress(), CopyElsewhere()])
    """

    def on_step(self, agent: SAC) -> bool | None:
        """Called after each step of all environments, once its updates, logging and evaluations are done.

        This is up to `num_envs` environment steps: an environment that was reset in this step does not count.
        """

    def on_evaluation(self, agent: SAC, evaluation: Evaluation) -> bool | None:
        """Called after each completed evaluation during training, with its returns and lengths."""

    def on_checkpoint(self, agent: SAC, path: Path) -> bool | None:
        """Called after a checkpoint has been written completely, with its directory, `checkpoints/step-...`.

        Checkpoints are written in the background, so `agent` may be some steps ahead of it. The last checkpoint of
        `learn` counts, too; `checkpoints/best` does not. A run keeps its two newest checkpoints: copy those to keep.
        """


class Hooks:
    """The callbacks of one call of `learn`."""

    def __init__(self, agent: SAC, callback: Callback | Sequence[Callback]) -> None:
        """Take one callback or several.

        Raises:
            UsageError: if one of them is not a Callback.
        """
        self._agent = agent
        self._callbacks = list(callback) if isinstance(callback, Sequence) else [callback]
        for each in self._callbacks:
            if not isinstance(each, Callback):
                raise UsageError(f"a callback must be an object of a subclass of fastsac.Callback, got {each!r}")
        self.ended_by = ""  # the first callback that ended training

    def call(self, hook: str, *arguments: Any) -> bool:
        """Call one method of every callback; return whether training should end.

        Raises:
            UsageError: if a callback raises an exception.
            FastsacError: if an agent method called by a callback raises it.
        """
        for callback in self._callbacks:
            name = f"{type(callback).__name__}.{hook}"
            try:
                answer = getattr(callback, hook)(self._agent, *arguments)
            except FastsacError:  # from the agent's own methods: a failed environment may be restarted
                raise
            except Exception as error:
                raise UsageError(
                    f"callback {name} failed at step {self._agent.steps:,}: {told(error, __file__)}"
                ) from error
            if _is_false(answer):
                self.ended_by = self.ended_by or name
        return bool(self.ended_by)

    def checkpoints(self, paths: Sequence[Path]) -> bool:
        """Call `on_checkpoint` for checkpoints that have been written; return whether training should end."""
        for path in paths:
            self.call("on_checkpoint", path)
        return bool(self.ended_by)


def make_callback(place: str) -> Callback:
    """Import `module:Class` and create an instance without arguments.

    Raises:
        UsageError: if that fails, or the class is not a Callback.
    """
    module, _, name = place.partition(":")
    if not module or not name:
        raise UsageError(f"--callback must be given as module:Class, got {place!r}")
    try:
        found = importlib.import_module(module)
        if not hasattr(found, name):
            raise UsageError(f"{module} has no {name!r} for --callback{did_you_mean(name, dir(found))}")
        made = getattr(found, name)()
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        raise UsageError(f"cannot import {error.name!r} for --callback {place}: is it on PYTHONPATH?") from error
    except Exception as error:
        raise UsageError(f"--callback {place} cannot be created: {told(error, __file__)}") from error
    if not isinstance(made, Callback):
        raise UsageError(f"--callback {place} must be a subclass of fastsac.Callback, got {made!r}")
    return made


def _is_false(answer: Any) -> bool:
    """Return whether it is False, or the equivalent result of a NumPy or PyTorch comparison."""
    if isinstance(answer, np.bool_ | np.ndarray | torch.Tensor):
        return str(answer.dtype) in ("bool", "torch.bool") and answer.ndim == 0 and not bool(answer)
    return answer is False
