"""`fastsac plot`: which runs make a curve, what it is called, and what is left out."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from fastsac.cli import main
from fastsac.config import Config
from fastsac.curves import label_of
from fastsac.lab.statistics import bootstrap
from fastsac.plot import common_steps
from fastsac.run_dir import RunLock, write_config


def store(path, returns, interval=100, **settings):
    """Write a run that was evaluated every so many steps."""
    path.mkdir(parents=True)
    write_config(path, Config(**{"env_id": "Pendulum-v1", "total_steps": 1000} | settings))
    rows = [{"step": interval * place, "eval_return": value} for place, value in enumerate(returns, 1)]
    rows += [{"step": 50, "critic_loss": 1.0}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def plot(tmp_path, monkeypatch, capsys):
    """Run `fastsac plot --json`; return its object, and what it told."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        main(["plot", "--json", *map(str, arguments)])
        out, err = capsys.readouterr()
        return json.loads(out), err

    return run


def curves(result):
    return {(each["env_id"], each["label"]): each["seeds"] for each in result["groups"]}


def test_runs_that_differ_in_their_seeds_only_make_one_curve(tmp_path, plot):
    returns = np.random.default_rng(0).normal(size=(5, 4))
    for seed, values in enumerate(returns.tolist()):
        store(
            tmp_path / f"seed-{seed}", values, seed=seed, log_every=seed + 1, num_threads=seed, total_steps=1000 + seed
        )
    result, told = plot(".")
    (group,) = result["groups"]
    expected = bootstrap([returns]).json()
    assert (group["label"], group["seeds"], group["steps"]) == ("", [0, 1, 2, 3, 4], [100, 200, 300, 400])
    assert {name: group[name] for name in expected} == expected
    assert all(
        low < middle < high for low, middle, high in zip(*(group[n] for n in ("low", "iqm", "high")), strict=True)
    )
    assert (result["differs"], result["left_out"], told) == ([], {}, "")
    assert not (tmp_path / "curves.png").exists()


def test_labels_name_what_differs_as_it_is_typed(tmp_path, plot):
    for seed in (0, 1):
        store(tmp_path / f"a{seed}", [1.0], seed=seed)
        store(tmp_path / f"b{seed}", [1.0], seed=seed, estimator="score", baseline="loo", actor_lr=1e-3)
        store(tmp_path / f"c{seed}", [1.0], seed=seed, layer_norm=True, hidden_sizes=(8, 8))
    result, _ = plot(".")
    assert result["differs"] == ["estimator", "baseline", "actor_lr", "hidden_sizes", "layer_norm"]
    assert [label for _, label in curves(result)] == [
        "estimator=pathwise actor-lr=0.0003 hidden-sizes=256,256 no-layer-norm",
        "estimator=score baseline=loo actor-lr=0.001 hidden-sizes=256,256 no-layer-norm",
        "estimator=pathwise actor-lr=0.0003 hidden-sizes=8,8 layer-norm",
    ]
    assert set(map(tuple, curves(result).values())) == {(0, 1)}
    assert label_of({"alpha": "auto"}, ["alpha"]) == "alpha=auto"
    assert (
        label_of({"tau": 0.12345678, "reward_scale": 5.0}, ["reward_scale", "tau"]) == "reward-scale=5 tau=0.12345678"
    )


def test_settings_that_go_with_the_environment_are_no_difference(tmp_path, plot):
    for env_id, gamma in (("Pendulum-v1", 0.9), ("Hopper-v5", 0.99)):
        for tau in (0.005, 0.01):
            store(tmp_path / env_id / f"{tau}", [1.0], env_id=env_id, gamma=gamma, tau=tau)
    result, _ = plot(tmp_path / "Pendulum-v1", tmp_path / "Hopper-v5")
    assert result["differs"] == ["tau"]
    assert list(curves(result)) == [
        (env_id, f"tau={tau}") for env_id in ("Pendulum-v1", "Hopper-v5") for tau in (0.005, 0.01)
    ]
    assert result["groups"][0]["low"] == [None]  # of one seed there is no interval


def test_a_schedule_depends_on_the_number_of_steps(tmp_path, plot):
    for total in (1000, 2000):
        store(tmp_path / f"{total}", [1.0], lr_schedule="linear", total_steps=total)
    assert list(curves(plot(".")[0])) == [("Pendulum-v1", "total-steps=1000"), ("Pendulum-v1", "total-steps=2000")]


def test_what_is_left_out_is_told_in_one_line(tmp_path, plot):
    store(tmp_path / "good", [1.0, 2.0])
    store(tmp_path / "shorter", [1.0])
    store(tmp_path / "none", [], seed=1)
    (store(tmp_path / "damaged", [1.0], seed=2) / "config.json").write_text("{")
    result, told = plot(".", tmp_path / "good")
    assert curves(result) == {("Pendulum-v1", ""): [0]}
    assert result["groups"][0]["runs"] == ["good"]
    assert told == (
        "fastsac: left out: damaged (damaged: damaged/config.json is damaged: Expecting property name enclosed in "
        "double quotes: line 1 column 2 (char 1)); none (no eval_return); "
        "shorter (same settings and random seed as another run)\n"
    )
    assert result["left_out"]["none"] == "no eval_return"


def test_nothing_but_damaged_runs(tmp_path, plot, capsys):
    (store(tmp_path / "damaged", [1.0]) / "config.json").write_text('{"no_setting": 1}')
    with pytest.raises(SystemExit):
        plot(".")
    told = capsys.readouterr().err
    assert told.startswith("fastsac: all runs are damaged; the first one: damaged/config.json: ")
    assert told.endswith("'no_setting'\n")


def test_a_curve_ends_where_its_shortest_run_does(tmp_path, plot):
    store(tmp_path / "a", [1.0, 2.0, 3.0, 4.0], seed=0)
    store(tmp_path / "b", [3.0, 4.0], seed=1)
    lock = RunLock(tmp_path / "b")
    result, told = plot(".")
    lock.release()
    (group,) = result["groups"]
    assert (group["steps"], group["iqm"]) == ([100, 200], [2.0, 3.0])
    assert told == "fastsac: Pendulum-v1: the curve ends at step 200 of 400, as b does, which is still running\n"
    store(tmp_path / "c", [5.0] * 4, interval=101, seed=2)  # evaluations pass their steps by a few
    result, told = plot("a", "c")
    assert (result["groups"][0]["steps"], told) == ([101, 200, 300, 400], "")


def test_common_steps():
    steps, values = common_steps([([1, 2, 3], [1.0, 2.0, 3.0]), ([2, 4], [10.0, 20.0])])
    assert steps.tolist() == [2, 3]
    assert values.tolist() == [[2, 3], [10, 15]]
    steps, values = common_steps([([1, 2], [0.0, 0.0]), ([5, 6], [0.0, 0.0])])
    assert (steps.shape, values.shape) == ((0,), (2, 0))


def test_runs_without_a_common_step(tmp_path, plot):
    store(tmp_path / "a", [1.0, 2.0], seed=0)
    store(tmp_path / "b", [3.0, 4.0], seed=1, interval=1000)
    result, told = plot(".", "--out", "x.png")
    assert result["groups"][0]["steps"] == []
    assert "has no step in common" in told


def test_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for env_id in ("Pendulum-v1", "Hopper-v5"):
        for seed in range(2):
            store(tmp_path / env_id / f"a{seed}", [1.0, seed], env_id=env_id, seed=seed)
            store(tmp_path / env_id / f"b{seed}", [1.0, seed], env_id=env_id, seed=seed, env_kwargs={"$\\bad$": "中_^"})
    main(["plot", "."])
    assert capsys.readouterr().out == "8 runs in 4 curves: curves.png\n"
    with Image.open("curves.png") as picture:
        assert picture.size[0] > 1.5 * picture.size[1]  # two panels side by side
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= colours
    main(["plot", "Hopper-v5/b0", "--out", "x.svg"])
    assert "Hopper-v5" in (tmp_path / "x.svg").read_text()
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"curves.png", "x.svg"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name run directories"),
        (["nope"], "nope does not exist"),
        (["empty"], "there are no runs in empty"),
        (["runs", "--metric", "evalreturn"], "no run has a metric 'evalreturn'; did you mean eval_return?"),
        (["runs", "--metric", "xyz"], "they have critic_loss, eval_return"),
        (["runs", "--out", "x.jpg"], "--out must end in .png, .svg or .pdf, got x.jpg"),
        (["runs", "--metric"], "see fastsac --help"),
    ],
)
def test_wrong_input(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    store(tmp_path / "runs" / "a", [1.0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main(["plot", *arguments])
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_a_picture_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store(tmp_path / "a", [1.0])
    (tmp_path / "x.png").mkdir()
    with pytest.raises(SystemExit, match="1"):
        main(["plot", "a", "--out", "x.png"])
    assert re.fullmatch("fastsac: cannot write x.png: .*\n", capsys.readouterr().err)
