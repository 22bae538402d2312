import math

import pytest
import torch
from torch import nn

from fastsac.networks import Actor, Critic, StackedMLP, ValueNetwork, q_of_samples

O, A, B, HIDDEN = 5, 3, 17, (8, 6)  # noqa: E741


def unstack(stacked: StackedMLP) -> list[nn.Sequential]:
    """Separate networks of plain layers with the same weights."""
    kinds = {"relu_": nn.ReLU, "elu_": nn.ELU, "silu": nn.SiLU, "tanh_": nn.Tanh}
    networks = []
    for index in range(stacked.weights[0].shape[0]):
        layers: list[nn.Module] = []
        for weight, bias in zip(stacked.weights, stacked.biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[2])
            layer.weight.data.copy_(weight.data[index].T)
            layer.bias.data.copy_(bias.data[index, 0])
            layers += [layer, kinds[stacked.activation.__name__]()]
        networks.append(nn.Sequential(*layers[:-1]))
    return networks


@pytest.mark.parametrize("activation", ["relu", "elu", "silu", "tanh"])
def test_a_stack_equals_separate_networks(activation: str) -> None:
    stacked = StackedMLP(3, [4, 8, 5, 2], activation)
    x, separate = torch.randn(11, 4), unstack(stacked)
    together = stacked(x)
    apart = torch.stack([network(x) for network in separate])
    torch.testing.assert_close(together, apart)
    weights = torch.randn_like(apart)
    (together * weights).sum().backward()
    (apart * weights).sum().backward()
    for index, network in enumerate(separate):
        for layer, (weight, bias) in zip(network[::2], zip(stacked.weights, stacked.biases, strict=True), strict=True):
            torch.testing.assert_close(weight.grad[index].T, layer.weight.grad)
            torch.testing.assert_close(bias.grad[index, 0], layer.bias.grad)
    assert len({network[0].weight[0, 0].item() for network in separate}) == 3


def test_initial_weights_are_those_of_linear_layers() -> None:
    torch.manual_seed(0)
    stacked = StackedMLP(2, [100, 50, 10], "relu")
    for parameter, fan_in in zip([*stacked.weights, *stacked.biases], (100, 50, 100, 50), strict=True):
        bound = 1.0 / math.sqrt(fan_in)
        assert 0.8 * bound < parameter.abs().max() <= bound
        assert parameter.detach().std() == pytest.approx(bound / math.sqrt(3.0), rel=0.2)


def test_log_std_stays_within_its_range_and_keeps_its_gradient() -> None:
    actor = Actor(1, 4, (1,), "tanh")
    last = actor.layers[-1]
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias[4:] = torch.tensor([-7.0, 3.0, 0.0, 6.0])  # raw numbers, three of them outside [-5, 2]
        last.bias[:4] = torch.tensor([-30.0, 30.0, 0.0, 1.0])
    mean, log_std = actor(torch.zeros(2, 1))
    torch.testing.assert_close(mean[0], torch.tensor([-30.0, 30.0, 0.0, 1.0]))
    assert ((log_std >= -5.0) & (log_std <= 2.0)).all()
    torch.testing.assert_close(log_std[0], torch.tensor([-5.0, 1.983, -1.5, 2.0]), atol=1e-3, rtol=0.0)
    log_std.sum().backward()
    assert (last.bias.grad[4:] > 0.0).all()
    for raw in (-1e4, 1e4):
        nn.init.constant_(last.bias, raw)
        log_std = actor(torch.zeros(2, 1))[1]
        assert ((log_std >= -5.0) & (log_std <= 2.0)).all()


def test_the_critics_of_samples_equal_those_of_each_sample() -> None:
    critic = Critic(2, O, A, HIDDEN, "relu")
    obs, action = torch.randn(B, O), torch.randn(4, B, A).requires_grad_()
    q = q_of_samples(critic, obs, action)
    assert q.shape == (4, 2, B)
    for k in range(4):
        torch.testing.assert_close(q[k], critic(obs, action[k]))
    q.sum().backward()
    assert all(p.grad is None for p in critic.parameters())
    (expected,) = torch.autograd.grad(sum(critic(obs, a).sum() for a in action), action)
    torch.testing.assert_close(action.grad, expected)
    value = ValueNetwork(O, HIDDEN, "relu")
    assert value(obs).shape == (B,)
    assert not value(obs, frozen=True).requires_grad
