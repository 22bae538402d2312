import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsac_kernels import categorical_loss, pathwise_loss, score_function_loss, td_loss
from tests.kernels.parity import normal, strided

SIZES = [(1, 1, 1), (2, 33, 3), (3, 1, 7), (2, 33, 17)]
every_size = pytest.mark.parametrize(("samples", "batch", "action_size"), SIZES)
ALPHA = 0.37
KINDS = ["none", "constant", "loo", "tensor"]


def pathwise_by_hand(log_prob: Tensor, q: Tensor, upstream: float) -> tuple[float, Tensor, Tensor]:
    """The loss, and its gradients times `upstream`."""
    samples, critics, batch = q.shape
    scale = upstream / (samples * batch)
    total, d_q = 0.0, torch.zeros_like(q)
    for k in range(samples):
        for i in range(batch):
            lowest = min(range(critics), key=lambda critic: q[k, critic, i].item())
            total += ALPHA * log_prob[k, i].item() - q[k, lowest, i].item()
            d_q[k, lowest, i] = -scale
    return total / (samples * batch), torch.full_like(log_prob, ALPHA * scale), d_q


@pytest.mark.parametrize("critics", [1, 2, 3])
@every_size
def test_pathwise(samples: int, batch: int, action_size: int, critics: int) -> None:
    log_prob, q = normal(samples, batch), normal(samples, critics, batch)
    expected, *gradients = pathwise_by_hand(log_prob, q, upstream=-2.5)
    for leaves in ((log_prob, q), (strided(log_prob), strided(q))):
        log_prob, q = (leaf.detach().requires_grad_() for leaf in leaves)
        alpha = torch.tensor(ALPHA, dtype=torch.float64, requires_grad=True)
        loss = pathwise_loss(log_prob, q, alpha)
        torch.testing.assert_close(loss.item(), expected)
        (-2.5 * loss).backward()
        torch.testing.assert_close([log_prob.grad, q.grad], gradients)
        assert alpha.grad is None
    assert torch.autograd.gradcheck(lambda x, y: pathwise_loss(x, y, ALPHA), (log_prob, q), fast_mode=batch > 1)


def score_problem(samples: int, batch: int, action_size: int) -> tuple[Tensor, ...]:
    """Mean, log_std, noise, q, and a baseline [B], which only the kind "tensor" uses."""
    mean, log_std = normal(batch, action_size, seed=1), 0.5 * normal(batch, action_size, seed=2) - 0.7
    noise, q = normal(samples, batch, action_size, seed=3), normal(samples, 2, batch, seed=4)
    return mean, log_std, noise, q, 3.0 * normal(batch, seed=5)


def score_by_hand(
    mean: Tensor, log_std: Tensor, noise: Tensor, q: Tensor, b: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients, from the closed form in the docstring."""
    samples, batch, _ = noise.shape
    sigma = log_std.exp()
    a = torch.tanh(mean + sigma * noise)
    log_normal = torch.distributions.Normal(mean, sigma).log_prob(mean + sigma * noise).sum(-1)
    f = ALPHA * (log_normal - torch.log(1.0 - a.square()).sum(-1)) - torch.minimum(q[:, 0], q[:, 1])
    advantage = f.clone()
    for k in range(samples):
        for i in range(batch):
            others = [f[j, i].item() for j in range(samples) if j != k]
            loo = sum(others) / max(len(others), 1)
            advantage[k, i] -= {"none": 0.0, "constant": -ALPHA, "loo": loo, "tensor": b[i].item()}[kind]
    weight = advantage[..., None] / (samples * batch)
    d_mean, d_log_std = (weight * noise / sigma).sum(0), (weight * (noise.square() - 1.0)).sum(0)
    return (log_normal * advantage).mean(), d_mean, d_log_std


@pytest.mark.parametrize("kind", KINDS)
@every_size
def test_score_function(samples: int, batch: int, action_size: int, kind: str) -> None:
    samples = max(samples, 2) if kind == "loo" else samples
    problem = score_problem(samples, batch, action_size)
    loss, *gradients = score_by_hand(*problem, kind)
    for leaves in (problem, [strided(each) for each in problem]):
        mean, log_std, noise, q, b = (leaf.detach().requires_grad_() for leaf in leaves)
        alpha = torch.tensor(ALPHA, dtype=torch.float64, requires_grad=True)
        found = score_function_loss(mean, log_std, noise, q, alpha, b if kind == "tensor" else kind)
        torch.testing.assert_close(found, loss, rtol=1e-8, atol=1e-8, check_stride=False)
        (-2.5 * found).backward()
        expected = [-2.5 * gradient for gradient in gradients]
        torch.testing.assert_close([mean.grad, log_std.grad], expected, rtol=1e-8, atol=1e-8, check_stride=False)
        assert [leaf.grad for leaf in (noise, q, b, alpha)] == [None] * 4


def test_score_function_takes_alpha_as_a_number_too() -> None:
    mean, log_std, noise, q, _ = score_problem(2, 3, 2)
    losses = [
        score_function_loss(mean, log_std, noise, q, alpha, "constant")
        for alpha in (ALPHA, torch.tensor(ALPHA, dtype=torch.float64))
    ]
    torch.testing.assert_close(*losses)


def td_by_hand(
    q: Tensor, reward: Tensor, terminated: Tensor, next_q: Tensor, next_log_prob: Tensor, gamma: float | Tensor
) -> tuple[float, Tensor]:
    critics, batch = q.shape
    total, d_q = 0.0, torch.zeros_like(q)
    for i in range(batch):
        y = reward[i].item()
        if not terminated[i]:
            discount = gamma[i].item() if isinstance(gamma, Tensor) else gamma
            y += discount * (min(next_q[:, i].tolist()) - ALPHA * next_log_prob[i].item())
        for critic in range(critics):
            error = q[critic, i].item() - y
            total += error**2 / batch
            d_q[critic, i] = 2.0 * error / batch
    return total, d_q


def td_problem(critics: int, batch: int) -> list[Tensor]:
    """Arguments q, reward, terminated, next_q, next_log_prob; the first and every third row are terminated."""
    terminated = torch.arange(batch) % 3 == 0
    return [
        normal(critics, batch, seed=1),
        5.0 * normal(batch, seed=2),
        terminated,
        3.0 * normal(critics, batch, seed=3),
        normal(batch, seed=4),
    ]


@pytest.mark.parametrize("flag", [torch.bool, torch.uint8])
@pytest.mark.parametrize(("critics", "batch"), [(1, 1), (2, 1), (2, 33), (3, 33), (5, 4)])
@pytest.mark.parametrize("discounts", [False, True])
def test_td(critics: int, batch: int, flag: torch.dtype, discounts: bool) -> None:
    problem = td_problem(critics, batch)
    problem[2] = problem[2].to(flag)
    gamma: Any = normal(batch, seed=5).sigmoid().requires_grad_() if discounts else 0.9
    expected, gradient = td_by_hand(*problem, gamma=gamma)
    for leaves in (problem, [strided(each) if each.is_floating_point() else each for each in problem]):
        leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
        alpha = torch.tensor(ALPHA, dtype=torch.float64, requires_grad=True)
        loss = td_loss(*leaves, alpha, gamma)
        torch.testing.assert_close(loss.item(), expected)
        (-2.5 * loss).backward()
        torch.testing.assert_close(leaves[0].grad, -2.5 * gradient, check_stride=False)
        assert [leaf.grad for leaf in leaves[1:]] == [None] * 4
        assert alpha.grad is None
        assert not discounts or gamma.grad is None
    q, *rest = leaves
    assert torch.autograd.gradcheck(lambda x: td_loss(x, *rest, ALPHA, gamma), (q,))


def categorical_by_hand(
    logits: Tensor, next_logits: Tensor, columns: list[Tensor], gamma: Any, ends: tuple[float, float], target: str
) -> tuple[float, Tensor, Tensor]:
    """The loss, its gradient and q, atom by atom, as algorithm 1 of arXiv 1707.06887 distributes the masses."""
    critics, batch, atoms = logits.shape
    reward, terminated, next_log_prob = columns
    low, high = ends
    width = (high - low) / (atoms - 1)
    z = [low + j * width for j in range(atoms)]
    total, gradient, q = 0.0, torch.zeros_like(logits), torch.zeros_like(logits[:, :, 0])
    for i in range(batch):
        weights = [[math.exp(x) for x in next_logits[e, i].tolist()] for e in range(critics)]
        masses = [[w / sum(row) for w in row] for row in weights]
        means = [sum(p * x for p, x in zip(row, z, strict=True)) for row in masses]
        for e in range(critics):
            source = masses[e if target == "own" else means.index(min(means))]
            m = [0.0] * atoms
            for p, atom in zip(source, z, strict=True):
                discount = gamma[i].item() if isinstance(gamma, Tensor) else gamma
                value = 0.0 if terminated[i] else discount * (atom - ALPHA * next_log_prob[i].item())
                place = (min(max(reward[i].item() + value, low), high) - low) / width
                lower, upper = math.floor(place), math.ceil(place)
                if lower == upper:
                    m[lower] += p
                else:
                    m[lower] += p * (upper - place)
                    m[upper] += p * (place - lower)
            exponentials = [math.exp(x) for x in logits[e, i].tolist()]
            for k, (each, mass) in enumerate(zip(exponentials, m, strict=True)):
                probability = each / sum(exponentials)
                total -= mass * math.log(probability) / batch
                gradient[e, i, k] = (probability - mass) / batch
                q[e, i] += probability * z[k]
    return total, gradient, q


def categorical_problem(critics: int, batch: int, atoms: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Some targets lie beyond the ends [-3, 2], some on atoms exactly; the means of row 0 are equal."""
    next_logits = 2.0 * normal(critics, batch, atoms, seed=2)
    next_logits[:, 0] = next_logits[0, 0]
    next_logits[-1, 0] = next_logits[0, 0] + 1.0
    reward, next_log_prob = 2.0 * normal(batch, seed=3), normal(batch, seed=4)
    reward[0], next_log_prob[0] = 0.0, 0.0
    return normal(critics, batch, atoms, seed=1), next_logits, [reward, torch.arange(batch) % 3 == 1, next_log_prob]


@pytest.mark.parametrize(("critics", "batch", "atoms"), [(1, 1, 2), (2, 33, 3), (3, 20, 51), (2, 7, 101)])
@pytest.mark.parametrize("target", ["own", "smallest"])
@pytest.mark.parametrize("discounts", [False, True])
def test_categorical(critics: int, batch: int, atoms: int, target: Any, discounts: bool) -> None:
    logits, next_logits, columns = categorical_problem(critics, batch, atoms)
    gamma: Any = normal(batch, seed=5).sigmoid().requires_grad_() if discounts else 1.0
    expected, gradient, means = categorical_by_hand(logits, next_logits, columns, gamma, (-3.0, 2.0), target)
    for layout in (lambda x: x, strided):
        leaves = [layout(each).detach().requires_grad_() for each in (logits, next_logits)]
        alpha = torch.tensor(ALPHA, dtype=torch.float64, requires_grad=True)
        loss, q = categorical_loss(*leaves, *columns, alpha, gamma, -3.0, 2.0, target)
        torch.testing.assert_close(loss.item(), expected)
        torch.testing.assert_close(q, means, check_stride=False)
        (-2.5 * loss).backward()
        torch.testing.assert_close(leaves[0].grad, -2.5 * gradient, check_stride=False)
        assert [leaf.grad for leaf in (leaves[1], alpha)] == [None] * 2
        assert not q.requires_grad
        assert not discounts or gamma.grad is None


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_the_product_that_projects_on_a_gpu_is_the_scatter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fastsac_kernels.categorical_loss"]
    monkeypatch.setattr(module, "_PIECE", rows * 51**2)
    mass, place = normal(3, 33, 51).softmax(2), (25.0 + 30.0 * normal(33, 51)).clamp(0.0, 50.0)
    place[0] = place[0].round()
    torch.testing.assert_close(module._multiply(mass, place), module._scatter(mass, place))
    place[1, 3] = math.nan
    assert module._multiply(mass, place)[:, 1].isnan().any(1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("target", ["own", "smallest"])
def test_categorical_ignores_what_lies_behind_termination(bad: float, target: Any) -> None:
    logits, next_logits, columns = categorical_problem(2, 9, 5)
    expected = categorical_loss(logits, next_logits, *columns, ALPHA, 0.9, -3.0, 2.0, target)
    next_logits[:, columns[1]], columns[2][columns[1]] = bad, bad
    found = categorical_loss(logits, next_logits, *columns, ALPHA, 0.9, -3.0, 2.0, target)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": (2, 4)}, "logits and next_logits must both be [E, B, M], got [2, 4] and [2, 4, 5]"),
        ({"logits": (1, 4, 5)}, "logits and next_logits must both be [E, B, M], got [1, 4, 5] and [2, 4, 5]"),
        ({"reward": (4, 1)}, "reward must be [B] = [4], got [4, 1]"),
        ({"terminated": (3,)}, "terminated must be [B] = [4], got [3]"),
        ({"next_log_prob": ()}, "next_log_prob must be [B] = [4], got []"),
        ({"gamma": ()}, "gamma must be [B] = [4], got []"),
        ({"v_min": 2.0}, "v_min must be below v_max, got 2.0 and 2.0"),
        ({"target": "mean"}, "target must be 'own' or 'smallest', got 'mean'"),
        ({"logits": (2, 4, 1), "next_logits": (2, 4, 1)}, "with at least 2 atoms, got [2, 4, 1]"),
    ],
    ids=str,
)
def test_categorical_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    sizes = {"logits": (2, 4, 5), "next_logits": (2, 4, 5), "reward": (4,), "terminated": (4,), "next_log_prob": (4,)}
    rest = {"alpha": ALPHA, "gamma": 0.9, "v_min": -3.0, "v_max": 2.0, "target": "own"}
    arguments = sizes | rest | changes
    arguments = {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match="must") as caught:
        categorical_loss(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_td_ignores_what_lies_behind_termination(bad: float) -> None:
    problem = td_problem(2, 33)
    expected, gradient = td_by_hand(*problem, gamma=0.9)
    q, reward, terminated, next_q, next_log_prob = problem
    next_q[:, terminated], next_log_prob[terminated] = bad, bad
    q.requires_grad_()
    loss = td_loss(q, reward, terminated, next_q, next_log_prob, ALPHA, 0.9)
    loss.backward()
    torch.testing.assert_close(loss.item(), expected)
    torch.testing.assert_close(q.grad, gradient)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_td_shows_a_bad_value_that_counts(bad: float) -> None:
    q, reward, terminated, next_q, next_log_prob = td_problem(2, 4)
    next_log_prob[1] = bad
    assert not td_loss(q, reward, terminated, next_q, next_log_prob, ALPHA, 0.9).isfinite()


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (2, 4, 1), "q and next_q must both be [E, B], got [2, 4, 1] and [2, 4]"),
        (0, (1, 4), "q and next_q must both be [E, B], got [1, 4] and [2, 4]"),
        (1, (4, 1), "reward must be [B] = [4], got [4, 1]"),
        (1, (1,), "reward must be [B] = [4], got [1]"),
        (2, (4, 1), "terminated must be [B] = [4], got [4, 1]"),
        (3, (4,), "q and next_q must both be [E, B], got [2, 4] and [4]"),
        (4, (4, 1), "next_log_prob must be [B] = [4], got [4, 1]"),
        (4, (1, 4), "next_log_prob must be [B] = [4], got [1, 4]"),
        (6, (4, 1), "gamma must be [B] = [4], got [4, 1]"),
        (6, (), "gamma must be [B] = [4], got []"),
    ],
)
def test_td_refuses_wrong_shapes(index: int, shape: tuple[int, ...], message: str) -> None:
    problem: list[Any] = [*td_problem(2, 4), ALPHA, 0.9]
    problem[index] = torch.zeros(shape, dtype=torch.bool if index == 2 else torch.float64)
    with pytest.raises(ValueError, match="must") as caught:
        td_loss(*problem)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("log_prob", "q"), [((3, 4), (3, 4)), ((3, 4), (2, 3, 4)), ((4,), (1, 2, 4)), ((3, 1), (3, 2, 4))]
)
def test_actor_losses_refuse_wrong_shapes(log_prob: tuple[int, ...], q: tuple[int, ...]) -> None:
    message = rf"log_prob must be \[K, B\] and q \[K, E, B\], got \[.*\] and \{list(q)}"
    with pytest.raises(ValueError, match=message):
        pathwise_loss(torch.zeros(log_prob), torch.zeros(q), ALPHA)
    if len(log_prob) == 2:
        mean, noise = torch.zeros(log_prob[1], 5), torch.zeros(*log_prob, 5)
        with pytest.raises(ValueError, match=message):
            score_function_loss(mean, mean, noise, torch.zeros(q), ALPHA, "none")


@pytest.mark.parametrize(
    ("samples", "baseline", "message"),
    [
        (1, "loo", "baseline 'loo' needs at least 2 action samples per state, got 1"),
        (2, "mean", "unknown baseline 'mean'; known: none, constant, loo, or a tensor [B]"),
        (2, torch.zeros(4, 1), "a baseline tensor must be [B] = [4], got [4, 1]"),
        (2, torch.zeros(2, 4), "a baseline tensor must be [B] = [4], got [2, 4]"),
        (2, torch.zeros(()), "a baseline tensor must be [B] = [4], got []"),
    ],
)
def test_score_function_refuses_baselines(samples: int, baseline: str | Tensor, message: str) -> None:
    mean, log_std, noise, q, _ = score_problem(samples, 4, 2)
    with pytest.raises(ValueError, match="baseline") as caught:
        score_function_loss(mean, log_std, noise, q, ALPHA, baseline)
    assert str(caught.value) == message


def test_score_function_is_accurate_at_small_sigma() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 64, 3, generator=generator)
    q = torch.randn(2, 2, 64, generator=generator)
    mean = torch.full((64, 3), 8.0, requires_grad=True)
    log_std = torch.full((64, 3), -5.0, requires_grad=True)
    score_function_loss(mean, log_std, noise, q, 0.0, "none").backward()
    advantage = -q.double().amin(1)[..., None] / (2 * 64)
    eps = noise.double()
    torch.testing.assert_close(mean.grad.double(), (advantage * eps * math.exp(5.0)).sum(0), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(log_std.grad.double(), (advantage * (eps**2 - 1.0)).sum(0), rtol=2e-6, atol=1e-7)


def test_alpha_must_be_a_scalar() -> None:
    with pytest.raises(ValueError, match="alpha must be a scalar"):
        pathwise_loss(torch.zeros(1, 3), torch.zeros(1, 2, 3), torch.zeros(3, 1))
