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
from fastsac_kernels import PhiloxState, replay_gather
from tests.pretend_cuda import pretended

OBS, ACTION = 3, 2
GAMMA = 0.5  # sums of whole numbers are exact
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
    assert [part.dtype for part in batch[:5]] == [torch.float32] * 4 + [torch.bool]
    for wide in (batch.obs, batch.next_obs, batch.action):
        assert torch.equal(wide, wide[:, :1] + torch.arange(wide.shape[1]) / 16)
    parts = [part[:, 0] if part.dim() == 2 else part for part in batch[:5]]
    return [Transition(*values) for values in zip(*(part.tolist() for part in parts), strict=True)]


def wide(values: list[float], size: int) -> torch.Tensor:
    return torch.tensor(values)[:, None] + torch.arange(size) / 16


def everything(replay: Replay) -> list[Transition]:
    """All that can be drawn, the oldest first."""
    assert replay._span.tolist() == [replay._first, replay.size]
    batch = replay.transitions()
    assert batch.discount is None
    if replay.size:
        parts = replay._obs, replay._action, replay._reward, replay._terminated, replay._queue, replay._span
        for found, gathered in zip(batch, replay_gather(*parts, torch.arange(replay.size), replay.size), strict=False):
            assert torch.equal(found, gathered)
    return rows(batch)


def poisoned(capacity: int, num_envs: int, seed: int = 0, n_step: int = 1) -> Replay:
    """A replay whose unwritten memory shows."""
    generator = torch.Generator().manual_seed(seed)
    replay = Replay(capacity, num_envs, OBS, ACTION, generator=generator, n_step=n_step, gamma=GAMMA)
    for memory in (replay._obs, replay._action, replay._reward):
        memory.fill_(float("nan"))
    replay._queue.fill_(2**40)
    if replay._valid_on_device is not None:
        replay._valid_on_device.fill_(True)
    return replay


#: an episode, to which later steps are added, and the place of a transition in it
Place = tuple[list[Transition], int]


def walk(place: Place, n_step: int) -> tuple[Transition, float]:
    """The n-step return from there, as far as the episode is known, and its discount."""
    episode, first = place
    steps = episode[first : first + n_step]
    reward = sum(GAMMA**k * step.reward for k, step in enumerate(steps))
    last = steps[-1]
    return steps[0]._replace(reward=reward, next_obs=last.next_obs, terminated=last.terminated), GAMMA ** len(steps)


class World:
    """Environments that reset at random, a replay that is told, and a list that remembers."""

    def __init__(self, capacity: int, num_envs: int, n_step: int = 1) -> None:
        self.num_envs = num_envs
        self.replay = poisoned(capacity, num_envs, n_step=n_step)
        self.remembered: deque[list[Transition]] = deque(maxlen=-(-capacity // num_envs))  # steps of all environments
        self.places: deque[list[Place]] = deque(maxlen=self.remembered.maxlen)
        self.counter = itertools.count(1)
        self.begin()

    def numbers(self) -> list[float]:
        return [float(next(self.counter)) for _ in range(self.num_envs)]

    def begin(self) -> None:
        self.obs = self.numbers()
        self.replay.begin(wide(self.obs, OBS))
        self.remembered.append([])
        self.places.append([])
        self.episodes: list[list[Transition]] = [[] for _ in range(self.num_envs)]

    def step(self, valid: list[bool], terminated: list[bool], truncated: list[bool] | None = None) -> None:
        action, reward, next_obs = self.numbers(), self.numbers(), self.numbers()
        self.replay.add(
            wide(action, ACTION), torch.tensor(reward), torch.tensor(terminated), wide(next_obs, OBS), np.array(valid)
        )
        columns = zip(self.obs, action, reward, next_obs, terminated, strict=True)
        step = [Transition(*column) for column in columns]
        self.remembered.append([transition for transition, ok in zip(step, valid, strict=True) if ok])
        self.places.append([])
        for env, (transition, ok) in enumerate(zip(step, valid, strict=True)):
            if ok:
                self.episodes[env].append(transition)
                self.places[-1].append((self.episodes[env], len(self.episodes[env]) - 1))
            if not ok or transition.terminated or (truncated is not None and truncated[env]):
                self.episodes[env] = []
        self.obs = next_obs

    def store_and_load(self, n_step: int | None = None) -> None:
        """Go on with a copy, perhaps one with another number of steps."""
        capacity = self.replay._obs.shape[0] * self.num_envs - self.num_envs
        loaded = poisoned(capacity, self.num_envs, n_step=n_step or self.replay.n_step)
        for start in range(self.replay.oldest, self.replay.newest, 3):
            loaded.load_rows(start, self.replay.rows(start, min(start + 3, self.replay.newest)))
        tensors, counters = self.replay.state()
        loaded.load_state(tensors, counters)
        assert (loaded._first, loaded.newest) == (self.replay._first, self.replay.newest)
        self.replay = loaded

    def check(self) -> None:
        expected = [transition for step in self.remembered for transition in step]
        assert len(self.replay) == self.replay.size == len(expected)
        assert everything(self.replay) == expected
        if self.replay.size:
            self.check_sample("reference")

    def check_sample(self, backend: Any) -> None:
        """Draw every transition once, and compare with the episodes."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randint", lambda size, *_, **__: torch.arange(size))
            batch = self.replay.sample(self.replay.size, backend=backend)
        expected = [walk(place, self.replay.n_step) for step in self.places for place in step]
        assert rows(batch) == [transition for transition, _ in expected]
        if self.replay.n_step == 1:
            assert batch.discount is None
        else:
            assert batch.discount is not None
            assert batch.discount.dtype == torch.float32
            assert batch.discount.tolist() == [discount for _, discount in expected]


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, list[Any]]:
    num_envs = draw(st.integers(1, 5))
    capacity = draw(st.integers(1, 20))
    flags = st.lists(st.booleans(), min_size=num_envs, max_size=num_envs)
    mostly = st.lists(st.sampled_from([True, True, True, False]), min_size=num_envs, max_size=num_envs)
    step, store = st.tuples(mostly, flags), st.tuples(st.just("store"), st.integers(1, 4))
    event = st.one_of(*[step] * 6, st.tuples(flags, flags), st.just("begin"), store)
    return capacity, num_envs, draw(st.lists(event, max_size=80))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(histories())
def test_what_can_be_drawn_is_what_happened_last(history: tuple[int, int, list[Any]]) -> None:
    capacity, num_envs, events = history
    world = World(capacity, num_envs)
    for event in events:
        if event == "begin":
            world.begin()
        elif event[0] == "store":
            world.store_and_load(n_step=event[1])
        else:
            world.step(*event)
        world.check()
    expected = {walk(place, world.replay.n_step)[0] for step in world.places for place in step}
    if expected:
        assert set(rows(world.replay.sample(100 * len(expected) + 200))) == expected
    else:
        with pytest.raises(ValueError, match="empty"):
            world.replay.sample(1)


def random_world(
    capacity: int, num_envs: int, num_steps: int, resets: float = 0.2, seed: int = 0, n_step: int = 1
) -> World:
    world, rng = World(capacity, num_envs, n_step), np.random.default_rng(seed)
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


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("n_step", [1, 2, 3, 5, 12])
def test_n_step_returns_are_walks_through_the_episodes(n_step: int, num_envs: int, backend: str) -> None:
    """In a ring of eight rows that wraps many times; a reset follows every truncation, and most terminations."""
    world, rng = World(7 * num_envs, num_envs, n_step), np.random.default_rng(n_step)
    done = np.zeros(num_envs, dtype=np.bool_)
    for step in range(160):
        if rng.random() < 0.05:
            world.begin()
            done[:] = False
        terminated, truncated = (rng.random(num_envs) < 0.12 for _ in range(2))
        valid = ~done & (rng.random(num_envs) >= 0.03)
        world.step(valid.tolist(), terminated.tolist(), truncated.tolist())
        done = valid & (truncated | (terminated & (rng.random(num_envs) < 0.7)))
        if step % 50 == 30:
            world.store_and_load()
        if world.replay.size and (backend == "reference" or step % 7 == 0):
            world.check_sample(backend)
    world.check()


def test_a_single_step_takes_nothing_more_and_n_steps_draw_the_same() -> None:
    single, several = (random_world(40, 3, 60, n_step=n_step).replay for n_step in (1, 3))
    assert single._valid_on_device is None
    batches = [replay.sample(50) for replay in (single, several)]
    assert batches[0].discount is None
    assert all(torch.equal(part, other) for part, other in zip(batches[0][:2], batches[1][:2], strict=True))
    assert not torch.equal(batches[0].reward, batches[1].reward)
    assert [len(part) for part in Replay(4, 2, OBS, ACTION).transitions()[:5]] == [0] * 5


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_n_steps_on_a_gpu(backend: Any) -> None:
    """A graph that was recorded when the ring was nearly empty follows it; a step is one copy, without a wait."""
    rng = np.random.default_rng(0)
    with pretended() as gpu:
        host, device = (Replay(30, 3, OBS, ACTION, device, n_step=3, gamma=0.9) for device in ("cpu", "cuda"))
        draws, graph = [PhiloxState(3, device, 2) for device in ("cpu", "cuda")], torch.cuda.CUDAGraph()
        for step in range(30):
            obs, action, reward = (rng.normal(size=size).astype(np.float32) for size in ((3, OBS), (3, ACTION), 3))
            ends, valid = rng.random(3) < 0.2, rng.random(3) < 0.9
            for replay in (host, device):
                if step in (0, 17):
                    replay.begin(obs)
                gpu.counts.clear()
                replay.add(action, reward, ends, obs, valid)
            assert gpu.counts["copies to device"] == 1
            assert gpu.counts["waits"] == 0
            if step == 0:
                with torch.cuda.graph(graph):
                    batch = device.sample(64, draws[1], backend)
            graph.replay()
            for found, expected in zip(batch, host.sample(64, draws[0]), strict=True):
                assert torch.equal(found.cpu(), expected)
            for rng_state in draws:
                rng_state.advance()


@pytest.mark.parametrize("resets", [0.0, 0.3])
@pytest.mark.parametrize("n_step", [1, 3])
def test_sampling_is_uniform(resets: float, n_step: int) -> None:
    world = random_world(capacity=60, num_envs=3, num_steps=131, resets=resets, n_step=n_step)
    size, draws = world.replay.size, 200_000
    _, counts = world.replay.sample(draws).obs[:, 0].unique(return_counts=True)
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

    with pytest.raises(UsageError, match="the stored replay buffer has a different"):
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


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize(("num_envs", "available"), [(1, 10_000), (16, 5_000_000), (3, 7 * 2**20), (64, 3 * 2**30)])
def test_a_replay_too_large_is_refused_with_a_size_that_fits(
    num_envs: int, available: int, n_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastsac.replay, "available_bytes", lambda device: available)
    capacity = 10**9
    with pytest.raises(UsageError) as error:
        Replay(capacity, num_envs, 17, 6, n_step=n_step)
    message = str(error.value)
    needed = bytes_needed(-(-capacity // num_envs) + 1, num_envs, 17, 6, n_step)
    assert f"{needed / 2**30:.2f} GiB" in message
    assert f"{available / 2**30:.2f} GiB" in message
    assert "\n" not in message
    advised = int(re.search(r"--buffer-size (\d+) fits", message)[1])  # type: ignore[index]
    assert advised >= num_envs
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: torch.empty(0))
    Replay(advised, num_envs, 17, 6, n_step=n_step)  # passes the forecast
    rows_there = -(-advised // num_envs) + 1
    assert 0.8 * available < bytes_needed(rows_there, num_envs, 17, 6, n_step) <= available


@pytest.mark.parametrize("n_step", [1, 2])
def test_the_forecast_counts_every_byte(n_step: int) -> None:
    replay = Replay(100, 4, 17, 6, n_step=n_step)
    held = [value for value in vars(replay).values() if isinstance(value, torch.Tensor) and value is not replay._span]
    assert bytes_needed(replay.num_rows, 4, 17, 6, n_step) == sum(tensor.nbytes for tensor in held)


def test_where_nothing_fits_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastsac.replay, "available_bytes", lambda device: 100)
    with pytest.raises(UsageError, match="no --buffer-size fits"):
        Replay(1000, 4, 17, 6)
