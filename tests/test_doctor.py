"""`fastsac doctor`: on this machine, on a pretended GPU, and on machines that lack something."""

import json
import sys
from typing import Any

import pytest
import torch

from fastsac import doctor
from fastsac.cli import main
from fastsac.learner import GraphedLearner, self_check
from fastsac.learner.self_check import Verdict
from tests.pretend_cuda import pretended, trust_engines


@pytest.fixture(autouse=True)
def _as_it_was() -> Any:
    yield
    torch.set_num_threads(1)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments work, and no time is spent on measuring."""
    monkeypatch.setattr(doctor, "_child", lambda *_: ("envpool", ""))
    monkeypatch.setattr(doctor, "_cpu_rate", lambda _: 123.0)
    monkeypatch.setattr("fastsac.learner.device.MEASURE_SECONDS", 0.0)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = 0
    try:
        main(["doctor", *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, capsys.readouterr().out


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = told(capsys, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["training_works"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["gpu"] is None
    assert found["engine"]["name"] == "fused"
    assert found["engine"]["updates_per_s"] > 0
    assert found["environments"]["envpool_tasks"] > 100
    assert found["environments"]["stepped_with"] == "envpool"


@pytest.mark.usefixtures("_quick")
def test_it_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = told(capsys)
    assert status == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["fastsac", "PyTorch", "GPU", "CPU", "Environments", "Engine", "Self-check", "Updates", "Problems"]
    assert "123 a second" in out
    assert "fused (no CUDA GPU)" in out


def broken_update(*_: Any) -> float:
    raise RuntimeError("mkl: illegal instruction\nand more")


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("target", "value", "what", "mend", "status"),
    [
        ("_child", lambda *_: ("", "ended by signal 6"), "no environment can be stepped", "pip install envpool", 1),
        ("_cpu_rate", broken_update, "no update can be made: RuntimeError: mkl", "reinstall PyTorch", 1),
        ("nvidia_driver", lambda: "570.1", "an NVIDIA driver, 570.1, but this build of PyTorch", "CUDA build", 0),
        (
            "_child",
            lambda env_id, what: ("", "no EGL") if what == "render" else ("envpool", ""),
            "no videos of MuJoCo tasks: no EGL",
            "libegl1",
            0,
        ),
    ],
)
def test_what_is_missing_is_named_with_what_mends_it(
    target: str, value: Any, what: str, mend: str, status: int, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, target, value)
    found, out = told(capsys)
    assert found == status
    assert what in out
    assert mend in out
    assert ("training does not work" in out) == bool(status)
    assert len(out.splitlines()) < 24
    assert json.loads(told(capsys, "--json")[1])["training_works"] == (status == 0)


@pytest.mark.usefixtures("_quick")
def test_a_gpu_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: out of memory\nand more")

    monkeypatch.setattr(doctor, "describe_gpu", broken)
    with pretended():
        status, out = told(capsys)
    assert status == 1
    assert "the GPU cannot be used: CUDA error: out of memory (training does not work)" in out
    assert "--device cpu" in out
    assert "fused (no CUDA GPU)" in out  # what would run without it


@pytest.mark.usefixtures("_quick")
def test_without_envpool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    status, out = told(capsys)
    assert status == 0
    assert "EnvPool cannot be imported" in out
    assert "(training works)" in out
    assert "until then, Gymnasium's slower environments are used" in out


@pytest.mark.usefixtures("_quick")
def test_a_gpu_that_pytorch_does_not_see(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    status, out = told(capsys)
    assert (status, "Problems      none" in out) == (0, True)  # PyTorch's usual build, on a machine without a GPU
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "570.1")
    status, out = told(capsys)
    assert status == 0
    assert "PyTorch is built for CUDA 12.8, but finds no GPU" in out
    assert "nvidia-smi" in out


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("problem", ["", "q is off by 1e-2, where 1e-6 is allowed"])
def test_a_gpu(problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trust_engines(monkeypatch)
    monkeypatch.setattr(self_check, "verdict", lambda *_: Verdict(problem))
    monkeypatch.setattr(GraphedLearner, "backend", "reference")
    if problem:  # the whole-update kernels of this size take the interpreter minutes
        rate = doctor._cuda_rate
        monkeypatch.setattr(doctor, "_cuda_rate", lambda *arguments: rate(*arguments, updates=8))
    else:
        monkeypatch.setattr(doctor, "_cuda_rate", lambda *_: 50.0)
    with pretended():
        status, out = told(capsys)
    assert status == 0  # it falls back
    assert "a pretended GPU, compute capability 9.0, 80.0 of 80.0 GiB free" in out
    if problem:
        assert problem in out
        assert "`fastsac doctor --json`" in out
        assert "until then, the graphed engine is used" in out
        assert "Engine        reference (the check of graphed failed)" in out
    else:
        assert "fused (a CUDA GPU)" in out
        assert "tf32 (the default)" in out
        assert "Self-check    passed" in out
        assert "Problems      none" in out


@pytest.mark.usefixtures("_quick")
def test_a_gpu_is_looked_at_where_environments_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trust_engines(monkeypatch)
    monkeypatch.setattr(doctor, "_child", lambda *_: ("", "ended by signal 6"))
    monkeypatch.setattr(doctor, "_cuda_rate", lambda *_: 50.0)
    with pretended():
        status, out = told(capsys)
    assert status == 1
    assert "fused (a CUDA GPU)" in out
    assert "Self-check    passed" in out


@pytest.mark.usefixtures("_quick")
def test_a_gpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastsac.learner.engines.graphed_obstacle", lambda: "Triton needs a C compiler")
    monkeypatch.setattr(doctor, "_cuda_rate", lambda *_: 50.0)
    with pretended():
        status, out = told(capsys)
    assert status == 0
    assert "reference (not graphed: Triton needs a C compiler)" in out
    assert "50 a second" in out


def test_a_child_that_fails_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._child("No-such-task-v0", "step")[1].startswith("fastsac.errors.UsageError")
    monkeypatch.setattr(doctor, "CHILD_SECONDS", 0.05)
    assert doctor._child("Pendulum-v1", "step")[1] == "no answer within 0.05 s"
