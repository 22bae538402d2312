"""The kernels of a whole update of SAC over rows of the batch (see `whole_update.py`); `descent_triton` has the others.

The last axis of every grid counts independent learners. A program reads and writes its own learner's part of each
tensor only, so a learner's numbers do not depend on how many there are. One that has made all updates that it is due
is left alone: the first stage decides that, and the others go by it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsac_kernels.philox_triton import normal_tile
from fastsac_kernels.replay_gather_triton import next_row, queued, uniform_position
from fastsac_kernels.squashed_gaussian_triton import HALF_LOG_2PI, exp, squash
from fastsac_kernels.two_layer_triton import (
    first_gradient,
    go_back,
    head_backward,
    hidden_layers,
    keep_second,
    last_row,
    load_second,
    policy_outputs,
    product,
)

#: of networks.py's bounded log_std
LOG_STD_MIDDLE: tl.constexpr = tl.constexpr(-1.5)
LOG_STD_HALF_RANGE: tl.constexpr = tl.constexpr(3.5)


@triton.jit
def smaller(first, second):
    """The smaller of two numbers; NaN if one of them is."""
    return tl.minimum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def policy(
    values_ptr,
    weights_ptr,
    x_ptr,
    x_start,
    live,
    h1_ptr,
    h2_ptr,
    kept_row,
    O: tl.constexpr,  # noqa: E741
    A: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    KEEP: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_A: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):
    """Mean and raw log_std [rows, BLOCK_A]; the second hidden layer is left in `h2_ptr`."""
    h2 = hidden_layers(
        *(values_ptr, weights_ptr, 0, x_ptr, x_start, live, x_start, h1_ptr, kept_row),
        *(1, O, H1, H2, 0, KEEP, STEP, CHUNK, FIRST, PRECISION),
    )
    keep_second(h2, h2_ptr, kept_row, live, H2)
    tl.debug_barrier()  # other threads have stored what is read again
    return policy_outputs(values_ptr, h2_ptr, kept_row, live, O, H1, H2, A, BLOCK_A, CHUNK, LAST)


@triton.jit
def sample(mean, raw, rng_ptr, stream, noise_row, live, A: tl.constexpr, BLOCK_A: tl.constexpr):
    """A sample of the policy: noise, log_std, sigma, action [rows, BLOCK_A], 1 - action^2, log_prob [rows]."""
    used = live[:, None] & (tl.arange(0, BLOCK_A) < A)[None, :]
    log_std = LOG_STD_MIDDLE + LOG_STD_HALF_RANGE * squash(raw)[0]
    sigma = exp(log_std)
    eps = normal_tile(rng_ptr, stream, noise_row, BLOCK_A)
    action, slope, log_slope = squash(mean + sigma * eps)
    log_prob = -0.5 * eps * eps - log_std - HALF_LOG_2PI - log_slope
    log_prob = tl.sum(tl.where(used, log_prob, 0.0), 1)
    return eps, log_std, sigma, tl.where(used, action, 0.0), slope, log_prob


@triton.jit
def _next_value_fwd_kernel(
    obs_ptr,
    action_ptr,
    reward_ptr,
    terminated_ptr,
    queue_ptr,
    span_ptr,
    rng_ptr,
    due_ptr,
    actor_ptr,
    actor_weights_ptr,
    target_ptr,
    target_weights_ptr,
    steps_ptr,
    x_ptr,
    reward_out_ptr,
    discount_ptr,
    next_q_ptr,
    next_log_prob_ptr,
    h2_ptr,
    length,
    N,
    B,
    gamma,
    ACTOR_SIZE: tl.constexpr,
    CRITIC_SIZE: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    A: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    BATCH_STREAM: tl.constexpr,
    NEXT_STREAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):
    """Draw the batch, sample the next actions, and let one target critic value them."""
    e = tl.program_id(1)
    learner = tl.program_id(2).to(tl.int64)
    due = tl.load(due_ptr + learner * 2)
    if (tl.program_id(0) == 0) & (e == 0):
        tl.store(due_ptr + learner * 2 + 1, (due > 0).to(tl.int64))
    if due <= 0:
        return
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < B
    rng_ptr += learner * 2
    ring = learner * length
    size = tl.load(span_ptr + learner * 2 + 1)
    position = uniform_position(rng_ptr, BATCH_STREAM, b, size)
    first = tl.load(span_ptr + learner * 2)
    index = queued(queue_ptr + ring, first, position, live, length)
    following = ring + next_row(index, N, length)
    index += ring
    row = learner * B + b
    if e == 0:
        x_row = row * (O + A)
        for start in range(0, O, STEP):
            column = start + tl.arange(0, STEP)
            inside = live[:, None] & (column < O)[None, :]
            obs = tl.load(obs_ptr + (index * O)[:, None] + column[None, :], mask=inside)
            tl.store(x_ptr + x_row[:, None] + column[None, :], obs, mask=inside)
        column = tl.arange(0, BLOCK_A)
        inside = live[:, None] & (column < A)[None, :]
        action = tl.load(action_ptr + (index * A)[:, None] + column[None, :], mask=inside)
        tl.store(x_ptr + x_row[:, None] + O + column[None, :], action, mask=inside)
        tl.store(reward_out_ptr + row, tl.load(reward_ptr + index, mask=live), mask=live)
        ended = tl.load(terminated_ptr + index, mask=live, other=1)
        tl.store(discount_ptr + row, tl.where(ended != 0, 0.0, gamma), mask=live)
        if tl.program_id(0) == 0:
            count = tl.load(steps_ptr + learner * 4)
            tl.store(steps_ptr + learner * 4, count + 1.0)
    x_start = following * O
    mean, raw = policy(
        *(actor_ptr + learner * ACTOR_SIZE, actor_weights_ptr + learner * ACTOR_SIZE),
        *(obs_ptr, x_start, live, obs_ptr, h2_ptr, (learner * 4 + e) * B + b),
        *(O, A, H1, H2, "nothing", STEP, CHUNK, BLOCK_A, FIRST, PRECISION, LAST),
    )
    drawn = sample(mean, raw, rng_ptr, NEXT_STREAM, b, live, A, BLOCK_A)
    if e == 0:
        tl.store(next_log_prob_ptr + row, drawn[5], mask=live)
    values_ptr = target_ptr + learner * CRITIC_SIZE
    h2 = hidden_layers(
        *(values_ptr, target_weights_ptr + learner * CRITIC_SIZE, e),
        *(obs_ptr, x_start, live, drawn[3], obs_ptr, x_start),
        *(2, O + A, H1, H2, A, "nothing", STEP, CHUNK, FIRST, PRECISION),
    )
    weight, bias = last_row(values_ptr, e, 2, O + A, H1, H2)
    q = tl.sum(h2 * weight[None, :], 1) + bias
    tl.store(next_q_ptr + (learner * 2 + e) * B + b, q, mask=live)


@triton.jit
def regress(
    h2,
    error,
    scale,
    values_ptr,
    weights_ptr,
    network,
    h1_ptr,
    kept_row,
    d1_ptr,
    d2_ptr,
    d_row,
    live,
    NETWORKS: tl.constexpr,
    INPUTS: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go back from scale * error, the gradient of a network's one output, to its hidden layers."""
    weight, _ = last_row(values_ptr, network, NETWORKS, INPUTS, H1, H2)
    d2 = tl.where(h2 > 0.0, (scale * error)[:, None] * weight[None, :], 0.0)
    keep_second(d2, d2_ptr, d_row, live, H2)
    go_back(
        *(d2, weights_ptr, network, h1_ptr, kept_row, d1_ptr, d_row, live),
        *(NETWORKS, INPUTS, H1, H2, CHUNK, PRECISION),
    )


@triton.jit
def _critics_fwd_bwd_kernel(
    critic_ptr,
    critic_weights_ptr,
    actor_ptr,
    actor_weights_ptr,
    value_ptr,
    value_weights_ptr,
    log_alpha_ptr,
    due_ptr,
    x_ptr,
    reward_ptr,
    discount_ptr,
    next_q_ptr,
    next_log_prob_ptr,
    h1_ptr,
    h2_ptr,
    d1_ptr,
    d2_ptr,
    q_ptr,
    error_ptr,
    policy_ptr,
    value_out_ptr,
    B,
    CRITIC_SIZE: tl.constexpr,
    ACTOR_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    A: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):
    """One critic: q, its error, and the gradients of its hidden layers. Or the actor at obs; or V there."""
    job = tl.program_id(1)
    learner = tl.program_id(2).to(tl.int64)
    if tl.load(due_ptr + learner * 2 + 1) == 0:
        return
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < B
    row = learner * B + b
    kept_row = (learner * 4 + job) * B + b
    x_start = row * (O + A)
    if job < 2:
        values_ptr, weights_ptr = critic_ptr + learner * CRITIC_SIZE, critic_weights_ptr + learner * CRITIC_SIZE
        h2 = hidden_layers(
            *(values_ptr, weights_ptr, job, x_ptr, x_start, live, b, h1_ptr, kept_row),
            *(2, O + A, H1, H2, 0, "values", STEP, CHUNK, FIRST, PRECISION),
        )
        keep_second(h2, h2_ptr, kept_row, live, H2)
        weight, bias = last_row(values_ptr, job, 2, O + A, H1, H2)
        q = tl.sum(h2 * weight[None, :], 1) + bias
        alpha = exp(tl.load(log_alpha_ptr + learner))
        next_ptr = next_q_ptr + learner * 2 * B + b
        next_q = smaller(tl.load(next_ptr, mask=live, other=0.0), tl.load(next_ptr + B, mask=live, other=0.0))
        next_value = next_q - alpha * tl.load(next_log_prob_ptr + row, mask=live, other=0.0)
        discount = tl.load(discount_ptr + row, mask=live, other=0.0)
        reward = tl.load(reward_ptr + row, mask=live, other=0.0)
        error = q - (reward + tl.where(discount == 0.0, 0.0, discount * next_value))
        d_row = (learner * 2 + job) * B + b
        tl.store(q_ptr + d_row, q, mask=live)
        tl.store(error_ptr + d_row, error, mask=live)
        tl.debug_barrier()  # other threads have stored what is read again
        regress(
            *(h2, error, 2.0 / B, values_ptr, weights_ptr, job, h1_ptr, kept_row, d1_ptr, d2_ptr, d_row, live),
            *(2, O + A, H1, H2, CHUNK, PRECISION),
        )
    elif job == 2:
        mean, raw = policy(
            *(actor_ptr + learner * ACTOR_SIZE, actor_weights_ptr + learner * ACTOR_SIZE),
            *(x_ptr, x_start, live, h1_ptr, h2_ptr, kept_row),
            *(O, A, H1, H2, "values", STEP, CHUNK, BLOCK_A, FIRST, PRECISION, LAST),
        )
        action = tl.arange(0, BLOCK_A)
        used = live[:, None] & (action < A)[None, :]
        place = policy_ptr + row[:, None] * (2 * A) + action[None, :]
        tl.store(place, mean, mask=used)
        tl.store(place + A, raw, mask=used)
    elif HAS_VALUE:
        values_ptr = value_ptr + learner * VALUE_SIZE
        h2 = hidden_layers(
            *(values_ptr, value_weights_ptr + learner * VALUE_SIZE, 0),
            *(x_ptr, x_start, live, b, h1_ptr, kept_row),
            *(1, O, H1, H2, 0, "values", STEP, CHUNK, FIRST, PRECISION),
        )
        keep_second(h2, h2_ptr, kept_row, live, H2)
        weight, bias = last_row(values_ptr, 0, 1, O, H1, H2)
        tl.store(value_out_ptr + row, tl.sum(h2 * weight[None, :], 1) + bias, mask=live)


@triton.jit
def _sampled_q_fwd_bwd_kernel(
    critic_ptr,
    critic_weights_ptr,
    rng_ptr,
    due_ptr,
    steps_ptr,
    x_ptr,
    signs_ptr,
    policy_ptr,
    log_prob_ptr,
    sampled_q_ptr,
    q_gradient_ptr,
    B,
    CRITIC_SIZE: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    A: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    K: tl.constexpr,
    PATHWISE: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sample an action, and let one critic value it; pathwise, also go back to the action."""
    e, k = tl.program_id(1) % 2, tl.program_id(1) // 2
    learner = tl.program_id(2).to(tl.int64)
    if tl.load(due_ptr + learner * 2 + 1) == 0:
        return
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < B
    row = learner * B + b
    mean, raw = load_policy(policy_ptr, row, live, A, BLOCK_A)
    drawn = sample(mean, raw, rng_ptr + learner * 2, STREAM, k * B + b, live, A, BLOCK_A)
    if e == 0:
        tl.store(log_prob_ptr + (learner * K + k) * B + b, drawn[5], mask=live)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        place = steps_ptr + learner * 4 + 1 + tl.arange(0, 4)
        mask = tl.arange(0, 4) < 3
        tl.store(place, tl.load(place, mask=mask, other=0.0) + 1.0, mask=mask)
    values_ptr, weights_ptr = critic_ptr + learner * CRITIC_SIZE, critic_weights_ptr + learner * CRITIC_SIZE
    sampled_row = ((learner * 2 + e) * K + k) * B + b
    h2 = hidden_layers(
        *(values_ptr, weights_ptr, e, x_ptr, row * (O + A), live, drawn[3], signs_ptr, sampled_row),
        *(2, O + A, H1, H2, A, "signs" if PATHWISE else "nothing", STEP, CHUNK, FIRST, PRECISION),
    )
    weight, bias = last_row(values_ptr, e, 2, O + A, H1, H2)
    tl.store(sampled_q_ptr + sampled_row, tl.sum(h2 * weight[None, :], 1) + bias, mask=live)
    if PATHWISE:
        tl.debug_barrier()  # other threads have stored the signs
        d2 = tl.where(h2 > 0.0, tl.zeros_like(h2) + weight[None, :], 0.0)
        action = tl.arange(0, BLOCK_A)
        total = tl.zeros([BLOCK_B, BLOCK_A], tl.float32)
        for start in range(0, H1, CHUNK):
            column = start + tl.arange(0, CHUNK)
            d1 = first_gradient(
                *(weights_ptr, e, d2, signs_ptr, sampled_row, live, column),
                *(2, O + A, H1, H2, PRECISION),
            )
            first_ptr = values_ptr if FIRST != "bf16" else weights_ptr
            place = e * ((1 + O + A) * H1) + (1 + O + action)[:, None] * H1 + column[None, :]
            weight1 = tl.load(first_ptr + place, mask=(action < A)[:, None], other=0.0)
            total = product(d1, tl.trans(weight1), total, FIRST)
        used = live[:, None] & (action < A)[None, :]
        tl.store(q_gradient_ptr + sampled_row[:, None] * A + action[None, :], total, mask=used)


@triton.jit
def load_policy(policy_ptr, row, live, A: tl.constexpr, BLOCK_A: tl.constexpr):
    """Mean and raw log_std [rows, BLOCK_A], zero behind A."""
    action = tl.arange(0, BLOCK_A)
    used = live[:, None] & (action < A)[None, :]
    place = policy_ptr + row[:, None] * (2 * A) + action[None, :]
    return tl.load(place, mask=used, other=0.0), tl.load(place + A, mask=used, other=0.0)


@triton.jit
def sampled_f(log_prob_ptr, sampled_q_ptr, learner, k, b, live, alpha, B, K: tl.constexpr):
    """Of sample k: f = alpha * log_prob - min_E q, log_prob, and both critics' q, each [rows]."""
    log_prob = tl.load(log_prob_ptr + (learner * K + k) * B + b, mask=live, other=0.0)
    place = sampled_q_ptr + (learner * 2 * K + k) * B + b
    first, second = tl.load(place, mask=live, other=0.0), tl.load(place + K * B, mask=live, other=0.0)
    return alpha * log_prob - smaller(first, second), log_prob, first, second


@triton.jit
def _actor_bwd_kernel(
    actor_ptr,
    actor_weights_ptr,
    value_ptr,
    value_weights_ptr,
    log_alpha_ptr,
    rng_ptr,
    due_ptr,
    h1_ptr,
    h2_ptr,
    d1_ptr,
    d2_ptr,
    policy_ptr,
    log_prob_ptr,
    sampled_q_ptr,
    q_gradient_ptr,
    value_out_ptr,
    value_error_ptr,
    policy_gradient_ptr,
    terms_ptr,
    B,
    ACTOR_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    A: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    K: tl.constexpr,
    PATHWISE: tl.constexpr,
    BASELINE: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):
    """The estimator's gradient, and the actor's way back from it; or the value network's."""
    learner = tl.program_id(2).to(tl.int64)
    if tl.load(due_ptr + learner * 2 + 1) == 0:
        return
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < B
    row = learner * B + b
    rows_of_two = learner * 2 * B + b
    alpha = exp(tl.load(log_alpha_ptr + learner))
    kept_row = (learner * 4 + 2 + tl.program_id(1)) * B + b
    d_row = rows_of_two + tl.program_id(1) * B
    if tl.program_id(1) == 1:
        soft_value = tl.zeros([BLOCK_B], tl.float32)
        for k in range(K):
            soft_value -= sampled_f(log_prob_ptr, sampled_q_ptr, learner, k, b, live, alpha, B, K)[0] * (1.0 / K)
        error = tl.load(value_out_ptr + row, mask=live, other=0.0) - soft_value
        tl.store(value_error_ptr + row, error, mask=live)
        h2 = load_second(h2_ptr, kept_row, live, H2)
        regress(
            *(h2, error, 2.0 / B, value_ptr + learner * VALUE_SIZE, value_weights_ptr + learner * VALUE_SIZE, 0),
            *(h1_ptr, kept_row, d1_ptr, d2_ptr, d_row, live, 1, O, H1, H2, CHUNK, PRECISION),
        )
    else:
        action_column = tl.arange(0, BLOCK_A)
        used = live[:, None] & (action_column < A)[None, :]
        mean, raw = load_policy(policy_ptr, row, live, A, BLOCK_A)
        baseline = tl.zeros([BLOCK_B], tl.float32)
        if BASELINE == "constant":
            baseline -= alpha
        if BASELINE == "value":
            baseline -= tl.load(value_out_ptr + row, mask=live, other=0.0)
        if BASELINE == "loo":  # beside the first sample's f: no two large numbers are subtracted
            first_f = sampled_f(log_prob_ptr, sampled_q_ptr, learner, 0, b, live, alpha, B, K)[0]
            for k in range(1, K):
                baseline += sampled_f(log_prob_ptr, sampled_q_ptr, learner, k, b, live, alpha, B, K)[0] - first_f
        grad_mean = tl.zeros([BLOCK_B, BLOCK_A], tl.float32)
        grad_log_std = tl.zeros([BLOCK_B, BLOCK_A], tl.float32)
        loss = tl.zeros([BLOCK_B], tl.float32)
        total_log_prob = tl.zeros([BLOCK_B], tl.float32)
        for k in range(K):
            f, log_prob, first, second = sampled_f(log_prob_ptr, sampled_q_ptr, learner, k, b, live, alpha, B, K)
            eps, log_std, sigma, action, slope, _ = sample(
                mean, raw, rng_ptr + learner * 2, STREAM, k * B + b, live, A, BLOCK_A
            )
            total_log_prob += log_prob
            if PATHWISE:
                place = q_gradient_ptr + ((learner * 2 * K + k) * B + b)[:, None] * A + action_column[None, :]
                of_first = tl.load(place, mask=used, other=0.0)
                of_second = tl.load(place + K * B * A, mask=used, other=0.0)
                share = tl.where(first < second, 1.0, tl.where(second < first, 0.0, 0.5))[:, None]
                grad_u = 2.0 * alpha * action - (share * of_first + (1.0 - share) * of_second) * slope
                grad_mean += grad_u
                grad_log_std += grad_u * (sigma * eps) - alpha
                loss += f
            else:
                advantage = f - baseline
                if BASELINE == "loo":
                    advantage = (K * (f - first_f) - baseline) * (1.0 / (K - 1))
                log_normal = tl.sum(tl.where(used, -0.5 * eps * eps - log_std - HALF_LOG_2PI, 0.0), 1)
                grad_mean += advantage[:, None] * tl.div_rn(eps, sigma)
                grad_log_std += advantage[:, None] * (eps * eps - 1.0)
                loss += log_normal * advantage
        scale = 1.0 / (K * B)
        grad_mean = tl.where(used, grad_mean * scale, 0.0)
        grad_raw = tl.where(used, grad_log_std * (LOG_STD_HALF_RANGE * scale) * squash(raw)[1], 0.0)
        place = policy_gradient_ptr + row[:, None] * (2 * A) + action_column[None, :]
        tl.store(place, grad_mean, mask=used)
        tl.store(place + A, grad_raw, mask=used)
        tl.store(terms_ptr + rows_of_two, loss * (1.0 / K), mask=live)
        tl.store(terms_ptr + rows_of_two + B, total_log_prob * (1.0 / K), mask=live)
        head_backward(
            *(actor_ptr + learner * ACTOR_SIZE, grad_mean, grad_raw, h2_ptr, kept_row, d2_ptr, d_row, live),
            *(O, H1, H2, A, CHUNK, LAST),
        )
        tl.debug_barrier()  # other threads have stored what is read again
        d2 = load_second(d2_ptr, d_row, live, H2)
        go_back(
            *(d2, actor_weights_ptr + learner * ACTOR_SIZE, 0, h1_ptr, kept_row, d1_ptr, d_row, live),
            *(1, O, H1, H2, CHUNK, PRECISION),
        )
