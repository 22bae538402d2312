"""How the stages of a whole update are cut up and launched."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from fastsac_kernels.descent_triton import _actor_descent_kernel, _critic_descent_kernel
from fastsac_kernels.launch import as_bytes, launch, power_of_two
from fastsac_kernels.whole_update import Plan, Scratch, State
from fastsac_kernels.whole_update_triton import (
    _actor_bwd_kernel,
    _critics_fwd_bwd_kernel,
    _next_value_fwd_kernel,
    _sampled_q_fwd_bwd_kernel,
)

#: first layers with at most so many inputs are not rounded to bfloat16
NARROW = 64
#: of the bookkeeping's sums over the batch
SUM_BLOCK = 1024
#: batches from here on fill the chip with programs of twice as many rows, which halves the reading of weights
MANY_ROWS = 4096
#: so many of 8 warps fit; left alone, the assembler spills a few for the sake of a second program beside it
MAX_REGISTERS = 224


class Blocks(NamedTuple):
    """How a stage is cut up."""

    BLOCK_B: int  # rows of a program
    BLOCK_A: int
    STEP: int  # inputs of the first layer that are loaded at a time
    CHUNK: int  # columns of the first layer that are made at a time
    TILE: int  # of weights
    BATCH: int  # rows of the batch that a tile of weights goes through at a time
    num_warps: int
    num_stages: int
    max_registers: int | None


def blocks_of(plan: Plan, device: torch.device) -> Blocks:
    """Return the cut for a device. The interpreter pays by the program, so it gets few."""
    block_a = max(16, power_of_two(plan.action_size))
    step = min(64, max(16, power_of_two(plan.obs_size + plan.action_size)))
    if device.type != "cuda":
        rows = min(64, max(16, power_of_two(plan.batch_size)))
        return Blocks(rows, block_a, step, 64, 128, rows, 1, 1, None)
    wide, exact = max(plan.hidden_sizes) > 256, plan.precision == "fp32"
    many = plan.batch_size >= MANY_ROWS and not wide and not exact
    # without tensor cores a program's rows cost registers and time, with them 16 are the least
    rows = (8 if wide else 16) if exact else 32 if many else 16
    return Blocks(rows, block_a, step, 16 if wide or exact else 32, 32, 64, 8, 2, MAX_REGISTERS)


def _for_weights(plan: Plan, device: torch.device) -> Blocks:
    """Return the cut for tiles of weights, which in float32 spill a little within any limit but the assembler's own."""
    cut = blocks_of(plan, device)
    return cut._replace(max_registers=None) if plan.precision == "fp32" else cut


def precisions_of(plan: Plan) -> dict[str, str]:
    """FIRST, PRECISION and LAST: of the first layer's, the second one's and the last one's products."""
    exact = "ieee" if plan.precision == "fp32" else "tf32"
    wide = plan.obs_size + plan.action_size > NARROW
    first = "bf16" if plan.precision == "bf16" and wide else exact
    hidden = "bf16" if plan.precision == "bf16" else exact
    return {"FIRST": first, "PRECISION": hidden, "LAST": exact}


def _constants(plan: Plan, state: State, cut: Blocks) -> dict[str, Any]:
    """Return all constants that kernels have, by name."""
    beta1, beta2 = plan.betas
    sizes = {"O": plan.obs_size, "A": plan.action_size, "INPUTS": plan.obs_size + plan.action_size}
    sizes |= {"H1": plan.hidden_sizes[0], "H2": plan.hidden_sizes[1], "K": plan.num_action_samples}
    networks = {"ACTOR": state.actor, "CRITIC": state.critic, "VALUE": state.value}
    sizes |= {f"{name}_SIZE": network.values.shape[1] for name, network in networks.items()}
    kinds = {"PATHWISE": plan.estimator == "pathwise", "BASELINE": plan.baseline, "LEARNS_ALPHA": plan.learns_alpha}
    kinds |= {"HAS_VALUE": plan.baseline == "value", "ROUNDED": plan.precision == "bf16"}
    streams = dict(zip(("NEXT_STREAM", "STREAM", "BATCH_STREAM"), plan.streams, strict=True))
    adam = {"BETA1": beta1, "LOG_BETA1": math.log(beta1) if beta1 else -math.inf}
    adam |= {"BETA2": beta2, "LOG_BETA2": math.log(beta2) if beta2 else -math.inf}
    return {**sizes, **kinds, **streams, **adam, **precisions_of(plan), **cut._asdict(), "BLOCK": SUM_BLOCK}


def _launch(
    kernel: Any, grid: tuple[int, int], *arguments: Any, plan: Plan, state: State, cut: Blocks, **more: Any
) -> None:
    """Launch a kernel for every learner, with the constants that it has."""
    constants = _constants(plan, state, cut) | more
    own = {name: constants[name] for name in kernel.arg_names if name in constants}
    options: Any = {"num_warps": cut.num_warps, "num_stages": cut.num_stages, "max_registers": cut.max_registers}
    launch(kernel, (*grid, plan.num_learners), *arguments, **own, **options)


def tiles_of(plan: Plan, inputs: int, outputs: int, tile: int) -> int:
    """Return how many tiles a network's weights make."""
    first, second = (triton.cdiv(width, tile) for width in plan.hidden_sizes)
    narrow = min(64, max(16, power_of_two(outputs)))
    return int(first * second + triton.cdiv(1 + inputs, tile) * first + second * triton.cdiv(outputs, narrow))


def next_value(state: State, scratch: Scratch, plan: Plan, last: bool) -> None:
    """Stage 0."""
    cut = blocks_of(plan, state.obs.device)
    _launch(
        _next_value_fwd_kernel,
        (triton.cdiv(plan.batch_size, cut.BLOCK_B), 2),
        *(state.obs, state.action, state.reward, as_bytes(state.terminated), state.queue, state.span, state.rng),
        state.due,
        *(state.actor.values, state.actor.weights, state.target.values, state.target.weights, state.steps),
        *(scratch.x, scratch.reward, scratch.discount, scratch.next_q, scratch.next_log_prob, scratch.h2),
        *(state.queue.shape[1], state.obs.shape[2], plan.batch_size, plan.gamma),
        plan=plan,
        state=state,
        cut=cut,
    )


def critics(state: State, scratch: Scratch, plan: Plan, last: bool) -> None:
    """Stage 1: also the actor's and V's forward passes, if it is the actor's turn."""
    cut = blocks_of(plan, state.obs.device)
    _launch(
        _critics_fwd_bwd_kernel,
        (triton.cdiv(plan.batch_size, cut.BLOCK_B), 2 if last else 3 + (plan.baseline == "value")),
        *(state.critic.values, state.critic.weights, state.actor.values, state.actor.weights),
        *(state.value.values, state.value.weights, state.log_alpha, state.due),
        *(scratch.x, scratch.reward, scratch.discount, scratch.next_q, scratch.next_log_prob),
        *(scratch.h1, scratch.h2, scratch.d1, scratch.d2, scratch.q, scratch.error, scratch.policy, scratch.value),
        plan.batch_size,
        plan=plan,
        state=state,
        cut=cut,
    )


def critics_step(state: State, scratch: Scratch, plan: Plan, last: bool) -> None:
    """Stage 2."""
    cut = _for_weights(plan, state.obs.device)
    tiles = tiles_of(plan, plan.obs_size + plan.action_size, 1, cut.TILE)
    _launch(
        _critic_descent_kernel,
        (tiles + 1, 2),
        *(scratch.x, scratch.h1, scratch.h2, scratch.d1, scratch.d2, scratch.error, scratch.q),
        *(*state.critic, state.target.values, state.target.weights),
        *(state.steps, state.rates, state.rng, state.due, state.metrics, plan.weight_decay, plan.tau, plan.batch_size),
        plan=plan,
        state=state,
        cut=cut,
        TILES=tiles,
        LAST_LAUNCH=last,
    )


def sampled_q(state: State, scratch: Scratch, plan: Plan, last: bool) -> None:
    """Stage 3."""
    cut = blocks_of(plan, state.obs.device)
    if cut.BLOCK_B < 16:  # with 8 warps the assembler aims at fewer registers than it needs
        cut = cut._replace(num_warps=4)
    _launch(
        _sampled_q_fwd_bwd_kernel,
        (triton.cdiv(plan.batch_size, cut.BLOCK_B), 2 * plan.num_action_samples),
        *(state.critic.values, state.critic.weights, state.rng, state.due, state.steps),
        *(scratch.x, scratch.signs, scratch.policy, scratch.log_prob, scratch.sampled_q, scratch.q_gradient),
        plan.batch_size,
        plan=plan,
        state=state,
        cut=cut,
    )


def actor(state: State, scratch: Scratch, plan: Plan, last: bool) -> None:
    """Stage 4."""
    cut = blocks_of(plan, state.obs.device)
    _launch(
        _actor_bwd_kernel,
        (triton.cdiv(plan.batch_size, cut.BLOCK_B), 1 + (plan.baseline == "value")),
        *(state.actor.values, state.actor.weights, state.value.values, state.value.weights, state.log_alpha, state.rng),
        state.due,
        *(scratch.h1, scratch.h2, scratch.d1, scratch.d2, scratch.policy, scratch.log_prob, scratch.sampled_q),
        *(scratch.q_gradient, scratch.value, scratch.value_error, scratch.policy_gradient, scratch.terms),
        plan.batch_size,
        plan=plan,
        state=state,
        cut=cut,
    )


def actor_step(state: State, scratch: Scratch, plan: Plan, last: bool) -> None:
    """Stage 5."""
    cut = _for_weights(plan, state.obs.device)
    tiles = max(tiles_of(plan, plan.obs_size, outputs, cut.TILE) for outputs in (1, 2 * plan.action_size))
    _launch(
        _actor_descent_kernel,
        (tiles + 1, 1 + (plan.baseline == "value")),
        *(scratch.x, scratch.h1, scratch.h2, scratch.d1, scratch.d2),
        *(scratch.policy_gradient, scratch.value_error, scratch.terms),
        *(*state.actor, *state.value, state.log_alpha, state.alpha_mean, state.alpha_square),
        *(state.steps, state.rates, state.rng, state.due, state.metrics),
        *(plan.weight_decay, plan.target_entropy, plan.batch_size),
        plan=plan,
        state=state,
        cut=cut,
        TILES=tiles,
    )


#: by stage
LAUNCHERS = (next_value, critics, critics_step, sampled_q, actor, actor_step)
