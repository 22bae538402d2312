"""Which engine, precision and number of threads a run gets, and what it says about it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastsac import SAC
from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.estimators import ESTIMATORS
from fastsac.learner import ThreadTrial, choose_engine, device, engines, make_learner, precisions, set_up_torch
from fastsac.learner.device import FixedBatch, Setup, measure_updates, thread_counts
from tests.pretend_cuda import trust_engines

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = {"hidden_sizes": (4,), "batch_size": 8}


@pytest.fixture(autouse=True)
def _one_thread_afterwards() -> Any:
    yield
    torch.set_num_threads(1)


def has_products(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))


@pytest.mark.parametrize(
    ("engine", "on", "expected"),
    [
        ("auto", CPU, ("fused", "no CUDA GPU")),
        ("auto", CUDA, ("fused", "a CUDA GPU")),
        ("reference", CUDA, ("reference", "requested")),
        ("reference", CPU, ("reference", "requested")),
        ("graphed", CUDA, ("graphed", "requested")),
        ("fused", CPU, ("fused", "requested")),
        ("fused", CUDA, ("fused", "requested")),
    ],
)
def test_the_engine_is_chosen(
    engine: Any, on: torch.device, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trust_engines(monkeypatch)
    assert choose_engine(Config(engine=engine), on) == expected
    if on == CPU:
        assert make_learner(Config(engine=engine, **SMALL), 3, 1).engine == expected[0]


@pytest.mark.parametrize(
    ("engine", "on", "message"),
    [
        ("graphed", CPU, "--engine graphed records CUDA graphs, which needs a GPU"),
    ],
)
def test_an_engine_that_cannot_run_is_refused(engine: Any, on: torch.device, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        choose_engine(Config(engine=engine), on)
    assert caught.value.exit_status == 2


def test_an_estimator_without_a_gradient_has_the_reference_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ESTIMATORS, "pathwise", ESTIMATORS["pathwise"]._replace(gradient=None))
    engine, reason = choose_engine(Config(), CPU)
    assert engine == "reference"
    assert "--estimator pathwise has no written-out gradient" in reason
    assert choose_engine(Config(estimator="score"), CPU)[0] == "fused"
    with pytest.raises(UsageError, match="--estimator pathwise has no written-out gradient"):
        choose_engine(Config(engine="fused"), CPU)


def lacking(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and all that the graphed engine needs, but for one thing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5) if what == "capability" else (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(shutil, "which", lambda name: None if what == "compiler" else f"/{name}")
    done = SimpleNamespace(returncode=int(what == "headers"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    if what == "triton":
        monkeypatch.setitem(sys.modules, "triton", None)
    engines.graphed_obstacle.cache_clear()


@pytest.fixture
def _known_anew() -> Iterator[None]:
    yield
    engines.graphed_obstacle.cache_clear()


@pytest.mark.usefixtures("_known_anew")
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("capability", "it needs a GPU of compute capability 8.0 or more, but a GPU has 7.5"),
        ("triton", "it needs Triton, which cannot be imported"),
        ("compiler", "Triton needs a C compiler, but there is no gcc or clang: install gcc"),
        ("headers", "Triton needs Python's header files: install them"),
    ],
)
def test_what_the_graphed_engine_needs_is_looked_for(what: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    with monkeypatch.context() as patch:
        lacking("nothing", patch)
        assert choose_engine(Config(), CUDA) == ("fused", "a CUDA GPU")
        assert choose_engine(Config(layer_norm=True), CUDA)[0] == "graphed"
    lacking(what, monkeypatch)
    engine, told = choose_engine(Config(), CUDA)
    assert engine == "reference"
    assert told.startswith(f"not graphed: {reason}")
    for engine in ("graphed", "fused"):
        with pytest.raises(UsageError, match=f"--engine {engine}: {re.escape(reason)}"):
            choose_engine(Config(engine=engine), CUDA)  # type: ignore[arg-type]
    assert choose_engine(Config(engine="reference"), CUDA) == ("reference", "requested")


@pytest.mark.usefixtures("_known_anew")
def test_a_compiler_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking("compiler", monkeypatch)
    for compiler in ("my-cc", ""):  # Triton takes an empty name, too
        monkeypatch.setenv("CC", compiler)
        engines.graphed_obstacle.cache_clear()
        assert "Triton needs a C compiler, but there is no" in choose_engine(Config(), CUDA)[1]


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", "bf16"])
def test_bfloat16_where_a_cpu_has_it(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_engines(monkeypatch)
    has_products(monkeypatch, "avx2", capability)
    assert precisions(Config(precision="auto"), CPU) == ["fp32", "bf16"]
    assert precisions(Config(precision="bf16"), CPU) == ["bf16"]
    assert precisions(Config(precision="auto", engine="reference"), CPU) == ["fp32"]
    assert precisions(Config(precision="auto"), CUDA) == ["tf32", "fp32"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))  # whose TF32 is no faster
    assert precisions(Config(precision="auto"), CUDA) == ["fp32", "tf32"]
    assert precisions(Config(precision="auto", engine="graphed"), CUDA) == ["fp32"]
    assert precisions(Config(precision="tf32", engine="graphed"), CUDA) == ["tf32"]
    assert precisions(Config(precision="bf16"), CUDA) == ["bf16"]


@pytest.mark.parametrize(
    ("settings", "on", "message"),
    [
        ({"precision": "bf16"}, CPU, "this CPU has no bfloat16 products"),
        (
            {"precision": "bf16", "engine": "reference"},
            CPU,
            "--precision bf16 needs --engine fused, but this run uses ref",
        ),
        (
            {"precision": "bf16", "n_step": 2},
            CUDA,
            "--precision bf16 needs --engine fused, but this run uses graphed",
        ),
        ({"precision": "tf32"}, CPU, "--precision tf32 needs a CUDA GPU"),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused(
    settings: dict[str, Any], on: torch.device, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust_engines(monkeypatch)
    has_products(monkeypatch, "avx2")
    assert precisions(Config(precision="auto"), CPU) == ["fp32"]
    with pytest.raises(UsageError, match=message) as caught:
        precisions(Config(**settings), on)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((3.0, 2.0, 1.0, 1.5), ("bf16", "fp32 2000.0, bf16 1000.0", 1)),
        ((3.0, 2.0, 4.0, 1.95), ("fp32", "fp32 2000.0, bf16 1950.0", 2)),
    ],
)
def test_the_faster_precision_is_taken_if_it_pays(
    times: tuple[float, ...], expected: tuple[str, str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_products(monkeypatch, "amx_bf16")
    monkeypatch.setattr(device, "thread_counts", lambda: [1, 2])
    pairs = [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
    monkeypatch.setattr(device, "measure_updates", lambda *_, **__: dict(zip(pairs, times, strict=True)))
    precision, reason, threads = expected
    assert set_up_torch(Config(), CPU, 3, 1) == Setup(precision, f"{reason} ms per update", threads)
    assert torch.get_num_threads() == threads


def test_what_is_given_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "measure_updates", lambda *_, **__: pytest.fail("measured"))
    assert set_up_torch(Config(precision="fp32", num_threads=1), CPU, 3, 1) == Setup("fp32", "requested", 1)


def test_no_batch_is_made_while_updates_are_timed() -> None:
    source = FixedBatch(3, 1)
    with torch.inference_mode():
        first = source.sample(8), source.sample(16)
        again = source.sample(8), source.sample(16)
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert not any(tensor.is_inference() for batch in first for tensor in batch[:5])


def test_measuring_leaves_the_number_of_threads_alone() -> None:
    torch.set_num_threads(1)
    times = measure_updates(Config(**SMALL), 3, 1, ["fp32", "bf16"], [1, 2], rounds=1)
    assert set(times) == {("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)}
    assert all(0.0 < seconds < 10.0 for seconds in times.values())
    assert torch.get_num_threads() == 1


def test_the_numbers_of_threads_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert thread_counts() == expected


@pytest.mark.parametrize("fastest", [1, 2, 4])
def test_a_trial_finds_the_fastest_number_of_threads(fastest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "thread_counts", lambda: [1, 2, 4])
    torch.set_num_threads(2)
    trial, tried, found = ThreadTrial(num_envs=3, utd=0.5), [], None
    while found is None:
        tried.append(torch.get_num_threads())
        found = trial.record(1.0 if tried[-1] == fastest else 1.1, 3)
    assert found == fastest == torch.get_num_threads()
    # one step to settle, then sixteen steps for eight updates, in steps of three; what was set goes first
    assert tried == ([2] * 7 + [1] * 7 + [4] * 7) * ThreadTrial.ROUNDS


def test_a_run_tries_threads_while_it_makes_updates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "thread_counts", lambda: [1, 2])
    settings = {"learning_starts": 20, "num_envs": 2, "precision": "fp32", "eval_every": 0, **SMALL}
    agent = SAC(Config("Pendulum-v1", **settings))
    trial = agent._trial
    assert trial is not None
    agent.learn(total_steps=20)
    assert not any(trial.best.values())
    agent.learn(total_steps=36, run_dir=tmp_path)  # in the middle of the second number's turn
    assert agent._trial is trial
    assert sum(best > 0.0 for best in trial.best.values()) == 1
    assert torch.get_num_threads() == agent.num_threads
    resumed = SAC.load(tmp_path)
    resumed.learn(total_steps=36 + 20)  # the replay buffer is filled again
    assert resumed._trial is not None
    assert not any(resumed._trial.best.values())
    agent.learn(total_steps=150)
    assert agent._trial is None
    assert all(trial.best.values())
    assert agent.num_threads == torch.get_num_threads() == max(trial.best, key=lambda count: trial.best[count])
    assert SAC(Config("Pendulum-v1", num_threads=1, **settings))._trial is None


def test_the_agent_says_what_it_runs_with() -> None:
    agent = SAC(Config("Pendulum-v1", precision="auto", num_threads=1, **SMALL))
    assert agent.learner.config.precision == agent.setup.precision
    assert agent.config.precision == "auto"
    assert agent.engine == "fused"
