"""Random numbers from a counter: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Nothing is stored but a seed and an offset; number j of row i is a function of them and of (i, j) alone. So the same
numbers come out for every block size, on every device and of every backend, bit for bit, and a backward pass draws them
again instead of loading them. One call makes four numbers::

    key     = seed, 64 bits
    counter = (row, column // 4, low half of the offset, stream * 2^16 + high half of the offset)
    words   = philox(counter, key)                      four uniform numbers of 32 bits, for columns 4c ... 4c + 3

Normal numbers come from two words each pair (Box and Muller 1958). Logarithm, sine and cosine are polynomials (of the
Cephes library) in additions, products and a correctly rounded root, each of which IEEE 754 fixes to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

#: log(1 + f) - f + f^2 / 2 over f^3, for f between sqrt(1/2) - 1 and sqrt(2) - 1, highest power first
LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
#: sin(t) = t + t^3 P(t^2) and cos(t) = 1 - t^2 / 2 + t^4 P(t^2), for |t| up to pi / 4
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
SQRT_HALF_BITS = 0x3F3504F3
EIGHTH_TURN = math.pi / 4 / 2**29


class PhiloxState:
    """A seed and an offset in one int64 tensor on the device, and the number of a stream.

    Drawing changes nothing: the same state gives the same numbers, which is how a loss or a backward pass draws a
    sample's noise again. `advance` moves on to new numbers, on the device and in place, so that a CUDA graph that holds
    it draws new ones at every replay. Call it when the backward passes are through: autograd refuses to go back to a
    state that has advanced.
    """

    __slots__ = ("state", "stream")

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu", stream: int = 0) -> None:
        """Start at offset 0.

        Args:
            seed: at least 0, below 2^63.
            device: where the numbers are wanted.
            stream: 0 to 65535; different streams of one seed are independent.

        Raises:
            ValueError: if the seed or the stream is out of its range.
        """
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {seed}")
        self.state = torch.tensor([seed, 0], dtype=torch.int64, device=device)
        self.stream = _checked_stream(stream)

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.state.device

    def of_stream(self, stream: int) -> PhiloxState:
        """Return another stream of the same seed and offset; the tensor is shared, so that both advance together.

        Raises:
            ValueError: if the stream is out of its range.
        """
        other = object.__new__(PhiloxState)
        other.state, other.stream = self.state, _checked_stream(stream)
        return other

    def clone(self) -> PhiloxState:
        """Return a copy that stays where it is."""
        other = object.__new__(PhiloxState)
        other.state, other.stream = self.state.clone(), self.stream
        return other

    def advance(self, steps: int = 1) -> None:
        """Advance to new numbers, in place, without the host."""
        self.state[1].add_(steps)


def _checked_stream(stream: int) -> int:
    if not 0 <= stream < 2**16:
        raise ValueError(f"stream must be 0 to 65535, got {stream}")
    return stream


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Return Philox4x32-10's four words for four counter words and two key words, each an int64 tensor in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low_product, high_product = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # 64 bits; a sign does no harm
        c0, c1, c2, c3 = (
            ((high_product >> 32) & MASK) ^ c1 ^ k0,
            high_product & MASK,
            ((low_product >> 32) & MASK) ^ c3 ^ k1,
            low_product & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def philox_words(state: Tensor, stream: int, rows: int, column_blocks: int) -> Tensor:
    """Return the words of `rows` rows and `column_blocks` blocks of four columns, int64 [rows, column_blocks, 4]."""
    seed, offset = state.unbind()
    row = torch.arange(rows, device=state.device)[:, None]
    block = torch.arange(column_blocks, device=state.device)[None, :]
    low, high = offset & MASK, ((offset >> 32) & 0xFFFF) | (stream << 16)
    counter = torch.broadcast_tensors(row, block, low, high)  # type: ignore[no-untyped-call]
    return torch.stack(philox(counter, (seed & MASK, (seed >> 32) & MASK)), -1)


# A registered operator, so that torch.compile calls it as it is: it would contract products and sums on a GPU, and on a
# CPU its vectorised code of this is wrong (torch 2.13).
@torch.library.custom_op("fastsac_kernels::philox_normal", mutates_args=())
def philox_normal_op(state: Tensor, stream: int, rows: int, columns: int) -> Tensor:
    """Return [rows, columns]; see `philox_normal`."""
    blocks = -(-columns // 4)
    words = philox_words(state, stream, rows, blocks).view(rows, 2 * blocks, 2)
    return box_muller(words[..., 0], words[..., 1]).view(rows, 4 * blocks)[:, :columns].contiguous()


@philox_normal_op.register_fake
def _(state: Tensor, stream: int, rows: int, columns: int) -> Tensor:
    return state.new_empty((rows, columns), dtype=torch.float32)


def philox_normal(rng: PhiloxState, shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers, float32, of `shape`: those that the kernels draw from this state.

    The last dimension counts the columns, all before it together the rows: for [K, B, A] row k * B + b holds sample k
    of state b. The state does not move.

    Raises:
        ValueError: if the shape has no dimension.
    """
    if not len(shape):
        raise ValueError("shape must have at least one dimension")
    *leading, columns = shape
    normal: Tensor = philox_normal_op(rng.state, rng.stream, math.prod(leading), columns)
    return normal.view(tuple(shape))


def box_muller(first: Tensor, second: Tensor) -> Tensor:
    """Return two normal numbers [..., 2], float32, for two words [...] each, int64 in [0, 2^32).

    Every operation here is one rounding, and `philox_triton` has the same ones in the same order.
    """
    uniform = first.float() * 2.0**-32 + 2.0**-33
    bits = uniform.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    log = _log_1p(f, exponent.float())
    radius = (log * -2.0).double().sqrt().float()  # torch's own float32 root is not always the nearest number

    t = ((second & 0x3FFFFFFF) - 0x20000000).float() * EIGHTH_TURN
    square = t * t
    sin = _polynomial(square, SIN) * square * t + t
    cos = _polynomial(square, COS) * square * square - square * 0.5 + 1.0
    quarter = second >> 30
    odd = (quarter & 1) == 1
    x, y = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    x = torch.where((quarter == 1) | (quarter == 2), -x, x)
    y = torch.where(quarter >= 2, -y, y)
    return torch.stack([radius * x, radius * y], -1)


def _log_1p(f: Tensor, exponent: Tensor) -> Tensor:
    """log((1 + f) * 2^exponent)."""
    square = f * f
    tail = _polynomial(f, LOG) * f * square + exponent * LN2_LOW - square * 0.5
    return f + tail + exponent * LN2_HIGH


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    first, *rest = coefficients
    value = x * first + rest[0]
    for coefficient in rest[1:]:
        value = value * x + coefficient
    return value
