"""The check of an engine on the user's GPU: engines that are wrong on purpose, children that crash, what is kept."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsac import SAC
from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.learner import GraphedLearner, Learner, compare, graphed, self_check
from fastsac.learner.compare import compare as compared
from fastsac.learner.graphed import ActingGraph, Graph, Measured
from fastsac.learner.reference import Metrics
from fastsac.types import Sampler
from tests.pretend_cuda import pretended

CUDA = torch.device("cuda")
SLOW = pytest.mark.slow
SMALL: dict[str, Any] = {"hidden_sizes": (8, 6), "batch_size": 16, "num_envs": 3}


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(graphed, "UPDATES_PER_GRAPH", 2)
    monkeypatch.setattr(compare, "UPDATES_PER_GRAPH", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(GraphedLearner, "backend", "reference")  # interpreted kernels take their time
    with pretended():
        yield


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=SLOW),
        pytest.param({"estimator": "score", "policy_delay": 3}, marks=SLOW),
        {"estimator": "score", "baseline": "value"},
        pytest.param({"estimator": "score", "baseline": "mean-action", "entropy_split": 0.5}, marks=SLOW),
        pytest.param({"estimator": "pathwise-stl"}, marks=SLOW),
        pytest.param({"estimator": "score-antithetic"}, marks=SLOW),
        pytest.param({"estimator": "mix"}, marks=SLOW),
        pytest.param({"estimator": "measure-valued", "alpha": 0.0}, marks=SLOW),
        pytest.param(
            {
                **{
                    "critic": "categorical",
                    "v_min": -20.0,
                    "v_max": 20.0,
                    "critic_reduction": "mean",
                    "layer_norm": True,
                },
                **{"num_atoms": 7, "n_step": 3, "normalize_obs": True, "normalize_reward": True, "optimizer": "adamw"},
                **{"lr_schedule": "linear", "batch_size": 3},  # interpreted, each row takes its time
            },
            marks=SLOW,
        ),
    ],
    ids=str,
)
def test_the_graphed_engine_passes(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphedLearner, "backend", "triton")
    assert compared(GraphedLearner, Config(**SMALL | settings), 5, 3, CUDA) == ""


class WrongTargets(GraphedLearner):
    def _update_targets(self) -> None:
        weights = [weight.clone() for weight in self.target_critic.parameters()]
        super()._update_targets()
        with torch.no_grad():
            for weight, before in zip(self.target_critic.parameters(), weights, strict=True):
                weight.add_(weight - before, alpha=0.01)


class WrongAlpha(GraphedLearner):
    def _update_actor_and_alpha(self, obs: Tensor, measure: bool) -> Metrics:
        self.target_entropy *= 1.0001
        metrics = super()._update_actor_and_alpha(obs, measure)
        self.target_entropy /= 1.0001
        return metrics


class WrongLoss(GraphedLearner):
    def _descend(self, name: str, loss: Tensor) -> None:
        super()._descend(name, loss * 1.0001 if name == "actor" else loss)


class WrongMetrics(GraphedLearner):
    def metrics(self) -> Metrics:
        return {name: value * 1.001 for name, value in super().metrics().items()}


class NotFinite(GraphedLearner):
    def _descend(self, name: str, loss: Tensor) -> None:
        super()._descend(name, loss * float("nan") if name == "critic" else loss)


class StuckNumbers(GraphedLearner):
    """A graph that draws the same batch and noise every time."""

    def _record(self, replay: Sampler, length: int, with_actor: bool) -> Graph:
        graph = super()._record(replay, length, with_actor)
        offset = self.rng.state.clone()

        def replay_() -> None:
            state = self.rng.state.clone()
            self.rng.state.copy_(offset)
            graph.replay()
            self.rng.state.copy_(state + torch.tensor([0, length], device="cuda"))

        return graph._replace(replay=replay_)


class WrongLongGraph(GraphedLearner):
    def _run(self, replay: Sampler, length: int, with_actor: bool) -> Measured:
        if length > 1:
            self.rng.advance()
            length -= 1
        return super()._run(replay, length, with_actor)


class LongGraphs(GraphedLearner):
    """Does something else after each graph of several updates: `spoil` of the classes below."""

    def _record(self, replay: Sampler, length: int, with_actor: bool) -> Graph:
        graph = super()._record(replay, length, with_actor)
        if length == 1:
            return graph

        def replay_() -> None:
            graph.replay()
            with torch.no_grad():
                self.spoil(graph)

        return graph._replace(replay=replay_)


class WrongAlphaLater(LongGraphs):
    def spoil(self, graph: Graph) -> None:
        self.log_alpha.add_(0.01)


class WrongMetricsLater(LongGraphs):
    def spoil(self, graph: Graph) -> None:
        graph.measured[1].mul_(1.01)


class WrongMomentsLater(LongGraphs):
    def spoil(self, graph: Graph) -> None:
        for state in self.optimizers["actor"].state.values():
            state["exp_avg"].neg_()


class EmptyGraph(GraphedLearner):
    def _record(self, replay: Sampler, length: int, with_actor: bool) -> Graph:
        return super()._record(replay, length, with_actor)._replace(replay=lambda: None)


class WrongActing(GraphedLearner):
    def _record_acting(self, obs: Tensor) -> ActingGraph:
        return super()._record_acting(obs)._replace(obs=obs.clone())  # it is not the graph's


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (WrongTargets, "target_critic"),
        pytest.param(WrongAlpha, "optimizer.alpha", marks=SLOW),
        pytest.param(WrongLoss, "actor", marks=SLOW),
        pytest.param(WrongMetrics, "is off by", marks=SLOW),
        pytest.param(NotFinite, "inf", marks=SLOW),
        (StuckNumbers, "is off by"),
        pytest.param(WrongLongGraph, "is off by", marks=SLOW),
        pytest.param(WrongAlphaLater, "log_alpha", marks=SLOW),
        (WrongMetricsLater, "is off by"),
        pytest.param(WrongMomentsLater, "mean of optimizer.actor.exp_avg", marks=SLOW),
        pytest.param(EmptyGraph, "is off by", marks=SLOW),
        (WrongActing, "the action"),
    ],
)
def test_an_engine_that_is_wrong_is_found_out(kind: type[Learner], named: str) -> None:
    assert named in compared(kind, Config(**SMALL), 5, 3, CUDA)


@pytest.mark.slow
def test_a_wrong_graph_of_several_updates_is_found_out_with_turns_too() -> None:
    assert "is off by" in compared(WrongLongGraph, Config(**SMALL, policy_delay=2), 5, 3, CUDA)


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(self_check, "COMMAND", [sys.executable, "-c", code])


PRETEND = "from tests.pretend_cuda import pretended\nfrom fastsac.learner.self_check import main\n"
SHORT = "from fastsac.learner import compare, graphed\ncompare.UPDATES_PER_GRAPH = graphed.UPDATES_PER_GRAPH = 2\n"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os; os.abort()", "the check was ended by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the check was ended by SIGSEGV"),
        ("raise SystemExit(3)", "the check failed: it said nothing"),
        (
            "raise RuntimeError('CUDA error: misaligned address\\nCompile with `TORCH_USE_CUDA_DSA` to enable it.')",
            "the check failed: RuntimeError: CUDA error: misaligned address",
        ),
        ('print(\'{"problem": "AcceleratorError: x", "crashed": true}\')', "AcceleratorError: x"),
        (
            "raise RuntimeError('ptxas fatal')",
            "the check failed: RuntimeError: ptxas fatal",
        ),
        ("print('{\"problem\": ')", "the check failed: it said nothing"),
        ("import time; time.sleep(60)", "the check did not end within 0.5 s"),
        ("print('noise'); print('{\"problem\": \"q is off\"}')", "q is off"),
        ('print(\'{"problem": ""}\')', ""),
    ],
)
def test_a_child_that_fails_counts_as_a_difference(code: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, code)
    found, crashed = self_check.ask_child({}, timeout=0.5 if "sleep" in code else 30.0)
    assert found == problem
    assert crashed == (problem not in ("", "q is off"))


@pytest.mark.slow
def test_the_check_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "engine, old = graphed.GraphedLearner, graphed.GraphedLearner._descend\nengine.backend = 'reference'\n"
    wrong += "engine._descend = lambda self, name, loss: old(self, name, loss * 1.0001 if name == 'actor' else loss)\n"
    child(monkeypatch, f"{PRETEND}{SHORT}{wrong}with pretended(): main()")
    found = self_check.verdict(Config(**SMALL), 5, 3, "graphed")
    assert "is off by" in found.problem
    assert "where" in found.problem


def test_what_was_found_is_kept_for_the_same_machine_versions_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    answers = [("", False), ("a is off", False), ("the check was ended by SIGSEGV", True)] + [("", False)] * 9
    monkeypatch.setattr(self_check, "ask_child", lambda request: asked.append(request) or answers[len(asked) - 1])

    def verdict(*sizes: int, **settings: Any) -> tuple[str, bool]:
        found = self_check.verdict(Config(**SMALL | settings), *(sizes or (5, 3)), "graphed", said.append)
        return found.problem, found.kept

    said: list[str] = []

    assert verdict() == ("", False)
    assert verdict(seed=7, actor_lr=1.0) == ("", True)  # of no consequence
    assert verdict(batch_size=17) == ("a is off", False)
    assert verdict(batch_size=17) == ("the check was ended by SIGSEGV", False)  # only what was right is believed
    assert verdict(batch_size=17) == ("", False)
    assert verdict(batch_size=17) == ("", True)
    for sizes, settings in [((6, 3), {}), ((5, 4), {}), ((), {"estimator": "score"}), ((), {"policy_delay": 2})]:
        assert not verdict(*sizes, **settings)[1]
    asked.clear()
    identity = self_check.identity()
    for changes in ({"gpu": "another"}, {"driver": "1"}, {"torch": "1"}, {"triton": "1"}, {"sources": "1"}):
        changed = identity | changes
        monkeypatch.setattr(self_check, "identity", lambda changed=changed: changed)
        verdict()
    assert len(asked) == 5
    place = next(self_check.cache_folder().glob("*.json"))
    assert json.loads(place.read_text())["gpu"]
    for path in self_check.cache_folder().glob("*.json"):
        path.write_text("[")
    assert not verdict()[1]  # a damaged file is none
    assert len(set(said)) == 1
    assert "checking engine graphed on this GPU" in said[0]
    assert [found["problem"] for found in self_check.kept()] == [""]


def test_the_hash_follows_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = self_check.source_hash(), Path.read_bytes
    for name in ("td_loss_triton.py", "philox_triton.py", "graphed.py", "score.py", "networks.py"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, name=name: read(path) + b"#" * (path.name == name))
            assert self_check.source_hash() != before


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(self_check, "ask_child", lambda request: ("", False))
    assert [self_check.verdict(Config(**SMALL), 5, 3, "graphed").kept for _ in range(2)] == [False, False]


RUN = Config("Pendulum-v1", **SMALL | {"num_envs": 4}, learning_starts=8, num_threads=1, eval_every=0)


def of_engine(engine: Any, monkeypatch: pytest.MonkeyPatch) -> SAC:
    monkeypatch.setattr("fastsac.learner.engines.graphed_obstacle", lambda: "")
    return SAC(dataclasses.replace(RUN, engine=engine))


def test_a_run_whose_engine_is_wrong_takes_the_reference_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    child(monkeypatch, "import os; os.abort()")
    agent = of_engine("auto", monkeypatch)
    assert agent.engine == "graphed"
    weights = agent.learner.actor.state_dict()
    agent.prepare()
    assert agent.engine == "reference"
    assert agent.engine_reason == "the check of graphed failed"
    assert len(caplog.messages) == 1
    for words in (
        "could not be checked on this GPU: the check was ended by SIGABRT;",
        "using the reference engine instead",
        "`fastsac doctor --json`",
    ):
        assert words in caplog.text
    assert "\n" not in caplog.messages[0]
    for name, tensor in agent.learner.actor.state_dict().items():
        assert torch.equal(tensor, weights[name])
    agent.learn(40)
    assert agent.updates > 20
    assert len(caplog.messages) == 1  # it is not checked again


def test_an_engine_that_was_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child(monkeypatch, 'print(\'{"problem": "q is off by 1e-2, where 1e-6 is allowed"}\')')
    agent = of_engine("graphed", monkeypatch)
    with pytest.raises(
        UsageError,
        match="on this GPU: q is off by 1e-2, where 1e-6 is allowed; --engine auto or reference works",
    ):
        agent.learn(40, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert agent.steps == 0


def test_an_engine_that_is_right_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, 'print(\'{"problem": ""}\')')
    agent = of_engine("auto", monkeypatch)
    agent.learn(40)
    assert agent.engine == "graphed"
    assert agent.updates > 20
    monkeypatch.setattr(self_check, "ask_child", lambda request: 1 / 0)
    of_engine("auto", monkeypatch).prepare()  # known already
    reference = of_engine("reference", monkeypatch)
    reference.prepare()  # nothing to compare with itself
    assert reference.engine == "reference"


def test_where_one_process_has_the_gpu_for_itself_it_is_checked_there(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "raise RuntimeError('CUDA error: CUDA-capable device(s) is/are busy or unavailable')")
    assert self_check.verdict(Config(**SMALL), 5, 3, "graphed") == ("", False, False)


def test_a_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """It sees the end of its input, and ends."""
    code = f"{PRETEND}import fastsac.learner.self_check as s, time, pathlib\n"
    code += f"s.compare = lambda *a: pathlib.Path({str(tmp_path / 'began')!r}).touch() or time.sleep(60)\n"
    code += "import torch; torch.cuda.set_device = lambda _: None\nmain()"
    request = {"config": {}, "sizes": [5, 3], "engine": "graphed", "device": 0}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.stdin.close()
    assert process.wait(30) == 1


def test_a_stray_module_in_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('not mine')")
    monkeypatch.chdir(tmp_path)
    assert "-P" in self_check.COMMAND
    monkeypatch.setattr(
        self_check, "COMMAND", [*self_check.COMMAND[:-1], "import json; print(json.dumps({'problem': ''}))"]
    )
    assert self_check.ask_child({}) == ("", False)


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(self_check, "ask_child", lambda request: ("", False))
    assert [self_check.verdict(Config(**SMALL), 5, 3, "graphed").kept for _ in range(2)] == [False, False]
    assert self_check.kept() == []
