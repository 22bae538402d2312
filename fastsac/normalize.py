"""Running normalisation of observations and rewards, on the learner's device.

The replay buffer stores raw values. Sampled batches, and the policy's observations, are normalised with the current
moments, as in Stable-Baselines3's VecNormalize::

    obs'    = clip((obs - mean) / sqrt(var + 1e-8), -10, 10)
    reward' = reward_scale * reward / sqrt(var of G + 1e-8),   G <- reward + gamma G, from 0 in each episode

Rewards are neither centred nor clipped, so their sums (n-step returns) can be normalised after summation. Moments are
float64. They start as those of 1e-4 samples with mean 0 and variance 1, and are merged with those of each step by the
parallel formula of Chan, Golub and LeVeque (1983).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.types import Batch

EPSILON, LARGEST, FIRST_COUNT = 1e-8, 10.0, 1e-4


class Moments:
    """Count, mean and variance of all numbers seen so far, per column."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Start with almost no weight."""
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.var = torch.ones(size, dtype=torch.float64, device=device)
        self.count = torch.full((), FIRST_COUNT, dtype=torch.float64, device=device)

    def add(self, numbers: Tensor, valid: Tensor | None = None) -> None:
        """Add rows [N, size]; only those that are `valid` [N, 1], if given."""
        numbers = numbers.double()
        if valid is None:
            var, mean = torch.var_mean(numbers, 0, correction=0)
            count = torch.full_like(self.count, len(numbers))
        else:
            count = valid.sum(dtype=torch.float64)
            weight = valid / count.clamp(min=1.0)
            mean = (weight * numbers).sum(0)
            var = (weight * (numbers - mean).square()).sum(0)
        delta, total = mean - self.mean, self.count + count
        share = count / total
        self.var.lerp_(var + delta.square() * (self.count / total), share)
        self.mean.add_(delta * share)
        self.count.copy_(total)

    def inverse_deviation(self) -> Tensor:
        """Return 1 / sqrt(var + 1e-8), float64."""
        return (self.var + EPSILON).rsqrt()


class Normalizer:
    """Normalises batches with the running moments of observations and of the discounted return."""

    def __init__(self, config: Config, obs_size: int, num_envs: int, device: torch.device) -> None:
        """Allocate what the settings need.

        Args:
            config: `normalize_obs`, `normalize_reward`, `reward_scale` and `gamma` are used.
            obs_size: O.
            num_envs: N.
            device: the device of all tensors.
        """
        self.device, self.gamma, self.reward_scale = device, config.gamma, config.reward_scale
        self._obs = Moments(obs_size, device) if config.normalize_obs else None
        self._return = Moments(1, device) if config.normalize_reward else None
        self._returns = torch.zeros(num_envs, dtype=torch.float64, device=device)
        # written in place: captured CUDA graphs hold their addresses
        self._mean, self._inverse = torch.zeros(obs_size, device=device), torch.ones(obs_size, device=device)
        self._scale = torch.full((), config.reward_scale, device=device)
        #: whether there is anything to do
        self.active = config.normalize_obs or config.normalize_reward or config.reward_scale != 1.0
        self._refresh()

    def obs(self, obs: Tensor) -> Tensor:
        """Return normalised observations [..., O]."""
        if self._obs is None:
            return obs
        mean, inverse = self._mean.to(obs.dtype), self._inverse.to(obs.dtype)
        return ((obs - mean) * inverse).clamp_(-LARGEST, LARGEST)

    def obs_normalisation(self) -> tuple[Tensor, Tensor] | None:
        """Return the mean and the inverse standard deviation [O] that `obs` uses, or None if it changes nothing."""
        return None if self._obs is None else (self._mean, self._inverse)

    def batch(self, batch: Batch) -> Batch:
        """Return the batch with normalised observations and rewards."""
        reward = batch.reward * self._scale.to(batch.reward.dtype)
        return batch._replace(obs=self.obs(batch.obs), next_obs=self.obs(batch.next_obs), reward=reward)

    @property
    def fresh(self) -> bool:
        """Whether nothing has been seen yet; waits for the device."""
        return all(float(each.count) <= FIRST_COUNT for each in (self._obs, self._return) if each is not None)

    @torch.no_grad()
    def begin(self, obs: Tensor, present: Tensor | None = None) -> None:
        """Add the observations [N, O] after a reset of all environments.

        Args:
            obs: [N, O].
            present: [N]: False where there is no observation; None if all are present.
        """
        self._returns.zero_()
        if self._obs is not None:
            self._obs.add(obs, None if present is None else present[:, None])
        self._refresh()

    @torch.no_grad()
    def add(self, next_obs: Tensor, reward: Tensor, valid: Tensor, present: Tensor | None = None) -> None:
        """Add one step of all environments, without waiting for the device.

        Args:
            next_obs: [N, O].
            reward: [N].
            valid: [N]: False where the environment was reset instead of stepped; its return starts at 0 again.
            present: [N]: False where there is no observation; None if all are present.
        """
        if self._obs is not None:
            self._obs.add(next_obs, None if present is None else present[:, None])
        if self._return is not None:
            self._returns.mul_(self.gamma).add_(reward).mul_(valid)
            self._return.add(self._returns[:, None], valid[:, None])
        self._refresh()

    def _refresh(self) -> None:
        """Update the tensors that `obs` and `batch` read."""
        if self._obs is not None:
            self._mean.copy_(self._obs.mean)
            self._inverse.copy_(self._obs.inverse_deviation())
        if self._return is not None:
            self._scale.copy_(self.reward_scale * self._return.inverse_deviation()[0])

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run needs."""
        tensors: dict[str, Tensor] = {}
        for name, moments in (("obs", self._obs), ("return", self._return)):
            if moments is not None:
                tensors |= {f"{name}_{key}": value for key, value in vars(moments).items()}
        return tensors | ({} if self._return is None else {"returns": self._returns})

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state` returned; missing tensors keep their initial values.

        Raises:
            UsageError: if a tensor does not fit, or its values are impossible for moments.
        """
        for name, tensor in self.state().items():
            other = tensors.get(name)
            if other is None:
                continue
            fits = other.dtype == tensor.dtype and (other.shape == tensor.shape or name == "returns")
            if not fits or not other.isfinite().all() or (name.endswith(("_var", "_count")) and (other < 0.0).any()):
                raise UsageError(f"the checkpoint's normalisation does not fit this configuration: {name}")
            if other.shape == tensor.shape:  # with a different number of environments, new episodes start
                tensor.copy_(other)
        self._refresh()
