"""The fused engine on CUDA: a whole update in six launches of `fastsac_kernels.whole_update`, many in one graph.

It computes what the fused engine computes on a CPU, over the same flat buffers; no gradient of a weight ever reaches
memory. What it does not serve is in `fused_cuda_obstacle`; there the graphed engine does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.estimators import choose
from fastsac.learner.flat import FlatMoments, FlatNetwork, Memory
from fastsac.learner.graphed import GraphedLearner, Measured
from fastsac.learner.optimizers import Groups, weight_decay
from fastsac.learner.reference import ACTION, BATCH, NEXT_ACTION, Moments
from fastsac.networks import Actor, StackedMLP
from fastsac.own_networks import STANDARD, OwnNetworks
from fastsac.replay import Replay
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
    State,
    make_scratch,
    run_stage,
)

#: of hidden layers' widths: they are multiples of the one, and at most the other
UNIT, WIDEST = 64, 512
BASELINES = ("none", "constant", "loo", "value")
#: places of the groups in the kernels' learning rates and counts of steps
ADAMS = {"critic": CRITIC_ADAM, "actor": ACTOR_ADAM, "alpha": ALPHA_ADAM, "value": VALUE_ADAM}


def fused_cuda_obstacle(config: Config, own: OwnNetworks = STANDARD) -> str:
    """Return what in a configuration the engine does not serve, or nothing."""
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
        """Initialise the networks, as the reference engine does from the same seed.

        Raises:
            ValueError: if it does not serve the configuration (see `fused_cuda_obstacle`).
        """
        if obstacle := fused_cuda_obstacle(config, own):
            raise ValueError(obstacle)
        self._state: State | None = None
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
        self._scratch = make_scratch(self._plan, self.device)

    def _make_optimizers(self, groups: Groups) -> None:
        memory = Memory(self.device)
        self._flat = {
            name: FlatNetwork(network, memory)
            for name, network in self._networks().items()
            if isinstance(network, Actor | StackedMLP)
        }
        rounds = self.config.precision == "bf16"
        self._weights = {
            name: network.values.to(torch.bfloat16) if rounds else network.values
            for name, network in self._flat.items()
        }
        self._steps, self._rates_there = (torch.zeros(1, len(ADAMS), device=self.device) for _ in range(2))
        self._metrics = torch.zeros(1, len(METRICS), device=self.device)
        self._adams: dict[str, FlatMoments] = {}
        for name, (parameters, lr) in groups.items():
            values = self._flat[name].values if name in self._flat else self.log_alpha.detach().view(1)
            self._adams[name] = FlatMoments(values, parameters, memory)
            self._adams[name].step = self._steps[0, ADAMS[name]]
            self._set_rate(name, lr)

    def _set_rate(self, name: str, lr: float) -> None:
        self._rates_there[0, ADAMS[name]] = lr

    def _state_with(self, replay: Sampler) -> State:
        """Return everything that the kernels touch."""
        if not isinstance(replay, Replay) or replay.n_step != 1:
            raise TypeError("the fused engine on CUDA draws single steps from a Replay")

        def network(name: str) -> Network:
            name = name if name in self._flat else "actor"  # in the place of what is not there
            moments = self._adams.get(name, self._adams["critic"])
            parts = self._flat[name].values, moments.exp_avg, moments.exp_avg_sq, self._weights[name]
            return Network(*(part[None] for part in parts))

        obs, action, reward, terminated, queue, span = (part[None] for part in replay.ring())
        log_alpha = self.log_alpha.detach().view(1)
        alpha = self._adams.get("alpha")
        return State(
            *(obs, action, reward, terminated, queue, span, self.rng.state[None], log_alpha),
            *((log_alpha, log_alpha) if alpha is None else (alpha.exp_avg, alpha.exp_avg_sq)),
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
            TypeError: if it is not a `Replay` of single steps.
            ValueError: if that is empty.
        """
        if num_updates and isinstance(replay, Replay) and not replay.size:
            raise ValueError("the replay is empty: add transitions before sampling")
        super().update(replay, num_updates)

    def _run(self, replay: Sampler, length: int, with_actor: bool) -> Measured:
        assert self._state is not None
        for index in range(length):
            turn = with_actor and index % self.config.actor_every == 0
            for stage in (NEXT_VALUE, CRITICS, CRITICS_STEP, *((SAMPLED_Q, ACTOR, ACTOR_STEP) if turn else ())):
                run_stage(stage, self._state, self._scratch, self._plan, not turn)
        known = len(METRICS) - (not self.uses_value) if with_actor else METRICS.index("actor_loss")
        return METRICS[:known], self._metrics[0, :known]

    def _moments(self) -> dict[str, Moments]:
        return {name: adam.moments() for name, adam in self._adams.items()}

    def _load_moments(self, moments: dict[str, Moments]) -> None:
        for name, adam in self._adams.items():
            adam.load_moments(moments.get(name, {}))

    def load_state(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Take over what `state` returned, also of another engine's learner.

        Raises:
            UsageError: if it comes from a learner of another shape or another estimator's networks.
        """
        super().load_state(tensors, counters)
        self.refresh()

    def stale_copies(self) -> str:
        """Return which network's copy for products is not its parameters, rounded; or nothing."""
        for name, weights in self._weights.items():
            values = self._flat[name].values
            if not torch.allclose(weights.float(), values, rtol=2.0**-7, atol=1e-30):
                return f"the rounded copy of the {name} is not that of its parameters"
        return ""

    def refresh(self) -> None:
        """Round the parameters anew; to be called when something else has written them."""
        for name, weights in self._weights.items():
            if weights is not self._flat[name].values:
                weights.copy_(self._flat[name].values)
