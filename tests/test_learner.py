"""What every engine does that runs on a CPU."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.learner import FusedLearner, Learner
from fastsac.networks import q_of_samples
from fastsac.replay import Replay
from fastsac.types import Batch
from tests.test_networks import unstack

O, A, B, HIDDEN = 5, 3, 17, (8, 6)  # noqa: E741
READS = ["item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__", "__array__"]
kind: type[Learner] = Learner
SCORE = {"estimator": "score", "baseline": "loo", "num_action_samples": 3}
VALUE = {"estimator": "score", "baseline": "value"}


@pytest.fixture(params=[Learner, FusedLearner], ids=lambda kind: kind.engine, autouse=True)
def _engine(request: pytest.FixtureRequest) -> None:
    global kind
    kind = request.param


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(seed: int = 0, obs_size: int = O, **settings: Any) -> Learner:
    rates = {"actor_lr": 1e-2, "critic_lr": 2e-2, "value_lr": 4e-2, "alpha_lr": 3e-2}
    defaults = {"hidden_sizes": HIDDEN, "batch_size": B, "num_envs": 4, "precision": "fp32"}
    return kind(Config(**{**defaults, **rates, **settings}), obs_size, A, seed=seed)


class Fixed:
    """The same random batch every time."""

    def __init__(self, size: int = B, seed: int = 0, discounts: bool = False) -> None:
        g = torch.Generator().manual_seed(seed)
        self.batch = Batch(
            obs=torch.randn(size, O, generator=g),
            action=torch.rand(size, A, generator=g) * 2 - 1,
            reward=torch.randn(size, generator=g),
            next_obs=torch.randn(size, O, generator=g),
            terminated=torch.rand(size, generator=g) < 0.3,
            discount=torch.rand(size, generator=g) if discounts else None,
        )

    def sample(self, batch_size: int, rng: Any = None, backend: str = "reference") -> Batch:
        copies, rest = divmod(batch_size, len(self.batch.obs))
        assert rest == 0
        return Batch(*(part if part is None else torch.cat([part] * copies) for part in self.batch))


def tensors_of(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state()[0].items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


class Textbook:
    """SAC as in arXiv 1812.05905, written straight: separate critics, a loop over them, a loop over the samples."""

    def __init__(self, learner: Learner, seed: int) -> None:
        self.config, self.num_samples = learner.config, learner.choice.num_action_samples
        self.target_entropy = learner.target_entropy
        self.generator = torch.Generator().manual_seed(seed)
        plain = [nn.Linear(layer.in_features, layer.out_features) for layer in learner.actor.layers]
        for layer, original in zip(plain, learner.actor.layers, strict=True):
            layer.load_state_dict(original.state_dict())
        self.actor = nn.Sequential(plain[0], nn.ReLU(), plain[1], nn.ReLU(), plain[2])
        self.critics, self.targets = unstack(learner.critic), unstack(learner.target_critic)
        self.value = unstack(learner.value)[0] if learner.value is not None else None
        self.log_alpha = nn.Parameter(learner.log_alpha.detach().clone())
        critic_parameters = [p for critic in self.critics for p in critic.parameters()]
        self.critic_adam = torch.optim.Adam(critic_parameters, self.config.critic_lr, fused=False, foreach=False)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), self.config.actor_lr, fused=False, foreach=False)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], self.config.alpha_lr, fused=False, foreach=False)
        if self.value is not None:
            self.value_adam = torch.optim.Adam(self.value.parameters(), self.config.value_lr, fused=False)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The action, its log-probability, and that of the number under the Gaussian with the number held fixed."""
        mean, raw = self.actor(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, (-5.0 + 3.5 * (1.0 + torch.tanh(raw))).exp())
        u = normal.mean + normal.stddev * noise
        log_prob = (normal.log_prob(u) - torch.log(1.0 - torch.tanh(u) ** 2)).sum(-1)
        return torch.tanh(u), log_prob, normal.log_prob(u.detach()).sum(-1)

    def q(self, critic: nn.Sequential, obs: Tensor, action: Tensor) -> Tensor:
        return critic(torch.cat([obs, action], -1))[:, 0]

    def smallest(self, critics: list[nn.Sequential], obs: Tensor, action: Tensor) -> Tensor:
        return torch.stack([self.q(critic, obs, action) for critic in critics]).min(0).values

    def noise(self, num_samples: int, batch: int) -> Tensor:
        return torch.randn(num_samples, batch, A, generator=self.generator)

    def descend(self, adam: torch.optim.Adam, loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward()
        adam.step()

    def critic_loss(self, batch: Batch, alpha: float) -> Tensor:
        with torch.no_grad():
            action, log_prob, _ = self.sample(batch.next_obs, self.noise(1, len(batch.obs))[0])
            soft = self.smallest(self.targets, batch.next_obs, action) - alpha * log_prob
            discount = self.config.gamma if batch.discount is None else batch.discount
            target = batch.reward + discount * (~batch.terminated) * soft
        errors = [self.q(critic, batch.obs, batch.action) - target for critic in self.critics]
        return sum((error**2).mean() for error in errors)

    def update(self, batch: Batch, with_actor: bool = True) -> dict[str, float]:
        config, alpha = self.config, self.log_alpha.exp().item()
        critic_loss = self.critic_loss(batch, alpha)
        self.descend(self.critic_adam, critic_loss)
        metrics = {"critic_loss": critic_loss.item()}
        if with_actor:
            metrics |= self.update_actor(batch.obs, alpha)
        for critic, slow in zip(self.critics, self.targets, strict=True):
            for new, old in zip(critic.parameters(), slow.parameters(), strict=True):
                old.data = config.tau * new.data + (1.0 - config.tau) * old.data
        return metrics

    def update_actor(self, obs: Tensor, alpha: float) -> dict[str, float]:
        samples = [self.sample(obs, noise) for noise in self.noise(self.num_samples, len(obs))]
        f = [alpha * log_prob - self.smallest(self.critics, obs, action) for action, log_prob, _ in samples]
        if self.config.estimator == "pathwise":
            loss = sum(x.mean() for x in f) / self.num_samples
        else:
            loss = 0.0
            for k, (_, _, log_normal) in enumerate(samples):
                others = [f[j] for j in range(self.num_samples) if j != k]
                baseline = {
                    "none": lambda: 0.0,
                    "constant": lambda: -alpha,
                    "loo": lambda others=others: sum(others) / len(others),
                    "value": lambda: -self.value(obs)[:, 0],
                }[self.config.baseline]()
                loss = loss + (log_normal * (f[k] - baseline).detach()).mean() / self.num_samples
        entropy = -sum(log_prob.mean().item() for _, log_prob, _ in samples) / self.num_samples
        soft_value = -sum(x.detach() for x in f) / self.num_samples
        self.descend(self.actor_adam, loss)
        if self.config.alpha == "auto":
            self.descend(self.alpha_adam, self.log_alpha.exp() * (entropy - self.target_entropy))
        if self.value is not None:
            self.descend(self.value_adam, ((self.value(obs)[:, 0] - soft_value) ** 2).mean())
        return {"actor_loss": loss.item(), "entropy": entropy, "alpha": alpha}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_action_samples": 3, "num_critics": 3, "tau": 0.3, "gamma": 0.9},
        {"alpha": 0.2},
        {"alpha": 0.0},
        {"policy_delay": 2, "target_entropy": 1.5},
        SCORE,
        VALUE,
        {"estimator": "score", "baseline": "value", "num_action_samples": 2, "alpha": 0.5},
        {"estimator": "score", "baseline": "constant"},
        {"estimator": "score", "baseline": "none", "num_action_samples": 2},
    ],
    ids=str,
)
def test_updates_equal_the_textbook(settings: dict[str, Any]) -> None:
    learner = make(seed=7, **settings)
    textbook = Textbook(learner, seed=7)
    for step in range(6):
        data = Fixed(seed=step)
        learner.update(data)
        metrics = learner.metrics()
        expected = textbook.update(data.batch, with_actor=step % learner.config.policy_delay == 0)
        for name, value in expected.items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-9), name
        for stacked, separate in ((learner.critic, textbook.critics), (learner.target_critic, textbook.targets)):
            for one, other in zip(unstack(stacked), separate, strict=True):
                torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-8, atol=1e-9)
        actors = zip(learner.actor.parameters(), textbook.actor.parameters(), strict=True)
        for one, other in actors:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(learner.log_alpha, textbook.log_alpha, rtol=1e-9, atol=0.0)
        if learner.value is not None:
            (value,) = unstack(learner.value)
            torch.testing.assert_close(value.state_dict(), textbook.value.state_dict(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("tau", [0.005, 0.25, 1.0])
def test_targets_take_the_fraction_tau_of_the_new_weights(tau: float) -> None:
    learner = make(tau=tau)
    before = [p.clone() for p in learner.target_critic.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, learner.critic.parameters(), strict=True))
    learner.update(Fixed())
    for old, new, target in zip(before, learner.critic.parameters(), learner.target_critic.parameters(), strict=True):
        assert not torch.equal(old, new)
        torch.testing.assert_close(target, (1.0 - tau) * old + tau * new, rtol=1e-6, atol=1e-7)
        assert not target.requires_grad


def test_a_fixed_alpha_stays() -> None:
    learner = make(alpha=0.37)
    learner.update(Fixed(), 20)
    assert learner.alpha.item() == pytest.approx(0.37, rel=1e-6)
    assert not any(name.startswith("optimizer.alpha") for name in learner.state()[0])


@pytest.mark.parametrize(("target_entropy", "sign"), [(-50.0, -1), (50.0, 1)])
def test_alpha_falls_where_there_is_entropy_to_spare(target_entropy: float, sign: int) -> None:
    learner = make(target_entropy=target_entropy)
    alphas = [1.0]
    for _ in range(5):
        learner.update(Fixed())
        alphas.append(learner.alpha.item())
    assert all(sign * (new - old) > 0.0 for old, new in pairwise(alphas))


def test_the_default_target_entropy_is_minus_the_action_size() -> None:
    assert make().target_entropy == -A
    assert make(target_entropy=1.25).target_entropy == 1.25


def test_the_actor_and_alpha_wait_for_their_turn() -> None:
    learner = make(policy_delay=3)
    moved = []
    for _ in range(7):
        before = tensors_of(learner)
        learner.update(Fixed())
        after = tensors_of(learner)
        assert not torch.equal(before["critic.weights.0"], after["critic.weights.0"])
        moved.append([not torch.equal(before[k], after[k]) for k in ("actor.layers.0.weight", "log_alpha")])
    assert moved == [[step % 3 == 0] * 2 for step in range(7)]


@pytest.mark.parametrize("settings", [{}, SCORE, VALUE], ids=str)
def test_the_actor_step_leaves_the_critics_alone(settings: dict[str, Any]) -> None:
    with_actor, without = make(policy_delay=2, **settings), make(policy_delay=2, **settings)
    without.updates = 1
    actor = [p.clone() for p in without.actor.parameters()]
    with_actor.update(Fixed())
    without.update(Fixed())
    assert all(torch.equal(p, q) for p, q in zip(actor, without.actor.parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(actor, with_actor.actor.parameters(), strict=True))
    for name in ("critic", "target_critic"):
        for p, q in zip(getattr(with_actor, name).parameters(), getattr(without, name).parameters(), strict=True):
            assert torch.equal(p, q)
            assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


class NothingRead(TorchDispatchMode):
    """Fails where PyTorch itself would have to wait for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.1}, SCORE, VALUE], ids=str)
def test_an_update_reads_nothing_on_the_host(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the host read a tensor")

    learner, replay = make(**settings), Replay(50, 2, O, A, generator=torch.Generator().manual_seed(0))
    replay.begin(torch.randn(2, O))
    for _ in range(40):
        ends, valid = torch.zeros(2, dtype=torch.bool), np.array([True, False])
        replay.add(torch.rand(2, A), torch.randn(2), ends, torch.randn(2, O), valid)
    learner.update(replay)  # PyTorch checks things at the first step
    with monkeypatch.context() as patch, NothingRead():
        for name in READS:
            patch.setattr(torch.Tensor, name, refuse)
        learner.update(replay, 3)
        metrics = learner.metrics()
    assert all(not metric.requires_grad and metric.dim() == 0 for metric in metrics.values())
    assert {"critic_loss", "q", "actor_loss", "alpha", "entropy"} <= metrics.keys()


@pytest.mark.parametrize("settings", [{}, SCORE, VALUE], ids=str)
def test_the_seed_decides_every_bit(settings: dict[str, Any]) -> None:
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(results))  # of no consequence
        learner = make(seed, **settings)
        learner.update(Fixed(), 10)
        results.append(tensors_of(learner))
    assert_same(results[0], results[1])
    assert not torch.equal(results[0]["actor.layers.0.weight"], results[2]["actor.layers.0.weight"])
    assert not torch.equal(results[0]["critic.weights.1"], results[2]["critic.weights.1"])


def test_the_noise_depends_on_the_seed_beyond_the_weights() -> None:
    actions = [make(seed).act(torch.zeros(4, O)) for seed in (0, 1)]
    learner = make(0)
    assert torch.equal(actions[0], learner.act(torch.zeros(4, O)))
    assert not torch.equal(actions[0], learner.act(torch.zeros(4, O)))  # the stream goes on
    calm = learner.act(torch.zeros(4, O), deterministic=True)
    assert torch.equal(calm, learner.act(torch.zeros(4, O), deterministic=True))
    assert torch.equal(calm, torch.tanh(learner.actor(torch.zeros(4, O))[0]))


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.0}, {"policy_delay": 2}, SCORE, VALUE], ids=str)
@pytest.mark.parametrize("num_updates", [0, 5])
def test_a_loaded_learner_goes_on_where_it_was(settings: dict[str, Any], num_updates: int) -> None:
    learner, resumed = make(0, **settings), make(1, **settings)
    learner.update(Fixed(), num_updates)
    resumed.update(Fixed(), 3)
    tensors, counters = tensors_of(learner), dict(learner.state()[1])
    resumed.load_state(tensors, counters)
    assert_same(tensors_of(resumed), tensors)
    assert resumed.updates == num_updates
    for one in (learner, resumed):
        one.update(Fixed(), 4)
    assert_same(tensors_of(learner), tensors_of(resumed))


def test_a_loaded_learner_shares_no_memory_with_what_it_was_given() -> None:
    learner, resumed = make(0), make(1)
    learner.update(Fixed(), 3)
    before = tensors_of(learner)
    resumed.load_state(*learner.state())
    resumed.update(Fixed())
    assert_same(tensors_of(learner), before)


@pytest.mark.parametrize(
    "other", [{"hidden_sizes": (8, 7)}, {"hidden_sizes": (8,)}, {"obs_size": O + 1}, {"num_critics": 3}, VALUE], ids=str
)
def test_a_state_of_another_shape_is_refused(other: dict[str, Any]) -> None:
    learner = make(0)
    learner.update(Fixed())
    with pytest.raises(UsageError, match="do not fit this configuration"):
        make(0, **other).load_state(*learner.state())


def test_the_value_network_learns_the_soft_value() -> None:
    learner = make(**VALUE, alpha=0.3, gamma=0.0, actor_lr=1e-6, critic_lr=1e-2, value_lr=1e-2)
    data = Fixed()
    learner.update(data, 300)
    with torch.no_grad():
        mean, log_std = learner.actor(data.batch.obs)
        normal = torch.distributions.Normal(mean, log_std.exp())
        u = normal.sample((1000,))
        q = q_of_samples(learner.critic, data.batch.obs, torch.tanh(u)).amin(1)
        log_prob = (normal.log_prob(u) - torch.log(1.0 - torch.tanh(u.double()) ** 2)).sum(-1)
        soft_value = (q - 0.3 * log_prob).mean(0)
        error = (learner.value(data.batch.obs) - soft_value).square().mean().sqrt()
    assert error < 0.4 * soft_value.std()


def test_building_a_learner_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    make(5)
    assert torch.equal(before, torch.random.get_rng_state())
