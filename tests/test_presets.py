"""Presets: what they are, what wins over them, and the command line's `--preset`."""

import json
import os

import envpool
import pytest

from fastsac import Config, UsageError, preset, presets
from fastsac.arguments import parse
from fastsac.estimators import choose
from fastsac.signals import SUPERVISOR
from tests.test_cli import TINY, run

NAMES = list(presets.presets())
DEFAULTS = Config(env_id="Unheard-v0")
INVENTED = """
[sac]
source = "the defaults"

[big]
source = "a paper"
num_envs = 64
critic = "categorical"
v_min = -10.0
v_max = 10.0
num_atoms = 51
optimizer = "adamw"
weight_decay = 0.1
initial_alpha = 0.5
hidden_sizes = [8, 4]
layer_norm = true

[Pendulum]
env_ids = ["Pendulum-v1", "Pendulum-v0"]
source = "a zoo"
actor_lr = 1e-2
adam_betas = [0.5, 0.6]
"""


def config(*arguments):
    return parse(["train", *map(str, arguments)]).config


@pytest.fixture
def invented(tmp_path, monkeypatch):
    """A file of presets of our own, and an empty directory to be in."""
    file = tmp_path / "presets.toml"
    file.write_text(INVENTED)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(presets, "FILE", file)
    return file


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_a_configuration_and_says_where_it_comes_from(name):
    found = presets.presets()[name]
    assert found.source
    assert "://" not in found.source
    assert choose(preset(name))
    assert preset(name) == config("--preset", name)
    # what the table shows can be typed
    typed = [word for option in presets.options(found) for word in option.split()]
    assert config("--env-id", preset(name).env_id, *typed) == preset(name)
    for env_id in found.env_ids:
        assert env_id in envpool.list_all_envs()
        assert preset("auto", env_id) == preset(name, env_id)  # no environment has two presets


def test_the_tasks_and_recipes_that_there_have_to_be():
    assert NAMES[:2] == ["sac", "sac-large"]
    assert preset("sac") == Config()
    for task in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid"):
        assert preset(task).env_id == f"{task}-v5"
        assert preset("auto", f"{task}-v4") == preset(task, f"{task}-v4") != Config(env_id=f"{task}-v4")
    assert preset("Pendulum") == Config(
        "Pendulum-v1", total_steps=20_000, learning_starts=100, actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3
    )
    for task in (name for name in NAMES if name.startswith("dmc-")):
        action_size = envpool.make_spec(preset(task).env_id).action_space.shape[0]
        assert preset(task).target_entropy == -action_size / 2
    for env_id in ("WalkerWalk-v1", "CheetahRun-v1", "HumanoidWalk-v1"):
        assert preset("auto", env_id).num_envs == 128


def test_what_is_given_explicitly_wins(invented):
    assert preset("Pendulum") == Config(env_id="Pendulum-v1", actor_lr=1e-2, adam_betas=(0.5, 0.6))
    assert preset("Pendulum", "Pendulum-v0", actor_lr=0.3).env_id == "Pendulum-v0"
    assert preset("Pendulum", actor_lr=0.3, seed=4) == Config(
        env_id="Pendulum-v1", actor_lr=0.3, seed=4, adam_betas=(0.5, 0.6)
    )
    for arguments in (
        ("--preset", "Pendulum", "--actor-lr", 0.3, "--seed", 4),
        ("--actor-lr", 0.3, "--seed=4", "--preset=Pendulum"),
        ("--seed", 4, "--preset", "big", "--preset", "Pendulum", "--actor_lr", 0.3),
    ):
        assert config(*arguments) == preset("Pendulum", actor_lr=0.3, seed=4)


def test_what_goes_only_with_the_presets_choice_is_left_out_with_another_one(invented):
    changes = {"critic": "scalar", "optimizer": "adam", "alpha": 0.2}
    expected = Config(num_envs=64, hidden_sizes=(8, 4), layer_norm=True, alpha=0.2)
    assert preset("big", **changes) == expected
    assert config("--critic", "scalar", "--optimizer=adam", "--preset", "big", "--alpha", 0.2) == expected
    same = {"critic": "categorical", "optimizer": "adamw", "alpha": "auto"}
    assert preset("big", **same) == preset("big") == config("--preset", "big", "--critic", "categorical")
    with pytest.raises(UsageError, match="--v-min needs --critic categorical"):
        preset("big", critic="scalar", v_min=0.0)


def test_auto_takes_the_tasks_own(invented, caplog):
    assert preset("auto", "Pendulum-v0").actor_lr == config("--preset", "auto", "--env_id=Pendulum-v0").actor_lr == 1e-2
    assert caplog.text == ""
    assert preset("auto", "Unheard-v0") == config("--env-id", "Unheard-v0", "--preset", "auto") == DEFAULTS
    assert "there is no preset for Unheard-v0: using sac, the defaults" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--preset Pendulum --env-id Hop-v5",
            "preset Pendulum is not for Hop-v5, but for Pendulum-v1, Pendulum-v0; `auto` selects",
        ),
        ("--preset pendulum", "unknown preset 'pendulum'; did you mean Pendulum?"),
        ("--preset zzz", "unknown preset 'zzz': `fastsac presets` lists them"),
        ("--preset --seed 1", "Missing value for argument '--preset'"),
        ("--preset big --buffer-size 10", "--buffer-size must be at least --num-envs (64), got 10"),
        ("--preset big --v-min 20", "--v-min must be below --v-max, got 20 and 10"),
        ("--presett big", "did you mean --preset?"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(invented, capsys, arguments, message):
    assert run("train", *arguments.split()) == 2
    err = capsys.readouterr().err
    assert message in err
    assert (err.count("\n"), err.startswith("fastsac: ")) == (1, True)
    assert not list((invented.parent / "here").iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("gama = 0.5", "unexpected keyword argument 'gama'"),
        ("gamma = 5", "--gamma must be in"),
        ("n_step = 0", "n-step"),
    ],
)
def test_a_wrong_file_is_told(invented, wrong, message):
    invented.write_text(f'[sac]\nsource = "x"\n{wrong}\n')
    with pytest.raises(UsageError, match=rf"presets.toml: \[sac\]: .*{message}"):
        presets.presets()


def test_a_run_names_its_preset_and_is_resumed_without_it(invented, capsys, monkeypatch):
    tiny = [*TINY[2:], "--total-steps", 30, "--eval-every", 0]
    assert run("train", "--preset", "Pendulum", *tiny, "--run-dir", "run") == 0
    assert capsys.readouterr().err.startswith("fastsac: Pendulum-v1 (envpool), preset Pendulum, pathwise, K=1, cpu, ")
    stored = json.loads((invented.parent / "here/run/config.json").read_text())
    assert (stored["actor_lr"], stored["num_envs"]) == (1e-2, 2)
    assert run("train", "--resume", "run", "--preset", "Pendulum", "--total-steps", 40) == 2
    assert "--resume uses the stored settings: leave out --preset" in capsys.readouterr().err
    # but the supervisor starts its child again with all arguments
    listen, tell = os.pipe()
    monkeypatch.setenv(SUPERVISOR, f"{tell},0")
    assert run("train", "--preset", "big", *tiny, "--total-steps", 40, "--resume", "run") == 0
    os.close(listen)
    os.close(tell)
    after = json.loads((invented.parent / "here/run/config.json").read_text())
    assert after == stored | {"total_steps": 40}


def test_auto_without_a_preset_is_named(invented, capsys):
    settings = ["--env-id", "MountainCarContinuous-v0", *TINY[2:], "--total-steps", 30, "--eval-every", 0]
    assert run("train", *settings, "--preset", "auto", "--run-dir", "run") == 0
    assert " preset sac (there is none for MountainCarContinuous-v0), " in capsys.readouterr().err


def test_the_list(capsys, invented):
    assert run("presets", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == ["sac", "big", "Pendulum"]
    assert listed["Pendulum"] == {
        "name": "Pendulum",
        "env_ids": ["Pendulum-v1", "Pendulum-v0"],
        "source": "a zoo",
        "settings": {"actor_lr": 1e-2, "adam_betas": [0.5, 0.6]},
    }
    assert run("presets") == 0
    shown = capsys.readouterr().out
    assert shown.isascii()  # no other spaces
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0] == ["preset", "environments", "settings", "source"]
    assert lines[1] == ["sac", "any", "the", "defaults"]
    words = "Pendulum Pendulum-v1 Pendulum-v0 --actor-lr 0.01 --adam-betas 0.5 0.6 a zoo"
    assert lines[-1] == words.split()
    assert any("--layer-norm" in line for line in lines)
