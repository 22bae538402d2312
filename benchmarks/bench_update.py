"""Times each estimator: the actor's step alone, and a whole update (hidden layers 256 and 256, O = 17).

    make bench ARGS="-k 'bench_update and B256-A6'"

The engines: `reference` is eager PyTorch; `compile` the same learner with its losses, networks included, compiled by
torch.compile (backward passes too; Adam stays eager and is fused anyway); `graphed` is a CUDA graph with the Triton
kernels, in which the actor's step alone is recorded as a graph too. An actor's step draws no batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.measure import Call, capture, synchronize, wall_quantiles
from benchmarks.op_cases import (
    ACTIONS,
    ACTOR,
    BATCHES,
    ESTIMATORS,
    GPU_UPDATES,
    MAIN,
    NUM_ENVS,
    OBS_SIZE,
    TABLE_SIZES,
    UPDATE,
)
from fastsac.config import Config
from fastsac.learner import Learner, make_learner, set_up_torch
from fastsac.replay import Replay

pytestmark = pytest.mark.filterwarnings("ignore")
CUDA = torch.cuda.is_available()
ENGINES = ("reference", "compile", "graphed", "fused", "fused-bf16")
SIZES = [(256, 6), *((256, a) for a in ACTIONS if a != 6), (65536, 6), (65536, 32), (4096, 6)]
SIZES += [(b, a) for b in BATCHES for a in ACTIONS if (b, a) not in SIZES]
#: updates a call, as when 8 environments were stepped; the graphed engine records as many
UPDATES_PER_CALL = 8
TRANSITIONS, WRITERS = 2**16, 256


class Case(NamedTuple):
    """A learner at one size."""

    estimator: str
    baseline: str
    K: int
    B: int
    A: int
    engine: str

    @property
    def id(self) -> str:
        parts = (self.estimator, self.baseline if self.baseline != "auto" else None, f"K{self.K}")
        return "-".join([part for part in parts if part] + [f"B{self.B}", f"A{self.A}", self.engine])


CASES = [Case(*estimator, *size, engine) for size in SIZES for estimator in ESTIMATORS for engine in ENGINES]
if CUDA:  # what the target compares, before a time budget may end; torch.compile's minutes last
    CASES.sort(key=lambda case: (case.engine == "compile", case.B != 256))
#: the fused engine has no actor's step apart from the update: the actor's forward pass is shared with the critics' step
STEPS = [(case, what) for case in CASES for what in (ACTOR, UPDATE) if what == UPDATE or "fused" not in case.engine]


def why_not(case: Case, what: str, on_gpu: bool = CUDA) -> str | None:
    """Return the reason if the step would take too long for what it tells."""
    main = case[:3] in MAIN
    if case.engine == "compile" and (case.B, case.A) != (256, 6):
        return "torch.compile of a learner is measured at B = 256, A = 6 only"
    if not on_gpu and case.B == 65536 and (case.A != 6 or not main):
        return "on a CPU B = 65536 is measured for A = 6, pathwise with K = 1 and loo with K = 2, only"
    if not on_gpu:
        return None
    if case.engine == "compile" and not main:
        return "on a GPU torch.compile of a learner is measured for pathwise with K = 1 and loo with K = 2 only"
    if what == ACTOR and (case.B, case.A) != (256, 6):
        return "on a GPU the actor's step alone is measured at B = 256, A = 6 only"
    if case.B == 256 and (case[:3], case.A) not in GPU_UPDATES:
        return "on a GPU other A than 6 are measured for pathwise with K = 1 and loo with K = 2 only"
    if case.B != 256 and (not main or (case.B, case.A) not in [*TABLE_SIZES, (65536, 6)]):
        return "on a GPU larger B are measured for pathwise with K = 1 and loo with K = 2, A = 6 and 32, only"
    return None


GPU_STEPS = [(case, what) for case, what in STEPS if "fused" not in case.engine and why_not(case, what, True) is None]
#: seconds on a GPU, if anything too many: a learner, its first updates (kernels compiled before) and graphs; a step
FIRST_S = {"reference": 0.3, "graphed": 1.0, "compile": 8.0}
STEP_S, START_S = 0.25, 5.0


def seconds(steps: list[tuple[Case, str]]) -> float:
    """Return about how long they take together on a GPU."""
    return START_S + STEP_S * len(steps) + sum(FIRST_S[case.engine] for case in {case for case, _ in steps})


@lru_cache(1)
def filled_replay(action_size: int, device: torch.device) -> Replay:
    ring = Replay(TRANSITIONS, WRITERS, OBS_SIZE, action_size, device, torch.Generator(device).manual_seed(0))
    ring.begin(torch.randn(WRITERS, OBS_SIZE))
    valid, terminated = torch.ones(WRITERS, dtype=torch.bool).numpy(), torch.zeros(WRITERS, dtype=torch.bool)
    for _ in range(TRANSITIONS // WRITERS):
        action = torch.rand(WRITERS, action_size, device=device) * 2.0 - 1.0
        ring.add(action, torch.randn(WRITERS), terminated, torch.randn(WRITERS, OBS_SIZE), valid)
    return ring


@lru_cache(1)  # the actor's step and the update of one case follow one another
def learner(case: Case, device: torch.device) -> Learner:
    config = Config(
        estimator=case.estimator,
        baseline=case.baseline,
        num_action_samples=case.K,
        batch_size=case.B,
        num_envs=NUM_ENVS,
        engine={"compile": "reference", "fused-bf16": "fused"}.get(case.engine, case.engine),
        precision="bf16" if case.engine == "fused-bf16" else "fp32",
        num_threads=torch.get_num_threads(),
    )
    set_up_torch(config, device, OBS_SIZE, case.A)
    made = make_learner(config, OBS_SIZE, case.A, device)
    if case.engine == "compile":
        torch._dynamo.reset()
        made._descend = torch.compiler.disable(made._descend)  # type: ignore[method-assign]
        for name in ("_update_critic", "_update_actor_and_alpha"):
            setattr(made, name, torch.compile(getattr(made, name), dynamic=False))
    return made


@pytest.mark.parametrize(("case", "what"), STEPS, ids=[f"{what}-{case.id}" for case, what in STEPS])
def test_update(
    benchmark: Any,
    device: torch.device,
    record: Callable[[dict[str, Any]], None],
    require: Callable[[str, torch.device], None],
    case: Case,
    what: str,
) -> None:
    require(case.engine, device)
    reason = why_not(case, what)
    if reason:
        pytest.skip(reason)
    synchronized, calls = prepare(case, what, device)
    row: dict[str, Any] = {"what": what} | case._asdict() | {"updates_per_call": calls}
    record(row | {"wall_us": wall_quantiles(benchmark, synchronized, device, 0.15 if CUDA else 0.5, calls)})


def prepare(case: Case, what: str, device: torch.device) -> tuple[Call, int]:
    """Return a call that ends when the device is done, and how many updates it makes; all is compiled and recorded."""
    made, ring = learner(case, device), filled_replay(case.A, device)
    calls = UPDATES_PER_CALL if what == UPDATE and case.B == 256 else 1
    call = actor_step(made, case, device) if what == ACTOR else lambda: made.update(ring, calls)

    def synchronized() -> None:
        call()
        synchronize(device)

    # compiles, makes the optimisers' state, records the graph
    for _ in range(1 if case.engine == "reference" or "fused" in case.engine else 4):
        synchronized()
    return synchronized, calls


def actor_step(made: Learner, case: Case, device: torch.device) -> Call:
    """Return the actor's and the temperature's step on a fixed batch, without metrics, as most updates make it."""
    obs = torch.randn(case.B, OBS_SIZE, device=device)
    if case.engine == "graphed":
        return capture(lambda: made._update_actor_and_alpha(obs, measure=False))
    return lambda: made._update_actor_and_alpha(obs, measure=False)
