"""What the learner launches, as Triton's own binder sees it: nothing is compiled while a CUDA graph is recorded.

No kernel runs here, and none has to: neither sizes nor addresses depend on what is computed.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.kernel_launches import Launch, recorded
from fastsac.config import Config
from fastsac.learner import GraphedLearner
from fastsac.learner import graphed as engine
from fastsac.learner.graphed import ActingGraph, Graph
from fastsac.replay import Replay
from fastsac.types import Sampler

SETTINGS = [
    {},
    {"num_action_samples": 3, "num_critics": 3, "policy_delay": 2},
    {"num_critics": 1, "alpha": 0.2},
    {"estimator": "score", "baseline": "loo"},
    {"estimator": "score", "baseline": "value", "policy_delay": 4},
    {"estimator": "score", "baseline": "constant", "num_action_samples": 2},
    {"estimator": "score", "baseline": "none", "batch_size": 5000},
    {"n_step": 3, "normalize_obs": True, "normalize_reward": True, "layer_norm": True, "lr_schedule": "linear"},
    {"critic": "categorical", "v_min": -20.0, "v_max": 20.0, "max_grad_norm": 1.0, "optimizer": "adamw"},
    {"critic": "categorical", "v_min": 0.0, "v_max": 1.0, "critic_reduction": "mean", "n_step": 2, "num_atoms": 51},
]
#: observations, actions, environments: HalfCheetah, and all the ones that there are
SIZES = [(17, 6, 16), (1, 1, 1)]
GRAPH = "graph of "


class OnCpu(GraphedLearner):
    """On a CPU what would be recorded runs once, at that moment, and never again."""

    phase = ""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._stream: Any = "a stream"  # as if there were graphs

    def _beside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        phase, self.phase = self.phase, GRAPH + self.phase
        yield
        self.phase = phase

    def _record(self, replay: Sampler, length: int, with_actor: bool) -> Graph:
        with self._recording():
            return Graph(lambda: None, self._run(replay, length, with_actor))

    def _record_acting(self, obs: Tensor) -> ActingGraph:
        with self._recording():
            return ActingGraph(lambda: None, obs, self._sample(obs))


def filled(sizes: tuple[int, int, int], rows: int) -> Replay:
    obs_size, action_size, num_envs = sizes
    replay = Replay(rows * num_envs, num_envs, obs_size, action_size)
    replay.begin(torch.zeros(num_envs, obs_size))
    steps = torch.zeros(num_envs, action_size), torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.bool)
    replay.add(*steps, torch.zeros(num_envs, obs_size), np.ones(num_envs, np.bool_))
    return replay


Keys = dict[str, set[tuple[str, str]]]


def train(first: int, sizes: tuple[int, int, int], settings: dict[str, Any]) -> tuple[Keys, Keys]:
    """Act and update for a while, from the given number of updates on; another replay and a loaded state begin anew.

    Returns:
        The keys that Triton looks up in each phase, and those of them that are new when a graph is recorded.
    """
    obs_size, action_size, num_envs = sizes
    learner = OnCpu(Config(**{"hidden_sizes": (4, 4), "batch_size": 256, **settings}), obs_size, action_size, "cpu")
    found, late = Keys(), Keys()

    def keep(launched: Launch) -> None:
        phase, key = launched.label, (launched.kernel, launched.key)
        found.setdefault(phase, set()).add(key)
        if phase.startswith(GRAPH) and key not in found.get(phase.removeprefix(GRAPH), ()):
            late.setdefault(phase, set()).add(key)

    learner.updates = first
    with recorded(keep, lambda: learner.phase):
        for number, rows in enumerate((10, 10, 11)):
            replay = filled(sizes, rows)
            for num_updates in (1, 1, 5, 3, 16, 8, 1):
                learner.phase = f"acting {number}"
                learner.act(torch.zeros(num_envs, obs_size))
                learner.phase = f"updates {number}"
                learner.update(replay, num_updates)
            learner.load_state(*learner.state())
    return found, late


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_nothing_is_compiled_while_a_graph_is_recorded(
    first: int, settings: dict[str, Any], sizes: tuple[int, int, int]
) -> None:
    found, late = train(first, sizes, settings)
    loss = "pathwise_loss" if settings.get("estimator", "pathwise") == "pathwise" else "score_function_loss"
    for number in range(3):
        kernels = {kernel for kernel, _ in found[f"{GRAPH}updates {number}"]}
        critics = "categorical_loss" if "critic" in settings else "td_loss"
        assert kernels >= {f"_{op}_fwd_kernel" for op in (loss, "squashed_gaussian", critics, "replay_gather")}
        assert len(found[f"{GRAPH}acting {number}"]) == 1
    assert late == {}


def test_too_few_warm_ups_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forget = GraphedLearner._forget

    def forget_the_actor(self: GraphedLearner, replay: Sampler | None) -> None:
        forget(self, replay)
        self._warm_ups_left = engine.WARM_UPS  # whatever `policy_delay` is

    monkeypatch.setattr(GraphedLearner, "_forget", forget_the_actor)
    monkeypatch.setattr(GraphedLearner, "_warm", True)
    _, late = train(1, SIZES[0], {"policy_delay": 4})
    assert "_pathwise_loss_fwd_kernel" in {kernel for kernel, _ in late[f"{GRAPH}updates 0"]}
