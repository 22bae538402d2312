"""The generator: published vectors, bit-for-bit agreement, and what statistics say of its numbers."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsac_kernels import PhiloxState, philox_normal, sample_squashed_gaussian, score_function_loss
from fastsac_kernels.philox import philox, philox_words
from fastsac_kernels.replay_gather import uniform_positions_op
from tests.kernels.parity import DEVICES, mutate, policy

every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of the Random123 library, philox4x32-10
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    c, k = ([torch.tensor(int(word, 16)) for word in words.split()] for words in (counter, key))
    assert [f"{word.item():08x}" for word in philox(c, k)] == expected.split()


def test_the_counter_is_row_column_block_offset_and_stream() -> None:
    rng = PhiloxState(seed=0x299F31D0A4093822, stream=0x0370)
    rng.advance((0x7344 << 32) + 0x13198A2E)  # pi's digits, all but the row and column, which are small here
    row, block = 5, 2
    counter = [torch.tensor(word) for word in (row, block, 0x13198A2E, 0x03707344)]
    expected = philox(counter, [torch.tensor(0xA4093822), torch.tensor(0x299F31D0)])
    assert philox_words(rng.state, rng.stream, 7, 3)[row, block].tolist() == [word.item() for word in expected]


def drawn_by_the_kernel(rng: PhiloxState, samples: int, batch: int, size: int) -> Tensor:
    """The noise, read off the forward pass where tanh is nearly the identity: u = 1e-4 eps."""
    mean = torch.zeros(batch, size, device=rng.device)
    return sample_squashed_gaussian(mean, mean - 9.0, rng, samples, backend="triton")[0]


@every_device
@pytest.mark.parametrize(("samples", "batch", "size"), [(1, 1, 1), (3, 33, 7), (2, 1000, 17), (1, 5, 33)])
def test_kernels_draw_what_philox_normal_returns(samples: int, batch: int, size: int, device: str) -> None:
    floats = {name: x.float().to(device) for name, x in policy(batch, size).items()}
    q = torch.randn(samples, 2, batch, generator=torch.Generator().manual_seed(0)).to(device)
    for seed, offset, stream in ((0, 0, 0), (2**62 + 12345, 2**33 + 7, 65535)):
        results = []
        rng = PhiloxState(seed, device, stream)
        rng.advance(offset)
        for source in (rng, philox_normal(rng, (samples, batch, size))):
            mean, log_std = (x.detach().requires_grad_() for x in floats.values())
            outputs = sample_squashed_gaussian(mean, log_std, source, samples, backend="triton")
            grads = torch.autograd.grad(outputs, (mean, log_std), [torch.ones_like(output) for output in outputs])
            loss = score_function_loss(mean, log_std, source, q, 0.3, "none", backend="triton")
            results.append([*outputs, *grads, loss, *torch.autograd.grad(loss, (mean, log_std))])
        for drawn, given in zip(*results, strict=True):
            assert torch.equal(drawn, given)  # the forward, the backward and the loss, to the last bit


@pytest.mark.parametrize(
    ("old", "new"),
    [("(offset >> 32) & 0xFFFF", "(offset >> 33) & 0xFFFF"), ("tl.sqrt_rn(", "1.0000001 * tl.sqrt_rn(")],
)
def test_a_wrong_generator_fails(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dependents = ("squashed_gaussian_triton", "score_function_loss_triton")
    mutate(monkeypatch, tmp_path, "philox_triton", old, new, dependents)
    with pytest.raises(AssertionError):
        test_kernels_draw_what_philox_normal_returns(1, 100, 7, "cpu")


def test_the_same_state_gives_the_same_and_advancing_gives_new_numbers() -> None:
    rng = PhiloxState(7)
    first = philox_normal(rng, (3, 5))
    assert torch.equal(first, philox_normal(rng, (3, 5)))
    kept, other = rng.clone(), rng.of_stream(1)
    rng.advance()
    assert not (philox_normal(rng, (3, 5)) == first).any()
    assert torch.equal(philox_normal(kept, (3, 5)), first)
    assert other.state[1].item() == 1  # a stream shares its offset with its origin
    for different in (PhiloxState(8), PhiloxState(7, stream=1)):
        assert not (philox_normal(different, (3, 5)) == first).any()


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    rng = PhiloxState(1)
    large = philox_normal(rng, (40, 9))
    assert torch.equal(philox_normal(rng, (7, 9)), large[:7])
    assert torch.equal(philox_normal(rng, (40, 6)), large[:, :6])
    assert torch.equal(philox_normal(rng, (4, 10, 9)), large.view(4, 10, 9))
    assert torch.equal(philox_normal(rng, (9,)), large[0])


@every_device
def test_a_backward_pass_after_advancing_is_refused(device: str) -> None:
    mean = torch.zeros(2, 3, device=device, requires_grad=True)
    rng = PhiloxState(0, device)
    action, _ = sample_squashed_gaussian(mean, mean.detach(), rng, backend="triton")
    rng.advance()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        action.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be at least 0 and below 2^63, got -1"),
        ({"seed": 2**63}, "seed must be at least 0"),
        ({"stream": -1}, "stream must be 0 to 65535, got -1"),
        ({"stream": 65536}, "stream must be 0 to 65535, got 65536"),
    ],
)
def test_bad_seeds_and_streams_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        PhiloxState(**arguments)
    assert message in str(caught.value)
    if "stream" in arguments:
        with pytest.raises(ValueError, match="stream must be"):
            PhiloxState().of_stream(arguments["stream"])
    with pytest.raises(ValueError, match="at least one dimension"):
        philox_normal(PhiloxState(), ())


def kolmogorov_smirnov(x: Tensor) -> float:
    """The statistic times the root of the number, against the standard normal distribution (1 of 1000 exceeds 1.95)."""
    x = x.double().sort().values
    cdf = torch.special.ndtr(x)
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return (torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max() * math.sqrt(len(x))).item()


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_the_numbers_are_normal(seed: int) -> None:
    x = philox_normal(PhiloxState(seed), (50_000, 8))
    assert all(kolmogorov_smirnov(column) < 1.95 for column in x.T)
    x = x.double().flatten()
    count = len(x)
    for power, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(x.pow(power).mean().item() - expected) < 4.0 * math.sqrt(variance / count)
    tail = 2.0 * (1.0 - torch.special.ndtr(torch.tensor(4.0, dtype=torch.float64)).item())
    assert abs((x.abs() > 4.0).sum().item() - tail * count) < 4.0 * math.sqrt(tail * count)
    assert x.abs().max() < 6.7  # sqrt(2 * 33 * log(2)): the smallest uniform number is 2^-33


def uncorrelated(x: Tensor, y: Tensor) -> bool:
    """Also of their squares, which see a dependence that has no sign."""
    pairs = (x.double(), y.double()), (x.double().square(), y.double().square())
    return all(abs(torch.corrcoef(torch.stack(pair))[0, 1].item()) < 4.0 / math.sqrt(len(x)) for pair in pairs)


def test_lanes_steps_streams_and_seeds_are_independent() -> None:
    def draw(seed: int = 5, offset: int = 0, stream: int = 0) -> Tensor:
        rng = PhiloxState(seed, stream=stream)
        rng.advance(offset)
        return philox_normal(rng, (40_000, 8))

    x = draw()
    for i in range(8):
        for j in range(i):
            assert uncorrelated(x[:, i], x[:, j]), (i, j)
    assert uncorrelated(x[1:].flatten(), x[:-1].flatten())
    for other in (draw(offset=1), draw(offset=2**32), draw(stream=1), draw(seed=6), draw(seed=5 + 2**32)):
        assert uncorrelated(x.flatten(), other.flatten())


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 2**31 - 1])
def test_positions_are_uniform(size: int) -> None:
    draws = 100_000
    position = uniform_positions_op(PhiloxState(3).state, 0, draws, torch.tensor(size))
    assert position.min() >= 0
    assert position.max() < size
    bins = min(size, 1000)
    counts = torch.bincount(position * bins // size, minlength=bins).double()
    expected = draws / bins
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - (bins - 1)) <= 4.0 * math.sqrt(2.0 * (bins - 1))


def test_a_position_is_the_64_bit_product() -> None:
    rng, size = PhiloxState(9), 2**31 - 1
    words = philox_words(rng.state, 0, 50, 1)[:, 0].tolist()
    expected = [((high << 32 | low) * size) >> 64 for low, high, _, _ in words]
    assert uniform_positions_op(rng.state, 0, 50, torch.tensor(size)).tolist() == expected
