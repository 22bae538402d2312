"""Flat buffers: what lies in them, what is rounded, and whose memory it is."""

import pytest
import torch

from fastsac.config import Config
from fastsac.learner import FusedLearner, Learner
from fastsac.learner.flat import ALIGNMENT, Memory
from fastsac.learner.stack import ACTIVATIONS
from tests.test_fused import Fixed, Shape, config_of
from tests.test_graphed import A, O


@pytest.mark.parametrize(("obs_size", "rounded"), [(17, [False, True, True, False]), (200, [True, True, True, False])])
def test_what_is_rounded(obs_size: int, rounded: list[bool]) -> None:
    """Hidden layers are, and the first one of a wide input; the last ones, parameters, moments and sums never."""
    shape = Shape(obs_size, 6, 8, (16, 16, 16), 2, 1)
    learner = FusedLearner(config_of("score", "value", "relu", shape, precision="bf16"), obs_size, 6)
    learner.update(Fixed(shape))
    for network in learner._flat.values():
        assert [layer.weight.dtype == torch.bfloat16 for layer in network.layers] == rounded
        for layer, exact in zip(network.layers, network.exact, strict=True):
            assert torch.equal(layer.weight, exact.weight.to(layer.weight.dtype))
            assert torch.equal(layer.bias, exact.bias.to(layer.bias.dtype))
    tensors, _ = learner.state()
    assert {tensor.dtype for name, tensor in tensors.items() if name != "generator"} == {torch.float32}
    plain = FusedLearner(config_of("score", "value", "relu", shape, precision="fp32"), obs_size, 6)
    assert not any(dtype == torch.bfloat16 for _, dtype in plain._memory._shared)
    assert all(layer.weight.dtype == torch.float32 for net in plain._flat.values() for layer in net.layers)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_modules_are_views_of_the_buffers(precision: str) -> None:
    learner = FusedLearner(Config(batch_size=16, hidden_sizes=(32, 32), precision=precision), O, A)
    reference = Learner(Config(batch_size=16, hidden_sizes=(32, 32), precision="fp32"), O, A)
    for name, network in learner._networks().items():
        values = learner._flat[name].values
        for own, other in zip(network.parameters(), reference._networks()[name].parameters(), strict=True):
            assert own.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
            assert torch.equal(own, other)  # drawn as the reference engine's
        with torch.no_grad():
            values += 1.0
        for own, other in zip(network.parameters(), reference._networks()[name].parameters(), strict=True):
            assert torch.equal(own, other + 1.0)


def test_a_loaded_state_is_rounded_anew() -> None:
    config = Config(batch_size=16, hidden_sizes=(8, 8), precision="bf16")
    first, second = FusedLearner(config, O, A, seed=0), FusedLearner(config, O, A, seed=1)
    second.load_state(*first.state())
    for name, network in second._flat.items():
        for layer, other in zip(network.layers, first._flat[name].layers, strict=True):
            assert torch.equal(layer.weight, other.weight)


def test_relu_on_bits_is_relu() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    bits = bits[(bits & 0x7F80 != 0) | (bits & 0x7F == 0)]  # every number but denormals, which may be flushed
    z = bits.to(torch.int16).view(torch.bfloat16)
    expected, h = torch.relu(z), z.clone()
    ACTIVATIONS["relu"].function(h, h)()
    assert torch.equal(h.isnan(), z.isnan())
    assert torch.equal(h[~z.isnan()], expected[~z.isnan()])
    d = torch.randn(len(z)).to(torch.bfloat16)
    slope = (z > 0).to(torch.bfloat16)
    gradient = d.clone()
    ACTIVATIONS["relu"].times_derivative(gradient, h)()
    assert torch.equal(gradient[~z.isnan()], (d * slope)[~z.isnan()])


def test_memory_comes_in_aligned_pieces_that_are_shared_by_name() -> None:
    memory = Memory(torch.device("cpu"))
    tensors = [
        memory.zeros(shape, dtype) for shape in ((3, 5), (1,), (2**20,)) for dtype in (torch.float32, torch.bfloat16)
    ]
    assert all(tensor.data_ptr() % ALIGNMENT == 0 and not tensor.any() for tensor in tensors)
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
    assert all((tensor == index).all() for index, tensor in enumerate(tensors))
    large = memory.shared("a", (4, 6), torch.float32)
    assert memory.shared("a", (2, 3), torch.float32).data_ptr() == large.data_ptr()
    assert memory.shared("b", (2, 3), torch.float32).data_ptr() != large.data_ptr()
    assert memory.shared("a", (2, 3), torch.bfloat16).data_ptr() != large.data_ptr()
    assert memory.shared("a", (5, 6), torch.float32).data_ptr() != large.data_ptr()  # too small for this one
