"""Networks of the user's own in place of the actor and the critics."""

import dataclasses

import pytest
import torch
from torch import nn

from fastsac import SAC, Config, UsageError
from fastsac.learner import GraphedLearner, Learner
from fastsac.networks import Actor, Critic
from fastsac.own_networks import OwnNetworks
from tests.pretend_cuda import pretended
from tests.runs import SMALL, parameters
from tests.test_graphed import A, O, filled

CONFIG = dataclasses.replace(SMALL, engine="reference", total_steps=300, checkpoint_replay=True)


class MyActor(nn.Module):
    def __init__(self, obs_size=3, action_size=1):
        super().__init__()
        self.Body = nn.Linear(obs_size, 16)  # a capital in its name
        self.heads = nn.ModuleDict({name: nn.Linear(16, action_size) for name in ("the-mean", "log std")})

    def forward(self, obs):
        x = torch.relu(self.Body(obs))
        return self.heads["the-mean"](x), self.heads["log std"](x).clamp(-5, 2)


class Forgetful(MyActor):
    """Draws random numbers by a function, where no module shows it."""

    def forward(self, obs):
        mean, log_std = super().forward(obs)
        return nn.functional.dropout(mean, training=self.training), log_std


class MyCritic(nn.Module):
    def __init__(self, obs_size=3, action_size=1, num_critics=2):
        super().__init__()
        self.each = nn.ModuleList(
            nn.Sequential(nn.Linear(obs_size + action_size, 16), nn.ELU(), nn.Linear(16, 1)) for _ in range(num_critics)
        )

    def forward(self, obs, action):
        x = torch.cat([obs, action], -1)
        return torch.stack([each(x)[:, 0] for each in self.each])


class Turned(MyCritic):
    """The values of one pair in a row, [B, E]."""

    def forward(self, obs, action):
        return super().forward(obs, action).T


class Several(MyCritic):
    def forward(self, obs, action):
        return (super().forward(obs, action),)


class Clamping(MyCritic):
    def forward(self, obs, action):
        return super().forward(obs, action.clamp_(-1.0, 1.0))


class Noisy(MyActor):
    def forward(self, obs):
        return super().forward(obs * (1.0 + torch.randn_like(obs)))


class Squeezed(MyActor):
    def forward(self, obs):
        return super().forward(obs.squeeze())


class Detached(MyActor):
    @torch.no_grad()
    def forward(self, obs):
        return super().forward(obs)


class Wrapped(nn.Module):
    """One of ours, without the argument `frozen`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return self.inner(*inputs)


@pytest.mark.parametrize("kind", [Learner, GraphedLearner], ids=lambda kind: kind.engine)
def test_ones_like_ours_learn_the_same_bit_for_bit(kind, monkeypatch):
    monkeypatch.setattr(GraphedLearner, "backend", "reference")
    config = Config(hidden_sizes=(8, 6), batch_size=17, critic_reduction="mean", max_grad_norm=1.0)
    device = "cuda" if kind is GraphedLearner else "cpu"
    with pretended():
        ours = kind(config, O, A, device)
        actor, critic = Actor(O, A, (8, 6), "relu"), Critic(2, O, A, (8, 6), "relu")
        actor.load_state_dict(ours.actor.state_dict())
        critic.load_state_dict(ours.critic.state_dict())
        theirs = kind(config, O, A, device, own=OwnNetworks(Wrapped(actor), Wrapped(critic)))
        for learner in (ours, theirs):
            learner.update(filled(device=device), 12)
        for name, network in ours._networks().items():
            other = theirs._networks()[name]
            for one, another in zip(network.parameters(), other.parameters(), strict=True):
                assert torch.equal(one, another), name


def test_they_are_trained_saved_and_loaded(tmp_path):
    actor, critic = MyActor(), MyCritic()
    before = [p.clone() for module in (actor, critic) for p in module.parameters()]
    agent = SAC(CONFIG, actor=actor, critic=critic)
    assert agent.actor is actor
    agent.learn(run_dir=tmp_path / "run")
    after = [p for module in (actor, critic) for p in module.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    loaded = SAC.load(tmp_path / "run", actor=MyActor(), critic=MyCritic())
    for other in (agent, loaded):
        other.learn(600)
    assert parameters(loaded).keys() == parameters(agent).keys()
    assert all(torch.equal(value, parameters(agent)[name]) for name, value in parameters(loaded).items())
    with pytest.raises(UsageError, match=r"pass them to SAC\.load\(\.\.\., actor=\.\.\., critic=\.\.\.\)"):
        SAC.load(tmp_path / "run")
    with pytest.raises(UsageError, match="do not fit this configuration"):
        SAC.load(tmp_path / "run", actor=MyActor())
    with pytest.raises(UsageError, match=r"the actor must be a torch\.nn\.Module, got <class"):
        SAC.load(tmp_path / "run", actor=MyActor, critic=MyCritic())


def test_trying_them_draws_none_of_the_programs_random_numbers():
    actor, before = Forgetful().eval(), torch.random.get_rng_state()
    SAC(CONFIG, actor=actor)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_of_them_alone():
    agent = SAC(dataclasses.replace(CONFIG, engine="auto"), critic=MyCritic())
    assert (agent.engine, type(agent.actor)) == ("reference", Actor)
    assert agent.engine_reason == "no CUDA GPU, and a network of your own has no written-out gradient"
    agent.learn(100)
    assert agent.updates


@pytest.mark.parametrize(
    ("networks", "settings", "message"),
    [
        ({"actor": MyActor(4)}, {}, r"the actor failed for inputs \[\[3, 3\]\]: RuntimeError: mat1 and mat2"),
        (
            {"actor": MyActor(3, 2)},
            {},
            r"mean and log_std, \[\[3, 1\], \[3, 1\]\] here, but returned \[\[3, 2\], \[3, 2\]\]",
        ),
        ({"actor": nn.Linear(3, 1)}, {}, r"but returned \[3, 1\]"),
        ({"actor": lambda obs: obs}, {}, "the actor must be a torch.nn.Module, got <function"),
        ({"actor": nn.Identity()}, {}, "the actor has no parameters to train"),
        ({"actor": MyActor().double()}, {}, r"parameters must be float32, got torch\.float64"),
        ({"actor": nn.Sequential(nn.BatchNorm1d(3), MyActor())}, {}, "the actor has a BatchNorm1d in training mode"),
        ({"actor": Forgetful()}, {}, "the actor returns different outputs for equal inputs"),
        ({"critic": MyCritic(num_critics=3)}, {}, r"\[2, 3\] here with --num-critics 2, but returned \[3, 3\]"),
        ({"critic": Turned()}, {}, r"\[2, 3\] here with --num-critics 2, but returned \[3, 2\]"),
        ({"critic": Several()}, {}, r"here with --num-critics 2, but returned \[\[2, 3\]\]"),
        ({"actor": Noisy()}, {}, "the actor returns different outputs for equal inputs"),
        (
            {"actor": Squeezed()},
            {},
            r"the actor must map .*, \[\[1, 1\], \[1, 1\]\] here, but returned \[\[1\], \[1\]\]",
        ),
        ({"actor": Detached()}, {}, "the actor returns outputs without gradients"),
        ({"critic": Clamping()}, {}, "the critic modifies its inputs"),
        (
            {"critic": MyCritic()},
            {"engine": "fused"},
            "--engine fused: a network of your own has no written-out gradient",
        ),
        (
            {"critic": MyCritic()},
            {"critic": "categorical", "v_min": 0.0, "v_max": 1.0},
            "your own critic returns one value, but --critic is categorical",
        ),
    ],
)
def test_misfits_are_refused(networks, settings, message):
    with pytest.raises(UsageError, match=message) as refusal:
        SAC(dataclasses.replace(CONFIG, **settings), **networks)
    assert "\n" not in str(refusal.value)
