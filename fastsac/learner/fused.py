"""The fused engine: SAC's update with every gradient written out, over networks in flat buffers. No autograd.

One update, in the order of the reference engine, with B states, K action samples, E critics::

    batch       x = [1 | obs | action]: next_obs with a', obs with each of the K samples, obs with the batch's action
    policy      y = actor([1 | next_obs, obs]) in one pass: both use the same weights
                log_std = 3.5 tanh(raw) - 1.5,  sigma = exp(log_std),  u = mean + sigma eps,  a = tanh(u)
                log_prob = sum_A [2 (|u| + log1p(e) - log 2) - log_std - eps^2 / 2 - log(2 pi) / 2],  e = exp(-2 |u|)
    critics     target = reward + gamma (1 - terminated) (min_E target_critic(next_obs, a') - alpha log_prob')
                loss = sum_E mean_B (q - target)^2             dq = 2 (q - target) / B
    actor       f = alpha log_prob - min_E q                   d mean, d log_std by the estimator (fastsac.estimators)
                d raw = d log_std * 3.5 (1 - tanh(raw)^2)      dy = [d mean | d raw] / B
                d min_E q / da = sum over the smallest critics of dq/da, over their number
    alpha       loss = alpha (entropy - target_entropy)        d log_alpha = alpha (entropy - target_entropy)
    value       loss = mean_B (V - soft_value)^2               dV = 2 (V - soft_value) / B,  soft_value = -mean_K f
    targets     target_critic += tau (critic - target_critic)

`fastsac.learner.stack` has the gradients of the networks' layers, and `fastsac.learner.flat` their memory. With `bf16`,
hidden layers' weights, biases, activations and gradients are rounded to bfloat16 for the products, whose sums are
accumulated in float32 and rounded once. Parameters, Adam, targets, losses and every network's last layer stay float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.estimators import choose
from fastsac.estimators.gaussian import mean_action_baseline
from fastsac.learner.flat import ALIGNMENT, FlatAdam, FlatGradients, FlatNetwork, Memory
from fastsac.learner.optimizers import Groups, weight_decay
from fastsac.learner.reference import Learner, Metrics, Moments
from fastsac.learner.stack import ACTIVATIONS, StackPass
from fastsac.networks import LOG_STD_HALF_RANGE, LOG_STD_MAX, LOG_STD_MIN, Actor, StackedMLP
from fastsac.own_networks import STANDARD, OwnNetworks
from fastsac.types import Batch, Gradient, Sample, Sampler

LOG_STD_MIDDLE = 0.5 * (LOG_STD_MIN + LOG_STD_MAX)
#: first layers with at most this many inputs stay exact: bfloat16 would save 0 to 6 % of an update (LOG.md)
NARROW = 64
#: transitions to draw at once if several updates are due
TRANSITIONS_DRAWN = 8192


def fused_obstacle(config: Config, own: OwnNetworks) -> str:
    """Return which setting has no written-out gradient, or an empty string."""
    if choose(config).gradient is None:
        return f"--estimator {config.estimator} has no written-out gradient"
    special = {"--layer-norm": config.layer_norm, "--critic categorical": config.critic == "categorical"}
    for what, there in {**special, "a network of your own": bool(own)}.items():
        if there:
            return f"{what} has no written-out gradient"
    return ""


class FusedLearner(Learner):
    """A learner whose parameters, gradients and moments lie in flat buffers; the modules' tensors are views of them."""

    engine = "fused"

    def __init__(
        self,
        config: Config,
        obs_size: int,
        action_size: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        own: OwnNetworks = STANDARD,
    ) -> None:
        """Initialise the networks as the reference engine does with the same seed.

        Raises:
            ValueError: if something has no written-out gradient (see `fused_obstacle`).
        """
        if obstacle := fused_obstacle(config, own):
            raise ValueError(obstacle)
        super().__init__(config, obs_size, action_size, device, seed, own)
        assert self.choice.gradient is not None
        self._gradient: Gradient = self.choice.gradient
        self._grad_log_alpha = self._adams["alpha"].grads[0] if self.learns_alpha else None
        self._make_passes(obs_size, action_size)

    def _make_optimizers(self, groups: Groups) -> None:
        self._memory = Memory(self.device)
        assert isinstance(self.critic, StackedMLP)
        weight, _ = self.critic.stack()[0]
        rounded_from = int(weight.shape[1] <= NARROW) if self.config.precision == "bf16" else None
        self._flat = {
            name: FlatNetwork(network, self._memory, rounded_from)
            for name, network in self._networks().items()
            if isinstance(network, Actor | StackedMLP)
        }
        # the gradients of actor, alpha and V are adjacent: one call averages them over ranks
        values = {
            name: self._flat[name].values if name in self._flat else self.log_alpha.detach().view(1) for name in groups
        }
        places = {name: -(-len(values[name]) // ALIGNMENT) * ALIGNMENT for name in groups if name != "critic"}
        self._actors_grads = self._memory.zeros([sum(places.values())], weight.dtype)
        parts = dict(zip(places, torch.split(self._actors_grads, list(places.values())), strict=True))
        self._adams: dict[str, FlatAdam] = {}
        self._grads: dict[str, FlatGradients] = {}
        for name, (parameters, lr) in groups.items():
            grads = parts[name][: len(values[name])] if name in parts else None
            clip = None if name == "alpha" else self.config.max_grad_norm
            settings = self.config.adam_betas, weight_decay(self.config, name), clip
            self._adams[name] = FlatAdam(values[name], parameters, lr, self._memory, *settings, grads)
            if name in self._flat:
                self._grads[name] = FlatGradients(self._flat[name], self._adams[name].grads, self._memory)

    def _make_passes(self, obs_size: int, action_size: int) -> None:
        """Make the inputs and views of their parts, and bind each pass to its input."""
        batch, like = self.config.batch_size, self.log_alpha.detach()
        # the mean-action baseline needs one more row per state: a sample without noise
        samples = self._rows = self.choice.num_action_samples + (self.choice.baseline == "mean-action")
        self._log_std_middle = torch.full_like(like, LOG_STD_MIDDLE)
        noise = like.new_zeros(1 + samples, batch, action_size)
        self._next_noise, self._sample_noise = noise[:1], noise[1 : 1 + self.choice.num_action_samples]
        self._noise = noise
        # [1 | obs | action]: next_obs with its sampled action, obs with K sampled ones, obs with the batch's
        columns = 1 + obs_size + action_size
        x = self._memory.zeros([2 + samples, batch, columns], self._flat["critic"].layers[0].block.dtype)
        x[:, :, 0] = 1.0
        self._next_obs, self._obs = x[0, :, 1:-action_size], x[1:, :, 1:-action_size]
        self._next_action, self._sampled_action = x[:1, :, -action_size:], x[:-1, :, -action_size:]
        self._batch_action = x[-1, :, -action_size:]
        policy_x = x[:2].view(2 * batch, columns)[:, :-action_size]

        def make(network: str, x: Tensor, name: str, trained: bool = False, first_row: int = 0) -> StackPass:
            grads = self._grads[network] if trained else None
            activation = ACTIVATIONS[self.config.activation]
            return StackPass(self._flat[network].layers, activation, x, self._memory, name, grads, first_row)

        self._sampled_pass = make("critic", x[1:-1].view(samples * batch, columns), "critic")
        self._target_pass = make("target_critic", x[0], "critic")
        self._critic_pass = make("critic", x[-1], "critic", trained=True)
        self._policy_pass = make("actor", policy_x, "actor", trained=True, first_row=batch)
        self._next_policy_pass = make("actor", policy_x[:batch], "actor")
        self._value_pass = make("value", policy_x[batch:], "value", trained=True) if self.uses_value else None
        self._grad_mean, self._grad_raw = self._policy_pass.grad_output[0].chunk(2, 1)
        self._action_weight = self._flat["critic"].layers[0].weight[:, -action_size:].mT
        acting_x = self._memory.zeros([self.config.num_envs, 1 + obs_size], like.dtype)
        acting_x[:, 0] = 1.0
        self._acting_obs, self._acting_noise = acting_x[:, 1:], like.new_empty(self.config.num_envs, action_size)
        activation = ACTIVATIONS[self.config.activation]
        self._acting_pass = StackPass(self._flat["actor"].exact, activation, acting_x, self._memory, "acting")

    def _set_rate(self, name: str, lr: float) -> None:
        self._adams[name].lr = lr

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Return actions [N, A] in [-1, 1] for obs [N, O]: a sample, or the squashed mean. Weights are not rounded."""
        if deterministic or len(obs) != self.config.num_envs:
            return super().act(obs, deterministic)
        self._acting_obs.copy_(self.normalizer.obs(obs))
        mean, raw = self._acting_pass.forward()[0].chunk(2, 1)
        self._acting_noise.normal_(generator=self.generator)
        sigma = torch.add(self._log_std_middle, torch.tanh(raw), alpha=LOG_STD_HALF_RANGE).exp_()
        return torch.addcmul(mean, sigma, self._acting_noise).tanh_()

    @torch.inference_mode()
    def update(self, replay: Sampler, num_updates: int = 1) -> None:
        """Make `num_updates` gradient updates, each on a new batch."""
        size, every = self.config.batch_size, self.config.policy_delay
        while num_updates:
            drawn = min(num_updates, max(1, TRANSITIONS_DRAWN // size))
            sampled = replay.sample(drawn * size)
            if self.normalizer.active:
                sampled = self.normalizer.batch(sampled)
            parts = [[None] * drawn if part is None else torch.split(part, size) for part in sampled]
            for batch in zip(*parts, strict=True):
                num_updates -= 1
                metrics = self._measured if num_updates < every else None
                self._update_fused(Batch(*batch), self.updates % every == 0, metrics)
                self.updates += 1

    def _update_fused(self, batch: Batch, with_actor: bool, metrics: Metrics | None) -> None:
        self._next_obs.copy_(batch.next_obs)
        self._obs.copy_(batch.obs)
        self._batch_action.copy_(batch.action)
        alpha = self.log_alpha.exp()
        sample, squashed = self._sample_policy(with_actor)
        self._descend_critic(batch, sample.log_prob[0], alpha, metrics)
        if with_actor:
            self._descend_actor_and_alpha(Sample(*(part[1:] for part in sample)), squashed, alpha, metrics)
        target = self._flat["target_critic"]
        target.values.lerp_(self._flat["critic"].values, self.config.tau)
        target.refresh()

    def _draw_noise(self, with_actor: bool) -> None:
        self._next_noise.normal_(generator=self.generator)
        if with_actor:
            self._sample_noise.normal_(generator=self.generator)  # separate, for the reference engine's numbers

    def _sample_policy(self, with_actor: bool) -> tuple[Sample, Tensor]:
        """Return a sample for next_obs [1, B, A], or with the actor's turn also K for obs after it [1 + K, B, A].

        Also return tanh(raw) [B, A] for obs.
        """
        self._draw_noise(with_actor)
        output = (self._policy_pass if with_actor else self._next_policy_pass).forward()
        mean, raw = output.view(-1, self.config.batch_size, output.shape[2]).chunk(2, -1)
        squashed = torch.tanh(raw)
        log_std = torch.add(self._log_std_middle, squashed, alpha=LOG_STD_HALF_RANGE)
        if with_actor and self._rows > 1:
            mean, log_std = (torch.cat([part[:1], part[1:].expand(self._rows, -1, -1)]) for part in (mean, log_std))
        noise = self._noise if with_actor else self._next_noise
        sigma = log_std.exp()
        deviation = sigma * noise
        u = mean + deviation
        action = torch.tanh(u)
        (self._sampled_action if with_actor else self._next_action).copy_(action)
        abs_u = u.abs()
        decay = (-2.0 * abs_u).exp_()
        # two constants: their sum would lose an ulp, the same way in every element
        terms = torch.log1p(decay).add_(abs_u).sub_(math.log(2.0)).mul_(2.0).sub_(0.5 * math.log(2.0 * math.pi))
        log_prob = terms.sub_(log_std).addcmul_(noise, noise, value=-0.5).sum(-1)
        return Sample(noise, log_std, sigma, deviation, action, decay, log_prob), squashed[-1]

    def _reduced(self, q: Tensor) -> Tensor:
        """Return the minimum or the mean of q [E, ...] over the critics."""
        return q.mean(0) if self.config.critic_reduction == "mean" else q.amin(0)

    def _descend_critic(self, batch: Batch, next_log_prob: Tensor, alpha: Tensor, metrics: Metrics | None) -> None:
        next_q = self._target_pass.forward().squeeze(2)  # [E, B]
        next_value = torch.addcmul(self._reduced(next_q), alpha, next_log_prob, value=-1.0)
        next_value = torch.where(batch.terminated, 0.0, next_value)
        if batch.discount is None:
            target = torch.add(batch.reward, next_value, alpha=self.config.gamma)  # [B]
        else:
            target = torch.addcmul(batch.reward, batch.discount, next_value)
        q = self._critic_pass.forward()  # [E, B, 1]
        errors = q - target.unsqueeze(1)
        torch.mul(errors, 2.0 / len(target), out=self._critic_pass.grad_output)
        if metrics is not None:
            metrics |= {"critic_loss": errors.square().mean(1).sum(), "q": q.mean()}
        self._critic_pass.backward()
        if self.average is not None:
            self.average(self._adams["critic"].grads)
        self._adams["critic"].descend()
        self._flat["critic"].refresh()

    def _descend_actor_and_alpha(
        self, sample: Sample, squashed: Tensor, alpha: Tensor, metrics: Metrics | None
    ) -> None:
        rows, batch, action_size = sample.action.shape
        samples = self.choice.num_action_samples
        averages = self.config.critic_reduction == "mean"
        q = self._sampled_pass.forward()  # [E, K B, 1], or (K + 1) B
        min_q = self._reduced(q)
        f = torch.mul(alpha, sample.log_prob).sub_(min_q.view(rows, batch))[:samples]  # [K, B]

        def q_gradient() -> Tensor:
            share = self._sampled_pass.grad_output
            if averages:
                share.fill_(1.0 / len(q))
            else:
                torch.eq(q, min_q, out=share)
                share /= share.sum(0)
            d = self._sampled_pass.backward()  # [E, K B, H]
            gradient = torch.bmm(d, self._action_weight).sum(0, dtype=q.dtype)
            return gradient.view(rows, batch, action_size)[:samples]

        baseline: str | Tensor = self.choice.baseline
        if self._value_pass is not None:
            value = self._value_pass.forward()  # [1, B, 1]
            baseline = self.choice.value_sign * value.view(batch)
        elif rows > samples:
            baseline = mean_action_baseline(sample.log_prob[-1], min_q.view(rows, batch)[-1], action_size, alpha)
            sample = Sample(*(part[:samples] for part in sample))
        gradient = self._gradient(sample, f, q_gradient, alpha, baseline)
        grad_mean, grad_log_std = (
            each[0] if samples == 1 else each.sum(0) for each in (gradient.mean, gradient.log_std)
        )
        torch.mul(grad_mean, 1.0 / (samples * batch), out=self._grad_mean)
        grad_raw = torch.ops.aten.tanh_backward(grad_log_std, squashed)  # times 1 - tanh(raw)^2
        torch.mul(grad_raw, LOG_STD_HALF_RANGE / (samples * batch), out=self._grad_raw)
        self._policy_pass.backward()
        if metrics is not None or self.learns_alpha:
            entropy = sample.log_prob.mean().neg_()
        if metrics is not None:
            metrics |= {"actor_loss": gradient.loss(), "alpha": alpha, "entropy": entropy}
        if self.learns_alpha:
            torch.mul(alpha, entropy - self.target_entropy, out=self._grad_log_alpha)
        if self._value_pass is not None:
            errors = value + f.mean(0).unsqueeze(1)
            torch.mul(errors, 2.0 / batch, out=self._value_pass.grad_output)
            self._value_pass.backward()
            if metrics is not None:
                metrics["value_loss"] = errors.square().mean()
        if self.average is not None:
            self.average(self._actors_grads)
        for name in self._adams:
            if name != "critic":
                self._adams[name].descend()
            if name in ("actor", "value"):
                self._flat[name].refresh()

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
        for network in self._flat.values():
            network.refresh()
