"""The settings beyond the standard update, against the textbook with a few more lines."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastsac.config import Config
from fastsac.learner import FusedLearner, Learner
from fastsac.learner.optimizers import rate_factor
from fastsac.types import Batch
from tests.test_learner import HIDDEN, SCORE, VALUE, A, B, Fixed, O, Textbook

RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "value_lr": 4e-2, "alpha_lr": 3e-2}
CATEGORICAL = {"critic": "categorical", "v_min": -2.0, "v_max": 3.0, "num_atoms": 7}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class PlainAdam:
    """AdamW with clipping, as the papers write it (arXiv 1412.6980, algorithm 1; arXiv 1711.05101, algorithm 2)."""

    def __init__(self, parameters: list[Tensor], lr: float, config: Config, trains_alpha: bool = False) -> None:
        self.parameters, self.lr, self.first_lr, self.betas = parameters, lr, lr, config.adam_betas
        decays = config.optimizer == "adamw" and not trains_alpha
        self.decay = (0.01 if config.weight_decay is None else config.weight_decay) if decays else 0.0
        self.most = math.inf if config.max_grad_norm is None or trains_alpha else config.max_grad_norm
        self.m, self.v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        self.t = 0

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        self.t += 1
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in self.parameters))
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            g = p.grad * min(1.0, self.most / (norm + 1e-6))
            p.data *= 1.0 - self.lr * self.decay
            for moment, beta, new in ((m, self.betas[0], g), (v, self.betas[1], g * g)):
                moment.copy_(beta * moment + (1.0 - beta) * new)
            bias = [1.0 - beta**self.t for beta in self.betas]
            p.data -= self.lr * (m / bias[0]) / ((v / bias[1]).sqrt() + 1e-8)


class Book(Textbook):
    """The textbook with the settings that its own one leaves out."""

    def __init__(self, learner: Learner, seed: int) -> None:
        config = learner.config
        self.atoms = [-2.0 + 5.0 / 6.0 * j for j in range(7)]
        super().__init__(learner, seed)
        if config.layer_norm:
            self.actor = plain_actor(learner.actor)
            self.critics, self.targets = (plain_critics(each) for each in (learner.critic, learner.target_critic))
        elif config.critic == "categorical":
            self.critics, self.targets = (plain_critics(each) for each in (learner.critic, learner.target_critic))
        self.critic_adam = PlainAdam([p for c in self.critics for p in c.parameters()], config.critic_lr, config)
        self.actor_adam = PlainAdam(list(self.actor.parameters()), config.actor_lr, config)
        self.alpha_adam = PlainAdam([self.log_alpha], config.alpha_lr, config, trains_alpha=True)
        if self.value is not None:
            self.value_adam = PlainAdam(list(self.value.parameters()), config.value_lr, config)

    def q(self, critic: nn.Sequential, obs: Tensor, action: Tensor) -> Tensor:
        output = critic(torch.cat([obs, action], -1))
        if self.config.critic == "scalar":
            return output[:, 0]
        return torch.stack([sum(p * z for p, z in zip(row, self.atoms, strict=True)) for row in output.softmax(-1)])

    def smallest(self, critics: list[nn.Sequential], obs: Tensor, action: Tensor) -> Tensor:
        if self.config.critic_reduction == "min":
            return super().smallest(critics, obs, action)
        return sum(self.q(critic, obs, action) for critic in critics) / len(critics)

    def critic_loss(self, batch: Batch, alpha: float) -> Tensor:
        if self.config.critic == "scalar":
            return super().critic_loss(batch, alpha)
        with torch.no_grad():
            action, log_prob, _ = self.sample(batch.next_obs, self.noise(1, len(batch.obs))[0])
            x = torch.cat([batch.next_obs, action], -1)
            nexts = [target(x).softmax(-1) for target in self.targets]
            if self.config.critic_reduction == "min":
                means = [self.q(target, batch.next_obs, action) for target in self.targets]
                lowest = [min(range(len(means)), key=lambda e, b=b: means[e][b].item()) for b in range(len(x))]
                nexts = [torch.stack([nexts[e][b] for b, e in enumerate(lowest)])] * len(nexts)
        loss = 0.0
        for critic, following in zip(self.critics, nexts, strict=True):
            log_p = critic(torch.cat([batch.obs, batch.action], -1)).log_softmax(-1)
            for b in range(len(x)):
                mass = self.projected(following[b], batch, b, alpha * log_prob[b].item())
                loss = loss - sum(m * lp for m, lp in zip(mass, log_p[b], strict=True)) / len(x)
        return loss

    def projected(self, p: Tensor, batch: Batch, b: int, entropy_cost: float) -> list[float]:
        """The distribution of the target on the atoms, atom by atom (arXiv 1707.06887, algorithm 1)."""
        mass, width = [0.0] * len(self.atoms), self.atoms[1] - self.atoms[0]
        discount = self.config.gamma if batch.discount is None else batch.discount[b].item()
        for probability, atom in zip(p.tolist(), self.atoms, strict=True):
            after = 0.0 if batch.terminated[b] else discount * (atom - entropy_cost)
            value = min(max(batch.reward[b].item() + after, self.atoms[0]), self.atoms[-1])
            place = (value - self.atoms[0]) / width
            below = min(math.floor(place), len(mass) - 2)
            mass[below] += probability * (below + 1 - place)
            mass[below + 1] += probability * (place - below)
        return mass

    def set_rates(self, factor: float) -> None:
        for adam in (self.actor_adam, self.critic_adam, self.alpha_adam, getattr(self, "value_adam", None)):
            if adam is not None:
                adam.lr = adam.first_lr * factor


def sequence(linears: list[nn.Linear], norms: list[nn.LayerNorm] | None) -> nn.Sequential:
    parts: list[nn.Module] = []
    for index, linear in enumerate(linears):
        parts.append(linear)
        if index < len(linears) - 1:
            parts += ([] if norms is None else [norms[index]]) + [nn.ReLU()]
    return nn.Sequential(*parts)


def plain_actor(actor: nn.Module) -> nn.Sequential:
    linears, norms = [], []
    for layer in actor.layers:
        linears.append(nn.Linear(layer.in_features, layer.out_features))
        linears[-1].load_state_dict(layer.state_dict())
    for norm in actor.norms:
        norms.append(nn.LayerNorm(norm.normalized_shape))
        norms[-1].load_state_dict(norm.state_dict())
    return sequence(linears, norms)


def plain_critics(critic: nn.Module) -> list[nn.Sequential]:
    """Each critic of the stack as a network of its own."""
    separate = []
    for e in range(len(critic.weights[0])):
        linears, norms = [], None
        for weight, bias in zip(critic.weights, critic.biases, strict=True):
            linears.append(nn.Linear(weight.shape[1], weight.shape[2]))
            linears[-1].load_state_dict({"weight": weight[e].T, "bias": bias[e, 0]})
        if critic.norms is not None:
            norms = [nn.LayerNorm(norm.weight.shape[2]) for norm in critic.norms]
            for norm, stacked in zip(norms, critic.norms, strict=True):
                norm.load_state_dict({"weight": stacked.weight[e, 0], "bias": stacked.bias[e, 0]})
        separate.append(sequence(linears, norms))
    return separate


CASES = [
    {"critic_reduction": "mean", "num_critics": 3},
    {"critic_reduction": "mean", **SCORE},
    {"critic_reduction": "mean", **VALUE},
    {"optimizer": "adamw", "weight_decay": 0.3, "adam_betas": (0.5, 0.8)},
    {"optimizer": "adamw", **VALUE},
    {"max_grad_norm": 0.02, **VALUE},
    {"max_grad_norm": 1e3},
    {"initial_alpha": 0.03, "lr_schedule": "linear"},
    {"lr_schedule": "cosine", **VALUE},
    {"n_step": 3},
    {"layer_norm": True, "num_critics": 3},
    {"layer_norm": True, "optimizer": "adamw", "max_grad_norm": 0.1, **SCORE},
    {**CATEGORICAL},
    {**CATEGORICAL, "critic_reduction": "mean", "n_step": 3, "layer_norm": True, "num_critics": 3},
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("kind", [Learner, FusedLearner], ids=lambda kind: kind.engine)
def test_updates_equal_the_textbook(kind: type[Learner], settings: dict[str, Any]) -> None:
    sizes = {"hidden_sizes": HIDDEN, "batch_size": B, "num_envs": 4, "precision": "fp32"}
    config = Config(**{**sizes, **RATES, **settings})
    if kind is FusedLearner and (config.layer_norm or config.critic == "categorical"):
        with pytest.raises(ValueError, match="has no written-out gradient"):
            kind(config, O, A)
        return
    learner = kind(config, O, A, seed=7)
    assert learner.alpha.item() == pytest.approx(settings.get("initial_alpha", 1.0), rel=1e-6)
    book = Book(learner, seed=7)
    for step in range(5):
        if config.lr_schedule != "constant":
            learner.set_progress(step / 8)
            left = 1.0 - step / 8 if config.lr_schedule == "linear" else (1.0 + math.cos(math.pi * step / 8)) / 2.0
            book.set_rates(left)
        data = Fixed(seed=step, discounts=config.n_step > 1)
        learner.update(data)
        metrics = learner.metrics()
        for name, value in book.update(data.batch).items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-9), name
        for stacked, separate in ((learner.critic, book.critics), (learner.target_critic, book.targets)):
            for one, other in zip(plain_critics(stacked), separate, strict=True):
                torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-8, atol=1e-9)
        own = [p for layer in learner.actor.layers for p in layer.parameters()]
        theirs = [p for layer in book.actor if isinstance(layer, nn.Linear) for p in layer.parameters()]
        for one, other in zip(own, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(learner.log_alpha, book.log_alpha, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("kind", [Learner, FusedLearner], ids=lambda kind: kind.engine)
def test_an_update_takes_normalised_numbers(kind: type[Learner]) -> None:
    sizes = {"hidden_sizes": HIDDEN, "batch_size": B, "num_envs": 4, "precision": "fp32"}
    settings = {"normalize_obs": True, "normalize_reward": True, "reward_scale": 0.25}
    learner, plain = (kind(Config(**sizes, **RATES, **each), O, A, seed=3) for each in (settings, {}))
    yes = torch.ones(4, dtype=torch.bool)
    for _ in range(9):
        learner.normalizer.add(torch.randn(4, O) * 3.0 + 1.0, torch.randn(4), yes)
    moments = learner.normalizer.state()
    mean, deviation = moments["obs_mean"].float(), (moments["obs_var"] + 1e-8).sqrt()
    data = Fixed()
    learner.update(data, 3)
    batch = data.batch
    obs, next_obs = (((each - mean) * (1.0 / deviation).float()).clamp(-10.0, 10.0) for each in batch[0:4:3])
    reward = batch.reward * (0.25 / (moments["return_var"][0] + 1e-8).sqrt()).float()
    data.batch = batch._replace(obs=obs, next_obs=next_obs, reward=reward)
    plain.update(data, 3)
    for name, tensor in plain.state()[0].items():
        torch.testing.assert_close(learner.state()[0][name], tensor, rtol=1e-4, atol=1e-6)
    obs = torch.randn(4, O)
    for deterministic in (True, False):
        for each in (learner, plain):
            each.generator.manual_seed(5)
        seen = (learner, obs), (plain, (obs - mean) / deviation.float())
        torch.testing.assert_close(*(each.act(x, deterministic) for each, x in seen), rtol=1e-4, atol=1e-5)


def test_rates_go_down_to_nothing_and_no_further() -> None:
    assert [rate_factor("constant", x) for x in (0.0, 0.7, 2.0)] == [1.0, 1.0, 1.0]
    assert [rate_factor("linear", x) for x in (0.0, 0.25, 1.0, 2.0)] == [1.0, 0.75, 0.0, 0.0]
    np.testing.assert_allclose(
        [rate_factor("cosine", x) for x in (0.0, 0.5, 1.0, 2.0)], [1.0, 0.5, 0.0, 0.0], atol=1e-15
    )
