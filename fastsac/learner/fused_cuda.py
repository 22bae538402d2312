"""The fused engine on CUDA: a whole update in six launches of `fastsac_kernels.whole_update`, many in one graph.

It computes the same as the fused engine on a CPU, over the same flat buffers; weight gradients never reach memory.
`fused_cuda_obstacle` says what it does not support; the graphed engine takes its place there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.estimators import choose
from fastsac.learner.flat import FlatMoments, FlatNetwork, Memory, Row, side_by_side
from fastsac.learner.graphed import GraphedLearner, Measured
from fastsac.learner.optimizers import Groups, weight_decay
from fastsac.learner.reference import ACTION, BATCH, NEXT_ACTION, Moments
from fastsac.networks import Actor, StackedMLP
from fastsac.own_networks import STANDARD, OwnNetworks
from fastsac.replay import Replay
from fastsac.transfer import to_device
from fastsac.types import Sampler
from fastsac_kernels.whole_update import (
    ACTOR,
    ACTOR_ADAM,
    ACTOR_STEP,
    ALPHA_ADAM,
    CRITIC_ADAM,
    CRITICS,
    CRITICS_STEP,
    METRICS,
    NEXT_VALUE,
    SAMPLED_Q,
    VALUE_ADAM,
    Network,
    Plan,
    Scratch,
    State,
    make_scratch,
    run_stage,
)

#: hidden layers' widths are multiples of UNIT, and at most WIDEST
UNIT, WIDEST = 64, 512
BASELINES = ("none", "constant", "loo", "value")
#: updates due for a learner that runs alone: no limit
ENDLESS = 2**62
#: index of each group in the kernels' learning rates and step counts
ADAMS = {"critic": CRITIC_ADAM, "actor": ACTOR_ADAM, "alpha": ALPHA_ADAM, "value": VALUE_ADAM}


def fused_cuda_obstacle(config: Config, own: OwnNetworks = STANDARD) -> str:
    """Return which setting the engine does not support, or an empty string."""
    choice = choose(config)
    if config.estimator not in ("pathwise", "score") or choice.baseline not in BASELINES:
        what = config.estimator + (f" with --baseline {choice.baseline}" if choice.takes_baseline else "")
        return f"--estimator {what} has no whole-update kernel"
    sizes = config.hidden_sizes
    if len(sizes) != 2 or any(size % UNIT or size > WIDEST for size in sizes):
        return f"--hidden-sizes must be two multiples of {UNIT} up to {WIDEST} for whole-update kernels"
    own_split = config.entropy_split not in ("auto", 1.0 if config.estimator == "score" else 0.0)
    others = {
        "a network of your own": bool(own),
        f"--entropy-split {config.entropy_split}": own_split,
        f"--activation {config.activation}": config.activation != "relu",
        "--layer-norm": config.layer_norm,
        f"--num-critics {config.num_critics}": config.num_critics != 2,
        f"--critic-reduction {config.critic_reduction}": config.critic_reduction != "min",
        f"--critic {config.critic}": config.critic != "scalar",
        f"--n-step {config.n_step}": config.n_step != 1,
        "--max-grad-norm": config.max_grad_norm is not None,
        "--normalize-obs": config.normalize_obs,
        "--normalize-reward": config.normalize_reward,
        f"--reward-scale {config.reward_scale:g}": config.reward_scale != 1.0,
    }
    return next((f"{what} has no whole-update kernel" for what, there in others.items() if there), "")


class FusedCudaLearner(GraphedLearner):
    """A learner whose parameters and moments lie in flat buffers, and whose updates are graphs of six launches each."""

    engine = "fused"

    def __init__(
        self,
        config: Config,
        obs_size: int,
        action_size: int,
        device: torch.device | str = "cuda",
        seed: int = 0,
        own: OwnNetworks = STANDARD,
    ) -> None:
        """Initialise the networks as the reference engine does with the same seed.

        Raises:
            ValueError: if the engine does not support the configuration (see `fused_cuda_obstacle`).
        """
        if obstacle := fused_cuda_obstacle(config, own):
            raise ValueError(obstacle)
        self._state: State | None = None
        self._others: list[tuple[FusedCudaLearner, Replay]] = []  # whose updates are made in this one's launches
        self._replay: Replay | None = None  # of a learner that shares launches with others
        self._memory = Memory(torch.device(device))
        super().__init__(config, obs_size, action_size, device, seed, own)
        first, second = config.hidden_sizes
        self._plan = Plan(
            num_learners=1,
            obs_size=obs_size,
            action_size=action_size,
            hidden_sizes=(first, second),
            batch_size=config.batch_size,
            num_action_samples=self.choice.num_action_samples,
            estimator="pathwise" if config.estimator == "pathwise" else "score",
            baseline=self.choice.baseline,  # type: ignore[arg-type]
            learns_alpha=self.learns_alpha,
            target_entropy=self.target_entropy,
            gamma=config.gamma,
            tau=config.tau,
            betas=config.adam_betas,
            weight_decay=weight_decay(config, "critic"),
            precision="tf32" if config.precision == "auto" else config.precision,
            streams=(NEXT_ACTION, ACTION, BATCH),
        )
        self._scratch: Scratch | None = make_scratch(self._plan, self.device)

    def _make_optimizers(self, groups: Groups) -> None:
        self._groups, memory = groups, self._memory
        self._flat = {
            name: FlatNetwork(network, memory)
            for name, network in self._networks().items()
            if isinstance(network, Actor | StackedMLP)
        }
        rounds = self.config.precision == "bf16"
        self._weights = {
            name: memory.zeros(network.values.shape, torch.bfloat16) if rounds else network.values
            for name, network in self._flat.items()
        }
        self.refresh()
        self._steps, self._rates_there = (memory.zeros([len(ADAMS)], torch.float32) for _ in range(2))
        self._metrics = memory.zeros([len(METRICS)], torch.float32)
        self._due = memory.zeros([2], torch.int64)
        self._due[0] = ENDLESS
        self._adams: dict[str, FlatMoments] = {}
        for name, (parameters, lr) in groups.items():
            values = self._flat[name].values if name in self._flat else self.log_alpha.detach().view(1)
            self._adams[name] = FlatMoments(values, parameters, memory)
            self._adams[name].step = self._steps[ADAMS[name]]
            self._set_rate(name, lr)

    def _set_rate(self, name: str, lr: float) -> None:
        self._rates_there[ADAMS[name]] = lr

    def move(self, row: Row) -> None:
        """Move everything that updates touch to a row beside other learners, and drop recorded graphs."""
        moments, rates = self._moments(), self._rates_there
        self.log_alpha.data = row.moved(self.log_alpha.detach())
        self.rng.state = row.moved(self.rng.state)
        self._memory = row
        self._make_optimizers(self._groups)
        self._load_moments(moments)
        self._rates_there.copy_(rates)
        self._forget(None)

    def join(self, replay: Replay, others: Sequence[tuple[FusedCudaLearner, Replay]]) -> None:
        """Let this learner's launches make other learners' updates, too, each from its own replay buffer.

        Args:
            replay: this learner's replay buffer.
            others: learners with the same settings except for the seed, and their replay buffers. All of them must lie
                in rows of the same memory, in this order, with this learner in the first row.
        """
        self._others, self._replay = list(others), replay
        for learner, own in others:
            learner._replay, learner._scratch = own, None
        self._plan = dataclasses.replace(self._plan, num_learners=1 + len(others))
        self._scratch = make_scratch(self._plan, self.device)
        self._forget(replay)

    def update_each(self, dues: Sequence[int]) -> None:
        """Make this many updates of this learner and of each one that has joined it, all at the same time.

        A learner that has made all its updates is left alone while the others continue. Each result is that of
        `update`.
        """
        replay = self._replay
        assert replay is not None, "no other learner has joined"
        if self._recorded_for is not replay:  # a state was loaded
            self._forget(replay)
        state = self._state
        assert state is not None
        learners, every = [self, *(learner for learner, _ in self._others)], self.config.policy_delay
        phases = [learner.updates % every for learner in learners]
        for phase in {phase for phase, due in zip(phases, dues, strict=True) if due}:  # grouped by the actor's turn
            here = np.array([due if own == phase else 0 for own, due in zip(phases, dues, strict=True)], np.int64)
            state.due[:, 0].copy_(to_device([here], self.device)[0])
            for _ in self._make(replay, phase, int(here.max())):
                pass
            for learner, due in zip(learners, here.tolist(), strict=True):
                if due:
                    with_actor = -phase % every < due
                    learner._note(due, with_actor, learner._measured_there(with_actor))

    def _state_with(self, replay: Sampler) -> State:
        """Return everything that the kernels touch."""
        rows = [self._rows_with(replay), *(learner._rows_with(own) for learner, own in self._others)]
        parts: list[Any] = [  # a tensor's or a network's rows
            Network(*map(side_by_side, zip(*each, strict=True))) if isinstance(each[0], Network) else side_by_side(each)
            for each in zip(*rows, strict=True)
        ]
        return State(*parts)

    def _rows_with(self, replay: Sampler) -> State:
        """Return this learner's part of it, without the leading axis."""
        if not isinstance(replay, Replay) or replay.n_step != 1:
            raise TypeError("the fused engine on CUDA needs a Replay of single steps")

        def network(name: str) -> Network:
            name = name if name in self._flat else "actor"  # stands in for a missing network
            moments = self._adams.get(name, self._adams["critic"])
            return Network(self._flat[name].values, moments.exp_avg, moments.exp_avg_sq, self._weights[name])

        obs, action, reward, terminated, queue, span = replay.ring()
        log_alpha, alpha = self.log_alpha.detach(), self._adams.get("alpha")
        return State(
            *(obs, action, reward, terminated, queue, span, self.rng.state, self._due, log_alpha),
            *((log_alpha, log_alpha) if alpha is None else (alpha.exp_avg[0], alpha.exp_avg_sq[0])),
            *(self._steps, self._rates_there, self._metrics),
            *(network("actor"), network("critic"), network("target_critic"), network("value")),
        )

    def _forget(self, replay: Sampler | None) -> None:
        state = None if replay is None else self._state_with(replay)  # before anything of another replay is dropped
        super()._forget(replay)
        self._state = state

    def update(self, replay: Sampler, num_updates: int = 1) -> None:
        """Make `num_updates` gradient updates, each on a new batch, without waiting for the device.

        Raises:
            TypeError: if `replay` is not a `Replay` of single steps.
            ValueError: if it is empty.
        """
        if num_updates and isinstance(replay, Replay) and not replay.size:
            raise ValueError("the replay buffer is empty: add transitions before sampling")
        if self._replay is not None:
            raise RuntimeError("this learner shares launches with others: call Together.update")
        super().update(replay, num_updates)

    def _run(self, replay: Sampler, length: int, with_actor: bool) -> Measured:
        assert self._state is not None
        assert self._scratch is not None
        for index in range(length):
            turn = with_actor and index % self.config.policy_delay == 0
            for stage in (NEXT_VALUE, CRITICS, CRITICS_STEP, *((SAMPLED_Q, ACTOR, ACTOR_STEP) if turn else ())):
                run_stage(stage, self._state, self._scratch, self._plan, not turn)
        return self._measured_there(with_actor)

    def _measured_there(self, with_actor: bool) -> Measured:
        known = len(METRICS) - (not self.uses_value) if with_actor else METRICS.index("actor_loss")
        return METRICS[:known], self._metrics[:known]

    def _moments(self) -> dict[str, Moments]:
        return {name: adam.moments() for name, adam in self._adams.items()}

    def _load_moments(self, moments: dict[str, Moments]) -> None:
        for name, adam in self._adams.items():
            adam.load_moments(moments.get(name, {}))

    def load_state(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Load what `state` returned, also for another engine's learner.

        Raises:
            UsageError: if it comes from a learner of another shape or another estimator's networks.
        """
        super().load_state(tensors, counters)
        self.refresh()

    def stale_copies(self) -> str:
        """Return which network's rounded copy does not match its parameters, or an empty string."""
        for name, weights in self._weights.items():
            values = self._flat[name].values
            if not torch.allclose(weights.float(), values, rtol=2.0**-7, atol=1e-30):
                return f"the rounded copy of the {name} does not match its parameters"
        return ""

    def refresh(self) -> None:
        """Round the parameters again; call this when something else has written them."""
        for name, weights in self._weights.items():
            if weights is not self._flat[name].values:
                weights.copy_(self._flat[name].values)
