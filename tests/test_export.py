import dataclasses
import importlib.util
import json
import math

import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch

from fastsac import SAC, Config, FastsacError, UsageError, evaluate
from fastsac.checkpoint import load_checkpoint, save_checkpoint
from fastsac.cli import main
from tests.runs import SMALL

NUMBER = 1000


def run(capsys, *arguments):
    """The exit status of a command line, and the last line that it printed."""
    status = 0
    try:
        main([str(each) for each in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    printed = capsys.readouterr()
    return status, (printed.err if status else printed.out).splitlines()[-1]


class Robot(gymnasium.Env):
    """Nested observations, and actions of two dimensions with bounds of their own."""

    observation_space = gymnasium.spaces.Dict(
        {
            "arm": gymnasium.spaces.Dict({"joints": gymnasium.spaces.Box(-5.0, 5.0, (2, 2))}),
            "goal": gymnasium.spaces.Box(-1e3, 1e3, (3,), np.float64),
        }
    )
    action_space = gymnasium.spaces.Box(np.array([[-3.0, 0.0]]), np.array([[1.0, 0.5]]), dtype=np.float64)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, dtype=np.float64))
        self._steps += 1
        return self._obs(), float(action[0, 0]), False, self._steps == 20, {}

    def _obs(self):
        random = self.np_random
        return {
            "goal": random.normal(300.0, 100.0, 3),
            "arm": {"joints": random.normal(size=(2, 2)).astype(np.float32)},
        }


@pytest.fixture(scope="module")
def cheetah(tmp_path_factory):
    """An agent whose actions are anywhere in their range, and its run directory."""
    agent = SAC(dataclasses.replace(SMALL, env_id="HalfCheetah-v5", hidden_sizes=(256, 256), normalize_obs=True))
    run_dir = tmp_path_factory.mktemp("cheetah") / "run"
    agent.learn(240, run_dir)
    return agent, run_dir


@pytest.fixture(scope="module")
def robot():
    agent = SAC(dataclasses.replace(SMALL, eval_episodes=1, normalize_obs=True), envs=Robot)
    agent.learn(100)
    return agent


def onnx_actions(path, inputs):
    session = onnxruntime.InferenceSession(path)
    assert [each.name for each in session.get_inputs()] == list(inputs)
    assert all(each.shape == ["batch", *inputs[each.name].shape[1:]] for each in session.get_inputs())
    assert [each.name for each in session.get_outputs()] == ["action"]
    return session.run(["action"], inputs)[0]


def torch_actions(path, inputs):
    program = torch.export.load(path).module()
    return program(**{name: torch.from_numpy(part) for name, part in inputs.items()}).numpy()


RUNTIMES = {"policy.onnx": onnx_actions, "policy.pt2": torch_actions}


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_file_does_what_predict_does(name, cheetah, tmp_path):
    agent, _ = cheetah
    obs = np.random.default_rng(0).normal(0.0, 3.0, (NUMBER, 17)).astype(np.float32)
    expected = agent.predict(obs)
    assert np.abs(expected).max() > 0.9  # saturated and not
    assert np.abs(expected).mean() < 0.9
    assert agent.export(tmp_path / name)[1:] == ({"obs": (17,)}, (6,))
    found = RUNTIMES[name](tmp_path / name, {"obs": obs})
    assert found.shape == (NUMBER, 6)
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=1e-6)
    one = RUNTIMES[name](tmp_path / name, {"obs": obs[:1]})
    np.testing.assert_allclose(one, expected[:1], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", RUNTIMES)
def test_nested_observations_and_bounds_of_their_own(name, robot, tmp_path):
    random = np.random.default_rng(1)
    goal, joints = random.normal(300.0, 200.0, (NUMBER, 3)), random.normal(size=(NUMBER, 2, 2)).astype(np.float32)
    expected = robot.predict({"arm": {"joints": joints}, "goal": goal})
    assert robot.export(tmp_path / name).inputs == {"arm_joints": (2, 2), "goal": (3,)}
    found = RUNTIMES[name](tmp_path / name, {"arm_joints": joints, "goal": goal.astype(np.float32)})
    assert found.shape == (NUMBER, 1, 2)
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=2e-6)  # of a range of 4
    assert (found >= Robot.action_space.low - 1e-6).all()


class Odd(gymnasium.Env):
    """Names that are none of a Python argument, and an observation without a dimension."""

    observation_space = gymnasium.spaces.Dict(
        {
            "self": gymnasium.spaces.Box(-1.0, 1.0, ()),
            "class": gymnasium.spaces.Box(-1.0, 1.0, (2,)),
            "limbs": gymnasium.spaces.Tuple([gymnasium.spaces.Box(-1.0, 1.0, (1,))] * 2),
            "2d": gymnasium.spaces.Box(-1.0, 1.0, (1, 2)),
        }
    )
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self._steps += 1
        return self.observation_space.sample(), 0.0, False, self._steps == 5, {}


@pytest.mark.parametrize("name", RUNTIMES)
def test_names_and_shapes_that_are_odd(name, tmp_path):
    agent = SAC(SMALL, envs=Odd)
    obs = {"2d": np.ones((3, 1, 2)), "class": np.ones((3, 2)), "limbs": (np.ones((3, 1)),) * 2, "self": np.ones(3)}
    parts = [obs["2d"], obs["class"], *obs["limbs"], obs["self"]]
    names = ["obs_2d", "obs_class", "limbs_0", "limbs_1", "obs_self"]
    assert list(agent.export(tmp_path / name).inputs) == names
    inputs = {name: part.astype(np.float32) for name, part in zip(names, parts, strict=True)}
    np.testing.assert_allclose(RUNTIMES[name](tmp_path / name, inputs), agent.predict(obs), rtol=0.0, atol=1e-6)


def test_the_command_names_file_inputs_and_output(cheetah, tmp_path, capsys):
    agent, run_dir = cheetah
    assert run(capsys, "export", run_dir, "--to", "onnx") == (
        0,
        f"{run_dir}/policy.onnx: obs [N, 17] -> action [N, 6]",
    )
    metadata = onnxruntime.InferenceSession(run_dir / "policy.onnx").get_modelmeta().custom_metadata_map
    assert metadata["env_id"] == "HalfCheetah-v5"
    assert metadata["steps"] == str(agent.steps)
    assert run(capsys, "export", run_dir, "--to", "torch", "--out", tmp_path / "a" / "b.pt2")[0] == 0
    assert (tmp_path / "a" / "b.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "choose one of --to onnx, --to torch and --policy-only"),
        (["--to", "onnx", "--policy-only"], "choose one of --to onnx, --to torch and --policy-only"),
        (["--to", "onnx", "--out", "policy.pt2"], "--to onnx writes .onnx, not 'policy.pt2'"),
        (["--policy-only"], "--policy-only writes a directory: name it with --out"),
        (
            ["--policy-only", "--out", "x", "--episodes", "-1"],
            "--episodes must be a whole number of at least 0, got -1",
        ),
    ],
)
def test_what_cannot_be_exported_is_said(arguments, message, cheetah, capsys):
    assert run(capsys, "export", cheetah[1], *arguments) == (2, f"fastsac: {message}")


def test_no_half_file_is_left(cheetah, tmp_path, monkeypatch):
    agent, _ = cheetah
    with pytest.raises(UsageError, match=r"must end in \.onnx or \.pt2"):
        agent.export(tmp_path / "policy.pt")
    with pytest.raises(FastsacError, match=r"^cannot write .*a\.onnx"):
        agent.export("/proc/a.onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"not installed: pip install onnx onnxscript"):
        agent.export(tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


class Branching(torch.nn.Module):
    """An actor that looks at its inputs on the host, which no exporter can follow."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, obs):
        out = self.layer(obs) if obs.sum() > 0.0 else self.layer(-obs)
        return out[:, :1], out[:, 1:].clamp(-5.0, 2.0)


class Keeping(Branching):
    """An actor that keeps a tensor with a gradient, which cannot be copied."""

    def forward(self, obs):
        self.last = self.layer(obs)
        return self.last[:, :1], self.last[:, 1:].clamp(-5.0, 2.0)


@pytest.mark.parametrize("name", RUNTIMES)
def test_an_actor_that_pytorch_cannot_export(name, tmp_path):
    agent = SAC(SMALL, actor=Branching())
    with pytest.raises(UsageError, match="PyTorch cannot export this actor: ") as told:
        agent.export(tmp_path / name)
    assert "\x1b" not in str(told.value)
    assert "data-dependent" in str(told.value)


def test_an_actor_that_cannot_be_copied(tmp_path):
    agent = SAC(SMALL, actor=Keeping())
    agent.actor(torch.zeros(1, 3))
    with pytest.raises(UsageError, match="PyTorch cannot export this actor: RuntimeError: Only Tensors created"):
        agent.export(tmp_path / "policy.pt2")
    assert not list(tmp_path.iterdir())


# a policy to share


@pytest.fixture(scope="module")
def shared(cheetah, tmp_path_factory):
    directory = tmp_path_factory.mktemp("shared") / "policy"
    evaluation = cheetah[0].evaluate(2, seed=0)
    cheetah[0].save(directory, policy_only=True, evaluation=evaluation)
    return directory, evaluation


def test_a_shared_policy_acts_as_the_agent_does(cheetah, shared, capsys):
    agent, run_dir = cheetah
    directory, evaluation = shared
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    names = ("manifest.json", "policy.safetensors", "state.json")
    assert files == ["README.md", *(f"checkpoints/step-{240:012d}/{name}" for name in names), "config.json"]
    full = sum(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*") if path.is_file())
    assert sum((directory / name).stat().st_size for name in files) < full / 5
    loaded = SAC.load(directory)
    obs = np.random.default_rng(0).normal(0.0, 3.0, (100, 17))
    np.testing.assert_array_equal(loaded.predict(obs), agent.predict(obs))
    assert loaded.evaluate(2, seed=0).returns.tolist() == evaluation.returns.tolist()
    status, line = run(capsys, "eval", directory, "--episodes", 2, "--json")
    assert status == 0
    assert json.loads(line)["returns"] == pytest.approx(evaluation.returns.tolist())


def test_a_shared_policy_does_not_learn(shared, tmp_path, capsys):
    loaded = SAC.load(shared[0])
    with pytest.raises(UsageError, match="holds only a policy, without critics"):
        loaded.learn(300)
    with pytest.raises(UsageError, match="save it with policy_only=True"):
        loaded.save(tmp_path / "full")
    status, line = run(capsys, "train", "--resume", shared[0], "--total-steps", 300)
    assert status == 2
    assert "holds only a policy" in line
    status, line = run(capsys, "lab", "gradients", shared[0])
    assert status == 2
    assert "holds only a policy" in line
    assert not (shared[0] / "metrics.jsonl").exists()
    loaded.save(tmp_path / "again", policy_only=True)  # and can be passed on
    obs = np.ones((1, 17))
    np.testing.assert_array_equal(SAC.load(tmp_path / "again").predict(obs), loaded.predict(obs))


@pytest.mark.parametrize("wrong", ["missing", "nan", "more"])
def test_a_shared_policy_that_is_not_whole(wrong, shared, tmp_path):
    (place,) = (shared[0] / "checkpoints").iterdir()
    (tensors,), state = (each.values() if number == 0 else each for number, each in enumerate(load_checkpoint(place)))
    if wrong == "missing":
        del tensors["normalizer.obs_mean"]  # its own default would be another policy
    elif wrong == "nan":
        tensors["actor.layers.0.bias"][0] = math.nan
    else:
        tensors["log_alpha"] = torch.zeros(())
    (tmp_path / "config.json").write_bytes((shared[0] / "config.json").read_bytes())
    save_checkpoint(tmp_path / "checkpoints" / place.name, {"policy": tensors}, state)
    with pytest.raises(FastsacError, match="a tensor is missing, or is not finite"):
        SAC.load(tmp_path)


def test_a_shared_policy_loads_where_it_could_not_be_trained(cheetah, tmp_path):
    agent = SAC.load(cheetah[1])
    agent.config = dataclasses.replace(agent.config, device="cuda", engine="graphed", precision="tf32")
    agent.save(tmp_path / "policy", policy_only=True)
    loaded = SAC.load(tmp_path / "policy")
    assert (loaded.config.device, loaded.config.engine, loaded.device.type) == ("auto", "auto", "cpu")
    with pytest.raises(UsageError, match="already holds a run"):
        agent.learn(300, tmp_path / "policy")  # the card would tell of another policy


def test_only_what_acts_is_read(tmp_path, capsys):
    agent = SAC(dataclasses.replace(SMALL, checkpoint_replay=True))
    agent.learn(60, tmp_path / "run")
    (damaged,) = (tmp_path / "run" / "checkpoints").glob("*/replay-*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert run(capsys, "export", tmp_path / "run", "--to", "torch")[0] == 0
    assert run(capsys, "eval", tmp_path / "run", "--episodes", 1)[0] == 0


def test_the_model_card_of_a_strange_name(tmp_path):
    agent = SAC(SMALL, envs=lambda: Robot())
    agent.save(tmp_path / "policy", policy_only=True)
    card = (tmp_path / "policy" / "README.md").read_text(encoding="utf-8")
    assert "# Soft Actor-Critic agent for `<lambda>`\n" in card
    assert "<lambda>" not in card.replace("`<lambda>`", "").split("---")[2]


def test_the_model_card(shared):
    directory, evaluation = shared
    _, front, body = (directory / "README.md").read_text().split("---\n", 2)
    metadata = {name: json.loads(value) for name, _, value in (line.partition(": ") for line in front.splitlines())}
    assert metadata["library_name"] == "fastsac"
    assert {"reinforcement-learning", "HalfCheetah-v5"} <= set(metadata["tags"])
    (result,) = metadata["model-index"][0]["results"]
    mean, spread = evaluation.returns.mean(), evaluation.returns.std()
    assert result["metrics"][0]["value"] == f"{mean:.2f} +/- {spread:.2f}"
    assert result["dataset"]["name"] == "HalfCheetah-v5"
    assert f"over 2 episodes: return {mean:.2f}" in body
    assert "| `normalize_obs` | `true` |" in body
    assert "| action | [6], from -1 to 1 |" in body
    assert f"| torch | {torch.__version__} |" in body
    code = body.split("```python\n")[1].split("```")[0]
    exec(code.replace("path/to/this/directory", str(directory)), {"obs": np.zeros(17)})


def test_the_card_has_the_last_evaluation_unless_the_policy_has_changed(tmp_path):
    agent = SAC(dataclasses.replace(SMALL, eval_every=100, eval_episodes=1))
    agent.learn(100)
    agent.save(tmp_path / "one", policy_only=True)
    assert f"return {agent.last_evaluation.returns.mean():.2f}" in (tmp_path / "one" / "README.md").read_text()
    agent.learn(150)
    agent._evaluated_at = 100
    agent.save(tmp_path / "two", policy_only=True)
    assert "was not evaluated" in (tmp_path / "two" / "README.md").read_text()


def test_nothing_of_the_users_is_overwritten(cheetah, tmp_path):
    agent, run_dir = cheetah
    with pytest.raises(UsageError, match="already holds a run"):
        agent.save(run_dir, policy_only=True)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UsageError, match=r"README\.md already exists"):
        agent.save(tmp_path, policy_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


# evaluation elsewhere


def test_evaluation_with_other_arguments_and_on_another_task(cheetah, monkeypatch, capsys):
    _, run_dir = cheetah
    made, make_envs = [], evaluate.make_envs
    monkeypatch.setattr(evaluate, "make_envs", lambda spec, *rest: made.append(spec) or make_envs(spec, *rest))

    def returns(*arguments):
        status, line = run(capsys, "eval", run_dir, "--episodes", 1, "--json", *arguments)
        assert status == 0, line
        return json.loads(line)["return_mean"]

    plain = returns()
    assert returns("--env-kwargs", '{"ctrl_cost_weight": 0.1}') == plain  # that is the default
    assert returns("--env-kwargs", '{"ctrl_cost_weight": 10.0}') < plain - 100.0
    returns("--env-id", "HalfCheetah-v4")
    returns("--env-backend", "gymnasium", "--env-kwargs", '{"ctrl_cost_weight": 0.1}')
    assert [each.backend for each in made] == ["auto"] * 4 + ["gymnasium"]
    assert [each.env_id for each in made] == ["HalfCheetah-v5"] * 3 + ["HalfCheetah-v4", "HalfCheetah-v5"]
    assert Config(env_id="HalfCheetah-v5") != SAC.load(run_dir).config  # which is left as it was
    assert SAC.load(run_dir).config.env_kwargs == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-id", "Hopper-v5"], "Hopper-v5 has different observations or actions than this agent was trained with"),
        (["--env-id", "HalfCheetah-v"], "unknown environment 'HalfCheetah-v'; did you mean"),
        (["--env-kwargs", "1"], "--env-kwargs must be a JSON object"),
        (["--env-kwargs", '{"seed": 1}'], "--env-kwargs must not contain 'seed'"),
    ],
)
def test_evaluations_that_cannot_be(arguments, message, cheetah, capsys):
    status, line = run(capsys, "eval", cheetah[1], *arguments)
    assert status == 2
    assert line.startswith(f"fastsac: {message}")
