"""Several processes that train one agent: gradients, parameters, steps, and what happens when one of them ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fastsac import SAC, Config
from fastsac.errors import FastsacError, UsageError
from fastsac.learner import FusedLearner, Learner
from fastsac.learner.reference import ACTION, NEXT_ACTION
from fastsac.ranks import RankLost, Ranks, first_to_end, for_ranks
from fastsac.types import Batch, Draw

O, A, B, K, UPDATES = 5, 3, 8, 2, 5  # noqa: E741
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"estimator": "score", "baseline": "value"},
    {"estimator": "score", "baseline": "loo", "max_grad_norm": 0.5, "policy_delay": 2, "optimizer": "adamw"},
]


def numbers(name: int, update: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * name + update))


class Part:
    """A rank's rows of the joined batch, and of its noise; one rank has all of them."""

    def __init__(self, rank: int, size: int, ranks: int) -> None:
        self.rows, self.total = slice(rank * B, (rank + size) * B), ranks * B
        self.update = 0

    def sample(self, batch_size: int, *_: Any) -> Batch:
        assert batch_size == self.rows.stop - self.rows.start
        self.update += 1
        obs, next_obs = (numbers(i, self.update, self.total, O)[self.rows] for i in (1, 2))
        action, reward = numbers(3, self.update, self.total, A).tanh()[self.rows], numbers(4, self.update, self.total)
        return Batch(obs, action, reward[self.rows], next_obs, (reward < -1.0)[self.rows])

    def noise(self, purpose: int, samples: int) -> Tensor:
        return numbers(10 + purpose, self.update, samples, self.total, A)[:, self.rows]


class Reference(Learner):
    part: Part

    def _draw(self, purpose: int, num_samples: int, mean: Tensor, num_noise: int | None = None) -> Draw:
        return Draw(self.part.noise(purpose, num_noise or num_samples), num_samples)


class Fused(FusedLearner):
    part: Part

    def _draw_noise(self, with_actor: bool) -> None:
        self._noise[:1] = self.part.noise(NEXT_ACTION, 1)
        self._noise[1:] = self.part.noise(ACTION, len(self._noise) - 1)


def trained(kind: Any, settings: dict[str, Any], part: Part, ranks: Ranks | None) -> list[Tensor]:
    rates = dict.fromkeys(("actor_lr", "critic_lr", "value_lr", "alpha_lr"), 3e-3)
    size = part.rows.stop - part.rows.start
    config = Config(hidden_sizes=(16, 16), batch_size=size, num_action_samples=K, precision="fp32", **rates, **settings)
    learner = kind(config, O, A, "cpu", 0)
    learner.part = part
    if ranks is not None:
        learner.average = ranks.average
    for _ in range(UPDATES):
        learner.update(part)
    return [tensor.clone() for name, tensor in learner.state()[0].items() if name != "generator"]


def work(rank: int, size: int, folder: str) -> None:
    """What a process does: train with its part of each batch, and exchange numbers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    ranks, found = Ranks(rank, size), []
    for kind in (Reference, Fused):
        for settings in SETTINGS:
            found.append(trained(kind, settings, Part(rank, 1, size), ranks))
    calls: list[int] = []
    counting = Ranks(rank, size)
    counting.average = lambda tensor: (calls.append(tensor.numel()), ranks.average(tensor))  # type: ignore[method-assign]
    trained(Fused, SETTINGS[1], Part(rank, 1, size), counting)
    numbers = ranks.sum(rank + 1), ranks.of_leader([float(rank), -0.5]), len(calls)
    state = {"actor.weight": torch.ones(3, 4), "log_alpha": torch.zeros(())}
    ranks.refuse_differences(state)
    if rank == size - 1:
        state["actor.weight"][2, 1] = 1.0 + 2.0**-23  # the last bit
    said = []
    settings = {"seed": 1, "batch_size": 7 + (rank == 1), "env_id": "x"}
    for check, what in ((ranks.refuse_differences, state), (ranks.refuse_other_settings, settings)):
        try:
            check(what)  # type: ignore[operator]
        except FastsacError as error:
            said.append(str(error))
    torch.save((found, numbers, said), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_are_one_process_with_the_joined_batch(size: int, tmp_path: Path) -> None:
    mp.spawn(work, (size, str(tmp_path)), size)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    joined = [trained(kind, each, Part(0, size, size), None) for kind in (Reference, Fused) for each in SETTINGS]
    for found, numbers, said in results:
        for own, first, wanted in zip(found, results[0][0], joined, strict=True):
            for tensor, of_leader, expected in zip(own, first, wanted, strict=True):
                assert torch.equal(tensor, of_leader)  # bit for bit
                torch.testing.assert_close(tensor, expected, rtol=2e-4, atol=2e-6)
        assert numbers == (size * (size + 1) // 2, [0.0, -0.5], 2 * UPDATES)  # two averages an update
        assert said[0].startswith("the ranks have different parameters (actor.weight)")
        assert said[1] == "--batch-size must be the same on all ranks"


def left_alone(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ranks = Ranks(rank, 2)
    ranks.sum(1)
    if rank == 1:
        os._exit(0)
    begun = time.monotonic()
    with pytest.raises(RankLost, match=r"^rank 0 of 2 ends because another one has: ") as caught:
        ranks.sum(1)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 20.0
    Path(folder, "lost").touch()


def test_a_rank_notices_that_another_one_has_ended(tmp_path: Path) -> None:
    mp.spawn(left_alone, (str(tmp_path),), 2)
    assert (tmp_path / "lost").exists()


class Pretended(Ranks):
    """A rank among others, which do what it does."""

    def average(self, tensor: Tensor) -> None:
        pass

    def sum(self, number: int) -> int:
        return number * self.size

    def _broadcast(self, tensor: Tensor) -> Tensor:
        return tensor

    def _add(self, tensor: Tensor) -> None:
        pass


def of_rank(rank: int, monkeypatch: pytest.MonkeyPatch, run_dir: Path | None = None) -> SAC:
    monkeypatch.setattr(Ranks, "join", staticmethod(lambda: Pretended(rank, 2)))
    config = Config(env_id="Pendulum-v1", num_envs=2, hidden_sizes=(16, 16), batch_size=16, learning_starts=20)
    return SAC(config) if run_dir is None else SAC.resume(run_dir, config)


def drawn(agent: SAC) -> list[Any]:
    exploration = agent._progress.exploration.random()
    noise = torch.randn(4, generator=agent.learner.generator).tolist()
    return [agent.envs.reset().tolist(), exploration, noise, agent.replay.generator.initial_seed()]  # type: ignore[union-attr]


def test_ranks_draw_different_numbers_also_after_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leader = of_rank(0, monkeypatch)
    leader.learn(60)
    leader.save(tmp_path / "run")
    fresh, resumed = (
        [drawn(of_rank(rank, monkeypatch, where)) for rank in (0, 1)] for where in (None, tmp_path / "run")
    )
    for pair in (fresh, resumed):
        for one, other in zip(*pair, strict=True):
            assert one != other
    first, second = (of_rank(rank, monkeypatch) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.actor.parameters(), second.actor.parameters(), strict=True))
    assert second.save(tmp_path / "other").name.startswith("step-")
    assert not (tmp_path / "other").exists()  # rank 0 saves


def test_a_signal_that_comes_while_ranks_agree_waits_for_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, stop = of_rank(1, monkeypatch), list[int]()

    def interrupted(number: int) -> int:
        stop.append(15)
        return number

    monkeypatch.setattr(agent._ranks, "sum", interrupted)
    assert not agent._stops(stop)
    assert agent._stops(stop)


def test_one_process_exchanges_nothing() -> None:
    ranks = Ranks()
    assert (ranks.alone, ranks.leads, first_to_end()) == (True, True, True)
    ranks.refuse_other_settings({"seed": 1})
    assert (ranks.sum(7), ranks.of_leader([1.5])) == (7, [1.5])
    ranks.refuse_differences({})
    assert Ranks.join().alone
    config = Config(checkpoint_replay=True)
    assert for_ranks(config, ranks, CPU) is config


@pytest.mark.parametrize(
    ("settings", "device", "why"),
    [
        (
            {"checkpoint_replay": True},
            CPU,
            "--checkpoint-replay stores a single replay buffer, but torchrun has started 3",
        ),
        ({"buffer_size": 5, "num_envs": 2}, CPU, "--buffer-size 5 may be empty on one rank"),
        ({"normalize_obs": True}, CPU, "--normalize-obs uses the moments of a single process"),
        ({"normalize_reward": True}, CPU, "--normalize-reward uses the moments of a single process"),
        ({"engine": "fused"}, CUDA, "--engine fused does not average gradients on CUDA"),
        ({"engine": "graphed"}, CUDA, "--engine graphed does not average gradients on CUDA"),
    ],
    ids=str,
)
def test_what_several_ranks_cannot_do_is_refused(settings: dict[str, Any], device: torch.device, why: str) -> None:
    with pytest.raises(UsageError, match=re.escape(why)):
        for_ranks(Config(**settings), Ranks(1, 3), device)


def test_nothing_is_measured_that_could_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    config = for_ranks(Config(), Ranks(1, 8, on_this_machine=4), CPU)
    assert (config.engine, config.precision, config.num_threads) == ("auto", "fp32", 3)
    config = for_ranks(Config(precision="bf16", num_threads=5), Ranks(1, 8, on_this_machine=4), CPU)
    assert (config.engine, config.precision, config.num_threads) == ("auto", "bf16", 5)
    assert for_ranks(Config(), Ranks(1, 2), CUDA).engine == "reference"


def launched(run_dir: Path, *options: str, size: int = 2, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command += ["-m", "fastsac", "train", *options]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=run_dir.parent, env=environ, **pipes, **more)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("fastsac: ")]


OPTIONS = (
    *("--env-id", "Pendulum-v1", "--num-envs", "2", "--learning-starts", "100", "--hidden-sizes", "16", "16"),
    *("--eval-every", "400", "--eval-episodes", "1", "--log-every", "100", "--batch-size", "16"),
)


@pytest.mark.slow
def test_torchrun_trains_one_agent_and_resumes_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = launched(run_dir, *OPTIONS, "--total-steps", "400", "--run-dir", str(run_dir))
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (told,) = ours(errors)
    assert "engine fused (no CUDA GPU), precision fp32 (the default of several ranks), 2 ranks" in told
    assert out.count("evaluation return") == 1
    steps = [row["step"] for row in rows(run_dir)]
    assert steps == [100, 200, 300, 400, 400]  # of both together, four at a time
    assert rows(run_dir)[-1]["updates"] == 296  # those of the last step are not due yet
    agent = SAC.load(run_dir)  # one process can go on with it
    assert (agent.steps, agent.config.precision) == (400, "auto")
    process = launched(run_dir, "--resume", str(run_dir), "--total-steps", "800")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert rows(run_dir)[-1]["step"] == 800
    process = launched(run_dir, *OPTIONS, "--total-steps", "400", "--run-dir", str(run_dir))
    _, errors = process.communicate(timeout=120)
    assert len(ours(errors)) == 1
    assert "already" in ours(errors)[0] or "holds" in ours(errors)[0]


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def under_way(run_dir: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 90.0
    while not ((run_dir / "metrics.jsonl").exists() and rows(run_dir)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_rank_that_dies_ends_the_job_with_one_line(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = launched(run_dir, *OPTIONS, "--total-steps", "1000000", "--run-dir", str(run_dir), size=3)
    under_way(run_dir, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    told = ours(errors)
    assert len(told) <= 2  # what is trained, and why it ends; torchrun may be quicker to end the others
    assert all("ends because another one has" in line for line in told[1:])


def test_a_signal_to_one_rank_stops_all_and_saves(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = launched(run_dir, *OPTIONS, "--total-steps", "1000000", "--run-dir", str(run_dir))
    under_way(run_dir, process)
    os.kill(children(process.pid)[-1], signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "interrupted at step" in out
    assert SAC.load(run_dir).steps >= rows(run_dir)[-1]["step"] > 0
