"""Networks of two hidden layers, row tile by row tile: what the kernels of `whole_update_triton.py` are made of.

A network lives in a flat buffer, as `fastsac.learner.flat` lays it out: E networks' first layers, each a row of biases
and I rows of weights; then their second layers' weights and biases; then their last layers'. Hidden layers are
multiples of 64 wide, so nothing lies between two layers.

A program owns some rows. The first hidden layer is made in chunks of columns, and each is consumed by the second layer
at once, so nothing wider than the second layer is ever held.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """Total + a @ b; factors of bfloat16, TF32 or float32 ("ieee"), sums of float32."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)


@triton.jit
def relu(z):
    """Also of NaN, which a maximum would lose."""
    return tl.where(z < 0.0, 0.0, z)


@triton.jit
def first_layer(
    values_ptr,
    weights_ptr,
    x_ptr,
    x_start,
    live,
    action,
    column,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTION: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some columns of the first hidden layer, for inputs [x | action] with x at x_ptr + x_start.

    ACTION is the action's size; 0 if there is none beside x.
    """
    rows: tl.constexpr = x_start.shape[0]
    columns: tl.constexpr = column.shape[0]
    z = tl.zeros([rows, columns], tl.float32) + tl.load(values_ptr + column)[None, :]
    given: tl.constexpr = INPUTS - ACTION
    for start in range(0, given, STEP):
        place = start + tl.arange(0, STEP)
        inside = place < given
        x = tl.load(x_ptr + x_start[:, None] + place[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        weight_ptr = weights_ptr + (1 + place)[:, None] * WIDTH + column[None, :]
        z = product(x, tl.load(weight_ptr, mask=inside[:, None], other=0.0), z, PRECISION)
    if ACTION > 0:
        place = tl.arange(0, action.shape[1])
        weight_ptr = weights_ptr + (1 + given + place)[:, None] * WIDTH + column[None, :]
        z = product(action, tl.load(weight_ptr, mask=(place < ACTION)[:, None], other=0.0), z, PRECISION)
    return relu(z)


@triton.jit
def hidden_layers(
    values_ptr,
    weights_ptr,
    network,
    x_ptr,
    x_start,
    live,
    action,
    kept_ptr,
    kept_row,
    NETWORKS: tl.constexpr,
    INPUTS: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    ACTION: tl.constexpr,
    KEEP: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The second hidden layer [rows, H2 up to a power of two], zero behind H2.

    `values_ptr` has the parameters, `weights_ptr` those that hidden layers' products take. KEEP says what of the first
    layer goes to the rows `kept_row` of `kept_ptr`: "values", "signs" or "nothing".
    """
    rows: tl.constexpr = x_start.shape[0]
    padded: tl.constexpr = triton.next_power_of_2(H2)
    start2: tl.constexpr = NETWORKS * (1 + INPUTS) * H1
    first = network * ((1 + INPUTS) * H1)
    second = start2 + network * (H1 * H2)
    out = tl.arange(0, padded)
    used = out < H2
    bias = tl.load(values_ptr + start2 + NETWORKS * H1 * H2 + network * H2 + out, mask=used, other=0.0)
    z = tl.zeros([rows, padded], tl.float32) + bias[None, :]
    for start in range(0, H1, CHUNK):
        column = start + tl.arange(0, CHUNK)
        first_ptr = values_ptr if FIRST != "bf16" else weights_ptr
        h1 = first_layer(
            values_ptr + first,
            first_ptr + first,
            *(x_ptr, x_start, live, action, column),
            *(INPUTS, H1, ACTION, STEP, FIRST),
        )
        if KEEP == "values":
            tl.store(kept_ptr + kept_row[:, None] * H1 + column[None, :], h1, mask=live[:, None])
        if KEEP == "signs":
            positive = (h1 > 0.0).to(tl.int8)
            tl.store(kept_ptr + kept_row[:, None] * H1 + column[None, :], positive, mask=live[:, None])
        weight = tl.load(weights_ptr + second + column[:, None] * H2 + out[None, :], mask=used[None, :], other=0.0)
        z = product(h1, weight, z, PRECISION)
    return relu(z)


@triton.jit
def last_row(values_ptr, network, NETWORKS: tl.constexpr, INPUTS: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr):
    """The last layer of a network with one output: its weights, zero behind H2, and its bias."""
    padded: tl.constexpr = triton.next_power_of_2(H2)
    start3: tl.constexpr = NETWORKS * ((1 + INPUTS) * H1 + (1 + H1) * H2)
    out = tl.arange(0, padded)
    weight = tl.load(values_ptr + start3 + network * H2 + out, mask=out < H2, other=0.0)
    return weight, tl.load(values_ptr + start3 + NETWORKS * H2 + network)


@triton.jit
def first_gradient(
    weights_ptr,
    network,
    d2,
    kept_ptr,
    kept_row,
    live,
    column,
    NETWORKS: tl.constexpr,
    INPUTS: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some columns of the first hidden layer's gradient before its ReLU, for the second one's d2 [rows, H2 padded]."""
    padded: tl.constexpr = triton.next_power_of_2(H2)
    start2: tl.constexpr = NETWORKS * (1 + INPUTS) * H1
    out = tl.arange(0, padded)
    weight_ptr = weights_ptr + start2 + network * (H1 * H2) + column[:, None] * H2 + out[None, :]
    weight = tl.load(weight_ptr, mask=(out < H2)[None, :], other=0.0)
    zeros = tl.zeros([d2.shape[0], column.shape[0]], tl.float32)
    d1 = product(d2, tl.trans(weight), zeros, PRECISION)
    kept = tl.load(kept_ptr + kept_row[:, None] * H1 + column[None, :], mask=live[:, None], other=0)
    return tl.where(kept.to(tl.float32) > 0.0, d1, 0.0)


@triton.jit
def head(
    values_ptr,
    start,
    action,
    INPUTS: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    A: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Some rows of the policy's last layer [CHUNK, A padded]: of the mean's columns, or, SHIFTed by A, of log_std's."""
    start3: tl.constexpr = (1 + INPUTS) * H1 + (1 + H1) * H2
    out = start + tl.arange(0, CHUNK)
    used = (out < H2)[:, None] & (action < A)[None, :]
    return tl.load(values_ptr + start3 + out[:, None] * (2 * A) + SHIFT + action[None, :], mask=used, other=0.0)


@triton.jit
def policy_outputs(
    values_ptr,
    h2_ptr,
    kept_row,
    live,
    INPUTS: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    A: tl.constexpr,
    BLOCK_A: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Mean and raw log_std [rows, BLOCK_A], for a second hidden layer in memory: chunk by chunk it fits registers."""
    action = tl.arange(0, BLOCK_A)
    zeros = tl.zeros([kept_row.shape[0], BLOCK_A], tl.float32)
    bias_ptr = values_ptr + (1 + INPUTS) * H1 + (1 + H1) * H2 + H2 * 2 * A + action
    mean = zeros + tl.load(bias_ptr, mask=action < A, other=0.0)[None, :]
    raw = zeros + tl.load(bias_ptr + A, mask=action < A, other=0.0)[None, :]
    for start in range(0, H2, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = live[:, None] & (column < H2)[None, :]
        h2 = tl.load(h2_ptr + kept_row[:, None] * H2 + column[None, :], mask=inside, other=0.0)
        mean = product(h2, head(values_ptr, start, action, INPUTS, H1, H2, A, 0, CHUNK), mean, PRECISION)
        raw = product(h2, head(values_ptr, start, action, INPUTS, H1, H2, A, A, CHUNK), raw, PRECISION)
    return mean, raw


@triton.jit
def keep_second(h2, h2_ptr, kept_row, live, H2: tl.constexpr):
    """Store the second hidden layer."""
    out = tl.arange(0, h2.shape[1])
    tl.store(h2_ptr + kept_row[:, None] * H2 + out[None, :], h2, mask=live[:, None] & (out < H2)[None, :])


@triton.jit
def load_second(h2_ptr, kept_row, live, H2: tl.constexpr):
    """The second hidden layer, zero behind H2."""
    out = tl.arange(0, triton.next_power_of_2(H2))
    inside = live[:, None] & (out < H2)[None, :]
    return tl.load(h2_ptr + kept_row[:, None] * H2 + out[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def go_back(
    d2,
    weights_ptr,
    network,
    h1_ptr,
    kept_row,
    d1_ptr,
    d_row,
    live,
    NETWORKS: tl.constexpr,
    INPUTS: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keep the first hidden layer's gradient before its ReLU, for the second one's d2 [rows, H2 padded]."""
    for start in range(0, H1, CHUNK):
        column = start + tl.arange(0, CHUNK)
        d1 = first_gradient(
            *(weights_ptr, network, d2, h1_ptr, kept_row, live, column, NETWORKS, INPUTS, H1, H2, PRECISION)
        )
        tl.store(d1_ptr + d_row[:, None] * H1 + column[None, :], d1, mask=live[:, None])


@triton.jit
def head_backward(
    values_ptr,
    grad_mean,
    grad_raw,
    h2_ptr,
    kept_row,
    d2_ptr,
    d_row,
    live,
    INPUTS: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    A: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keep the second hidden layer's gradient before its ReLU, for those of mean and raw log_std [rows, A padded]."""
    action = tl.arange(0, grad_mean.shape[1])
    zeros = tl.zeros([kept_row.shape[0], CHUNK], tl.float32)
    for start in range(0, H2, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = live[:, None] & (column < H2)[None, :]
        weight = head(values_ptr, start, action, INPUTS, H1, H2, A, 0, CHUNK)
        d2 = product(grad_mean, tl.trans(weight), zeros, PRECISION)
        weight = head(values_ptr, start, action, INPUTS, H1, H2, A, A, CHUNK)
        d2 = product(grad_raw, tl.trans(weight), d2, PRECISION)
        h2 = tl.load(h2_ptr + kept_row[:, None] * H2 + column[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(d2_ptr + d_row[:, None] * H2 + column[None, :], tl.where(h2 > 0.0, d2, 0.0), mask=inside)
