"""What a CUDA graph may hold and point at, and what a training step costs the host; on the pretended GPU."""

import dataclasses
import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsac import SAC
from fastsac.learner import GraphedLearner
from fastsac.learner import graphed as engine
from fastsac.replay import Replay
from fastsac.transfer import to_device, to_host
from tests.pretend_cuda import CaptureError, Gpu, Stream, pretended, trust_engines
from tests.runs import SMALL
from tests.test_graphed import few_settings, filled, make

CONFIG = dataclasses.replace(
    SMALL, engine="graphed", hidden_sizes=(8, 6), batch_size=8, learning_starts=16, checkpoint_replay=True
)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    monkeypatch.setattr(engine, "UPDATES_PER_GRAPH", 2)
    trust_engines(monkeypatch)
    with pretended() as gpu:
        yield gpu


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0.0],
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.tensor(1.0, device="cuda"),
        lambda x: x.normal_(),
        lambda x: torch.randn(3, device="cuda"),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_what_a_capture_forbids_is_noticed(forbidden: Any, gpu: Gpu) -> None:
    x = torch.ones(3, device="cuda")
    forbidden(x)
    with pytest.raises(CaptureError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        forbidden(x)
    x + 1.0  # and things go on


@few_settings
def test_nothing_is_done_for_the_first_time_in_a_capture(settings: dict[str, Any], gpu: Gpu) -> None:
    learner, replay, obs = make(**settings), filled(), torch.zeros(4, 5, device="cuda")
    gpu.ops.clear()
    for _ in range(3):
        learner.act(obs)
        learner.update(replay, 1)
    assert not learner._graphs
    warm, gpu.ops = gpu.ops, set()
    for _ in range(3):
        learner.update(replay, 5)
    assert {with_actor for _, with_actor in learner._graphs} == {True, learner.config.policy_delay == 1} | {True}
    assert gpu.ops <= warm
    gpu.ops = set()
    learner.act(obs)
    learner.act(obs)
    assert learner._acting is not None
    assert gpu.ops - {torch.ops.aten.clone.default, torch.ops.aten.copy_.default} <= warm


@few_settings
def test_an_update_is_nothing_but_graphs(settings: dict[str, Any], gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphedLearner, "backend", "reference")  # as many graphs, and less to interpret
    learner, replay, obs = make(**settings), filled(), torch.zeros(4, 5, device="cuda")
    for _ in range(5):
        learner.update(replay, 5)
        learner.act(obs)
    gpu.counts.clear()
    learner.update(replay, 2)
    assert set(gpu.counts) == {"graph launches"}
    assert gpu.counts["graph launches"] <= 2
    gpu.counts.clear()
    learner.act(obs)
    assert gpu.counts == {"graph launches": 1, "kernels": 2}  # the observations' copy, and the actions'
    gpu.counts.clear()
    learner.metrics()
    assert gpu.counts["kernels"] <= 2


def test_no_garbage_is_collected_in_a_capture(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[bool] = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(gpu.graph is not None))
    learner, replay = make(), filled()
    learner.update(replay, 6)
    assert collected == [False, False]  # before each of the two graphs
    assert not gpu.collecting
    assert gc.isenabled()


def test_a_graph_survives_another_one_of_its_stream(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams come from a pool, and with a graph PyTorch frees its stream's cuBLAS workspace (PyTorch issue 193402)."""
    monkeypatch.setattr(Stream, "numbers", iter([7] * 100))
    monkeypatch.setattr(GraphedLearner, "backend", "reference")
    (first, second), replay = (make() for _ in range(2)), filled()
    for learner in (first, second, first):
        learner.update(replay, 6)
    second._forget(None)
    del second, learner
    gc.collect()
    first.update(replay, 6)
    torch.mm(torch.ones(2, 2, device="cuda"), torch.ones(2, 2, device="cuda"))
    first.update(replay, 6)


def address(tensor: Any) -> int:
    return int(tensor.inner.untyped_storage().data_ptr())


def addresses(learner: GraphedLearner) -> dict[Any, set[int]]:
    """Of all that was there before a graph was recorded, but for the place where acting reads its observations."""
    graphs: dict[Any, Any] = {key: graph.replay for key, graph in learner._graphs.items()}
    own = set()
    if learner._acting is not None:
        graphs["acting"], own = learner._acting.replay, {address(learner._acting.obs)}
    return {key: set(replay.__self__.before) - own for key, replay in graphs.items()}


@pytest.mark.slow
def test_what_a_graph_points_at_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding, acting, saving and evaluating move nothing; loading moves much, and drops the graphs."""
    monkeypatch.setattr(engine, "WARM_UPS", 1)  # the interpreter takes its time
    agent = SAC(CONFIG)
    agent.learn(28)
    learner, before = agent.learner, None
    assert isinstance(learner, GraphedLearner)
    for _ in range(2):  # recorded anew, a graph points at the same places
        found = addresses(learner)
        assert {(1, True), (2, True), "acting"} <= set(found)
        state = {address(tensor) for tensor in learner.state()[0].values() if tensor.is_cuda}
        assert state & found[1, True]
        assert before in (None, found)
        before = found
        learner._forget(agent.replay)
        agent.learn(agent.steps + 8)
        agent.save(tmp_path / "run")
        agent.evaluate(1)
        agent.predict(np.zeros(3, np.float32), deterministic=False)
    learner.load_state(*learner.state())
    assert not learner._graphs
    assert learner._acting is None


def steps(agent: SAC, number: int) -> list[Counter[str]]:
    """What each of so many training steps costs."""
    counted, step = [], agent._step

    def counting(obs: Any, saver: Any) -> Any:
        gpu = Gpu.current()
        gpu.counts.clear()
        result = yield from step(obs, saver)
        counted.append(gpu.counts.copy())
        return result

    agent._step = counting  # type: ignore[method-assign]
    agent.learn(agent.steps + number * agent.config.num_envs)
    return counted


def test_a_training_step_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphedLearner, "backend", "reference")  # as many waits, and less to interpret
    agent = SAC(CONFIG)
    exploring = steps(agent, 4)
    assert all(step["waits"] == 0 and step["copies to device"] == 1 for step in exploring)
    training = steps(agent, 20)
    for step in training:
        assert step["waits"] == step["waits: a stream"] == step["copies to host"] == step["copies to device"] == 1
    settled = training[-10:]
    assert {step["graph launches"] for step in settled} == {3}  # acting, and two pairs of updates
    # observations into acting's graph, actions out of it and to the host, and a step's transitions to the device, where
    # obs, action, reward, flag, indices and their span go to their places
    assert {step["kernels"] for step in settled} == {10}


def test_arrays_go_to_the_device_in_one_copy_and_come_back(gpu: Gpu) -> None:
    arrays = [np.arange(3), np.ones((2, 3), np.float32), np.array([True, False, True]), np.full(5, 0.5, np.float32)]
    tensors = to_device(arrays, torch.device("cuda"))
    assert gpu.counts == {"copies to device": 1, "kernels": 1}
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.is_cuda
        assert tensor.is_contiguous()
        back = to_host(tensor)
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)
    assert gpu.counts["waits"] == 4


def test_the_replay_on_a_gpu_holds_what_one_on_a_cpu_does() -> None:
    rng, replays = np.random.default_rng(0), [Replay(10, 3, 4, 2, device) for device in ("cpu", "cuda")]
    obs = rng.normal(size=(3, 4)).astype(np.float32)
    for replay in replays:
        replay.begin(obs)
    for step in range(12):
        action, obs, reward = (rng.normal(size=size).astype(np.float32) for size in ((3, 2), (3, 4), 3))
        ends, valid = rng.random(3) < 0.5, rng.random(3) < 0.7
        for replay in replays:
            on_device = torch.from_numpy(action).to(replay.device)
            given = on_device if step % 2 else action  # sampled on the device, or drawn at random on the host
            assert np.array_equal(to_host(replay.add(given, reward, ends, obs, valid)), obs)
    states = [replay.rows(replay.oldest, replay.newest) | {"queue": replay._queue.cpu()} for replay in replays]
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name
