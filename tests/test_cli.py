"""The command line: what it prints, what it leaves, and what it answers to bad input."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from fastsac.arguments import parse
from fastsac.cli import main
from fastsac.config import Config
from fastsac.run_dir import write_config
from fastsac.train_command import default_run_dir

TINY = (  # noqa: SIM905, a list is harder to read
    "--env-id Pendulum-v1 --num-envs 2 --hidden-sizes 8 --batch-size 8 --learning-starts 20 --buffer-size 1000 "
    "--eval-episodes 2 --eval-every 50 --log-every 20 --num-threads 1"
).split()


def run(*arguments):
    """Exit status of the command line."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code or 0
    return 0


@pytest.fixture
def trained(tmp_path):
    assert run("train", *TINY, "--total-steps", 100, "--run-dir", tmp_path / "run") == 0
    return tmp_path / "run"


def test_train_then_eval(tmp_path, capsys):
    trained = tmp_path / "run"
    assert run("train", *TINY, "--total-steps", 100, "--run-dir", trained) == 0
    out, err = capsys.readouterr()
    assert "engine fused (no CUDA GPU), precision" in err
    assert "evaluation return" in out
    assert f"learning curve: {trained / 'learning_curve.png'}" in out
    assert (trained / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((trained / "config.json").read_text())["hidden_sizes"] == [8]
    assert run("eval", trained, "--episodes", 3, "--seed", 1, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"return_mean", "return_std", "returns", "lengths"}
    assert result["lengths"] == [200, 200, 200]
    assert run("eval", trained, "--episodes", 3, "--seed", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out) == result


def test_the_first_line_names_what_is_special(tmp_path, capsys):
    special = "--critic categorical --v-min -2000 --v-max 10 --layer-norm --n-step 3 --total-steps 30 --eval-every 0"
    assert run("train", *TINY, *special.split(), "--run-dir", tmp_path / "run") == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert "Pendulum-v1 (envpool), pathwise, K=1, categorical critics, layer norm, 3-step returns, cpu, " in first


def test_no_baseline_is_a_baseline(tmp_path):
    run_dir = tmp_path / "run"
    arguments = [*TINY, "--estimator", "score", "--baseline", "none", "--total-steps", "30", "--run-dir", run_dir]
    assert run("train", *arguments) == 0
    assert json.loads((run_dir / "config.json").read_text())["baseline"] == "none"


def test_resume_with_another_setting(trained, capsys):
    assert run("train", "--resume", trained, "--total-steps", 140, "--actor-lr", 1e-3) == 0
    assert "the replay buffer is empty" in capsys.readouterr().err
    stored = json.loads((trained / "config.json").read_text())
    assert (stored["total_steps"], stored["actor_lr"], stored["hidden_sizes"]) == (140, 1e-3, [8])
    assert run("train", "--resume", trained) == 2
    assert "has already reached step 140" in capsys.readouterr().err


def test_every_kind_of_value_is_understood(tmp_path):
    typed = (
        'train --env-kwargs {"a":[1,{"b":null}]} --env-wrappers a:B c.d:E --normalize-obs --no-layer-norm '
        "--adam-betas 0.5 0.75 --critic categorical --v-min -20 --v-max=-.5 --utd-end 0.5 --weight-decay None "
        "--target-entropy -1e1 --max-episode-steps 7 --num-action-samples None --alpha auto"
    )
    command = parse(typed.split())
    expected = Config(
        env_kwargs={"a": [1, {"b": None}]},
        env_wrappers=("a:B", "c.d:E"),
        normalize_obs=True,
        adam_betas=(0.5, 0.75),
        critic="categorical",
        v_min=-20.0,
        v_max=-0.5,
        utd_end=0.5,
        target_entropy=-10.0,
        max_episode_steps=7,
    )
    assert command.config == expected
    write_config(tmp_path, expected)
    resumed = ["train", "--resume", str(tmp_path)]
    assert parse(resumed).config == expected
    changes = ["--utd-end", "None", "--no-normalize-obs", "--critic", "scalar", "--env-kwargs", "{}", "--env-wrappers"]
    assert parse([*resumed, *changes]).config == Config(
        adam_betas=(0.5, 0.75), target_entropy=-10.0, max_episode_steps=7
    )


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "--env-kwargs JSON" in shown
    assert re.search(r"--adam-betas FLOAT FLOAT.*?\(default:\s+0.9 0.999\)", shown.replace("│", ""), re.DOTALL)
    assert re.search(r"--v-min {None}\|FLOAT", shown)


@pytest.mark.parametrize("name", ["film.gif", "film.mp4"])
def test_video(trained, tmp_path, name):
    assert run("eval", trained, "--episodes", 1, "--video", tmp_path / name) == 0
    assert (tmp_path / name).stat().st_size > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"run", name}


def test_video_of_a_mujoco_task_from_envpool(tmp_path):
    settings = ["--env-id", "Hopper-v5", *TINY[2:], "--total-steps", "30", "--eval-every", "0"]
    assert run("train", *settings, "--run-dir", tmp_path / "run") == 0
    film = tmp_path / "film.gif"
    command = [sys.executable, "-m", "fastsac", "eval", tmp_path / "run", "--episodes", "1", "--video", film]
    done = subprocess.run(command, capture_output=True, text=True)  # a mistake here aborts the process
    if (
        "no OpenGL for off-screen rendering" in done.stderr
    ):  # neither EGL nor OSMesa here: told in one line, and no file
        assert (done.returncode, done.stderr.count("\n"), film.exists()) == (1, 1, False)
        return
    assert done.returncode == 0, done.stderr
    with Image.open(film) as picture:
        assert len(set(picture.convert("L").tobytes())) > 20  # a scene, not a blank


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--env-id HalfCheeta-v5", "did you mean HalfCheetah-v5"),
        ("--env-id NoSuchThing-v0", "unknown environment 'NoSuchThing-v0'"),
        ("--env-id no_such_module:Env-v0", "cannot import 'no_such_module'"),
        ("--env-id CartPole-v1", "Discrete action space"),
        ("--env-id Hopper-v5 --env-backend envpool --num-envs 0", "--num-envs must be a whole number of at least 1"),
        ("--estimator score --baseline loo --num-action-samples 1", "--num-action-samples must be at least 2"),
        ("--estimator pathwise --baseline value", "takes no --baseline"),
        ("--estimator score --baseline value-as-printed", "has the wrong sign on purpose, for comparisons: fastsac"),
        ("--estimator pathwise-stl --entropy-split 0.5", "takes no --entropy-split"),
        ("--entropy-split 1.5", "--entropy-split must be `auto` or a number from 0 to 1"),
        ("--estimator pathwise-antithetic --num-action-samples 3", "must be even"),
        ("--estimator scor", "did you mean score?"),
        ("--estimator score --baseline lo", "did you mean loo?"),
        ("--estimator score --baseline None", "did you mean none?"),
        ("--total-steps -5", "--total-steps must be a whole number of at least 1, got -5"),
        ("--total-steps 1.5", "--total-steps: it must be a whole number, got '1.5'"),
        ("--utd many", "--utd: it must be a number, got 'many'"),
        ("--batch-size 0", "--batch-size must be"),
        ("--utd 0", "--utd must be above 0"),
        ("--utd nan", "--utd must be above 0"),
        ("--gamma 1.5", "--gamma must be in [0, 1]"),
        ("--buffer-size 1", "--buffer-size must be at least --num-envs"),
        ("--buffer-size 100000000000", "--buffer-size "),
        ("--hidden-sizes 0", "--hidden-sizes must be"),
        ("--activation swish", "invalid choice 'swish' for argument '--activation'"),
        ("--seed", "Missing value for argument '--seed'"),
        ("--env-kwargs abc", "--env-kwargs must be a JSON object such as '{\"frame_skip\": 2}', got 'abc'"),
        ("--env-kwargs [1]", "--env-kwargs must be a JSON object such as '{\"frame_skip\": 2}', got [1]"),
        ('--env-kwargs {"a":NaN}', "--env-kwargs must be a JSON object such as"),
        ("--env-kwargs", "Missing value for argument '--env-kwargs'"),
        ("--env-wrappers Wrapper", "--env-wrappers must be given as module:Wrapper, got ('Wrapper',)"),
        ("--adam-betas 0.9", "Missing value for argument '--adam-betas'. Expected 2 values"),
        ("--adam-betas 0.9 x", "--adam-betas: they must be numbers, got ['0.9', 'x']"),
        ("--adam-betas 0.9 1", "--adam-betas must be two numbers in [0, 1), got (0.9, 1.0)"),
        ("--hidden-sizes 8 x", "--hidden-sizes: they must be whole numbers, got ['8', 'x']"),
        ("--utd-end x", "--utd-end: it must be None or a number, got 'x'"),
        ("--max-episode-steps 1.5", "--max-episode-steps: it must be None or a whole number, got '1.5'"),
        ("--target-entropy x", "--target-entropy: it must be a number or auto, got 'x'"),
        ("--n-step 1001", "--n-step must be at most 1000, got 1001"),
        ("--batch-size 1048577", "--batch-size must be at most 1048576, got 1048577"),
        ("--num-atoms 51", "--num-atoms needs --critic categorical"),
        ("--target-return 5 --eval-every 0", "--target-return needs evaluations, and --eval-every 0 disables"),
        ("--run-dir /dev/null", "/dev/null is a file: choose another --run-dir"),
        ("--num-atoms 5000 --critic categorical --v-min 0 --v-max 1", "--num-atoms must be at most 4096, got 5000"),
        ("--v-min -20", "--v-min needs --critic categorical"),
        ("--critic categorical --v-min -20 --v-max -3e1", "--v-min must be below --v-max, got -20 and -30"),
        ("--normalize-obs yes", "Unrecognized options: yes"),
        ("--normalise-obs", "did you mean --normalize-obs?"),
        ("--env-id CarRacing-v3", "pixels are not supported"),
        ("--num-env 3", "did you mean --num-envs?"),
        ("--xyzzy 3", "Unrecognized options: --xyzzy, 3"),
        ("--resume nowhere", "nowhere is not a run directory"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run("train", *TINY, "--total-steps", 40, *arguments.split()) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert err.startswith("fastsac: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("eval run --eval-episodes 3", "Unrecognized options: --eval-episodes 3; did you mean --episodes?"),
        ("eval run --no-jsn", "Unrecognized options: --no-jsn; did you mean --json?"),
        ("train --best", "Unrecognized options: --best; see fastsac --help"),
        ("lab toy --num-states 3", "Unrecognized options: --num-states 3; did you mean --num-samples?"),
        ("lab --num-samples 3", "Unrecognized options: --num-samples 3; see fastsac --help"),
        ("--episodes 3", "Unrecognized options: --episodes 3; see fastsac --help"),
    ],
)
def test_only_options_of_the_subcommand_are_suggested(capsys, line, message):
    assert run(*line.split()) == 2
    assert capsys.readouterr().err == f"fastsac: {message}\n"


def test_cuda_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("train", *TINY, "--device", "cuda") == 2
    assert "PyTorch sees no CUDA GPU" in capsys.readouterr().err
    assert run("train", *TINY, "--engine", "graphed") == 2
    assert capsys.readouterr().err.startswith(
        "fastsac: --engine graphed records CUDA graphs, which needs a GPU, but this"
    )
    assert not list(tmp_path.iterdir())


def test_a_run_made_with_graphs_is_evaluated_without(trained, capsys):
    path = trained / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"engine": "graphed"}))
    assert run("eval", trained, "--episodes", 1) == 0
    assert run("train", "--resume", trained, "--total-steps", 120) == 2
    assert "--engine graphed" in capsys.readouterr().err
    assert run("train", "--resume", trained, "--total-steps", 120, "--engine", "auto") == 0


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(tmp_path, capsys):
    for name in ("config.json", "metrics.jsonl"):
        directory = tmp_path / name[0]
        directory.mkdir()
        (directory / name).write_text('{"step": 5}\n')
        assert run("train", *TINY, "--total-steps", 40, "--run-dir", directory) == 2
        assert "already holds a run" in capsys.readouterr().err
        assert (directory / name).read_text() == '{"step": 5}\n'
    write_config(directory, Config(env_id="Pendulum-v1", num_envs=2, eval_every=0))
    assert run("train", "--resume", directory, *TINY, "--total-steps", 40) == 0
    assert "has no checkpoint yet: it starts from the beginning" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == [20, 40, 40]


@pytest.mark.parametrize(
    "line",
    ['{"step": -1e300}', '{"step": 5, "x": 1e400}', '{"step": "5"}', '{"step": 9' + "9" * 400 + "}", "[", '{"st'],
)
def test_odd_lines_of_metrics_are_dropped(trained, line):
    path = trained / "metrics.jsonl"
    path.write_text(f"{line}\n" + path.read_text())
    assert run("train", "--resume", trained, "--total-steps", 120) == 0
    assert line not in path.read_text().splitlines()


def test_a_taken_run_directory(trained, capsys):
    before = (trained / "metrics.jsonl").read_bytes()
    assert run("train", *TINY, "--run-dir", trained) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_flipped_byte(trained, capsys):
    (path,) = trained.glob("checkpoints/step-*/learner.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for command in (("eval", trained), ("train", "--resume", trained, "--total-steps", 200)):
        assert run(*command) == 1
        err = capsys.readouterr().err
        assert "learner.safetensors" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--seed", -1), ("--episodes", 0), ("--video", "film.avi")])
def test_bad_input_to_eval(trained, capsys, arguments):
    assert run("eval", trained, *arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("fastsac: --")


def test_another_estimator_does_not_inherit_the_baseline(tmp_path):
    arguments = [*TINY, "--estimator", "score", "--baseline", "loo", "--total-steps", 40]
    assert run("train", *arguments, "--run-dir", tmp_path / "run") == 0
    assert run("train", "--resume", tmp_path / "run", "--estimator", "pathwise", "--total-steps", 80) == 0


@pytest.mark.parametrize("change", [{"hidden_sizes": 5}, {"baseline": 5}, {"unheard_of": 1}])
def test_an_edited_configuration(trained, capsys, change):
    path = trained / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert run("train", "--resume", trained, "--total-steps", 200) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_output_that_nobody_reads(trained):
    code = "from fastsac.cli import main; main()"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = f"'{sys.executable}' -c '{code}' eval '{trained}' --episodes 1 --json | true"
    done = subprocess.run(["bash", "-c", command], env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""


def test_a_missing_checkpoint(tmp_path, capsys):
    assert run("eval", tmp_path / "nothing") == 2
    assert "is not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raise", "failed at step 31: ValueError: broken"),
        ("nan", "observation not finite: nan in column 0"),
        ("nan-reward", "reward not finite: nan"),
        ("shape", "failed at step 31: observation array must be [2], got [3]"),
    ],
)
def test_an_environment_that_fails_in_mid_run(tmp_path, capsys, monkeypatch, kind, message):
    monkeypatch.setenv("FAULT", f"{kind}:30")
    arguments = [*TINY, "--env-id", "tests.faulty:Faulty-v0", "--checkpoint-every", "20", "--eval-every", "0"]
    assert run("train", *arguments, "--run-dir", tmp_path / "run") == (2 if kind == "shape" else 1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastsac: tests.faulty:Faulty-v0")
    assert message in last
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2


def test_no_space_left(tmp_path, trained, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastsac.checkpoint.save_file", full)
    assert run("train", "--resume", trained, "--total-steps", 200) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert run("eval", trained, "--episodes", 1) == 0
    assert {path.name for path in trained.glob("checkpoints/*")} == {"step-000000000100", "best"}


def test_a_run_directory_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("train", *TINY, "--run-dir", tmp_path / "file" / "run") == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "cannot write to the run directory" in err


def test_default_run_dir_stays_one_level_below_runs():
    for env_id in ("phys2d/Pendulum-v0", "../../etc:Env-v0", "a/b/c"):
        path = default_run_dir(Config(env_id=env_id))
        assert path.parent.name == "runs"
        assert len(path.parts) == 2


def test_imports_stay_light():
    code = (
        "import sys, torch; import fastsac; from fastsac import Config; Config();"
        "import fastsac_kernels, fastsac.learner, fastsac.replay, fastsac.estimators;"
        "heavy = {'envpool', 'gymnasium', 'tyro', 'rich', 'matplotlib', 'safetensors'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    code = "import sys, fastsac.cli; assert 'torch' not in sys.modules"  # help, mistakes and supervisors do without
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
