import math

import mpmath
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from fastsac_kernels import sample_squashed_gaussian
from fastsac_kernels.squashed_gaussian import squash

every_size = pytest.mark.parametrize(
    ("samples", "batch", "action_size"), [(1, 1, 1), (2, 33, 3), (3, 1, 7), (1, 33, 17), (2, 1, 17)]
)
MAGNITUDES = [0.0, 1e-4, 5.0, 8.0, 9.01, 20.0, 50.0]
SIGNED = [sign * magnitude for magnitude in MAGNITUDES for sign in (1.0, -1.0)]


def inputs(samples: int, batch: int, action_size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(batch + action_size)
    mean = torch.randn(batch, action_size, generator=rng, dtype=dtype)
    log_std = 0.5 * torch.randn(batch, action_size, generator=rng, dtype=dtype) - 0.7
    noise = torch.randn(samples, batch, action_size, generator=rng, dtype=dtype)
    return mean.requires_grad_(), log_std.requires_grad_(), noise


def ramp(like: Tensor) -> Tensor:
    """Upstream gradients that differ everywhere."""
    return torch.linspace(-1.0, 2.0, like.numel(), dtype=like.dtype).view_as(like)


@every_size
def test_gradcheck(samples: int, batch: int, action_size: int) -> None:
    mean, log_std, noise = inputs(samples, batch, action_size)
    fast_mode = mean.numel() > 20
    assert torch.autograd.gradcheck(
        lambda m, s: sample_squashed_gaussian(m, s, noise), (mean, log_std), fast_mode=fast_mode
    )


@every_size
def test_is_the_transformed_distribution(samples: int, batch: int, action_size: int) -> None:
    mean, log_std, noise = inputs(samples, batch, action_size)
    action, log_prob = sample_squashed_gaussian(mean, log_std, noise)
    assert action.shape == (samples, batch, action_size)
    assert log_prob.shape == (samples, batch)
    gaussian = Normal(mean, log_std.exp())
    expected_action = torch.tanh(mean + log_std.exp() * noise)
    policy = Independent(TransformedDistribution(gaussian, [TanhTransform()]), 1)
    expected = policy.log_prob(expected_action)
    torch.testing.assert_close((action, log_prob), (expected_action, expected), rtol=1e-9, atol=1e-9)
    upstream = ramp(action), ramp(log_prob)
    found = torch.autograd.grad((action, log_prob), (mean, log_std), upstream)
    oracle = torch.autograd.grad((expected_action, expected), (mean, log_std), upstream)
    torch.testing.assert_close(found, oracle, rtol=1e-7, atol=1e-7)


@every_size
def test_gradients_are_the_closed_form(samples: int, batch: int, action_size: int) -> None:
    mean, log_std, noise = inputs(samples, batch, action_size)
    action, log_prob = sample_squashed_gaussian(mean, log_std, noise)
    grad_action, grad_log_prob = ramp(action), ramp(log_prob)[..., None]
    found = torch.autograd.grad((action, log_prob), (mean, log_std), (grad_action, grad_log_prob[..., 0]))
    action, scaled = action.detach(), (log_std.exp() * noise).detach()
    through_action = grad_action * (1.0 - action.square())
    d_mean = through_action + grad_log_prob * 2.0 * action
    d_log_std = through_action * scaled + grad_log_prob * (2.0 * action * scaled - 1.0)
    torch.testing.assert_close(found, (d_mean.sum(0), d_log_std.sum(0)))


def exact(u: float) -> tuple[float, float, float]:
    """tanh(u), 1 - tanh(u)^2 and the logarithm of that."""
    with mpmath.workdps(60):
        slope = mpmath.sech(u) ** 2
        return float(mpmath.tanh(u)), float(slope), float(mpmath.log(slope))


def relative(value: Tensor, expected: float, floor: float) -> None:
    assert value.dtype == torch.float32
    assert abs(value.item() - expected) <= 1e-5 * abs(expected) + floor


@pytest.mark.parametrize("u", SIGNED)
def test_squash_in_float32(u: float) -> None:
    x = torch.tensor(u, requires_grad=True)
    tanh, slope, log_slope = exact(x.item())
    action, log_jacobian = squash(x)
    relative(action, tanh, 0.0)
    relative(log_jacobian, log_slope, 2e-7)  # near 0 it is the difference of two numbers of size log(2)
    (d_action,) = torch.autograd.grad(action, x, retain_graph=True)
    (d_log_jacobian,) = torch.autograd.grad(log_jacobian, x)
    relative(d_action, slope, 1.2e-38)  # at 50 it is below float32's normal numbers
    relative(d_log_jacobian, -2.0 * tanh, 0.0)


@pytest.mark.parametrize("u", SIGNED)
@pytest.mark.parametrize("log_std", [-5.0, -1.0, 2.0])
def test_log_prob_in_float32(u: float, log_std: float) -> None:
    mean = torch.full((1, 1), u, requires_grad=True)
    log_std_ = torch.full((1, 1), log_std, requires_grad=True)
    for eps in (0.0, 0.5):
        noise = torch.full((1, 1, 1), eps)
        moved = mean.item() + math.exp(log_std) * eps
        tanh, _, log_slope = exact(moved)
        _, log_prob = sample_squashed_gaussian(mean, log_std_, noise)
        expected = -0.5 * eps**2 - log_std - 0.5 * math.log(2.0 * math.pi) - log_slope
        relative(log_prob, expected, 1e-6)
        d_mean, d_log_std = torch.autograd.grad(log_prob, (mean, log_std_))
        relative(d_mean, 2.0 * tanh, 1e-10)
        relative(d_log_std, 2.0 * tanh * math.exp(log_std) * eps - 1.0, 1e-6)


def test_a_saturated_policy_is_still_pulled_back() -> None:
    mean = torch.tensor([[-60.0, 30.0]], requires_grad=True)
    _, log_prob = sample_squashed_gaussian(mean, torch.zeros(1, 2), torch.zeros(1, 1, 2))
    log_prob.backward()
    assert mean.grad.tolist() == [[-2.0, 2.0]]


def test_strides_do_not_matter() -> None:
    mean, log_std, noise = (each.detach() for each in inputs(3, 33, 7))
    strided = [torch.empty(*each.shape, 2, dtype=each.dtype)[..., 1].copy_(each) for each in (mean, log_std)]
    strided[1] = log_std.T.contiguous().T
    strided.append(noise.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    assert not any(each.is_contiguous() for each in strided)
    results = []
    for m, s, n in ((mean, log_std, noise), strided):
        m, s = m.detach().requires_grad_(), s.detach().requires_grad_()
        action, log_prob = sample_squashed_gaussian(m, s, n)
        upstream = action.detach().flip(0), log_prob.detach().T.contiguous().T
        results.append((action, log_prob, *torch.autograd.grad((action, log_prob), (m, s), upstream)))
    torch.testing.assert_close(*results, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize(
    ("mean", "log_std", "noise", "message"),
    [
        ((4, 3), (4, 1), (2, 4, 3), "mean and log_std must both be [B, A], got [4, 3] and [4, 1]"),
        ((3,), (3,), (2, 4, 3), "mean and log_std must both be [B, A], got [3] and [3]"),
        ((4, 3), (3,), (2, 4, 3), "mean and log_std must both be [B, A], got [4, 3] and [3]"),
        ((4, 3), (4, 3), (4, 3), "noise must be [K, B, A] with [B, A] = [4, 3], got [4, 3]"),
        ((4, 3), (4, 3), (2, 4, 1), "noise must be [K, B, A] with [B, A] = [4, 3], got [2, 4, 1]"),
        ((4, 3), (4, 3), (2, 1, 3), "noise must be [K, B, A] with [B, A] = [4, 3], got [2, 1, 3]"),
        ((4, 3), (4, 3), (0, 4, 3), "noise must be [K, B, A] with [B, A] = [4, 3], got [0, 4, 3]"),
    ],
)
def test_wrong_shapes_are_refused(
    mean: tuple[int, ...], log_std: tuple[int, ...], noise: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=r"must") as caught:
        sample_squashed_gaussian(torch.zeros(mean), torch.zeros(log_std), torch.zeros(noise))
    assert str(caught.value) == message


def test_a_second_derivative_is_refused() -> None:
    mean = torch.zeros(1, 1, requires_grad=True)
    action, _ = sample_squashed_gaussian(mean, torch.zeros(1, 1), torch.ones(1, 1, 1))
    (grad,) = torch.autograd.grad(action.sum(), mean, create_graph=True)
    with pytest.raises(RuntimeError, match="require grad"):
        torch.autograd.grad(grad.sum(), mean)
