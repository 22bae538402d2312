"""Checks whether an engine on a GPU computes the same as the reference engine.

The engine, the reference engine in float32 and the reference engine in float64 make the same updates: from the same
state, with the same replay buffer and random numbers. The engine's error relative to float64 may be twice that of the
float32 reference, and a little more where sums cancel.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.learner.fused_cuda import FusedCudaLearner
from fastsac.learner.graphed import UPDATES_PER_GRAPH, WARM_UPS, GraphedLearner
from fastsac.learner.reference import ACTING, BATCH, Learner, Metrics
from fastsac.learner.together import Together
from fastsac.normalize import Normalizer
from fastsac.replay import Replay
from fastsac.transfer import to_device
from fastsac.types import Batch, Draw, Sampler
from fastsac_kernels import PhiloxState, philox_normal

SEED, AGE = 1, 4
#: single updates, without a graph and with each kind of graph; even, so that the long graphs start with the actor
SINGLE_UPDATES = 8
EPS = torch.finfo(torch.float32).eps
#: relative, for means over a batch
TOLERANCE = 1e-5
#: relative, for a network's gradients: products of these types against float32; ReLUs that switch add to it. Three
#: times what was found when the interpreter rounded as tensor cores do, up to O = 348 (LOG.md)
ROUNDING = {"tf32": 0.04, "bf16": 0.1}
METRICS = re.compile(r"critic_loss|q|actor_loss|alpha|entropy|value_loss|.*optimizer\.alpha\..*")
MOMENTS = re.compile(r"optimizer\.(\w+)\.\d+\.(exp_avg|exp_avg_sq)")


class SameNumbers(Learner):
    """The reference engine with the random numbers of an engine that draws them on the device."""

    def __init__(self, config: Config, obs_size: int, action_size: int, device: torch.device, seed: int) -> None:
        super().__init__(config, obs_size, action_size, device, seed)
        self.rng, self.acting_rng = PhiloxState(seed, device), PhiloxState(seed, device, ACTING)

    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Return actions, as the reference engine does."""
        action = super().act(obs, deterministic)
        self.acting_rng.advance()
        return action

    def _update_once(self, replay: Sampler, with_actor: bool, measure: bool) -> Metrics:
        metrics = super()._update_once(replay, with_actor, measure)
        self.rng.advance()
        return metrics

    def _sample_batch(self, replay: Sampler) -> Batch:
        batch = replay.sample(self.config.batch_size, self.rng.of_stream(BATCH))
        dtype = self.log_alpha.dtype
        return Batch._make(part if part is None or part.dtype == torch.bool else part.to(dtype) for part in batch)

    def _draw(self, purpose: int, num_samples: int, mean: Tensor, num_noise: int | None = None) -> Draw:
        rng = self.acting_rng if purpose == ACTING else self.rng.of_stream(purpose)
        return Draw(philox_normal(rng, (num_noise or num_samples, *mean.shape)).to(mean.dtype), num_samples)


class Errors:
    """Errors of the engine and of the reference engine relative to float64, by name."""

    def __init__(self, updates: int = 1) -> None:
        """Start empty; the numbers added later come from this many updates in a row."""
        self._updates = updates
        self._sizes: dict[str, list[float]] = {}

    def note(self, found: dict[str, Tensor], by_reference: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
        """Add numbers; the largest difference for each name counts."""
        for name, wanted in exact.items():
            wanted = wanted.double()
            parts = found[name] - wanted, by_reference[name] - wanted, wanted
            sizes = torch.stack([part.abs().max() for part in parts]).tolist()
            sizes[0] = sizes[0] if np.isfinite(sizes[0]) else np.inf
            self._sizes[name] = [max(pair) for pair in zip(self._sizes.get(name, sizes), sizes, strict=True)]

    def problem(self) -> str:
        """Return the worst error above its limit in words, or an empty string."""
        allowed = {name: 2.0 * sizes[1] + self._slack(name) for name, sizes in self._sizes.items()}
        excess = {name: sizes[0] / (allowed[name] or EPS) for name, sizes in self._sizes.items()}
        worst = max(excess, key=lambda name: excess[name])
        if excess[worst] <= 1.0:
            return ""
        return f"{worst} is off by {self._sizes[worst][0]:.1e}, where {allowed[worst]:.1e} is allowed"

    def _slack(self, name: str) -> float:
        """Return what chance may add; for means over a batch, where terms cancel, also what 2 ulp per term may add."""
        size = self._sizes[name][2]
        if METRICS.fullmatch(name):
            return self._updates * TOLERANCE * max(1.0, size)
        if moment := MOMENTS.fullmatch(name):
            network, kind = moment.groups()
            group = [key for key in self._sizes if key.startswith(f"optimizer.{network}.") and key.endswith(f".{kind}")]
            return TOLERANCE * max(self._sizes[key][2] for key in group)
        return self._updates * (TOLERANCE if "optimizer" in name else 4.0 * EPS) * size


@contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compare(kind: type[Learner], config: Config, obs_size: int, action_size: int, device: torch.device) -> str:
    """Return how the engine differs from the reference engine, or an empty string if it does not.

    Covers the engine's updates without a graph, those that record one, and those that replay it. The float32 reference
    continues from update to update; the others start each update from its state.
    """
    rates = {"actor_lr": 3e-4, "critic_lr": 3e-4, "value_lr": 3e-4, "alpha_lr": 3e-4}  # none that diverges
    config = dataclasses.replace(config, policy_delay=min(2, config.policy_delay), **rates)  # type: ignore[arg-type]
    engine, reference = (each(config, obs_size, action_size, device, SEED) for each in (kind, SameNumbers))
    assert isinstance(engine, GraphedLearner)
    assert isinstance(reference, SameNumbers)
    with _float64():
        exact = SameNumbers(config, obs_size, action_size, device, SEED)
    replay = random_replay(obs_size, action_size, device, config.n_step)
    for learner in (engine, reference, exact):
        _show_some(learner.normalizer, obs_size, config.num_envs)
    with torch.no_grad():
        for weight in reference.target_critic.parameters():
            weight.mul_(0.5)  # else the targets hardly move
    reference.update(replay, AGE)
    engine.load_state(*reference.state())
    one, many = Errors(), Errors(UPDATES_PER_GRAPH)
    for turn, number in enumerate([1] * SINGLE_UPDATES + [UPDATES_PER_GRAPH] * 3):
        if config.lr_schedule != "constant":
            for learner in (engine, reference, exact):
                learner.set_progress(turn / 100.0)
        tensors, counters = reference.state()
        exact.load_state(tensors, counters)
        _put(engine, tensors)
        engine.updates = reference.updates
        for learner in (engine, exact):
            learner.rng.state[1] = reference.updates
        for learner in (engine, reference, exact):
            learner.update(replay, number)
        numbers = [_numbers(learner) for learner in (engine, reference, exact)]
        if number == 1:
            one.note(*numbers)
        else:
            many.note(*_means(*numbers))
    return one.problem() or many.problem() or _compare_acting(engine, reference, exact, obs_size)


def compare_rounded(kind: type[Learner], config: Config, obs_size: int, action_size: int, device: torch.device) -> str:
    """Return by how much lower-precision products change the engine's own float32 update, if that is too much.

    Compares Adam's first moments after one update, which are the gradients, and the metrics. After more updates, some
    of them in graphs, the copies of the parameters must be the rounded parameters.
    """
    exact = dataclasses.replace(config, precision="fp32")
    learners = [kind(each, obs_size, action_size, device, SEED) for each in (exact, config)]
    replay = random_replay(obs_size, action_size, device, config.n_step)
    for learner in learners:
        learner.update(replay)
    wanted, found = (_numbers(learner) for learner in learners)
    allowed, groups = ROUNDING[config.precision], dict[str, list[str]]()
    for name in wanted:
        moment = MOMENTS.fullmatch(name)
        if moment and moment[2] == "exp_avg" and moment[1] != "alpha":
            groups.setdefault(f"the gradient of the {moment[1]}", []).append(name)
        elif METRICS.fullmatch(name) and "." not in name:
            groups[name] = [name]
    for group, names in groups.items():
        error = torch.cat([(found[name] - wanted[name]).double().flatten() for name in names]).norm().item()
        size = torch.cat([wanted[name].double().flatten() for name in names]).norm().item()
        if not error <= allowed * (size if len(names) > 1 else max(1.0, size)):
            return f"in {config.precision}, {group} is off by {error:.1e}, and its magnitude is {size:.1e}"
    engine = learners[1]
    assert isinstance(engine, FusedCudaLearner)
    engine.update(replay, WARM_UPS + 1 + 2 * UPDATES_PER_GRAPH)
    for name, value in engine.metrics().items():
        if not value.isfinite():
            return f"in {config.precision}, {name} is {value.item()} after {engine.updates} updates"
    return engine.stale_copies()


def compare_together(kind: type[Learner], config: Config, obs_size: int, action_size: int, device: torch.device) -> str:
    """Return how learners that share launches differ from learners that run alone; empty if they are bit-identical."""
    rounds = (WARM_UPS + 1, 2), (UPDATES_PER_GRAPH, UPDATES_PER_GRAPH + 1), (0, 1)  # graphs of both kinds among them
    several, alone = ([kind(config, obs_size, action_size, device, seed) for seed in range(2)] for _ in range(2))
    together = Together(len(several))
    for learner in several:
        together.add(learner, random_replay(obs_size, action_size, device))
    together.complete()
    for dues in rounds:
        together.update(dues)
    for number, learner in enumerate(alone):
        learner.update(random_replay(obs_size, action_size, device), sum(dues[number] for dues in rounds))
    for found, wanted in zip(map(_numbers, several), map(_numbers, alone), strict=True):
        for name, tensor in wanted.items():
            if not torch.equal(found[name], tensor):
                return f"{name} of a learner that shares launches differs from the same learner alone"
    return ""


def _means(*numbers: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return numbers after several updates, averaged so that chance does not decide.

    Errors grow from update to update, in some weights more than in others. So the mean error counts: of a network's
    parameters, and of its moments of each kind. Metrics and alpha count as they are. Each mean error is added to the
    mean size of the exact numbers.
    """
    exact = numbers[-1]
    groups: dict[str, list[str]] = {}
    for name in exact:
        moment = MOMENTS.fullmatch(name)
        group = ".".join(("mean of optimizer", *moment.groups())) if moment else f"mean of {name.partition('.')[0]}"
        if moment or "." in name:
            groups.setdefault(group, []).append(name)

    def mean(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.double().abs().flatten() for tensor in tensors]).mean()

    sizes = {group: mean(exact[name] for name in names) for group, names in groups.items()}
    single = [name for name in exact if "." not in name]
    return [
        {group: sizes[group] + mean(each[name] - exact[name] for name in names) for group, names in groups.items()}
        | {name: each[name] for name in single}
        for each in numbers
    ]


def _compare_acting(engine: GraphedLearner, reference: SameNumbers, exact: SameNumbers, obs_size: int) -> str:
    tensors, counters = reference.state()
    exact.load_state(tensors, counters)
    _put(engine, tensors)
    errors, generator = Errors(), torch.Generator().manual_seed(SEED)
    for learner in (engine, reference, exact):
        learner.acting_rng.state[0], learner.acting_rng.state[1] = SEED, reference.updates
    for _ in range(WARM_UPS + 3):
        obs = torch.randn(engine.config.num_envs, obs_size, generator=generator).to(engine.device)
        with torch.no_grad():
            actions = engine.act(obs), reference.act(obs), exact.act(obs.double())
        errors.note(*({"the action": action} for action in actions))
    return errors.problem()


def _show_some(normalizer: Normalizer, obs_size: int, num_envs: int) -> None:
    """Show the normalizer some random steps."""
    if not normalizer.active:
        return
    rng = np.random.default_rng(SEED)
    for _ in range(3):
        obs, reward = rng.normal(0.5, 2.0, (num_envs, obs_size)), rng.normal(0.5, 2.0, num_envs)
        step = obs.astype(np.float32), reward.astype(np.float32), np.ones(num_envs, bool)
        normalizer.add(*to_device(step, normalizer.device))


def random_replay(obs_size: int, action_size: int, device: torch.device, n_step: int = 1) -> Replay:
    """Return a replay buffer with a few thousand random transitions."""
    rng = np.random.default_rng(SEED)
    num_envs, steps = 64, 64
    replay = Replay(num_envs * steps, num_envs, obs_size, action_size, device, n_step=n_step)
    replay.begin(rng.standard_normal((num_envs, obs_size), np.float32))
    for _ in range(steps):
        replay.add(
            rng.uniform(-1.0, 1.0, (num_envs, action_size)).astype(np.float32),
            rng.standard_normal(num_envs, np.float32),
            rng.random(num_envs) < 0.1,
            rng.standard_normal((num_envs, obs_size), np.float32),
            rng.random(num_envs) < 0.9,
        )
    return replay


def _numbers(learner: Learner) -> dict[str, Tensor]:
    left_out = {"generator", "philox"} | (set() if learner.learns_alpha else {"log_alpha"})  # log 0 is infinite
    return {name: tensor for name, tensor in learner.state()[0].items() if name not in left_out} | learner.metrics()


@torch.no_grad()
def _put(learner: Learner, tensors: dict[str, Tensor]) -> None:
    """Write another learner's state into this one's memory, where recorded graphs find it."""
    for name, tensor in learner.state()[0].items():
        if name not in ("generator", "philox"):
            tensor.copy_(tensors[name])
    if isinstance(learner, FusedCudaLearner):
        learner.refresh()
