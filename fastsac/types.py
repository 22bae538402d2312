"""The data types shared by all modules, and the shape letters.

B batch, N environments, K action samples per state, E critics, O observation size, A action size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from fastsac_kernels import PhiloxState, sample_squashed_gaussian
from fastsac_kernels.launch import Backend
from fastsac_kernels.squashed_gaussian import noise_of

#: actions [K, B, A] -> the critics there, [K, E, B]
QFunction = Callable[[Tensor], Tensor]


class Batch(NamedTuple):
    """Transitions sampled from the replay buffer, on the learner's device."""

    obs: Tensor
    """[B, O] float32."""
    action: Tensor
    """[B, A] float32, in the policy's [-1, 1] units."""
    reward: Tensor
    """[B] float32."""
    next_obs: Tensor
    """[B, O] float32; at an episode's end the true last observation."""
    terminated: Tensor
    """[B] bool."""
    discount: Tensor | None = None
    """[B] float32, of the value at `next_obs`; None: gamma. With n-step returns `reward` is the discounted sum of up to
    n rewards, `next_obs` the observation after the last of them, and `terminated` says whether the episode ended there.
    """


class Sampler(Protocol):
    """The source of a learner's batches: the replay buffer, or a fixed batch in a test."""

    def sample(self, batch_size: int, rng: PhiloxState | None = None, backend: Backend = "reference") -> Batch:
        """Return a batch of `batch_size` transitions, sampled with `rng`, or with its own generator if None."""


class Draw(NamedTuple):
    """The source of an estimator's action samples."""

    #: a generator's state, or standard normal numbers [K, B, A] (or as many as `Entry.num_noise` says in place of K)
    rng: PhiloxState | Tensor
    num_samples: int  # K
    backend: Backend = "reference"  # of all kernels in the estimator

    def sample(self, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """Return K actions [K, B, A] and their log-probabilities [K, B] for mean and log_std [B, A]."""
        return sample_squashed_gaussian(mean, log_std, *self)

    def noise(self, mean: Tensor, num_vectors: int | None = None) -> Tensor:
        """Return the samples' standard normal noise, [K, B, A], or `num_vectors` vectors instead of K."""
        return noise_of(self.rng, (num_vectors or self.num_samples, *mean.shape), mean.dtype)


class Estimate(NamedTuple):
    """The result of an estimator of the actor's gradient."""

    loss: Tensor
    """Scalar; differentiable in mean and log_std."""
    log_prob: Tensor
    """[K, B], detached."""
    q: Tensor
    """[K, E, B], detached: the critics at the sampled actions."""

    @classmethod
    def of_gradient(
        cls, mean: Tensor, log_std: Tensor, gradient: ActorGradient, f: Tensor, q: Tensor, log_prob: Tensor
    ) -> Estimate:
        """Return an estimate with this constant gradient; the value of its loss is the mean of f [K, B]."""
        head = mean * gradient.mean.mean(0) + log_std * gradient.log_std.mean(0)
        linear = head.sum(-1).mean()
        return cls(f.detach().mean() + (linear - linear.detach()), log_prob, q)

    def soft_value(self, alpha: Tensor) -> Tensor:
        """Return the mean over K of min_E q - alpha * log_prob, [B]: an unbiased estimate of V(s)."""
        return (self.q.amin(1) - alpha * self.log_prob).mean(0)


class Estimator(Protocol):
    """A method to estimate the gradient of E[alpha * log_prob - min_E q] with respect to the policy's parameters."""

    def __call__(
        self, mean: Tensor, log_std: Tensor, draw: Draw, q_function: QFunction, alpha: Tensor, baseline: str | Tensor
    ) -> Estimate:
        """Return the loss whose gradient is the estimate.

        Args:
            mean: [B, A], of the Gaussian before squashing.
            log_std: [B, A].
            draw: samples the actions; a loss that needs their noise again takes it from ``draw.rng``.
            q_function: the critics as a function of the action, differentiable in it.
            alpha: scalar tensor, a constant here.
            baseline: the baseline's name, or its values b(s) [B] if a network computes them.
        """


class Sample(NamedTuple):
    """K actions per state and the quantities for hand-written gradients; [K, B, A] unless stated otherwise.

    u = mean + deviation is the sample before squashing; mean and log_std are the same for all K.
    """

    noise: Tensor  # eps
    log_std: Tensor
    sigma: Tensor  # exp(log_std)
    deviation: Tensor  # sigma * eps
    action: Tensor  # tanh(u)
    decay: Tensor  # e = exp(-2 |u|)
    log_prob: Tensor  # [K, B]


class ActorGradient(NamedTuple):
    """An estimate of the gradient of E[alpha * log_prob - min_E q] from each sample; their mean is the estimator's."""

    mean: Tensor  # [K, B, A]
    log_std: Tensor  # [K, B, A]
    loss: Callable[[], Tensor]  # returns the estimator's loss, a scalar


class Gradient(Protocol):
    """A hand-written estimator of the actor's gradient: what autograd computes for its `Estimator`, times K B."""

    def __call__(
        self, sample: Sample, f: Tensor, q_gradient: Callable[[], Tensor], alpha: Tensor, baseline: str | Tensor
    ) -> ActorGradient:
        """Return the estimate.

        Args:
            sample: the actions.
            f: [K, B], alpha * log_prob - min_E q.
            q_gradient: backpropagates through the critics; returns the gradient [K, B, A] of min_E q with respect to
                the action, shared among equal critics.
            alpha: scalar tensor.
            baseline: the baseline's name, or its values b(s) [B] if a network computes them.
        """
