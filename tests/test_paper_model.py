"""The paper model's counts against formulas, and its predictions against common sense."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks import paper_model
from benchmarks.counted import Counted, counted, working_set
from benchmarks.launches import filled_replay
from benchmarks.paper_model import CHIPS, Chip
from fastsac.config import Config
from fastsac.learner import FusedLearner, GraphedLearner, Learner
from fastsac.learner.device import FixedBatch
from fastsac.replay import Replay
from fastsac.transfer import to_host
from tests.pretend_cuda import pretended

O, A, H, E = 17, 6, 32, 2  # noqa: E741
ESTIMATORS = {"pathwise": 1, "score": 2}  # K


def learner(kind: type[Learner] = Learner, estimator: str = "pathwise", batch: int = 8) -> Learner:
    return kind(Config(estimator=estimator, batch_size=batch, hidden_sizes=(H, H)), O, A, "cpu")


def counts(kind: type[Learner] = Learner, estimator: str = "pathwise", batch: int = 8) -> Counted:
    return counted(learner(kind, estimator, batch), FixedBatch(O, A))


def flops_of_sac(estimator: str, batch: int, ones: int) -> int:
    """FLOPs of the products of an update by the layers' sizes; `ones` columns of first inputs stand for the bias."""
    actor, critic = [O + ones, H, H, 2 * A], [O + A + ones, H, H, 1]

    def passed(sizes: list[int], first: int = 0) -> int:
        return 2 * batch * sum(i * o for i, o in list(pairwise(sizes))[first:])

    act = 2 * passed(actor) + passed(actor) + passed(actor, 1)  # next_obs, obs; weights; inputs but the first layer's
    learn_q = E * (2 * passed(critic) + passed(critic) + passed(critic, 1))  # target, critic; the same
    judge = E * ESTIMATORS[estimator] * passed(critic)
    if estimator == "pathwise":
        judge += E * passed(critic)
        if ones:  # only the actions' columns are gone back to
            judge -= E * 2 * batch * (O + ones) * H
    if ones:  # an outer product is none of the products
        learn_q -= E * 2 * batch * H
        judge -= E * 2 * batch * H * (estimator == "pathwise")
    return act + learn_q + judge


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("kind", "ones"), [(Learner, 0), (GraphedLearner, 0), (FusedLearner, 1)])
def test_flops_are_those_of_the_layers(kind, ones, estimator):
    assert counts(kind, estimator).flops == flops_of_sac(estimator, 8, ones)


def test_bytes_are_those_of_the_tensors():
    a, b, bias, square = torch.ones(2, 3, 4), torch.ones(2, 4, 5), torch.ones(2, 1, 5), torch.ones(4, 4)
    out, scalar = torch.ones(2, 3, 5), torch.ones(()).expand(7)

    def moved(call, *arguments, **options):
        with Counted() as counter:
            call(*arguments, **options)
        return counter.launches, counter.bytes // 4

    assert moved(torch.bmm, a, b) == (1, 24 + 40 + 30)
    assert moved(torch.bmm, a, b, out=out) == (1, 24 + 40 + 30)
    assert moved(torch.baddbmm, bias, a, b) == (2, 10 + 30 + 24 + 40 + 2 * 30)
    assert moved(square.relu_) == (1, 32)
    assert moved(square.copy_, square.clone()) == (1, 32)
    assert moved(torch.neg, scalar) == (1, 1 + 7)
    assert moved(square.view, 16) == (0, 0)


def test_what_is_held_grows_with_the_batch_and_holds_the_state():
    small, large = (working_set(learner(batch=batch), filled_replay()) for batch in (8, 512))
    state, _ = learner().state()
    assert sum(tensor.nbytes for name, tensor in state.items() if name != "generator") < small
    assert small + 4 * E * 504 * H < large


@pytest.fixture(scope="module")
def updates():
    return {batch: (counts(batch=batch), 10_000 * batch) for batch in (8, 4096)}


def ends(update, chip: Chip, engine: str = "graphed", precision: str = "fp32") -> list[float]:
    found = paper_model.predict(*update, chip, engine, precision)
    assert found["floor"] == max(found["floors"].values()) > 0.0
    assert found["floor"] <= found["expected"][0] < found["expected"][1]
    return [found["floor"], *found["expected"]]


@pytest.mark.parametrize("engine", paper_model.GPU_ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))
def test_a_faster_chip_is_not_slower_and_a_larger_batch_not_faster(updates, chip, precision, engine):
    faster = chip._replace(fp32=2 * chip.fp32, tf32=2 * chip.tf32, clock=2 * chip.clock, bandwidth=2 * chip.bandwidth)
    small, large = (ends(updates[batch], chip, engine, precision) for batch in (8, 4096))
    assert all(a <= b for a, b in zip(small, large, strict=True))
    for better in (faster, faster._replace(l2=100 * chip.l2)):
        assert all(a >= b for a, b in zip(large, ends(updates[4096], better, engine, precision), strict=True))


def test_each_part_of_the_model_counts(updates):
    slow = Chip(1e-3, 1e-3, 1e3, 1e9, 1e9, 100, "sm_90", "")
    starved = Chip(1e9, 1e9, 1e3, 1e-3, 0.0, 100, "sm_90", "")
    crawling = Chip(1e9, 1e9, 1e-6, 1e9, 1e9, 100, "sm_90", "")
    update, footprint = updates[8]
    assert paper_model.device_us(update, footprint, slow, "fp32", 0) > 1e3 * update.flops * 1e-6
    assert paper_model.device_us(update, footprint, starved, "fp32", 0) == pytest.approx(1e3 * 1e-3 * update.bytes, 0.1)
    graphed = counts(GraphedLearner)
    assert paper_model.device_us(graphed, footprint, crawling, "fp32", 0) > 1e6
    assert ends(updates[8], CHIPS["H100"])[1] == pytest.approx(1.1 * update.launches)


def test_a_step_costs_what_the_model_says(monkeypatch):
    monkeypatch.setattr(GraphedLearner, "backend", "reference")  # as many launches, and less to interpret
    for num_envs in (1, 16):
        with pretended() as gpu:
            config = Config(num_envs=num_envs, batch_size=8, hidden_sizes=(H, H))
            agent, replay = GraphedLearner(config, O, A, "cuda"), Replay(512, num_envs, O, A, "cuda")
            obs = replay.begin(np.zeros((num_envs, O), np.float32))
            for index in range(12 if num_envs == 1 else 6):  # until there are only graphs
                gpu.counts.clear()
                action = agent.act(obs)
                to_host(action)
                agent.update(replay, num_envs * (index > 0))
                rewards, ends = np.zeros(num_envs, np.float32), np.zeros(num_envs, np.bool_)
                obs = replay.add(action, rewards, ends, np.zeros((num_envs, O), np.float32), ~ends)
        counts = paper_model.step(num_envs, [1.0, 2.0], [1.0, 2.0])["counts"]
        assert counts["graph"] == gpu.counts["graph launches"]
        assert counts["copy"] == gpu.counts["copies to host"] + gpu.counts["copies to device"]
        assert counts["launch"] == gpu.counts["kernels"] - counts["copy"]
        assert counts["wait"] == gpu.counts["waits"]


def test_a_step_takes_no_less_than_its_updates():
    one, sixteen = (paper_model.step(num_envs, [10.0, 20.0], [200.0, 400.0]) for num_envs in (1, 16))
    assert one["steps_per_s"][1] == pytest.approx(1e6 / 210.0)
    assert one["steps_per_s"] < sixteen["steps_per_s"]
    assert sixteen["steps_per_s"][0] == pytest.approx(16e6 / (20.0 + 16 * 400.0 + sixteen["host_us"][1]))


def test_every_chip_and_engine_has_its_row():
    result = json.loads((paper_model.RESULTS / "paper_model.json").read_text())
    assert result["chips"] == {name: chip._asdict() for name, chip in CHIPS.items()}
    assert {(row["engine"], row["estimator"], row["B"]) for row in result["updates"]} == {
        (engine, estimator, batch)
        for engine in paper_model.GPU_ENGINES
        for estimator in ESTIMATORS
        for batch in (256, 4096)
    }
    for row in result["updates"]:
        assert all(row[key] > 0 for key in ("launches", "flops", "bytes", "footprint"))
        assert row["footprint"] < row["bytes"]
        assert row["chips"].keys() == CHIPS.keys()
        for found in row["chips"].values():
            assert 0.0 < found["floor"] <= found["expected"][0] < found["expected"][1]
    assert {(row["chip"], row["N"]) for row in result["steps"]} == {(chip, n) for chip in CHIPS for n in (1, 16)}
    for row in result["cpu"]["rows"]:
        for engine in ("reference", "fused, fp32", "fused, bf16"):
            assert row[engine]["ratio"] == pytest.approx(row[engine]["measured"] / row[engine]["predicted"])
    found = {(row["engine"], row["estimator"], row["B"]) for row in result["cpu"]["estimators"]}
    assert len(found) == len(result["cpu"]["estimators"]) == 3 * len(ESTIMATORS) * 2
    assert all(row["predicted"] > 0.0 for row in result["cpu"]["estimators"])
