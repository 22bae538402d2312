"""A whole update of SAC in six launches: four over rows of the batch, two over tiles of the weights.

For networks of two hidden layers with ReLU, twin critics, B states and K action samples, the stages are::

    0  next value       draw the batch; a', log_prob' from the policy at next_obs; target_q_e(next_obs, a')
    1  critics          q_e, error_e = q_e - (reward + discount (min_E target_q - alpha log_prob')), back to the layers;
                        beside them mean and log_std at obs, and V there, which do not depend on the critics
    2  critics' step    dW = x^T d tile by tile, Adam, target += tau (critic - target)
    3  sampled q        K samples, q_e there; pathwise: d q_e / d action
    4  actor            d mean and d log_std by the estimator, and back to the layers; V's error, and back
    5  actor's step     dW, Adam; alpha; the random numbers' offset

What is computed in each is written out in `fastsac.learner.fused`, the estimators' gradients in `fastsac.estimators`;
the reference is `fastsac.learner.Learner`. Random numbers are those that `philox_normal` and `replay_gather` draw from
the same generator. Every tensor has a leading axis of L independent learners.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastsac_kernels.launch import HAS_TRITON, NO_TRITON

NEXT_VALUE, CRITICS, CRITICS_STEP, SAMPLED_Q, ACTOR, ACTOR_STEP = STAGES = range(6)
#: indices of the learning rates and of Adam's step counts
CRITIC_ADAM, ACTOR_ADAM, ALPHA_ADAM, VALUE_ADAM = range(4)
METRICS = ("critic_loss", "q", "actor_loss", "alpha", "entropy", "value_loss")


class Network(NamedTuple):
    """A network's flat buffers (see `fastsac.learner.flat`), each [L, n] with its own n."""

    values: Tensor  # float32
    mean: Tensor  # Adam's moments
    square: Tensor
    weights: Tensor  # what products take: `values` themselves, or a copy in bfloat16


class State(NamedTuple):
    """All that an update reads and writes. Contiguous; float32 where nothing else is said."""

    obs: Tensor  # [L, T, N, O], the ring of the replay
    action: Tensor  # [L, T, N, A]
    reward: Tensor  # [L, T, N]
    terminated: Tensor  # [L, T, N] bool
    queue: Tensor  # [L, T N] int64
    span: Tensor  # [L, 2] int64
    rng: Tensor  # [L, 2] int64, seed and offset
    due: Tensor  # [L, 2] int64: updates still to make, and whether the present one is; without, none is
    log_alpha: Tensor  # [L]
    alpha_mean: Tensor  # [L]
    alpha_square: Tensor  # [L]
    steps: Tensor  # [L, 4], of each Adam
    rates: Tensor  # [L, 4]
    metrics: Tensor  # [L, 6], see METRICS
    actor: Network
    critic: Network
    target: Network  # without moments: those are the critics'
    value: Network  # the actor's, where there is no value network


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is the same in every update: sizes, hyper-parameters, and the streams of the generator."""

    num_learners: int
    obs_size: int
    action_size: int
    hidden_sizes: tuple[int, int]  # multiples of 64
    batch_size: int
    num_action_samples: int
    estimator: Literal["pathwise", "score"]
    baseline: Literal["none", "constant", "loo", "value"]
    learns_alpha: bool
    target_entropy: float
    gamma: float
    tau: float
    betas: tuple[float, float]
    weight_decay: float
    precision: Literal["fp32", "tf32", "bf16"]
    streams: tuple[int, int, int]  # next action, action, batch


class Scratch(NamedTuple):
    """What one stage leaves for the next ones."""

    x: Tensor  # [L, B, O + A], the batch's obs and action
    reward: Tensor  # [L, B]
    discount: Tensor  # [L, B], gamma or 0
    next_q: Tensor  # [L, 2, B]
    next_log_prob: Tensor  # [L, B]
    h1: Tensor  # [L, 4, B, H1]: of both critics, of the actor, and of V
    h2: Tensor  # [L, 4, B, H2]
    d1: Tensor  # [L, 2, B, H1]: of both critics, later of the actor and of V
    d2: Tensor  # [L, 2, B, H2]
    q: Tensor  # [L, 2, B]
    error: Tensor  # [L, 2, B]
    signs: Tensor  # [L, 2, K, B, H1] int8: where the critics' first layer is above zero
    policy: Tensor  # [L, B, 2 A], mean and raw log_std
    policy_gradient: Tensor
    log_prob: Tensor  # [L, K, B]
    sampled_q: Tensor  # [L, 2, K, B]
    q_gradient: Tensor  # [L, 2, K, B, A]
    value: Tensor  # [L, B]
    value_error: Tensor  # [L, B]
    terms: Tensor  # [L, 2, B]: of the actor's loss, and log_prob


def make_scratch(plan: Plan, device: torch.device | str) -> Scratch:
    """Return the memory, which holds NaN: nothing is read that no stage has written."""
    learners, batch, samples = plan.num_learners, plan.batch_size, plan.num_action_samples
    first, second = plan.hidden_sizes
    size, kept = plan.action_size, torch.bfloat16 if plan.precision == "bf16" else torch.float32
    pathwise = plan.estimator == "pathwise"

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((learners, *shape), float("nan"), dtype=dtype, device=device)

    return Scratch(
        x=empty(batch, plan.obs_size + size),
        reward=empty(batch),
        discount=empty(batch),
        next_q=empty(2, batch),
        next_log_prob=empty(batch),
        h1=empty(4, batch, first, dtype=kept),
        h2=empty(4, batch, second, dtype=kept),
        d1=empty(2, batch, first, dtype=kept),
        d2=empty(2, batch, second, dtype=kept),
        q=empty(2, batch),
        error=empty(2, batch),
        signs=torch.zeros(learners, 2, samples * pathwise, batch, first, dtype=torch.int8, device=device),
        policy=empty(batch, 2 * size),
        policy_gradient=empty(batch, 2 * size),
        log_prob=empty(samples, batch),
        sampled_q=empty(2, samples, batch),
        q_gradient=empty(2, samples * pathwise, batch, size),
        value=empty(batch),
        value_error=empty(batch),
        terms=empty(2, batch),
    )


def run_stage(stage: int, state: State, scratch: Scratch, plan: Plan, last: bool = False) -> None:
    """Launch one stage.

    Args:
        stage: of STAGES.
        state: of the learners.
        scratch: of `make_scratch`.
        plan: of the update.
        last: whether no stage of this update follows CRITICS_STEP: it is not the actor's turn.

    Raises:
        RuntimeError: if Triton is not installed.
    """
    if not HAS_TRITON:
        raise RuntimeError(NO_TRITON)
    tensors = [*state[: len(state) - 4], *state.actor, *state.critic, *state.target, *state.value, *scratch]
    _stage(tensors, stage, last, _as_text(plan))


@functools.cache
def _as_text(plan: Plan) -> str:
    return json.dumps(dataclasses.asdict(plan))


@functools.cache
def _from_text(text: str) -> Plan:
    values: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(text).items()}
    return Plan(**values)


# An operator, so that a launch is one call for whoever counts or records calls; it takes no dataclass.
@torch.library.custom_op("fastsac_kernels::whole_update_stage", mutates_args=("tensors",))
def _stage(tensors: list[Tensor], stage: int, last: bool, plan: str) -> None:
    from fastsac_kernels import whole_update_launch

    number, of_network = len(State._fields) - 4, len(Network._fields)
    networks: Any = (Network(*tensors[number + i * of_network :][:of_network]) for i in range(4))
    small: Any = tensors[:number]
    state = State(*small, *networks)
    scratch = Scratch(*tensors[number + 4 * of_network :])
    whole_update_launch.LAUNCHERS[stage](state, scratch, _from_text(plan), last)
