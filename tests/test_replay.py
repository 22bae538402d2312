import itertools
import re
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastsac.replay
from fastsac.errors import UsageError
from fastsac.replay import Replay, bytes_needed
from fastsac.types import Batch
from fastsac_kernels import replay_gather

OBS, ACTION = 3, 2
READS = ["item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__", "__array__"]


class Transition(NamedTuple):
    """A number for each of the parts."""

    obs: float
    action: float
    reward: float
    next_obs: float
    terminated: float


def rows(batch: Batch) -> list[Transition]:
    """The batch as plain transitions; fails if the columns of a row do not belong together."""
    assert batch.obs.shape[1:] == batch.next_obs.shape[1:] == (OBS,)
    assert batch.action.shape[1:] == (ACTION,)
    assert [part.dtype for part in batch] == [torch.float32] * 4 + [torch.bool]
    for wide in (batch.obs, batch.next_obs, batch.action):
        assert torch.equal(wide, wide[:, :1] + torch.arange(wide.shape[1]) / 16)
    parts = [part[:, 0] if part.dim() == 2 else part for part in batch]
    return [Transition(*values) for values in zip(*(part.tolist() for part in parts), strict=True)]


def wide(values: list[float], size: int) -> torch.Tensor:
    return torch.tensor(values)[:, None] + torch.arange(size) / 16


def everything(replay: Replay) -> list[Transition]:
    """All that can be drawn, the oldest first."""
    assert replay._span.tolist() == [replay._first, replay.size]
    if replay.size == 0:
        return []
    parts = replay._obs, replay._action, replay._reward, replay._terminated, replay._queue, replay._span
    return rows(Batch(*replay_gather(*parts, torch.arange(replay.size), replay.size)))


def poisoned(capacity: int, num_envs: int, seed: int = 0) -> Replay:
    """A replay whose unwritten memory shows."""
    replay = Replay(capacity, num_envs, OBS, ACTION, generator=torch.Generator().manual_seed(seed))
    for memory in (replay._obs, replay._action, replay._reward):
        memory.fill_(float("nan"))
    replay._queue.fill_(2**40)
    return replay


class World:
    """Environments that reset at random, a replay that is told, and a list that remembers."""

    def __init__(self, capacity: int, num_envs: int) -> None:
        self.num_envs = num_envs
        self.replay = poisoned(capacity, num_envs)
        self.remembered: deque[list[Transition]] = deque(maxlen=-(-capacity // num_envs))  # steps of all environments
        self.counter = itertools.count(1)
        self.begin()

    def numbers(self) -> list[float]:
        return [float(next(self.counter)) for _ in range(self.num_envs)]

    def begin(self) -> None:
        self.obs = self.numbers()
        self.replay.begin(wide(self.obs, OBS))
        self.remembered.append([])

    def step(self, valid: list[bool], terminated: list[bool]) -> None:
        action, reward, next_obs = self.numbers(), self.numbers(), self.numbers()
        self.replay.add(
            wide(action, ACTION), torch.tensor(reward), torch.tensor(terminated), wide(next_obs, OBS), np.array(valid)
        )
        columns = zip(self.obs, action, reward, next_obs, terminated, strict=True)
        step = [Transition(*column) for column in columns]
        self.remembered.append([transition for transition, ok in zip(step, valid, strict=True) if ok])
        self.obs = next_obs

    def store_and_load(self) -> None:
        loaded = poisoned(self.replay._obs.shape[0] * self.num_envs - self.num_envs, self.num_envs)
        for start in range(self.replay.oldest, self.replay.newest, 3):
            loaded.load_rows(start, self.replay.rows(start, min(start + 3, self.replay.newest)))
        tensors, counters = self.replay.state()
        loaded.load_state(tensors, counters)
        assert (loaded._first, loaded.newest) == (self.replay._first, self.replay.newest)
        self.replay = loaded

    def check(self) -> None:
        expected = [transition for step in self.remembered for transition in step]
        assert self.replay.size == len(expected)
        assert everything(self.replay) == expected


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, list[Any]]:
    num_envs = draw(st.integers(1, 5))
    capacity = draw(st.integers(1, 20))
    flags = st.lists(st.booleans(), min_size=num_envs, max_size=num_envs)
    mostly = st.lists(st.sampled_from([True, True, True, False]), min_size=num_envs, max_size=num_envs)
    event = st.one_of(*[st.tuples(mostly, flags)] * 6, st.tuples(flags, flags), st.just("begin"), st.just("store"))
    return capacity, num_envs, draw(st.lists(event, max_size=80))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(histories())
def test_what_can_be_drawn_is_what_happened_last(history: tuple[int, int, list[Any]]) -> None:
    capacity, num_envs, events = history
    world = World(capacity, num_envs)
    for event in events:
        if event == "begin":
            world.begin()
        elif event == "store":
            world.store_and_load()
        else:
            world.step(*event)
        world.check()
    expected = {transition for step in world.remembered for transition in step}
    if expected:
        assert set(rows(world.replay.sample(100 * len(expected) + 200))) == expected
    else:
        with pytest.raises(ValueError, match="empty"):
            world.replay.sample(1)


def random_world(capacity: int, num_envs: int, num_steps: int, resets: float = 0.2, seed: int = 0) -> World:
    world, rng = World(capacity, num_envs), np.random.default_rng(seed)
    for _ in range(num_steps):
        world.step((rng.random(num_envs) >= resets).tolist(), (rng.random(num_envs) < 0.3).tolist())
    return world


@pytest.mark.parametrize("num_steps", [0, 1, 6, 7, 8, 9, 40, 500])
def test_a_long_history_wraps_many_times(num_steps: int) -> None:
    world = random_world(capacity=20, num_envs=3, num_steps=num_steps, seed=num_steps)
    world.check()
    world.store_and_load()
    world.check()
    world.step([True] * 3, [False] * 3)
    world.check()


@pytest.mark.parametrize(("capacity", "num_envs"), [(1, 1), (1, 4), (4, 4), (5, 4), (37, 3), (40, 5)])
def test_it_holds_its_capacity_and_less_than_a_row_more(capacity: int, num_envs: int) -> None:
    world = random_world(capacity, num_envs, num_steps=3 * capacity + 10, resets=0.0)
    assert capacity <= world.replay.size < capacity + num_envs
    world.check()


@pytest.mark.parametrize("resets", [0.0, 0.3])
def test_sampling_is_uniform(resets: float) -> None:
    world = random_world(capacity=60, num_envs=3, num_steps=131, resets=resets)
    size, draws = world.replay.size, 200_000
    _, counts = world.replay.sample(draws).reward.unique(return_counts=True)
    assert len(counts) == size
    chi_square = ((counts - draws / size) ** 2 / (draws / size)).sum().item()
    degrees = size - 1
    assert abs(chi_square - degrees) < 4.0 * (2.0 * degrees) ** 0.5


def test_the_same_seed_draws_the_same() -> None:
    def draws(seed: int) -> list[Transition]:
        replay = random_world(30, 3, 50).replay
        replay.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + np.random.default_rng().integers(2**30))  # of no consequence
        return rows(replay.sample(40)) + rows(replay.sample(40))

    first = draws(0)
    assert first == draws(0)
    assert first != draws(1)
    assert first[:40] != first[40:]


def test_an_empty_replay_cannot_be_sampled() -> None:
    world = World(10, 2)
    with pytest.raises(ValueError, match="empty"):
        world.replay.sample(4)
    world.step([False, False], [False, False])
    with pytest.raises(ValueError, match="empty"):
        world.replay.sample(4)


class NothingRead(TorchDispatchMode):
    """Fails where PyTorch itself would have to wait for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), func
        return func(*args, **(kwargs or {}))


def test_sampling_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the host read a tensor")

    replay = random_world(20, 3, 50).replay
    with monkeypatch.context() as patch, NothingRead():
        for name in READS:
            patch.setattr(torch.Tensor, name, refuse)
        batch = replay.sample(8)
    assert batch.obs.shape == (8, OBS)


@pytest.mark.parametrize(
    "other",
    [
        {"num_envs": 2},
        {"capacity": 12},
        {"obs_size": OBS + 1},
        {"action_size": ACTION + 1},
    ],
)
def test_a_stored_replay_of_another_shape_is_refused(other: dict[str, int]) -> None:
    stored = random_world(18, 3, 20).replay
    replay = Replay(**{"capacity": 18, "num_envs": 3, "obs_size": OBS, "action_size": ACTION, **other})

    def load() -> None:
        replay.load_rows(stored.oldest, stored.rows(stored.oldest, stored.newest))
        replay.load_state(*stored.state())

    with pytest.raises(UsageError, match="the stored replay has another"):
        load()
    assert replay.size == 0


def test_rows_that_do_not_add_up_are_refused() -> None:
    stored, copy = random_world(18, 3, 20).replay, random_world(18, 3, 3).replay
    copy.load_rows(stored.oldest + 1, stored.rows(stored.oldest + 1, stored.newest))  # one too few
    with pytest.raises(ValueError, match="transitions instead of"):
        copy.load_state(*stored.state())


def test_an_episode_is_what_was_added_last() -> None:
    world = World(capacity=20, num_envs=2)
    for _ in range(15):  # the ring wraps
        world.step([True, True], [False, False])
    expected = [step[1] for step in world.remembered][-4:]
    obs, action = world.replay.episode(env=1, length=4)
    assert obs[:, 0].tolist() == [transition.obs for transition in expected] + [expected[-1].next_obs]
    assert action[:, 0].tolist() == [transition.action for transition in expected]
    assert len(world.replay.episode(0, 10)[1]) == 10
    assert world.replay.episode(0, 11) is None


@pytest.mark.parametrize(("num_envs", "available"), [(1, 10_000), (16, 5_000_000), (3, 7 * 2**20), (64, 3 * 2**30)])
def test_a_replay_too_large_is_refused_with_a_size_that_fits(
    num_envs: int, available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastsac.replay, "available_bytes", lambda device: available)
    capacity = 10**9
    with pytest.raises(UsageError) as error:
        Replay(capacity, num_envs, 17, 6)
    message = str(error.value)
    needed = bytes_needed(-(-capacity // num_envs) + 1, num_envs, 17, 6)
    assert f"{needed / 2**30:.2f} GiB" in message
    assert f"{available / 2**30:.2f} GiB" in message
    assert "\n" not in message
    advised = int(re.search(r"--buffer-size (\d+) fits", message)[1])  # type: ignore[index]
    assert advised >= num_envs
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: torch.empty(0))
    Replay(advised, num_envs, 17, 6)  # passes the forecast
    rows_there = -(-advised // num_envs) + 1
    assert 0.8 * available < bytes_needed(rows_there, num_envs, 17, 6) <= available


def test_the_forecast_counts_every_byte() -> None:
    replay = Replay(100, 4, 17, 6)
    held = [replay._obs, replay._action, replay._reward, replay._terminated, replay._queue]
    assert bytes_needed(replay.num_rows, 4, 17, 6) == sum(tensor.nbytes for tensor in held)


def test_where_nothing_fits_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastsac.replay, "available_bytes", lambda device: 100)
    with pytest.raises(UsageError, match="no --buffer-size fits"):
        Replay(1000, 4, 17, 6)
