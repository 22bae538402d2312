"""Weight gradients with Adam and the targets' move in their epilogue, tile by tile: no gradient reaches memory.

A program owns a tile of one layer's weights, goes through the whole batch, and then takes Adam's step (Kingma and Ba,
arXiv 1412.6980; AdamW's decay, arXiv 1711.05101) as PyTorch's fused kernel computes it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsac_kernels.squashed_gaussian_triton import exp
from fastsac_kernels.two_layer_triton import product


@triton.jit
def adam(
    gradient,
    place,
    live,
    values_ptr,
    mean_ptr,
    square_ptr,
    weights_ptr,
    target_ptr,
    target_weights_ptr,
    step,
    rate,
    decay,
    tau,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    TARGET: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """One step for the parameters at `place`; TARGET moves the target's by tau, ROUNDED keeps copies of bfloat16."""
    count = step.to(tl.float64)  # beta^count is close to 1 at first: one minus it needs more than float32
    step_size = (rate.to(tl.float64) / (1.0 - tl.exp(count * LOG_BETA1))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp(count * LOG_BETA2)).to(tl.float32)
    mean = tl.load(mean_ptr + place, mask=live, other=0.0)
    square = tl.load(square_ptr + place, mask=live, other=0.0)
    value = tl.load(values_ptr + place, mask=live, other=0.0)
    mean += (1.0 - BETA1) * (gradient - mean)
    square = BETA2 * square + (1.0 - BETA2) * gradient * gradient
    value -= rate * decay * value
    value -= tl.div_rn(step_size * mean, tl.div_rn(tl.sqrt_rn(square), root) + 1e-8)
    tl.store(mean_ptr + place, mean, mask=live)
    tl.store(square_ptr + place, square, mask=live)
    tl.store(values_ptr + place, value, mask=live)
    if ROUNDED:
        tl.store(weights_ptr + place, value, mask=live)
    if TARGET:
        target = tl.load(target_ptr + place, mask=live, other=0.0)
        target += tau * (value - target)
        tl.store(target_ptr + place, target, mask=live)
        if ROUNDED:
            tl.store(target_weights_ptr + place, target, mask=live)


@triton.jit
def gradient_tile(
    x_ptr,
    stride_x,
    d_ptr,
    scale,
    i,
    j,
    B,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    BIAS_FIRST: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows i and columns j of scale * x^T d, and of scale * sum d; BIAS_FIRST gives x a leading column of ones."""
    total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    total_bias = tl.zeros([j.shape[0]], tl.float32)
    for start in range(0, B, BATCH):
        b = start + tl.arange(0, BATCH)
        inside = (b < B)[:, None]
        d = tl.load(d_ptr + b[:, None] * J + j[None, :], mask=inside & (j < J)[None, :], other=0.0)
        if BIAS_FIRST:
            column = (i > 0) & (i <= I)
            x = tl.load(x_ptr + b[:, None] * stride_x + (i - 1)[None, :], mask=inside & column[None, :], other=0.0)
            x = tl.where((i == 0)[None, :], 1.0, x)
        else:
            x = tl.load(x_ptr + b[:, None] * stride_x + i[None, :], mask=inside & (i < I)[None, :], other=0.0)
            total_bias += tl.sum(d.to(tl.float32), 0)
        total = product(tl.trans(x), d, total, PRECISION)
    return total * scale, total_bias * scale


@triton.jit
def descend(
    tile,
    network,
    x_ptr,
    stride_x,
    h1_ptr,
    h2_ptr,
    d1_ptr,
    d2_ptr,
    d3_ptr,
    scale,
    values_ptr,
    mean_ptr,
    square_ptr,
    weights_ptr,
    target_ptr,
    target_weights_ptr,
    step,
    rate,
    decay,
    tau,
    B,
    NETWORKS: tl.constexpr,
    INPUTS: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    TARGET: tl.constexpr,
    ROUNDED: tl.constexpr,
    TILE: tl.constexpr,
    BATCH: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):
    """One tile of a network's parameters: of its second layer, its first one or its last one, in this order."""
    columns1: tl.constexpr = triton.cdiv(H1, TILE)
    columns2: tl.constexpr = triton.cdiv(H2, TILE)
    tiles1: tl.constexpr = triton.cdiv(1 + INPUTS, TILE) * columns1
    tiles2: tl.constexpr = columns1 * columns2
    narrow: tl.constexpr = min(64, max(16, triton.next_power_of_2(OUTPUTS)))
    columns3: tl.constexpr = triton.cdiv(OUTPUTS, narrow)
    start2: tl.constexpr = NETWORKS * (1 + INPUTS) * H1
    start3: tl.constexpr = start2 + NETWORKS * (1 + H1) * H2
    span = tl.arange(0, TILE)
    if tile < tiles2:
        i, j = tile // columns2 * TILE + span, tile % columns2 * TILE + span
        gradient, bias = gradient_tile(h1_ptr, H1, d2_ptr, 1.0, i, j, B, H1, H2, False, BATCH, PRECISION)
        place = start2 + network * (H1 * H2) + i[:, None] * H2 + j[None, :]
        adam(
            *(gradient, place, (i < H1)[:, None] & (j < H2)[None, :], values_ptr, mean_ptr, square_ptr, weights_ptr),
            *(target_ptr, target_weights_ptr, step, rate, decay, tau),
            *(BETA1, BETA2, LOG_BETA1, LOG_BETA2, TARGET, ROUNDED),
        )
        place = start2 + NETWORKS * H1 * H2 + network * H2 + j
        adam(
            *(bias, place, (j < H2) & (tile < columns2), values_ptr, mean_ptr, square_ptr, weights_ptr),
            *(target_ptr, target_weights_ptr, step, rate, decay, tau),
            *(BETA1, BETA2, LOG_BETA1, LOG_BETA2, TARGET, ROUNDED),
        )
    elif tile < tiles2 + tiles1:
        place = tile - tiles2
        i, j = place // columns1 * TILE + span, place % columns1 * TILE + span
        gradient, _ = gradient_tile(x_ptr, stride_x, d1_ptr, 1.0, i, j, B, INPUTS, H1, True, BATCH, FIRST)
        place = network * ((1 + INPUTS) * H1) + i[:, None] * H1 + j[None, :]
        adam(
            *(gradient, place, (i <= INPUTS)[:, None] & (j < H1)[None, :], values_ptr, mean_ptr, square_ptr),
            *(weights_ptr, target_ptr, target_weights_ptr, step, rate, decay, tau),
            *(BETA1, BETA2, LOG_BETA1, LOG_BETA2, TARGET, ROUNDED),
        )
    elif tile < tiles2 + tiles1 + columns2 * columns3:
        place = tile - tiles2 - tiles1
        i, j = place // columns3 * TILE + span, place % columns3 * narrow + tl.arange(0, narrow)
        gradient, bias = gradient_tile(h2_ptr, H2, d3_ptr, scale, i, j, B, H2, OUTPUTS, False, BATCH, LAST)
        of_bias = (j < OUTPUTS) & (place < columns3)
        place = start3 + network * (H2 * OUTPUTS) + i[:, None] * OUTPUTS + j[None, :]
        adam(
            *(gradient, place, (i < H2)[:, None] & (j < OUTPUTS)[None, :], values_ptr, mean_ptr, square_ptr),
            *(weights_ptr, target_ptr, target_weights_ptr, step, rate, decay, tau),
            *(BETA1, BETA2, LOG_BETA1, LOG_BETA2, TARGET, ROUNDED),
        )
        place = start3 + NETWORKS * H2 * OUTPUTS + network * OUTPUTS + j
        adam(
            *(bias, place, of_bias, values_ptr, mean_ptr, square_ptr),
            *(weights_ptr, target_ptr, target_weights_ptr, step, rate, decay, tau),
            *(BETA1, BETA2, LOG_BETA1, LOG_BETA2, TARGET, ROUNDED),
        )


@triton.jit
def mean_of(x_ptr, size, BLOCK: tl.constexpr, SQUARED: tl.constexpr):
    """The mean of `size` numbers, or of their squares, by one program in one order."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + place, mask=place < size, other=0.0)
        total += x * x if SQUARED else x
    return tl.sum(total, 0) / size


@triton.jit
def end_update(rng_ptr, due_ptr, learner):
    """Go on to new random numbers, and count the update; nothing else in the launch reads these two numbers."""
    tl.store(rng_ptr + learner * 2 + 1, tl.load(rng_ptr + learner * 2 + 1) + 1)
    tl.store(due_ptr + learner * 2, tl.load(due_ptr + learner * 2) - 1)


@triton.jit
def _critic_descent_kernel(
    x_ptr,
    h1_ptr,
    h2_ptr,
    d1_ptr,
    d2_ptr,
    error_ptr,
    q_ptr,
    critic_ptr,
    mean_ptr,
    square_ptr,
    weights_ptr,
    target_ptr,
    target_weights_ptr,
    steps_ptr,
    rates_ptr,
    rng_ptr,
    due_ptr,
    metrics_ptr,
    decay,
    tau,
    B,
    TILES: tl.constexpr,
    CRITIC_SIZE: tl.constexpr,
    INPUTS: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    LAST_LAUNCH: tl.constexpr,
    ROUNDED: tl.constexpr,
    TILE: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):
    """A tile of one critic; or the metrics, and the end of the update if no launch of it follows."""
    tile, e = tl.program_id(0), tl.program_id(1)
    learner = tl.program_id(2).to(tl.int64)
    if tl.load(due_ptr + learner * 2 + 1) == 0:
        return
    if tile == TILES:
        if e == 0:
            kept = learner * 2 * B
            tl.store(metrics_ptr + learner * 6, 2.0 * mean_of(error_ptr + kept, 2 * B, BLOCK, True))
            tl.store(metrics_ptr + learner * 6 + 1, mean_of(q_ptr + kept, 2 * B, BLOCK, False))
            if LAST_LAUNCH:
                end_update(rng_ptr, due_ptr, learner)
    else:
        kept, back, first = (learner * 4 + e) * B, (learner * 2 + e) * B, learner * CRITIC_SIZE
        descend(
            *(tile, e, x_ptr + learner * B * INPUTS, INPUTS, h1_ptr + kept * H1, h2_ptr + kept * H2),
            *(d1_ptr + back * H1, d2_ptr + back * H2, error_ptr + back, 2.0 / B),
            *(critic_ptr + first, mean_ptr + first, square_ptr + first, weights_ptr + first),
            *(target_ptr + first, target_weights_ptr + first),
            *(tl.load(steps_ptr + learner * 4), tl.load(rates_ptr + learner * 4), decay, tau, B),
            *(2, INPUTS, H1, H2, 1, BETA1, BETA2, LOG_BETA1, LOG_BETA2, True, ROUNDED),
            *(TILE, BATCH, FIRST, PRECISION, LAST),
        )


@triton.jit
def _actor_descent_kernel(
    x_ptr,
    h1_ptr,
    h2_ptr,
    d1_ptr,
    d2_ptr,
    policy_gradient_ptr,
    value_error_ptr,
    terms_ptr,
    actor_ptr,
    actor_mean_ptr,
    actor_square_ptr,
    actor_weights_ptr,
    value_ptr,
    value_mean_ptr,
    value_square_ptr,
    value_weights_ptr,
    log_alpha_ptr,
    alpha_mean_ptr,
    alpha_square_ptr,
    steps_ptr,
    rates_ptr,
    rng_ptr,
    due_ptr,
    metrics_ptr,
    decay,
    target_entropy,
    B,
    TILES: tl.constexpr,
    ACTOR_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    A: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    LEARNS_ALPHA: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    ROUNDED: tl.constexpr,
    TILE: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):
    """A tile of the actor or of the value network; or alpha, the metrics and the end of the update."""
    tile, network = tl.program_id(0), tl.program_id(1)
    learner = tl.program_id(2).to(tl.int64)
    if tl.load(due_ptr + learner * 2 + 1) == 0:
        return
    x_ptr += learner * B * (O + A)
    kept, back = (learner * 4 + 2 + network) * B, (learner * 2 + network) * B
    steps_ptr += learner * 4
    rates_ptr += learner * 4
    if tile == TILES:
        if network == 0:
            terms_ptr += learner * 2 * B
            metrics_ptr += learner * 6
            log_alpha = tl.load(log_alpha_ptr + learner)
            alpha = exp(log_alpha)
            entropy = -mean_of(terms_ptr + B, B, BLOCK, False)
            tl.store(metrics_ptr + 2, mean_of(terms_ptr, B, BLOCK, False))
            tl.store(metrics_ptr + 3, alpha)
            tl.store(metrics_ptr + 4, entropy)
            if HAS_VALUE:
                tl.store(metrics_ptr + 5, mean_of(value_error_ptr + learner * B, B, BLOCK, True))
            if LEARNS_ALPHA:
                place = learner + tl.arange(0, 1)
                gradient = tl.zeros([1], tl.float32) + alpha * (entropy - target_entropy)
                adam(
                    *(gradient, place, place >= 0, log_alpha_ptr, alpha_mean_ptr, alpha_square_ptr),
                    *(log_alpha_ptr, log_alpha_ptr, log_alpha_ptr, tl.load(steps_ptr + 2), tl.load(rates_ptr + 2)),
                    *(0.0, 0.0, BETA1, BETA2, LOG_BETA1, LOG_BETA2, False, False),
                )
            end_update(rng_ptr, due_ptr, learner)
    elif network == 0:
        first = learner * ACTOR_SIZE
        descend(
            *(tile, 0, x_ptr, O + A, h1_ptr + kept * H1, h2_ptr + kept * H2),
            *(d1_ptr + back * H1, d2_ptr + back * H2, policy_gradient_ptr + learner * B * (2 * A), 1.0),
            *(actor_ptr + first, actor_mean_ptr + first, actor_square_ptr + first, actor_weights_ptr + first),
            *(actor_ptr, actor_ptr, tl.load(steps_ptr + 1), tl.load(rates_ptr + 1), decay, 0.0, B),
            *(1, O, H1, H2, 2 * A, BETA1, BETA2, LOG_BETA1, LOG_BETA2, False, ROUNDED),
            *(TILE, BATCH, FIRST, PRECISION, LAST),
        )
    else:
        first = learner * VALUE_SIZE
        descend(
            *(tile, 0, x_ptr, O + A, h1_ptr + kept * H1, h2_ptr + kept * H2),
            *(d1_ptr + back * H1, d2_ptr + back * H2, value_error_ptr + learner * B, 2.0 / B),
            *(value_ptr + first, value_mean_ptr + first, value_square_ptr + first, value_weights_ptr + first),
            *(value_ptr, value_ptr, tl.load(steps_ptr + 3), tl.load(rates_ptr + 3), decay, 0.0, B),
            *(1, O, H1, H2, 1, BETA1, BETA2, LOG_BETA1, LOG_BETA2, False, ROUNDED),
            *(TILE, BATCH, FIRST, PRECISION, LAST),
        )
