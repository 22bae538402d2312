"""Environments of the user's own: keyword arguments, wrappers, processes, and environments from Python."""

import dataclasses
import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Tuple
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RescaleAction, TimeLimit

from fastsac import SAC, Config, FastsacError, UsageError
from fastsac.env_backends import EnvSpec
from fastsac.env_gymnasium import _Async
from fastsac.envs import environment_seeds, make_envs
from fastsac.errors import EnvironmentFailure
from tests.faulty import Faulty
from tests.runs import SMALL, state_of, stopped_at
from tests.test_cli import TINY, run

FAULTY = "tests.faulty:Faulty-v0"
ARM = "tests.test_own_envs:Arm-v0"
CONFIG = dataclasses.replace(SMALL, total_steps=240, checkpoint_replay=True)


class Arm(gymnasium.Env):
    """Its numbers tell where they came from: nested observations, a matrix of float64 as the action."""

    observation_space = Dict(
        {
            "joints": Tuple(
                [Box(-1e3, 1e3, (2, 2)), Dict({"b": Box(-1e3, 1e3, (), np.float64), "a": Box(0, 9, (1,))})]
            ),
            "goal": Box(-1e3, 1e3, (3,)),
        }
    )

    def __init__(self, reach=1.0, length=20):
        self.action_space = Box(np.full((2, 3), -reach), np.arange(1.0, 7.0).reshape(2, 3) * reach, dtype=np.float64)
        self.length = length
        self.actions = []

    def observation(self):
        first = np.array([[self.time, 1.0], [2.0, 3.0]], np.float32)
        parts = {"b": np.array(5.0), "a": np.array([4.0], np.float32)}
        return {"joints": (first, parts), "goal": self.goal.copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.goal = 0, self.np_random.normal(size=3).astype(np.float32)
        return self.observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        self.time += 1
        return self.observation(), -float(np.square(action).sum()), False, self.time == self.length, {}


class Doubled(gymnasium.RewardWrapper):
    def reward(self, reward):
        return 2.0 * reward


class Increased(gymnasium.RewardWrapper):
    def reward(self, reward):
        return reward + 1.0


class Shifting(gymnasium.ObservationWrapper):
    """Other shapes once the episode has begun."""

    def observation(self, obs):
        self.count = getattr(self, "count", 0) + 1
        return obs if self.count < 15 else np.append(obs, np.float32(0.0))


class Special(Exception):
    """Cannot travel between processes: it is made from two arguments, and has only one of them afterwards."""

    def __init__(self, what, where):
        super().__init__(f"{what} in {where}")


class Breaking(gymnasium.RewardWrapper):
    def reward(self, reward):
        raise Special("a leak", "the third joint")


class Raising(gymnasium.Wrapper):
    def __init__(self, env):
        raise RuntimeError("no licence for it")


ONE = Faulty()

gymnasium.register("Arm-v0", Arm)


def here(*names):
    return tuple(f"tests.test_own_envs:{name}" for name in names)


def spec(env_id=FAULTY, **options):
    return EnvSpec.of(Config(env_id=env_id, **options))


def play(envs, steps, seed=0):
    """Every number of some steps with random actions."""
    rng = np.random.default_rng(seed)
    taken = [envs.reset()]
    for _ in range(steps):
        envs.send(rng.uniform(-1, 1, (envs.num_envs, envs.spaces.action_size)).astype(np.float32))
        taken.extend(envs.recv())
    envs.close()
    return taken


# keyword arguments, wrappers and time limits


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_keyword_arguments_reach_the_environment(backend):
    """HalfCheetah's reward is what it runs, times a weight, less what its actions cost, times another."""
    weights = {"forward_reward_weight": 0.0, "ctrl_cost_weight": 3.0, "reset_noise_scale": 0.0}
    envs = make_envs(spec("HalfCheetah-v5", env_backend=backend, env_kwargs=weights), 2, 0)
    obs = envs.reset()
    np.testing.assert_array_equal(obs, np.zeros_like(obs))
    action = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6)
    envs.send(action)
    np.testing.assert_allclose(envs.recv().reward, -3.0 * np.square(action).sum(1), rtol=1e-5)
    envs.close()


@pytest.mark.parametrize(
    ("env_id", "options", "message"),
    [
        (
            "HalfCheetah-v5",
            {"env_kwargs": {"ctrl_weight": 1}},
            "EnvPool could not create HalfCheetah-v5 with --env-kwa",
        ),
        ("Pendulum-v1", {"env_kwargs": {"g": 1, "mass": 2}, "env_backend": "gymnasium"}, "keyword argument 'mass'"),
        (FAULTY, {"env_wrappers": here("Raising")}, "--env-wrappers tests.test_own_envs:Raising: RuntimeError: no lic"),
        (FAULTY, {"env_wrappers": here("Missing")}, "--env-wrappers tests.test_own_envs:Missing: module 'tests.test_"),
        (FAULTY, {"env_wrappers": ("no_such_module:A",)}, "no_such_module:A: No module named 'no_such_module'"),
        (FAULTY, {"env_wrappers": here("FAULTY")}, "it is not callable"),
        (FAULTY, {"env_wrappers": ("gymnasium.wrappers:TimeLimit",)}, "max_episode_steps"),
        ("Ant-v5", {"env_wrappers": here("Doubled"), "env_backend": "envpool"}, "use gymnasium or auto"),
        (FAULTY, {"env_kwargs": {"num_envs": 3}}, "must not contain 'num_envs': --num-envs and --env-backend set it"),
        ("Ant-v5", {"env_kwargs": {"seed": 3}}, "must not contain 'seed': --seed sets it"),
    ],
    ids=str,
)
def test_what_the_environment_does_not_take_is_told_in_one_line(env_id, options, message):
    with pytest.raises(UsageError) as error:
        make_envs(spec(env_id, **options), 2, 0)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["auto", "gymnasium-async"])
def test_wrappers_are_applied_the_innermost_first(backend):
    outcomes = [
        play(make_envs(spec(env_backend=backend, env_wrappers=here(*names)), 1, 0), 3)[2::5]
        for names in ((), ("Doubled", "Increased"), ("Increased", "Doubled"))
    ]
    plain, one, other = (np.array(rewards) for rewards in outcomes)
    np.testing.assert_allclose(one, 2 * plain + 1, rtol=1e-6)
    np.testing.assert_allclose(other, 2 * (plain + 1), rtol=1e-6)


@pytest.mark.parametrize("backend", ["envpool", "gymnasium", "gymnasium-async"])
def test_episodes_are_truncated_after_so_many_steps(backend):
    envs = make_envs(spec("Pendulum-v1", env_backend=backend, max_episode_steps=7), 2, 0)
    numbers = play(envs, 24)
    terminated, truncated, valid = (np.array(numbers[place::5])[:, 0] for place in (3, 4, 5))
    assert np.flatnonzero(truncated).tolist() == [6, 14, 22]
    assert np.flatnonzero(~valid).tolist() == [7, 15, 23]
    assert not terminated.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-kwargs", "{frame_skip: 2}"], "--env-kwargs must be a JSON object such as '{\"frame_skip\": 2}'"),
        (["--env-kwargs", "[1]"], "--env-kwargs must be a JSON object"),
        (["--env-kwargs", '{"frame_skip": NaN}'], "--env-kwargs must be a JSON object"),
        (["--env-wrappers", "Doubled"], "--env-wrappers must be given as module:Wrapper"),
        (["--env-backend", "python"], "the environments Pendulum-v1 come from Python, and none were passed"),
        (["--env-backend", "python", "--max-episode-steps", "3"], "--max-episode-steps has no effect on environments"),
        (["--max-episode-steps", "0"], "--max-episode-steps must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_bad_options_of_the_environment_leave_nothing_behind(tmp_path, capsys, arguments, message):
    assert run("train", *TINY, *arguments, "--run-dir", tmp_path / "run") == 2
    last = capsys.readouterr().err.strip()
    assert last.count("\n") == 0
    assert last.startswith(f"fastsac: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["auto", "gymnasium-async"])
def test_a_wrapper_that_changes_shapes_in_mid_run(tmp_path, capsys, backend):
    """It has trained by then, and keeps its checkpoints."""
    options = ["--env-id", FAULTY, "--env-backend", backend, "--env-wrappers", *here("Shifting")]
    options += ["--eval-every", "0", "--checkpoint-every", "10", "--num-envs", "2"]
    assert run("train", *TINY, *options, "--run-dir", tmp_path / "run") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"fastsac: {FAULTY} failed at step 14: observation array must be [2], got [3]"
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2


# spaces


@pytest.mark.parametrize("backend", ["auto", "gymnasium-async"])
def test_nested_observations_and_matrices_of_actions(backend):
    envs = make_envs(spec(ARM, env_backend=backend, env_kwargs={"reach": 0.5}), 2, 0)
    assert envs.spaces.obs_shapes == {"goal": (3,), "joints/0": (2, 2), "joints/1/a": (1,), "joints/1/b": ()}
    assert envs.spaces.action_size == 6
    goal = [np.random.default_rng(seed).normal(size=3) for seed in environment_seeds(0, 2)]
    obs, after, reward, *_ = play(envs, 1)
    rest = np.array([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]] * 2)
    np.testing.assert_array_equal(obs, np.concatenate([goal, rest], 1).astype(np.float32))
    np.testing.assert_array_equal(after[:, 3], [1.0, 1.0])
    action = np.random.default_rng(0).uniform(-1, 1, (2, 2, 3)).astype(np.float32)
    low, high = np.full((2, 3), -0.5), np.arange(1.0, 7.0).reshape(2, 3) * 0.5
    np.testing.assert_allclose(reward, -np.square(low + (action + 1) / 2 * (high - low)).sum((1, 2)), rtol=1e-5)


def test_a_policy_answers_in_the_environments_own_shape(tmp_path):
    trained = SAC(dataclasses.replace(CONFIG, env_id=ARM))
    trained.learn(run_dir=tmp_path)
    for agent in (trained, SAC.load(tmp_path)):
        env = gymnasium.make(ARM)
        obs, _ = env.reset(seed=0)
        action = agent.predict(obs)
        assert action.shape == (2, 3)
        assert env.action_space.contains(action.astype(np.float64))
        first, parts = obs["joints"]
        five = {
            "goal": np.stack([obs["goal"]] * 5),
            "joints": (np.stack([first] * 5), {key: np.stack([part] * 5) for key, part in parts.items()}),
        }
        actions = agent.predict(five)
        np.testing.assert_allclose(actions, np.stack([action] * 5), rtol=1e-5)
        with pytest.raises(ValueError, match=re.escape("has the keys ['goal'], expected ['goal', 'joints/0',")):
            agent.predict({"goal": obs["goal"]})
        agent.close()


# environments in processes of their own


def test_processes_give_the_numbers_of_one_process():
    one, other = (play(make_envs(spec(env_backend=name), 3, 5), 60) for name in ("gymnasium", "gymnasium-async"))
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def processes():
    envs = make_envs(spec(env_backend="gymnasium-async"), 2, 0)
    envs.reset()
    yield envs, envs._backend._envs.processes
    envs.close()
    assert not any(process.is_alive() for process in envs._backend._envs.processes)


def test_a_process_that_dies_is_named(processes, capfd):
    envs, (_, second) = processes
    os.kill(second.pid, signal.SIGKILL)
    second.join()
    with pytest.raises(FastsacError, match="ChildProcessError: the process of environment 1 has ended with status -9"):
        play(envs, 2)
    assert capfd.readouterr().err == ""


def test_a_process_that_dies_while_it_steps_is_named(processes, capfd):
    envs, (_, second) = processes
    os.kill(second.pid, signal.SIGSTOP)  # so that it does not answer
    envs.send(np.zeros((2, 1), np.float32))
    os.kill(second.pid, signal.SIGKILL)
    with pytest.raises(FastsacError, match="ChildProcessError: the process of environment 1 has ended with status -9"):
        envs.recv()
    assert capfd.readouterr().err == ""


def test_a_process_that_dies_before_a_checkpoint_is_named(tmp_path, capsys):
    agent = SAC(dataclasses.replace(CONFIG, env_id=FAULTY, env_backend="gymnasium-async", num_envs=2))
    agent.learn(40)
    first, _ = agent.envs._backend._envs.processes
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with pytest.raises(EnvironmentFailure, match="the process of environment 0 has ended with status -9"):
        agent.save(tmp_path / "run")
    agent.close()
    agent.learn(60)  # in new episodes
    agent.close()
    assert capsys.readouterr().err == ""


def test_closing_does_not_wait_for_a_process_that_hangs(processes, monkeypatch):
    monkeypatch.setattr("fastsac.env_gymnasium.PATIENCE", 0.2)
    envs, (first, _) = processes
    os.kill(first.pid, signal.SIGSTOP)
    start = time.monotonic()
    envs.close()
    assert time.monotonic() - start < 3.0


def test_an_interrupt_is_the_parents_to_answer(processes):
    """Ctrl-C reaches every process of the terminal's group."""
    envs, others = processes
    for process in others:
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
    envs.send(np.zeros((2, 1), np.float32))
    envs.recv()


@pytest.mark.parametrize("backend", ["envpool", "gymnasium", "gymnasium-async"])
@pytest.mark.parametrize("method", ["recv", "reset"])
def test_what_was_interrupted_is_followed_by_new_episodes(monkeypatch, backend, method):
    def interrupted(*_):
        raise KeyboardInterrupt

    agent = SAC(dataclasses.replace(CONFIG, env_id="Pendulum-v1", env_backend=backend, num_envs=2))
    if method == "recv":
        agent.learn(60)
    monkeypatch.setattr(agent.envs._backend, method, interrupted)
    if method == "reset" and backend == "gymnasium-async":  # its processes answer, and nobody has listened
        agent.envs._backend._envs.reset_async()
    with pytest.raises(KeyboardInterrupt):
        agent.learn(80)
    agent.learn(120)
    assert agent.steps == 120
    agent.close()


def test_what_a_process_raises_is_told_as_in_one_process(monkeypatch, capfd):
    monkeypatch.setenv("FAULT", "raise:3")
    envs = make_envs(spec(env_backend="gymnasium-async"), 2, 0)
    with pytest.raises(FastsacError, match=f"^{re.escape(FAULTY)} failed at step 3: ValueError: broken$"):
        play(envs, 5)
    envs.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (np.array([1.5]), ""),
        (True, ""),
        (np.zeros(2), "TypeError: the reward must be one number, got float64 [2]"),
        ("3.5", "TypeError: the reward must be one number, got <U3 []"),
    ],
    ids=str,
)
def test_a_reward_is_one_number(monkeypatch, reward, message):
    monkeypatch.setattr(Doubled, "reward", lambda self, _: reward)
    envs = make_envs(EnvSpec("Faulty", "python", own=lambda: Doubled(Faulty())), 2, 0)
    envs.reset()
    envs.send(np.zeros((2, 1), np.float32))
    if message:
        with pytest.raises(FastsacError, match=f"failed at step 1: {re.escape(message)}$"):
            envs.recv()
    else:
        assert envs.recv().reward.tolist() == [float(np.ravel(reward)[0])] * 2


def test_the_interface_before_gymnasium_is_told(monkeypatch):
    envs = make_envs(EnvSpec("Faulty", "python", own=Faulty), 1, 0)
    monkeypatch.setattr(Faulty, "step", lambda self, action: (np.zeros(2), 0.0, False, {}))
    with pytest.raises(FastsacError, match=r"step must return obs, reward, terminated, .*, got 4 values"):
        play(envs, 1)
    monkeypatch.setattr(Faulty, "reset", lambda self, **_: np.zeros(2, np.float32))
    with pytest.raises(FastsacError, match=r"reset must return obs, info .*, got ndarray"):
        envs.reset()


@pytest.mark.parametrize("backend", ["gymnasium", "gymnasium-async"])
def test_an_error_of_the_environments_own_type(backend):
    envs = make_envs(spec(env_backend=backend, env_wrappers=here("Breaking")), 2, 0)
    with pytest.raises(FastsacError, match="failed at step 1: Special: a leak in the third joint"):
        play(envs, 1)
    envs.close()


def test_a_script_ends_that_keeps_its_environments(tmp_path):
    """At the interpreter's end, `multiprocessing` waits for processes that a global variable still holds."""
    script = """
        from fastsac import Config
        from fastsac.env_backends import EnvSpec
        from fastsac.envs import make_envs

        if __name__ == "__main__":
            envs = make_envs(EnvSpec.of(Config(env_id="Pendulum-v1", env_backend="gymnasium-async")), 2, 0)
            envs.reset()
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(script))
    ended = subprocess.run([sys.executable, tmp_path / "mine.py"], timeout=60, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_processes_end_with_the_last_reference():
    envs = make_envs(spec(env_backend="gymnasium-async"), 2, 0)
    others = envs._backend._envs.processes
    os.kill(others[0].pid, signal.SIGKILL)
    with pytest.raises(FastsacError, match="has ended with status -9"):
        play(envs, 2)
    del envs
    gc.collect()
    assert not any(process.is_alive() for process in others)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_leaves_them_alone(processes):
    envs, _ = processes
    if (child := os.fork()) == 0:
        status = 1
        try:
            envs._backend.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    envs.send(np.zeros((2, 1), np.float32))
    envs.recv()


def test_no_process_outlives_the_run(tmp_path):
    """Killed with no time to clean up; the script's own classes are known to the processes."""
    script = tmp_path / "mine.py"
    script.write_text(
        textwrap.dedent("""
            from fastsac import SAC, Callback, Config

            class Told(Callback):
                def on_step(self, agent):
                    if agent.steps == 60:
                        print(*(process.pid for process in agent.envs._backend._envs.processes), flush=True)

            if __name__ == "__main__":
                config = Config(env_id="tests.faulty:Faulty-v0", env_backend="gymnasium-async", num_envs=2)
                SAC(config).learn(callback=Told())
        """)
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    end = time.monotonic() + 30.0
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_script_that_its_processes_would_start_again(tmp_path):
    """What `spawn` cannot do is told, after multiprocessing's own words on it."""
    script = tmp_path / "mine.py"
    script.write_text(
        "from fastsac import SAC, Config\n"
        "SAC(Config(env_id='Pendulum-v1', env_backend='gymnasium-async', num_envs=1))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'ended at start-up; a script must create its environments inside if __name__ == "__main__":' in done.stderr


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


# environments from Python


def timed():
    return TimeLimit(gymnasium.make("Pendulum-v1").unwrapped, 50)


def test_a_function_that_makes_one_is_gymnasium_by_another_way(tmp_path):
    config = dataclasses.replace(CONFIG, env_backend="gymnasium", max_episode_steps=50, eval_every=120)
    by_id = SAC(config)
    by_id.learn()
    own = SAC(dataclasses.replace(config, max_episode_steps=None, env_backend="auto"), envs=timed)
    assert (own.config.env_id, own.config.env_backend, own.config.num_envs) == ("timed", "python", 4)
    own.learn(run_dir=tmp_path)
    ours, theirs = state_of(by_id), state_of(own)
    assert (ours["envs"].pop("backend"), theirs["envs"].pop("backend")) == ("gymnasium", "python")
    assert ours == theirs
    assert np.array_equal(by_id.last_evaluation.returns, own.last_evaluation.returns)


@pytest.mark.parametrize("kind", ["function", "env", "vector"])
def test_a_run_goes_on_with_the_environments_it_is_given(tmp_path, monkeypatch, capsys, kind):
    """Bit for bit, but for a vector environment, which begins new episodes and says so."""

    def make():
        if kind == "function":
            return {"envs": Faulty}
        envs = Faulty() if kind == "env" else SyncVectorEnv([Faulty] * 3)
        return {"envs": envs, "eval_envs": Faulty()}

    config = dataclasses.replace(CONFIG, eval_every=80)
    alone, resumed = SAC(config, **make()), SAC(config, **make())
    alone.learn()
    number = {"function": 4, "env": 1, "vector": 3}[kind]
    assert alone.config.num_envs == number
    assert alone.config.env_id == "Faulty" if kind == "function" else alone.config.env_id
    with stopped_at(monkeypatch, 131):
        resumed.learn(run_dir=tmp_path)
    resumed.close()
    resumed = SAC.load(tmp_path, **make())
    resumed.learn(run_dir=tmp_path, progress=True)
    said = "cannot be resumed (the state of your own vector environment" in " ".join(capsys.readouterr().err.split())
    assert said == (kind == "vector")
    assert (state_of(resumed) == state_of(alone)) == (kind != "vector")


def test_a_stored_run_plays_and_evaluates_with_environments_given_to_it(tmp_path, capsys):
    agent = SAC(CONFIG, envs=Faulty)
    agent.learn(run_dir=tmp_path)
    loaded = SAC.load(tmp_path)
    assert loaded.predict(np.zeros(2, np.float32)).shape == (1,)
    alone = SAC(CONFIG, envs=Faulty())
    with pytest.raises(UsageError, match="none were passed for evaluations"):
        alone.evaluate(1)
    for ask in (lambda: loaded.evaluate(1), lambda: loaded.learn(300), lambda: SAC(loaded.config)):
        with pytest.raises(UsageError, match="the environments Faulty come from Python, and none were passed"):
            ask()
    assert run("eval", tmp_path) == 2
    assert run("train", "--resume", tmp_path, "--total-steps", 300) == 2
    assert all("come from Python" in line for line in capsys.readouterr().err.splitlines())
    given = SAC.load(tmp_path, envs=Faulty)
    assert np.array_equal(given.evaluate(3, seed=1).returns, agent.evaluate(3, seed=1).returns)
    with pytest.raises(UsageError, match="Arm has different observations or actions than this agent was trained with"):
        SAC.load(tmp_path, envs=Arm)


class Closing(Faulty):
    render_mode = None
    closed = 0

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("kind", ["env", "vector"])
def test_what_is_borrowed_is_not_closed(kind):
    made = [Closing() for _ in range(2)]
    envs = made[0] if kind == "env" else SyncVectorEnv([lambda: made[0], lambda: made[1]])
    agent = SAC(CONFIG, envs=envs)
    agent.learn()
    agent.close()
    assert made[0].closed == made[1].closed == 0
    agent.learn(300)
    made_by_us = SAC(dataclasses.replace(CONFIG, num_envs=1), envs=lambda: made[0])
    made_by_us.learn()
    made_by_us.close()
    assert made[0].closed == 1


def test_a_vector_environment_in_processes_of_its_own():
    envs = AsyncVectorEnv([Faulty] * 2, context="spawn")
    agent = SAC(CONFIG, envs=envs)
    agent.learn()
    assert agent.replay.size + agent.config.num_envs >= 200
    envs.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"envs": 3},
            "envs must be a gymnasium.Env, a gymnasium.vector.VectorEnv or a function returning an Env, got 3",
        ),
        ({"envs": lambda: 3}, "envs must return a gymnasium.Env, got 3"),
        ({"envs": Faulty, "eval_envs": lambda: None}, "eval_envs must return a gymnasium.Env, got None"),
        ({"envs": lambda: 1 / 0}, "could not be created: ZeroDivisionError: division by zero"),
        ({"eval_envs": Faulty}, "eval_envs needs envs"),
        ({"envs": Faulty, "eval_envs": 3}, "envs must be a gymnasium.Env"),
        ({"envs": ONE, "eval_envs": ONE}, "eval_envs must differ from envs"),
        ({"envs": ONE, "eval_envs": TimeLimit(ONE, 3)}, "eval_envs must differ from envs"),
        ({"envs": lambda: ONE}, "<lambda> returned the same environment twice: it must create a new one each time"),
        ({"envs": lambda: TimeLimit(ONE, 3)}, "returned the same environment twice"),
        (
            {"envs": Faulty, "eval_envs": Arm},
            "the evaluation environments have different observations or actions than this agent was trained with",
        ),
        ({"envs": Faulty()}, "evaluations would disturb the training episodes"),
        ({"envs": SyncVectorEnv([Faulty], autoreset_mode=AutoresetMode.SAME_STEP), "eval_envs": Faulty}, "NEXT_STEP"),
        ({"envs": lambda: gymnasium.make("CartPole-v1")}, "has a Discrete action space"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_environments_from_python_that_cannot_be_used(options, message):
    with pytest.raises(UsageError) as error:
        SAC(dataclasses.replace(CONFIG, eval_every=100), **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["env_kwargs", "env_wrappers", "max_episode_steps"])
def test_options_that_would_do_nothing_to_them_are_refused(name):
    value = {"env_kwargs": {"g": 1.0}, "env_wrappers": here("Doubled"), "max_episode_steps": 3}[name]
    with pytest.raises(UsageError, match="has no effect on environments from Python"):
        SAC(dataclasses.replace(CONFIG, **{name: value}), envs=Faulty)


def test_a_video_of_an_environment_from_python(tmp_path):
    agent = SAC(CONFIG, envs=lambda: gymnasium.make("Pendulum-v1", render_mode="rgb_array", max_episode_steps=5))
    agent.record_video(tmp_path / "film.mp4")
    assert (tmp_path / "film.mp4").stat().st_size > 1000
    blind = SAC(CONFIG, envs=timed)
    with pytest.raises(UsageError, match="was created with render_mode None, but a video needs 'rgb_array'"):
        blind.record_video(tmp_path / "none.mp4")


def test_rescaled_actions_are_the_same_actions():
    """A wrapper around what SAC does already: bounds of [0, 1] in place of the environment's own."""
    one = SAC(CONFIG, envs=timed)
    other = SAC(CONFIG, envs=lambda: RescaleAction(timed(), np.float32(0), np.float32(1)))
    observations = [play(agent.envs, 9)[-5] for agent in (one, other)]
    np.testing.assert_allclose(*observations, rtol=1e-4, atol=1e-5)


def test_async_is_our_backend():
    assert isinstance(make_envs(spec(env_backend="gymnasium-async"), 1, 0)._backend, _Async)
