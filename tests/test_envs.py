import re
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Tuple

from fastsac.env_backends import EnvSpec
from fastsac.envs import Step, VectorEnv, environment_seeds, make_envs
from fastsac.errors import FastsacError, UsageError
from fastsac.spaces import Spaces, read_spaces

LOW, HIGH = np.array([-1.0, 0.0], np.float32), np.array([3.0, 10.0], np.float32)
REALS = Box(-np.inf, np.inf, (2,), np.float32)
UNIT = Box(-1.0, 1.0, (2,), np.float32)


class Countdown(gymnasium.Env):
    """Observes (episode, time in it) and ends at `length`, with reward 1 a step."""

    made: ClassVar[list["Countdown"]] = []
    observation_space, action_space = REALS, Box(LOW, HIGH)

    def __init__(self, ends: str = "terminated") -> None:
        self.ends, self.length, self.episode, self.time = ends, 3, 0, 0
        self.faults: dict[int, str] = {}  # by step of the episode
        self.actions: list[np.ndarray] = []
        self.made.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0.0], np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.actions.append(np.array(action))
        self.time += 1
        fault = self.faults.get(self.time)
        if fault == "raise":
            raise RuntimeError("the simulator\n  broke")
        obs = np.array([self.episode, np.nan if fault == "observation" else self.time], np.float32)
        done = self.time >= self.length
        reward = np.inf if fault == "reward" else 1.0
        return obs, reward, done and self.ends == "terminated", done and self.ends == "truncated", {}


class Fixed(gymnasium.Env):
    """An environment of given spaces."""

    def __init__(self, observation_space: Any = REALS, action_space: Any = UNIT) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}


BAD_SPACES = {
    "FastsacDiscrete-v0": ({"action_space": Discrete(3)}, "Discrete action space"),
    "FastsacUnbounded-v0": ({"action_space": Box(-np.inf, np.inf, (2,), np.float32)}, "unbounded"),
    "FastsacWide-v0": ({"action_space": Box(-np.inf, np.inf, (30,), np.float32)}, "unbounded"),
    "FastsacHalfBounded-v0": ({"action_space": Box(0.0, np.inf, (2,), np.float32)}, "unbounded"),
    "FastsacBogus-v0": ({"action_space": Box(-3.4e38, 3.4e38, (2,), np.float32)}, "unbounded"),
    "FastsacInteger-v0": ({"action_space": Box(0, 3, (2,), np.int64)}, r"Box of int64 \[2\] as its action space"),
    "FastsacTwice-v0": (
        {"observation_space": Dict({"a/b": Box(0.0, 1.0, (1,)), "a": Dict({"b": Box(0.0, 1.0, (2,))})})},
        "has two observations that are both named 'a/b' after flattening",
    ),
    "FastsacUnnamed-v0": ({"observation_space": Dict({"": Box(0.0, 1.0, (1,))})}, "an observation with an empty name"),
    "FastsacFixed-v0": (
        {"action_space": Box(np.array([0.0, 1.0]), np.array([0.0, 2.0]))},
        "has an action whose low bound is not below its high bound",
    ),
    "FastsacScalar-v0": ({"action_space": Box(-1.0, 1.0, ())}, r"Box of float32 \[\] as its action space"),
    "FastsacMode-v0": (
        {"observation_space": Discrete(3)},
        "Discrete observation, but SAC needs a Box: convert it with --env-wrappers gymnasium.wrappers:Flatten",
    ),
    "FastsacNested-v0": (
        {"observation_space": Tuple([UNIT, Dict({"b": Discrete(2)})])},
        "Discrete observation 1/b, but",
    ),
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(gymnasium.registry)
    gymnasium.register("FastsacCountdown-v0", entry_point=Countdown, disable_env_checker=True)
    for env_id, (kwargs, _) in BAD_SPACES.items():
        gymnasium.register(env_id, entry_point=Fixed, kwargs=kwargs, disable_env_checker=True)
    observed = Dict({"b": Box(0.0, 1.0, (2, 2), np.float32), "a": Box(2.0, 3.0, (), np.float64), "c": Box(4, 9, (1,))})
    gymnasium.register("FastsacDict-v0", entry_point=Fixed, kwargs={"observation_space": observed})
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(before)
    Countdown.made.clear()


@pytest.fixture
def make() -> Iterator[Any]:
    opened: list[VectorEnv] = []

    def open_envs(env_id: str, num_envs: int, seed: int, *spec: Any) -> VectorEnv:
        opened.append(make_envs(EnvSpec(env_id, *spec), num_envs, seed))
        return opened[-1]

    yield open_envs
    for envs in opened:
        envs.close()


def zeros(envs: VectorEnv) -> np.ndarray:
    return np.zeros((envs.num_envs, envs.spaces.action_size), np.float32)


def play(envs: VectorEnv, num_steps: int, seed: int = 0) -> tuple[np.ndarray, list[Step]]:
    """Random actions [T, N, A], and the steps."""
    shape = (num_steps, envs.num_envs, envs.spaces.action_size)
    actions = np.random.default_rng(seed).uniform(-1.0, 1.0, shape).astype(np.float32)
    steps = []
    for action in actions:
        envs.send(action)
        steps.append(envs.recv())
    return actions, steps


def check_autoreset_rule(steps: list[Step]) -> None:
    """Invalid rows are those after a done row and no others, with reward 0."""
    done = np.zeros(len(steps[0].valid), bool)
    for step in steps:
        np.testing.assert_array_equal(step.valid, ~done)
        done = step.terminated | step.truncated
        assert not done[~step.valid].any()
        assert (step.reward[~step.valid] == 0.0).all()


def hopper_fell(obs: np.ndarray) -> np.ndarray:
    """Hopper-v5's own rule, from its documentation."""
    return ~((obs[:, 0] > 0.7) & (np.abs(obs[:, 1]) < 0.2) & (np.abs(obs[:, 1:]) < 100.0).all(1))


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_hopper_shows_its_true_last_observation_and_marks_reset_rows(backend: str, make: Any) -> None:
    envs = make("Hopper-v5", 4, 0, backend)
    first = envs.reset()
    assert first.dtype == np.float32
    assert first.shape == (4, 11)
    _, steps = play(envs, 300)
    check_autoreset_rule(steps)
    assert sum(step.terminated.sum() for step in steps) > 20
    for step in steps:
        assert [part.dtype for part in step] == [np.float32, np.float32, np.bool_, np.bool_, np.bool_]
        assert [part.shape for part in step] == [(4, 11), (4,), (4,), (4,), (4,)]
        np.testing.assert_array_equal(hopper_fell(step.obs), step.terminated)
        started = step.obs[~step.valid]
        np.testing.assert_allclose(started, np.broadcast_to([1.25] + [0.0] * 10, started.shape), atol=5.1e-3)


@pytest.mark.parametrize("ends", ["terminated", "truncated"])
def test_gymnasium_rows_in_order(ends: str, make: Any) -> None:
    envs = make("FastsacCountdown-v0", 2, 0)
    for env in Countdown.made:
        env.ends = ends
    Countdown.made[1].length = 2
    np.testing.assert_array_equal(envs.reset(), [[1, 0], [1, 0]])
    _, steps = play(envs, 7)
    check_autoreset_rule(steps)
    rows = [[(*step.obs[i], getattr(step, ends)[i], step.valid[i]) for step in steps] for i in range(2)]
    yes, no = True, False
    assert rows[0] == [
        (1, 1, no, yes), (1, 2, no, yes), (1, 3, yes, yes), (2, 0, no, no), (2, 1, no, yes), (2, 2, no, yes),
        (2, 3, yes, yes),
    ]  # fmt: skip
    assert rows[1] == [
        (1, 1, no, yes), (1, 2, yes, yes), (2, 0, no, no), (2, 1, no, yes), (2, 2, yes, yes), (3, 0, no, no),
        (3, 1, no, yes),
    ]  # fmt: skip
    other = {"terminated": "truncated", "truncated": "terminated"}[ends]
    assert not any(getattr(step, other).any() for step in steps)
    envs.reset()
    assert play(envs, 1)[1][0].valid.all()  # a reset of all leaves nothing to reset


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_a_time_limit_truncates_and_does_not_terminate(backend: str, make: Any) -> None:
    envs = make("Pendulum-v1", 2, 0, backend)
    envs.reset()
    _, steps = play(envs, 402)
    assert not any(step.terminated.any() for step in steps)
    assert [t for t, step in enumerate(steps) if step.truncated.all()] == [199, 400]
    assert [t for t, step in enumerate(steps) if not step.valid.any()] == [200, 401]
    check_autoreset_rule(steps)


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_steps_that_were_returned_do_not_change_later(backend: str, make: Any) -> None:
    envs = make("Pendulum-v1", 3, 0, backend)
    envs.reset()
    envs.send(zeros(envs))
    step = envs.recv()
    kept = Step(*(part.copy() for part in step))
    play(envs, 205)
    for part, copy in zip(step, kept, strict=True):
        np.testing.assert_array_equal(part, copy)


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_pendulum_gets_its_own_action_in_newton_metres(backend: str, make: Any) -> None:
    """Row i obeys the equation of motion with action i scaled to [-2, 2]: units, and the order of the rows."""
    envs = make("Pendulum-v1", 8, 0, backend)
    obs = envs.reset()
    actions, steps = play(envs, 150)
    for action, step in zip(actions, steps, strict=True):
        torque = 2.0 * action[:, 0]
        velocity = np.clip(obs[:, 2] + 0.05 * (15.0 * obs[:, 1] + 3.0 * torque), -8.0, 8.0)
        np.testing.assert_allclose(step.obs[:, 2], velocity, atol=1e-3)
        cost = np.arctan2(obs[:, 1], obs[:, 0]) ** 2 + 0.1 * obs[:, 2] ** 2 + 0.001 * torque**2
        np.testing.assert_allclose(step.reward, -cost, atol=2e-3)
        obs = step.obs


def test_actions_are_scaled_to_asymmetric_bounds(make: Any) -> None:
    envs = make("FastsacCountdown-v0", 2, 0)
    envs.reset()
    envs.send(np.array([[-1, -1], [1, 1]], np.float32))
    envs.recv()
    envs.send(np.array([[0, 0.5], [-0.5, 0]], np.float32))
    envs.recv()
    np.testing.assert_array_equal(Countdown.made[0].actions, [[-1, 0], [1, 7.5]])
    np.testing.assert_array_equal(Countdown.made[1].actions, [[3, 10], [0, 5]])


def test_envpool_returns_the_environments_in_order(make: Any) -> None:
    envs = make("Hopper-v5", 8, 0)
    envs.reset()
    pool, rng = envs._backend._pool, np.random.default_rng(0)
    for _ in range(300):
        pool.send(rng.uniform(-1.0, 1.0, (8, 3)))
        np.testing.assert_array_equal(pool.recv()[-1]["env_id"], np.arange(8))


@pytest.mark.parametrize(
    ("env_id", "columns"),
    [
        ("WalkerWalk-v1", {"height": [0], "orientations": range(1, 15), "velocity": range(15, 24)}),
        ("FastsacDict-v0", {"a": [0], "b": range(1, 5), "c": [5]}),
    ],
)
def test_dict_observations_are_flattened_alphabetically(env_id: str, columns: dict[str, Any], make: Any) -> None:
    envs = make(env_id, 3, 0)
    raw: list[Any] = []
    take = envs._backend.reset
    envs._backend.reset = lambda seeds: raw.append(take(seeds)) or raw[0]
    obs = envs.reset()
    assert obs.dtype == np.float32
    assert obs.shape == (3, envs.spaces.obs_size) == (3, sum(map(len, columns.values())))
    assert sorted(raw[0]) == list(columns)
    for key, where in columns.items():
        np.testing.assert_array_equal(obs[:, list(where)], raw[0][key].reshape(3, -1).astype(np.float32))


@pytest.mark.parametrize("keys", ["a", "ac"])
def test_flatten_refuses_missing_keys_and_wrong_shapes(keys: str) -> None:
    spaces = Spaces({"a": (2,), "b": ()}, LOW, HIGH)
    with pytest.raises(ValueError, match="keys"):
        spaces.flatten({key: np.zeros((3, 2)) for key in keys})
    with pytest.raises(ValueError, match="observation b must be"):
        spaces.flatten({"a": np.zeros((3, 2)), "b": np.zeros((3, 1))})


def test_neighbouring_seeds_share_no_environment_seed() -> None:
    seeds = [value for seed in range(40) for value in environment_seeds(seed, 32)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= value < 2**31 for value in seeds)


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_seeds_decide_what_is_observed(backend: str, make: Any) -> None:
    first = [make("Hopper-v5", 4, seed, backend).reset() for seed in (0, 1)]
    assert len(np.unique(np.concatenate(first), axis=0)) == 8
    again = make("Hopper-v5", 4, 0, backend)
    np.testing.assert_array_equal(again.reset(), first[0])
    once_more = make("Hopper-v5", 4, 0, backend)
    once_more.reset()
    for a, b in zip(play(again, 60)[1], play(once_more, 60)[1], strict=True):
        np.testing.assert_array_equal(a.obs, b.obs)


@pytest.mark.parametrize("env_id", ["Hopper-v5", "FastsacCountdown-v0"])
def test_actions_of_wrong_shape_or_type_are_refused_on_every_step(env_id: str, make: Any) -> None:
    envs = make(env_id, 3, 0)
    envs.reset()
    for _ in range(3):
        good = zeros(envs)
        for bad in (good[:, :1], good[:2], good[0], np.concatenate([good, good], 1), good[:, :, None]):
            with pytest.raises(ValueError, match="actions must be float32"):
                envs.send(bad)
        for dtype in (np.float64, np.int32):
            with pytest.raises(ValueError, match="actions must be float32"):
                envs.send(good.astype(dtype))
        envs.send(good)
        assert envs.recv().valid.all()


def one_line(error: pytest.ExceptionInfo[FastsacError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("env_id", ["Hopper-v5", "FastsacCountdown-v0"])
def test_a_non_finite_action_is_named(env_id: str, value: float, make: Any) -> None:
    envs = make(env_id, 3, 0)
    envs.reset()
    play(envs, 2)
    action = zeros(envs)
    action[1, -1] = value
    with pytest.raises(FastsacError) as error:
        envs.send(action)
    assert one_line(error).startswith(f"{env_id}, environment 1, step 3: action not finite")


@pytest.mark.parametrize("fault", ["reward", "observation"])
def test_a_non_finite_outcome_is_named(fault: str, make: Any) -> None:
    envs = make("FastsacCountdown-v0", 3, 0)
    envs.reset()
    Countdown.made[2].faults[2] = fault
    play(envs, 1)
    envs.send(zeros(envs))
    with pytest.raises(FastsacError) as error:
        envs.recv()
    assert one_line(error).startswith(f"FastsacCountdown-v0, environment 2, step 2: {fault} not finite")


def test_an_environment_that_raises_is_named(make: Any) -> None:
    envs = make("FastsacCountdown-v0", 2, 0)
    envs.reset()
    Countdown.made[1].faults[2] = "raise"
    with pytest.raises(FastsacError) as error:
        play(envs, 2)
    assert one_line(error) == "FastsacCountdown-v0 failed at step 2: RuntimeError: the simulator broke"


def test_what_is_not_finite_is_named_in_one_line_however_wide(make: Any) -> None:
    envs = make("Ant-v5", 2, 0)
    obs = envs.reset()
    obs[1, 40] = np.nan
    with pytest.raises(FastsacError) as error:
        envs._check_finite("observation", obs)
    assert one_line(error) == "Ant-v5, environment 1, step 0: observation not finite: nan in column 40"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_scaled_actions_never_leave_the_space(dtype: Any) -> None:
    space = Box(np.array([[-0.3, -7.1]]).astype(dtype), np.array([[1.1, 0.4]]).astype(dtype), dtype=dtype)
    spaces = read_spaces("", REALS, space)
    for number in np.linspace(-1.0, 1.0, 1001, dtype=np.float32):
        (action,) = spaces.scale(np.full((1, 2), number)).astype(dtype)
        assert space.contains(action)


def test_making_a_pool_anew_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        make_envs(EnvSpec("Pendulum-v1"), 2, 0).reset(seed=1)


@pytest.mark.parametrize("env_id", BAD_SPACES)
def test_unsupported_spaces_are_refused(env_id: str) -> None:
    with pytest.raises(UsageError, match=BAD_SPACES[env_id][1]) as error:
        make_envs(EnvSpec(env_id), 2, 0)
    assert one_line(error).startswith(env_id)


@pytest.mark.parametrize(
    ("env_id", "backend", "message"),
    [
        ("CartPole-v1", "envpool", "CartPole-v1 has a Discrete action space"),
        ("HalfCheeta-v5", "auto", "'HalfCheeta-v5'; did you mean HalfCheetah-v5, "),
        ("HalfCheeta-v5", "envpool", "'HalfCheeta-v5'; did you mean HalfCheetah-v5, "),
        ("HalfCheeta-v5", "gymnasium", "'HalfCheeta-v5'; did you mean HalfCheetah-v5, "),
        ("FastsacCountdwn-v0", "auto", "did you mean FastsacCountdown-v0"),
        ("WalkerWalk-v1", "gymnasium", "unknown environment 'WalkerWalk-v1'"),
        ("", "auto", "unknown environment ''"),
        ("no_such_module_here:Thing-v0", "auto", "no_such_module_here"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(env_id: str, backend: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        make_envs(EnvSpec(env_id, backend), 2, 0)
    one_line(error)


def test_a_module_is_imported_for_its_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    registers = "import gymnasium\ngymnasium.register('FastsacImported-v0', entry_point='fastsac_imported:Env')\n"
    spaces = "space = gymnasium.spaces.Box(-1.0, 1.0, (2,))\n"
    body = "class Env(gymnasium.Env):\n    observation_space = action_space = space\n"
    (tmp_path / "fastsac_imported.py").write_text(registers + spaces + body)
    monkeypatch.syspath_prepend(tmp_path)
    assert make("fastsac_imported:FastsacImported-v0", 2, 0).spaces.obs_size == 2
    with pytest.raises(UsageError, match="cannot import 'no_such_module_here'"):
        make_envs(EnvSpec("no_such_module_here:Thing-v0"), 2, 0)


def test_a_missing_dependency_is_not_an_unknown_environment() -> None:
    def entry_point() -> None:
        raise gymnasium.error.DependencyNotInstalled("Box2D is not installed")

    gymnasium.register("FastsacNeedy-v0", entry_point=entry_point)
    with pytest.raises(FastsacError, match="Box2D is not installed") as error:
        make_envs(EnvSpec("FastsacNeedy-v0"), 2, 0)
    assert "unknown" not in one_line(error)
