"""The reference engine: SAC's update with autograd, eager and readable. Every other engine is tested against it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.estimators import choose
from fastsac.learner.optimizers import Groups, make_adam, rate_factor
from fastsac.networks import CategoricalCritic, ValueNetwork, make_actor, make_critic, q_of_samples
from fastsac.normalize import Normalizer
from fastsac.own_networks import STANDARD, OwnCritic, OwnNetworks
from fastsac.replay import restore_generator
from fastsac.types import Batch, Draw, Sampler
from fastsac_kernels import categorical_loss, td_loss
from fastsac_kernels.launch import Backend

Metrics = dict[str, Tensor]
#: Adam's state of each parameter by its index in the group: step, exp_avg, exp_avg_sq
Moments = dict[int, dict[str, Tensor]]
#: what random numbers are drawn for: the generator's streams
NEXT_ACTION, ACTION, BATCH, ACTING = range(4)


OTHER_NETWORKS = (
    "the checkpoint's networks do not fit this configuration; if it was trained with networks of your own, pass them "
    "to SAC.load(..., actor=..., critic=...)"
)
#: tensor names in any engine's state
_STORED = re.compile(
    r"(actor|critic|target_critic|value)\.[\w.]+|normalizer\.[a-z_]+|log_alpha|generator|philox"
    r"|optimizer\.(actor|critic|alpha|value)\.[0-9]{1,6}\.(step|exp_avg|exp_avg_sq)"
)


class Learner:
    """Actor, critics, targets, temperature and optimisers, all on one device. Only `update` writes them."""

    engine = "reference"
    backend: Backend = "reference"

    def __init__(
        self,
        config: Config,
        obs_size: int,
        action_size: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        own: OwnNetworks = STANDARD,
    ) -> None:
        """Initialise the networks.

        Args:
            config: its estimator, hyper-parameters and network sizes are used; the device is not.
            obs_size: O.
            action_size: A.
            device: where everything lives.
            seed: random seed of the initial weights and of all noise.
            own: the user's own networks, which are moved to the device and trained.

        Raises:
            UsageError: if the estimator, the baseline and K cannot be combined, or the user's networks do not fit.
        """
        self.config = config
        self.choice = choose(config)
        self.device = torch.device(device)
        self.updates = 0
        #: averages gradients [n] over several processes, in place; None for a single process
        self.average: Callable[[Tensor], None] | None = None
        self._measured: Metrics = {}
        self.target_entropy = -float(action_size) if config.target_entropy == "auto" else config.target_entropy
        self.generator = torch.Generator(self.device).manual_seed(seed)
        own.refuse_misfits(obs_size, action_size, config.num_critics)
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU: the same on every device
            torch.manual_seed(seed)
            actor = make_actor(config, obs_size, action_size) if own.actor is None else own.actor
            critic = make_critic(config, obs_size, action_size) if own.critic is None else OwnCritic(own.critic)
            value = ValueNetwork(obs_size, config.hidden_sizes, config.activation) if self.uses_value else None
        self.actor: nn.Module = actor.to(self.device)
        self.critic: nn.Module = critic.to(self.device)
        self.value = value if value is None else value.to(self.device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.normalizer = Normalizer(config, obs_size, config.num_envs, self.device)
        initial_alpha = config.initial_alpha if config.alpha == "auto" else config.alpha
        self.log_alpha = nn.Parameter(torch.tensor(float(initial_alpha), device=self.device).log())
        groups: Groups = {
            "actor": (list(self.actor.parameters()), config.actor_lr),
            "critic": (list(self.critic.parameters()), config.critic_lr),
        }
        if self.learns_alpha:
            groups["alpha"] = [self.log_alpha], config.alpha_lr
        if self.value is not None:
            groups["value"] = list(self.value.parameters()), config.value_lr
        self._parameters = {name: parameters for name, (parameters, _) in groups.items()}
        self._rates = {name: lr for name, (_, lr) in groups.items()}
        self._make_optimizers(groups)

    def _make_optimizers(self, groups: Groups) -> None:
        """Make an optimiser for each group's parameters and learning rate."""
        self.optimizers = {name: make_adam(self.config, name, *group) for name, group in groups.items()}

    def set_progress(self, fraction: float) -> None:
        """Set the learning rates by `lr_schedule`, after this fraction of training, from 0 to 1."""
        factor = rate_factor(self.config.lr_schedule, fraction)
        for name, lr in self._rates.items():
            self._set_rate(name, factor * lr)

    def _set_rate(self, name: str, lr: float) -> None:
        self.optimizers[name].param_groups[0]["lr"] = lr

    @property
    def learns_alpha(self) -> bool:
        """Whether alpha is tuned to reach a target entropy."""
        return self.config.alpha == "auto"

    @property
    def uses_value(self) -> bool:
        """Whether the baseline is a learned soft value."""
        return self.choice.value_sign != 0.0

    @property
    def alpha(self) -> Tensor:
        """The entropy temperature, a detached scalar."""
        return self.log_alpha.detach().exp()

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Return actions [N, A] in [-1, 1] for obs [N, O]: a sample, or the squashed mean."""
        mean, log_std = self.actor(self.normalizer.obs(obs))
        if deterministic:
            return torch.tanh(mean)
        return self._draw(ACTING, 1, mean).sample(mean, log_std)[0][0]

    def update(self, replay: Sampler, num_updates: int = 1) -> None:
        """Make `num_updates` gradient updates, each on a new batch, without waiting for the device."""
        for left in range(num_updates, 0, -1):
            with_actor = self.updates % self.config.policy_delay == 0
            self._measured |= self._update_once(replay, with_actor, measure=left <= self.config.policy_delay)
            self.updates += 1

    def metrics(self) -> Metrics:
        """Return scalars of the last update, on the device; none before the first one.

        `critic_loss`, `q` and, from the last update of the actor, `actor_loss`, `alpha`, `entropy` (of the squashed
        policy, in nats) and `value_loss` where there is a V.
        """
        return dict(self._measured)

    def _update_once(self, replay: Sampler, with_actor: bool, measure: bool) -> Metrics:
        """Make one update; return its metrics with `measure`, and otherwise possibly some of them."""
        batch = self._sample_batch(replay)
        if self.normalizer.active:
            batch = self.normalizer.batch(batch)
        metrics = self._update_critic(batch, measure)
        if with_actor:
            metrics |= self._update_actor_and_alpha(batch.obs, measure)
        self._update_targets()
        return metrics

    def _sample_batch(self, replay: Sampler) -> Batch:
        return replay.sample(self.config.batch_size)

    def _update_critic(self, batch: Batch, measure: bool) -> Metrics:
        with torch.no_grad():
            mean, log_std = self.actor(batch.next_obs)
            next_action, next_log_prob = self._draw(NEXT_ACTION, 1, mean).sample(mean, log_std)
        loss, q = self._critic_loss(batch, next_action[0], next_log_prob[0])
        self._descend("critic", loss)
        return {"critic_loss": loss.detach(), "q": q.detach().mean()} if measure else {}

    def _critic_loss(self, batch: Batch, next_action: Tensor, next_log_prob: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, and q [E, B]."""
        config, averages = self.config, self.config.critic_reduction == "mean"
        discount = config.gamma if batch.discount is None else batch.discount
        if isinstance(self.critic, CategoricalCritic) and isinstance(self.target_critic, CategoricalCritic):
            with torch.no_grad():
                next_logits = self.target_critic.logits(batch.next_obs, next_action)
            logits = self.critic.logits(batch.obs, batch.action)
            return categorical_loss(
                *(logits, next_logits, batch.reward, batch.terminated, next_log_prob, self.alpha, discount),
                v_min=self.critic.v_min,
                v_max=self.critic.v_max,
                target="own" if averages else "smallest",
                backend=self.backend,
            )
        with torch.no_grad():
            next_q = self.target_critic(batch.next_obs, next_action)
            if averages:
                next_q = next_q.mean(0, keepdim=True).expand_as(next_q)
        q = self.critic(batch.obs, batch.action)
        target = batch.reward, batch.terminated, next_q, next_log_prob
        return td_loss(q, *target, self.alpha, discount, self.backend), q

    def _q_of_samples(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return q [K, E, B] of actions [K, B, A]; [K, 1, B] where the critics' mean counts."""
        q = q_of_samples(self.critic, obs, action)
        return q.mean(1, keepdim=True) if self.config.critic_reduction == "mean" else q

    def _update_actor_and_alpha(self, obs: Tensor, measure: bool) -> Metrics:
        mean, log_std = self.actor(obs)
        draw = self._draw(ACTION, self.choice.num_action_samples, mean, self.choice.num_noise)
        alpha = self.alpha
        baseline: str | Tensor = self.choice.baseline
        if self.value is not None:
            baseline = self.choice.value_sign * self.value(obs, frozen=True)
        estimate = self.choice.estimator(
            mean, log_std, draw, lambda action: self._q_of_samples(obs, action), alpha, baseline
        )
        self._descend("actor", estimate.loss)
        metrics: Metrics = {}
        if measure or self.learns_alpha:
            entropy = -estimate.log_prob.mean()
        if measure:
            metrics = {"actor_loss": estimate.loss.detach(), "alpha": alpha, "entropy": entropy}
        if self.learns_alpha:
            self._descend("alpha", self.log_alpha.exp() * (entropy - self.target_entropy))
        if self.value is not None:
            value_loss = (self.value(obs) - estimate.soft_value(alpha)).square().mean()
            self._descend("value", value_loss)
            if measure:
                metrics["value_loss"] = value_loss.detach()
        return metrics

    @torch.no_grad()
    def _update_targets(self) -> None:
        torch._foreach_lerp_(list(self.target_critic.parameters()), list(self.critic.parameters()), self.config.tau)

    def _descend(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.average is not None:
            self._average(name)
        if self.config.max_grad_norm is not None and name != "alpha":
            nn.utils.clip_grad_norm_(self._parameters[name], self.config.max_grad_norm)
        self.optimizers[name].step()

    def _average(self, name: str) -> None:
        """Average a network's gradients over ranks, in a single call."""
        assert self.average is not None
        grads = [p.grad for p in self._parameters[name] if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        self.average(flat)
        for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view(grad.shape))

    def reseed(self, seed: int) -> None:
        """Reseed the random numbers; the weights stay."""
        self.generator.manual_seed(seed)

    def _draw(self, purpose: int, num_samples: int, mean: Tensor, num_noise: int | None = None) -> Draw:
        noise = torch.randn((num_noise or num_samples, *mean.shape), device=self.device, generator=self.generator)
        return Draw(noise, num_samples, self.backend)

    def _moments(self) -> dict[str, Moments]:
        """Return the state of each group's Adam."""
        return {name: optimizer.state_dict()["state"] for name, optimizer in self.optimizers.items()}

    def _load_moments(self, moments: dict[str, Moments]) -> None:
        """Load copies of what `_moments` returned; a missing group starts from zero."""
        for name, optimizer in self.optimizers.items():
            # fused Adam ignores strides, and the parameters are contiguous
            state = {
                index: {key: value.clone(memory_format=torch.contiguous_format) for key, value in own.items()}
                for index, own in moments.get(name, {}).items()
            }
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def _refuse_other_moments(self, moments: dict[str, Moments]) -> None:
        """Raise UsageError unless each parameter has all of its moments or none: Adam's kernel trusts their sizes."""
        for name, parameters in self._parameters.items():
            for index, own in moments.get(name, {}).items():
                if index >= len(parameters):
                    raise UsageError("the checkpoint's optimisers do not fit this configuration")
                shape = tuple(parameters[index].shape)
                shapes = {key: tuple(value.shape) for key, value in own.items()}
                floats = all(value.dtype == torch.float32 for value in own.values())
                if shapes != {"step": (), "exp_avg": shape, "exp_avg_sq": shape} or not floats:
                    raise UsageError("the checkpoint's optimisers do not fit this configuration")

    def _networks(self) -> dict[str, nn.Module]:
        networks = {"actor": self.actor, "critic": self.critic, "target_critic": self.target_critic}
        if self.value is not None:
            networks["value"] = self.value
        return networks

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return everything that a resumed run needs: tensors by name, and counters for JSON."""
        tensors = {
            f"{name}.{key}": value for name, net in self._networks().items() for key, value in net.state_dict().items()
        }
        tensors |= {f"normalizer.{name}": value for name, value in self.normalizer.state().items()}
        tensors["log_alpha"] = self.log_alpha.detach()
        tensors["generator"] = self.generator.get_state()
        for name, moments in self._moments().items():
            for index, state in moments.items():
                tensors |= {f"optimizer.{name}.{index}.{key}": value for key, value in state.items()}
        return tensors, {"updates": self.updates}

    def load_state(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Load what `state` returned.

        Raises:
            UsageError: if it comes from a learner of another shape or another estimator's networks.
        """
        ours = {f"{name}.{key}" for name, network in self._networks().items() for key in network.state_dict()}
        if unknown := [name for name in tensors if name not in ours and not _STORED.fullmatch(name)]:
            raise UsageError(f"the checkpoint holds {unknown[0]!r}, which no learner has")
        try:
            for name, network in self._networks().items():
                prefix = f"{name}."
                network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            # a fixed alpha comes from the configuration, and no gradient leads away from log 0
            if self.learns_alpha and tensors["log_alpha"].isfinite():
                self.log_alpha.data.copy_(tensors["log_alpha"])
        except (RuntimeError, KeyError) as error:
            raise UsageError(OTHER_NETWORKS) from error
        prefix = "normalizer."
        self.normalizer.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        moments: dict[str, Moments] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, name, index, moment = key.split(".")
                moments.setdefault(name, {}).setdefault(int(index), {})[moment] = value
        self._refuse_other_moments(moments)
        self._load_moments(moments)
        restore_generator(self.generator, tensors["generator"])
        self.updates = counters["updates"]
        self._measured = {}


def refuse_other_networks(
    config: Config,
    obs_size: int,
    action_size: int,
    shapes: Mapping[str, tuple[int, ...]],
    own: OwnNetworks = STANDARD,
    policy_only: bool = False,
) -> None:
    """Raise UsageError unless the actor and critics of the configuration have these shapes; takes no memory.

    With `policy_only` there are no critics to compare.
    """
    with torch.device("meta"):
        actor = make_actor(config, obs_size, action_size) if own.actor is None else own.actor
        critic = make_critic(config, obs_size, action_size) if own.critic is None else OwnCritic(own.critic)
    expected = {
        f"{name}.{key}": tuple(value.shape)
        for name, network in (("actor", actor), *([] if policy_only else [("critic", critic)]))
        for key, value in network.state_dict().items()
    }
    if any(shapes.get(name) != shape for name, shape in expected.items()):
        raise UsageError(OTHER_NETWORKS)
