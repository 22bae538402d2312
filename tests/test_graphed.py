"""The graphed engine, on a GPU and on a pretended one, whose graphs are as a GPU's."""

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.learner import GraphedLearner, Learner
from fastsac.learner import graphed as engine
from fastsac.learner.compare import compare
from fastsac.learner.graphed import Graph
from fastsac.learner.reference import Metrics
from fastsac.replay import Replay
from fastsac.types import Batch, Draw, Sampler
from fastsac_kernels import PhiloxState, philox_normal, replay_gather
from fastsac_kernels.replay_gather import uniform_positions_op
from tests.pretend_cuda import pretended, trust_engines

O, A, N, B, HIDDEN = 5, 3, 2, 17, (8, 6)  # noqa: E741
SETTINGS = [
    {},
    {"num_action_samples": 3, "num_critics": 3, "policy_delay": 2},
    {"estimator": "score", "baseline": "loo", "alpha": 0.2},
    {"estimator": "score", "baseline": "value"},
    {"estimator": "score", "baseline": "constant", "num_action_samples": 2},
    {"estimator": "score", "baseline": "none"},
    {
        **{"critic": "categorical", "v_min": -3.0, "v_max": 3.0, "num_atoms": 7, "critic_reduction": "mean"},
        **{"layer_norm": True, "optimizer": "adamw", "max_grad_norm": 0.5, "lr_schedule": "linear", "n_step": 3},
        **{"normalize_obs": True, "normalize_reward": True, "batch_size": 5},  # the interpreter takes its time
    },
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def slow(*settings: dict[str, Any]) -> list[Any]:
    return [pytest.param(each, marks=pytest.mark.slow) for each in settings]


most_settings = pytest.mark.parametrize(
    "settings", [*SETTINGS[:2], *slow(*SETTINGS[2:3]), SETTINGS[3], *slow(*SETTINGS[4:6]), SETTINGS[6]], ids=str
)
few_settings = pytest.mark.parametrize(
    "settings", [{"policy_delay": 2}, SETTINGS[3], *slow({}, SETTINGS[2], SETTINGS[6])], ids=str
)


@pytest.fixture(autouse=True, params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def _gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engine, "UPDATES_PER_GRAPH", 4)  # the interpreter takes its time
    monkeypatch.setattr(engine, "WARM_UPS", 2)
    if request.param == "cuda":
        yield
        return
    trust_engines(monkeypatch)
    monkeypatch.setattr(GraphedLearner, "backend", "reference")  # where it makes no difference
    with pretended():
        yield


class Eager(GraphedLearner):
    """The same numbers through the reference's kernels, without any graph."""

    backend = "reference"

    def _forget(self, replay: Sampler | None) -> None:
        super()._forget(replay)
        self._warm_ups_left = 10**9


def make(kind: type[Learner] = GraphedLearner, seed: int = 0, **settings: Any) -> Any:
    rates = {"actor_lr": 1e-3, "critic_lr": 1e-3, "value_lr": 1e-3, "alpha_lr": 1e-3}
    return kind(Config(**{"hidden_sizes": HIDDEN, "batch_size": B, **rates, **settings}), O, A, "cuda", seed)


def filled(steps: int = 20, device: str = "cuda", n_step: int = 1) -> Replay:
    replay = Replay(100, N, O, A, device, torch.Generator(device).manual_seed(0), n_step)
    rng = torch.Generator().manual_seed(1)
    replay.begin(torch.randn(N, O, generator=rng))
    for _ in range(steps):
        add(replay, rng)
    return replay


def add(replay: Replay, rng: torch.Generator, reward: float | None = None) -> None:
    action = torch.rand(N, A, generator=rng) * 2.0 - 1.0
    rewards = torch.randn(N, generator=rng) if reward is None else torch.full((N,), reward)
    ends = torch.rand(N, generator=rng) < 0.2
    replay.add(action, rewards, ends, torch.randn(N, O, generator=rng), np.array([True, False]))


def tensors_of(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in learner.state()[0].items() if name != "generator"}


def metrics_of(learner: Learner) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in learner.metrics().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


class Drawn(GraphedLearner):
    """Notes the batches, and what the actions are drawn with."""

    def __init__(self, *args: Any) -> None:
        self.batches: list[Batch] = []
        self.draws: list[tuple[Tensor, int]] = []
        super().__init__(*args)

    def _update_critic(self, batch: Batch, measure: bool) -> Metrics:
        self.batches.append(batch)
        return super()._update_critic(batch, measure)

    def _draw(self, purpose: int, num_samples: int, mean: Tensor, num_noise: int | None = None) -> Draw:
        draw = super()._draw(purpose, num_samples, mean, num_noise)
        self.draws.append((philox_normal(draw.rng, (draw.num_samples, *mean.shape)), draw.num_samples))
        return draw


def test_every_draw_has_numbers_of_its_own() -> None:
    """Written out from the generator alone: stream 0 the next action, 1 the action, 2 the batch, 3 acting."""
    learner, replay = make(Drawn, estimator="score", num_action_samples=3, seed=5), filled()
    for step in range(3):  # the warm-ups, which recording repeats
        learner._warm_ups_left = 10
        learner.update(replay, 1)
        assert learner.rng.state.tolist() == [5, step + 1]
        expected = [PhiloxState(5, "cuda", stream) for stream in range(3)]
        for rng in expected:
            rng.advance(step)
        positions = uniform_positions_op(expected[2].state, 2, B, torch.tensor(replay.size, device="cuda"))
        ring = replay._obs, replay._action, replay._reward, replay._terminated, replay._queue, replay._span
        for found, wanted in zip(learner.batches[-1][:5], replay_gather(*ring, positions, B), strict=True):
            assert torch.equal(found, wanted)
        (next_noise, one), (noise, samples) = learner.draws[-2:]
        assert (one, samples) == (1, 3)
        assert torch.equal(next_noise, philox_normal(expected[0], (1, B, A)))
        assert torch.equal(noise, philox_normal(expected[1], (3, B, A)))
    learner.act(torch.zeros(4, O, device="cuda"))
    assert torch.equal(learner.draws[-1][0], philox_normal(PhiloxState(5, "cuda", 3), (1, 4, A)))


@pytest.mark.parametrize("num_updates", [1, 13])
def test_an_update_advances_the_generator_by_one(num_updates: int) -> None:
    learner = make()
    learner.update(filled(), num_updates)
    assert learner.rng.state[1] == learner.updates == num_updates


@most_settings
def test_it_does_what_the_reference_does(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphedLearner, "backend", "triton")
    replay = filled(n_step=settings.get("n_step", 1))
    learners = [make(kind, **settings) for kind in (GraphedLearner, Eager)]
    for num_updates in (1, 1, 5):
        for learner in learners:
            learner.update(replay, num_updates)
        found, expected = (metrics_of(learner) for learner in learners)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4, msg=name)
    # Adam divides each gradient by its own size, so a rounding error in a small one may move a weight by a whole step
    for (name, tensor), other in zip(tensors_of(learners[0]).items(), tensors_of(learners[1]).values(), strict=True):
        if not name.startswith("optimizer"):
            difference = (tensor.double() - other.double()).abs()
            assert difference.mean() < 2e-5, name
            assert difference.max() < 2e-3, name


@few_settings
def test_graphs_change_no_bit(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphedLearner, "backend", "triton")
    replay = filled(n_step=settings.get("n_step", 1))
    graphed, plain = make(**settings), make(**settings)
    plain._forget(replay)
    plain._warm_ups_left = 10**9
    for num_updates in (2, 1, 5, 1):
        graphed.update(replay, num_updates)
        plain.update(replay, num_updates)
    assert_equal(tensors_of(graphed), tensors_of(plain))


@pytest.mark.parametrize("schedule", ["cosine", pytest.param("linear", marks=pytest.mark.slow)])
def test_recorded_graphs_follow_the_schedule(schedule: str) -> None:
    replay, settings = filled(), {"lr_schedule": schedule, "estimator": "score", "baseline": "value"}
    graphed, plain = (make(**settings) for _ in range(2))
    plain._forget(replay)
    plain._warm_ups_left = 10**9
    for fraction in (0.0, 0.2, 0.9, 1.0):
        before = {name: parameter.cpu().clone() for name, parameter in graphed.actor.named_parameters()}
        for learner in (graphed, plain):
            learner.set_progress(fraction)
            learner.update(replay, 9)
        assert_equal(tensors_of(graphed), tensors_of(plain))
        moved = [not torch.equal(parameter.cpu(), before[name]) for name, parameter in graphed.actor.named_parameters()]
        assert all(moved) == any(moved) == (fraction < 1.0)
    assert graphed._graphs


@few_settings
def test_the_seed_decides_every_bit(settings: dict[str, Any]) -> None:
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(results))  # of no consequence
        learner, replay = make(GraphedLearner, seed, **settings), filled(n_step=settings.get("n_step", 1))
        learner.update(replay, 6)
        learner.act(torch.zeros(4, O, device="cuda"))
        results.append(tensors_of(learner))
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0]["critic.weights.1"], results[2]["critic.weights.1"])


class Noting(GraphedLearner):
    """Notes on the device whose turn it was in every update that ran, and what was recorded."""

    def __init__(self, *args: Any) -> None:
        self.recorded: list[tuple[int, bool]] = []
        super().__init__(*args)
        self.history = torch.zeros((), dtype=torch.int64, device="cuda")

    def _update_once(self, replay: Sampler, with_actor: bool, measure: bool) -> Metrics:
        self.history.mul_(3).add_(1 + with_actor).remainder_(HISTORIES)
        value = self.history.float()
        return {"x": value, "y": value} if with_actor else {"x": value}

    def _record(self, replay: Sampler, length: int, with_actor: bool) -> Graph:
        self.recorded.append((length, with_actor))
        return super()._record(replay, length, with_actor)


HISTORIES = 1_000_003


def history(turns: list[bool]) -> int:
    value = 0
    for turn in turns:
        value = (3 * value + 1 + turn) % HISTORIES
    return value


@pytest.mark.parametrize("policy_delay", [1, *(pytest.param(each, marks=pytest.mark.slow) for each in (2, 4)), 3, 100])
def test_the_actor_has_its_turn_as_in_the_reference(policy_delay: int) -> None:
    learner, total = make(Noting, policy_delay=policy_delay), 0
    replay = filled()
    for num_updates in (0, 1, 16, 3, 1, 16, 16, 7, 250):
        total += num_updates
        learner.update(replay, num_updates)
        assert learner.updates == total
        turns = [step % policy_delay == 0 for step in range(total)]
        assert learner.history.item() == history(turns)
        if total:  # the metrics are those of the last update, and of the actor's last turn
            last = max(step for step, turn in enumerate(turns) if turn)
            expected = {"x": float(history(turns)), "y": float(history(turns[: last + 1]))}
            assert {name: value.item() for name, value in learner.metrics().items()} == expected


@pytest.mark.parametrize(
    ("policy_delay", "long"), [(1, 4), *(pytest.param(each, 4, marks=pytest.mark.slow) for each in (2, 4)), (3, 3)]
)
def test_few_graphs_serve_all(policy_delay: int, long: int) -> None:
    learner, replay = make(Noting, policy_delay=policy_delay), filled()
    for num_updates in (16, 1, 16, 5, 16, 16, 3, 16):
        learner.update(replay, num_updates)
    assert len(learner.recorded) == len(set(learner.recorded)) <= 3
    assert (long, True) in learner.recorded


def test_another_replay_or_a_loaded_state_is_recorded_anew() -> None:
    learner, replay = make(Noting), filled()
    learner.update(replay, 20)
    assert len(learner.recorded) == 2
    learner.update(replay, 20)
    assert len(learner.recorded) == 2
    learner.update(filled(), 20)
    assert len(learner.recorded) == 4
    learner.load_state(*make().state())
    learner.update(replay, 20)
    assert len(learner.recorded) == 6


def test_what_is_added_later_is_drawn_too() -> None:
    learner, replay = make(gamma=0.0, critic_lr=1e-9), filled(steps=3)
    learner.update(replay, 6)
    rng = torch.Generator().manual_seed(2)
    for _ in range(60):  # wraps the ring: nothing of the old is left
        add(replay, rng, reward=1000.0)
    learner.update(replay, 4)
    assert learner.metrics()["critic_loss"].item() == pytest.approx(2.0 * 1000.0**2, rel=0.01)


def test_metrics_stay_as_they_were() -> None:
    learner, replay = make(), filled()
    learner.update(replay, 6)
    learner.update(replay, 4)
    first = learner.metrics()
    before = {name: value.item() for name, value in first.items()}
    learner.update(replay, 4)
    assert {name: value.item() for name, value in first.items()} == before
    assert {"critic_loss", "q", "actor_loss", "alpha", "entropy"} <= first.keys()
    assert all(value.dim() == 0 and not value.requires_grad for value in first.values())


@few_settings
def test_a_loaded_learner_goes_on_where_it_was(settings: dict[str, Any]) -> None:
    learner, resumed = (make(GraphedLearner, seed, **settings) for seed in (0, 1))
    replay = filled(n_step=settings.get("n_step", 1))
    learner.update(replay, 4)
    resumed.update(replay, 3)
    learner.act(torch.zeros(4, O, device="cuda"))
    resumed.load_state(*learner.state())
    assert resumed.metrics() == {}
    for each in (learner, resumed):
        each.update(replay, 6)
        each.act(torch.zeros(4, O, device="cuda"))
    assert_equal(tensors_of(learner), tensors_of(resumed))


def test_checkpoints_go_from_one_engine_to_another() -> None:
    replay, reference = filled(), make(Learner)
    reference.update(replay, 3)
    graphed = make()
    graphed.load_state(*reference.state())
    graphed.update(replay, 3)
    back = make(Learner)
    back.load_state(*graphed.state())
    back.update(replay, 3)
    assert back.updates == 9
    again = make()
    again.load_state(*back.state())
    assert again.rng.state.tolist() == [0, 9]  # none of the numbers that the first graphed one drew
    assert again.acting_rng.state[1] > 9


def test_acting_draws_new_numbers_each_time_and_an_update_none_of_them() -> None:
    learner, other, obs = make(), make(), torch.zeros(4, O, device="cuda")
    first = learner.act(obs)
    assert torch.equal(first, other.act(obs))
    assert not torch.equal(first, learner.act(obs))
    calm = learner.act(obs, deterministic=True)
    assert torch.equal(calm, torch.tanh(learner.actor(obs)[0]))
    other.update(filled(), 2)
    assert other.acting_rng.state.tolist() == [0, 1]


def test_a_run_with_it_is_saved_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("envpool")
    from fastsac import SAC  # needs the environments, which a GPU host may not have
    from tests.runs import SMALL

    changes = {"hidden_sizes": HIDDEN, "batch_size": 8, "learning_starts": 8, "checkpoint_replay": True}
    agent = SAC(dataclasses.replace(SMALL, engine="graphed", **changes))
    agent.learn(total_steps=20)
    assert agent.updates == 8
    agent.save(tmp_path / "run")
    loaded = SAC.load(tmp_path / "run")
    assert_equal(tensors_of(loaded.learner), tensors_of(agent.learner))
    assert loaded.learner.rng.state[1] == 8
    for each in (agent, loaded):  # one that was never stopped, and one that was
        each.learn(total_steps=32)
        assert each.updates == 20
    assert_equal(tensors_of(loaded.learner), tensors_of(agent.learner))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@every_setting
def test_nothing_waits_for_the_device(settings: dict[str, Any]) -> None:
    learner, replay = make(**settings), filled(n_step=settings.get("n_step", 1))
    for _ in range(3):  # records all graphs
        learner.update(replay, 31)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        learner.update(replay, 30)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_neither_acting_nor_adding_waits_for_the_device() -> None:
    learner, replay, obs = make(), filled(), torch.zeros(N, O, device="cuda")
    reward, ends, valid = np.zeros(N, np.float32), np.zeros(N, np.bool_), np.ones(N, np.bool_)

    def step(obs: Tensor) -> Tensor:
        action = learner.act(obs)
        return replay.add(action, reward, ends, np.ones((N, O), np.float32), valid)

    for _ in range(5):
        obs = step(obs)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(10):
            obs = step(obs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert obs.tolist() == [[1.0] * O] * N


@pytest.mark.gpu
@every_setting
def test_it_passes_its_check(settings: dict[str, Any]) -> None:
    assert compare(GraphedLearner, Config(**settings), 17, 6, torch.device("cuda")) == ""


@pytest.mark.gpu
def test_memory_stays() -> None:
    learner, replay = make(), filled()
    learner.update(replay, 30)
    gc.collect()
    before = torch.cuda.memory_allocated()
    learner.update(replay, 800)
    assert torch.cuda.memory_allocated() == before
