"""The kernels of a whole update against the reference engine and autograd; wrong ones on purpose are noticed."""

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.learner.flat import Row
from fastsac.learner.fused_cuda import FusedCudaLearner
from fastsac.replay import Replay
from fastsac.types import Sampler
from fastsac_kernels import whole_update_launch
from tests.kernels.parity import DEVICES, mutate
from tests.kernels.whole import Problem, as_tensor_cores, filled, one_update, problem

PATHWISE, LOO = problem(5, 3, 33, (64, 128)), problem(3, 2, 20, (128, 64), estimator="score", num_action_samples=3)
VALUE = problem(4, 1, 17, (64, 64), estimator="score", baseline="value", optimizer="adamw")
#: odd batch sizes, A from 1 to 32, K from 1 to 4, inputs in one and in two steps, widths that are no powers of two
CASES = [
    PATHWISE,
    LOO,
    VALUE,
    problem(1, 1, 1, (64, 64), alpha=0.2),
    problem(70, 17, 37, (64, 192), num_action_samples=3, optimizer="adamw", weight_decay=0.1),
    problem(11, 32, 129, (64, 64), estimator="score", num_action_samples=4),
    problem(17, 6, 100, (192, 64), estimator="score", baseline="none", alpha=0.0),
    problem(2, 7, 65, (64, 64), estimator="score", baseline="constant", num_action_samples=2, adam_betas=(0.5, 0.9)),
    problem(3, 8, 9, (64, 64), estimator="score", baseline="value", num_action_samples=2, gamma=0.5, tau=0.9),
]


class Eager(FusedCudaLearner):
    """Without any graph."""

    def _forget(self, replay: Sampler | None) -> None:
        super()._forget(replay)
        self._warm_ups_left = 10**9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_update_equals_the_reference_engines(case: Problem, device: str) -> None:
    assert one_update(case, device) == ""


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Cut the stages up as on a GPU: rows, chunks and tiles that many programs share."""
    cut = whole_update_launch.blocks_of
    cuda = torch.device("cuda")
    monkeypatch.setattr(whole_update_launch, "blocks_of", lambda plan, _: cut(plan, cuda)._replace(**changes))


@pytest.mark.parametrize(
    "case", [PATHWISE, LOO._replace(batch_size=33), VALUE._replace(hidden_sizes=(64, 320), batch_size=20)], ids=str
)
def test_it_does_not_depend_on_how_the_stages_are_cut_up(case: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    assert one_update(case) == ""


#: relative errors of gradients in TF32: factors are off by up to 2^-10, all the same way, and some ReLUs switch
@pytest.mark.parametrize(("precision", "least", "most"), [("tf32", 1e-5, 0.02), ("bf16", 1e-4, 0.08)])
@pytest.mark.parametrize(
    ("case", "first"),
    [
        (problem(17, 6, 64, (64, 128)), "tf32"),  # a first layer that bfloat16 does not round
        (problem(100, 6, 64, (64, 64), estimator="score", baseline="value"), "bf16"),
        (problem(5, 3, 33, (64, 64), estimator="score", num_action_samples=2), "tf32"),
    ],
    ids=str,
)
def test_rounded_products_stay_within_their_bounds(
    case: Problem, first: str, precision: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, config = as_tensor_cores(monkeypatch), case.config()
    sizes, found = (case.obs_size, case.action_size), []
    for each in ("fp32", precision):
        seen.clear()
        learner = FusedCudaLearner(dataclasses.replace(config, precision=each), *sizes, "cpu", 0)  # type: ignore[arg-type]
        learner.update(filled(*sizes))
        found.append(learner)
    assert set(seen) == {"tf32", precision}
    exact, rounded = found
    for name in exact._adams.keys() - {"alpha"}:
        wanted, gradient = (each._adams[name].exp_avg for each in found)
        error = ((gradient - wanted).norm() / wanted.norm()).item()
        assert least < error < most, f"{name}: {error:.1e}"
    for name, value in exact.metrics().items():
        assert rounded.metrics()[name].item() == pytest.approx(value.item(), rel=most, abs=most), name
    for name, network in rounded._flat.items():  # the copies follow the parameters
        weights = rounded._weights[name]
        assert weights.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        torch.testing.assert_close(weights.float(), network.values, rtol=2.0**-7, atol=1e-6)
    if precision == "bf16":
        assert whole_update_launch.precisions_of(rounded._plan)["FIRST"] == first


def state_of(learner: FusedCudaLearner) -> dict[str, Tensor]:
    tensors = {name: tensor.clone() for name, tensor in learner.state()[0].items() if name != "generator"}
    return tensors | {name: tensor.clone() for name, tensor in learner.metrics().items()}


@pytest.mark.slow
def test_programs_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted programs run one after the other; on a GPU nobody knows which comes first."""
    import triton.runtime.interpreter as interpreter

    as_on_a_gpu(monkeypatch)
    config = Config(batch_size=33, hidden_sizes=(64, 64), precision="fp32", estimator="score", baseline="value")
    replay, orders, found = filled(5, 3), list[list[int]](), []

    def shuffled(*bounds: int) -> list[int]:
        numbers = list(range(*bounds))
        if sys._getframe(1).f_code.co_name == "__call__" and found:  # the loops over programs
            random.Random(len(orders)).shuffle(numbers)
            orders.append(numbers)
        return numbers

    monkeypatch.setattr(interpreter, "range", shuffled, raising=False)
    for _ in range(3):
        learner = FusedCudaLearner(config, 5, 3, "cpu", 0)
        learner.update(replay, 2)
        found.append(state_of(learner))
    assert any(order != sorted(order) for order in orders)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(other[name], value), name


def beside(kind: Any, config: Config, seeds: list[int], replays: list[Any]) -> list[FusedCudaLearner]:
    """Learners in the launches of the first one."""
    learners, memory = [kind(config, 5, 3, "cpu", seed) for seed in seeds], list[Tensor]()
    for number, (learner, replay) in enumerate(zip(learners, replays, strict=True)):
        row = Row(learner.device, memory, number, len(seeds))
        learner.move(row)
        replay.move(row.moved)
    learners[0].join(replays[0], list(zip(learners[1:], replays[1:], strict=True)))
    return learners


def replays_of(number: int) -> list[Replay]:
    replays = [filled(5, 3) for _ in range(number)]
    for each, replay in enumerate(replays):
        replay._reward.add_(float(each))
    return replays


def difference_from_alone(settings: dict[str, Any], rounds: list[tuple[int, ...]]) -> str:
    """Return what of some learners in the launches of one is not, bit for bit, what it would be alone; or nothing."""
    config = Config(**{"batch_size": 20, "hidden_sizes": (64, 64), "precision": "fp32", "num_envs": 2, **settings})
    number = len(rounds[0])
    alone = [Eager(config, 5, 3, "cpu", seed) for seed in range(number)]
    for learner, replay, dues in zip(alone, replays_of(number), zip(*rounds, strict=True), strict=True):
        for turn, due in enumerate(dues):
            learner.set_progress(turn / 4)
            learner.update(replay, due)
    together = beside(Eager, config, list(range(number)), replays_of(number))
    for turn, dues in enumerate(rounds):
        for learner in together:
            learner.set_progress(turn / 4)
        together[0].update_each(dues)
    for found, wanted in zip(together, alone, strict=True):
        numbers = [state_of(each) | {"rng": each.rng.state, "steps": each._steps} for each in (found, wanted)]
        assert numbers[0].keys() == numbers[1].keys()
        for name, value in numbers[1].items():
            if not torch.equal(numbers[0][name], value):
                return name
        if found.updates != wanted.updates or found.stale_copies():
            return f"{found.updates} updates, {found.stale_copies()}"
    return ""


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({}, [(2, 1, 0), (0, 1, 1)]),
        ({"estimator": "score", "baseline": "value", "lr_schedule": "linear"}, [(1, 0, 2)]),
        ({"policy_delay": 2}, [(1, 2, 0), (2, 1, 1)]),
        pytest.param({"alpha": 0.2, "precision": "bf16"}, [(1, 2, 1)], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_learners_in_one_launch_are_what_each_would_be_alone(
    settings: dict[str, Any], rounds: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_tensor_cores(monkeypatch)
    assert difference_from_alone(settings, rounds) == ""


def test_learners_that_do_not_lie_side_by_side_are_refused() -> None:
    config = Config(batch_size=4, hidden_sizes=(64, 64), precision="fp32")
    first, second = (FusedCudaLearner(config, 5, 3, "cpu", seed) for seed in range(2))
    with pytest.raises(ValueError, match="do not lie side by side"):
        first.join(filled(5, 3), [(second, filled(5, 3))])


def autograd_of(learner: FusedCudaLearner, batch: Any, noise: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return every gradient of the update at its present weights, by autograd in float64."""
    state = learner._state
    assert state is not None
    config, alpha = learner.config, learner.alpha.double()
    nets = {name: network.double() for name, network in learner._networks().items()}
    obs, action, reward, next_obs = (part.double() for part in batch[:4])

    def sampled(obs: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, log_std = nets["actor"](obs)
        u = mean + log_std.exp() * eps
        slope = 2.0 * (torch.log(torch.tensor(2.0).double()) - u - torch.nn.functional.softplus(-2.0 * u))
        normal = torch.distributions.Normal(mean, log_std.exp())
        return mean, log_std, u, (normal.log_prob(u) - slope).sum(-1)

    with torch.no_grad():
        *_, u, log_prob = sampled(next_obs, noise[0][0].double())
        next_q = nets["target_critic"](next_obs, u.tanh())
        target = reward + config.gamma * ~batch.terminated * (next_q.amin(0) - alpha * log_prob)
    q = nets["critic"](obs, action)
    critic = torch.autograd.grad(((q - target) ** 2).mean(1).sum(), list(nets["critic"].parameters()))
    eps = noise[1].double()
    mean, log_std, u, log_prob = sampled(obs, eps)
    leaf = u.tanh().detach().requires_grad_()
    sampled_q = torch.stack([nets["critic"](obs, each, frozen=True) for each in leaf], 1)  # [E, K, B]
    q_gradient = torch.stack([torch.autograd.grad(q.sum(), leaf, retain_graph=True)[0] for q in sampled_q])
    q_there = torch.stack([nets["critic"](obs, each, frozen=True) for each in u.tanh()], 1)
    loss = (alpha * log_prob - q_there.amin(0)).mean()
    actor = torch.autograd.grad(loss, list(nets["actor"].parameters()), retain_graph=True)
    heads = torch.autograd.grad(loss, [mean, log_std])
    found = {f"critic {i}": each for i, each in enumerate(critic)} | {f"actor {i}": x for i, x in enumerate(actor)}
    values = {"next_q": next_q, "q": q, "error": q - target, "sampled_q": sampled_q, "log_prob": log_prob}
    return found | values | {"q_gradient": q_gradient, "d mean": heads[0], "d log_std": heads[1]}


def test_each_stage_has_autograds_gradients() -> None:
    from fastsac.networks import LOG_STD_HALF_RANGE
    from fastsac_kernels import philox_normal

    sizes, config = (5, 3), Config(batch_size=33, hidden_sizes=(64, 64), num_action_samples=2, precision="fp32")
    learner, replay = FusedCudaLearner(config, *sizes, "cpu", 0), filled(*sizes)
    batch = replay.sample(33, learner.rng.of_stream(learner._plan.streams[2]))
    noise = [philox_normal(learner.rng.of_stream(learner._plan.streams[i]), (k, 33, 3)) for i, k in ((0, 1), (1, 2))]
    for name in ("critic", "actor", "alpha"):
        learner._set_rate(name, 0.0)
    learner.update(replay)
    scratch = learner._scratch
    assert torch.equal(scratch.x[0], torch.cat(batch[:2], 1))
    found = {
        name: getattr(scratch, name)[0] for name in ("next_q", "q", "error", "sampled_q", "log_prob", "q_gradient")
    }
    for name in ("critic", "actor"):  # the first moments are (1 - beta1) times the gradients
        views = learner._adams[name].of_parameters(learner._adams[name].exp_avg / (1.0 - 0.9))
        found |= {f"{name} {i}": view for i, view in enumerate(views)}
    raw_slope = 1.0 - torch.tanh(scratch.policy[0, :, 3:]) ** 2
    found["d mean"] = scratch.policy_gradient[0, :, :3]
    found["d log_std"] = scratch.policy_gradient[0, :, 3:] / (LOG_STD_HALF_RANGE * raw_slope)
    expected = autograd_of(learner, batch, (noise[0], noise[1]))
    for name, wanted in expected.items():
        error, size = (found[name].double() - wanted).abs().max(), wanted.abs().max()
        assert error <= 2e-5 * size, f"{name} is off by {error:.1e} of {size:.1e}"


TWO, WHOLE, DESCENT = "two_layer_triton", "whole_update_triton", "descent_triton"
GATHER, LAUNCH = "replay_gather_triton", "whole_update_launch"
MUTATIONS = [
    (PATHWISE, TWO, "tl.where(z < 0.0, 0.0, z)", "z"),
    (PATHWISE, TWO, "tl.load(values_ptr + column)[None, :]", "tl.load(values_ptr + column)[None, :] * 2.0"),
    (PATHWISE, TWO, "(1 + given + place)[:, None] * WIDTH", "(given + place)[:, None] * WIDTH"),
    (PATHWISE, TWO, "second = start2 + network * (H1 * H2)", "second = start2"),
    (PATHWISE, TWO, "tl.where(kept.to(tl.float32) > 0.0, d1, 0.0)", "d1"),
    (PATHWISE, TWO, "weights_ptr + start2 + network * (H1 * H2)", "weights_ptr + start2"),
    (PATHWISE, TWO, "bias_ptr + A, mask", "bias_ptr, mask"),
    (PATHWISE, TWO, "A, A, CHUNK), raw, PRECISION", "A, 0, CHUNK), raw, PRECISION"),
    (PATHWISE, GATHER, "slot >= length, slot - length", "slot >= length, length - 1"),
    (PATHWISE, WHOLE, "x_start = following * O", "x_start = index * O"),
    (PATHWISE, WHOLE, "tl.where(ended != 0, 0.0, gamma)", "gamma"),
    (PATHWISE, WHOLE, "NEXT_STREAM, b, live", "BATCH_STREAM, b, live"),
    (PATHWISE, WHOLE, "next_q - alpha *", "next_q + alpha *"),
    (PATHWISE, WHOLE, "return tl.minimum(first, second", "return tl.maximum(first, second"),
    (PATHWISE, WHOLE, "tl.where(first < second, 1.0", "tl.where(first < second, 0.0"),
    (PATHWISE, WHOLE, "(1.0 - share) * of_second) * slope", "(1.0 - share) * of_second)"),
    (PATHWISE, WHOLE, "grad_u * (sigma * eps) - alpha", "grad_u * (sigma * eps)"),
    (PATHWISE, WHOLE, "scale) * squash(raw)[1]", "scale)"),
    (PATHWISE, WHOLE, "load(place, mask=mask, other=0.0) + 1.0", "load(place, mask=mask, other=0.0)"),
    (LOO, WHOLE, "(K * (f - first_f) - baseline) * (1.0 / (K - 1))", "(K * (f - first_f) - baseline) * (1.0 / K)"),
    (LOO, WHOLE, "tl.div_rn(eps, sigma)", "eps"),
    (VALUE, WHOLE, "(eps * eps - 1.0)\n", "(eps * eps)\n"),
    (VALUE, WHOLE, "baseline -= tl.load(value_out_ptr", "baseline += tl.load(value_out_ptr"),
    (VALUE, WHOLE, "mask=live, other=0.0) - soft_value", "mask=live, other=0.0) + soft_value"),
    (PATHWISE, DESCENT, "(i == 0)[None, :], 1.0, x", "(i == 0)[None, :], 0.0, x"),
    (PATHWISE, DESCENT, "(1.0 - BETA2) * gradient * gradient", "(1.0 - BETA1) * gradient * gradient"),
    (PATHWISE, DESCENT, "count * LOG_BETA2", "count * LOG_BETA1"),
    (VALUE, DESCENT, "value -= rate * decay * value", "value -= decay * value"),
    (PATHWISE, DESCENT, "tau * (value - target)", "tau * (value + target)"),
    (PATHWISE, DESCENT, "alpha * (entropy - target_entropy)", "alpha * (entropy + target_entropy)"),
    (PATHWISE, DESCENT, "entropy = -mean_of", "entropy = mean_of"),
    (PATHWISE, DESCENT, "tl.store(metrics_ptr + learner * 6, 2.0 *", "tl.store(metrics_ptr + learner * 6, 1.0 *"),
]


@pytest.mark.parametrize(("case", "module", "old", "new"), MUTATIONS, ids=lambda part: str(part)[:40])
def test_a_wrong_kernel_is_noticed(
    case: Problem, module: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dependents = {TWO: (DESCENT, WHOLE, LAUNCH), DESCENT: (LAUNCH,), WHOLE: (LAUNCH,), GATHER: (WHOLE, LAUNCH)}[module]
    mutate(monkeypatch, tmp_path, module, old, new, dependents)
    assert one_update(case) != ""


LEARNER = "    learner = tl.program_id(2).to(tl.int64)\n"
DUE = "    if tl.load(due_ptr + learner * 2 + 1) == 0:\n        return\n"
SAMPLED, CRITICS_TILE, ACTORS_TILE = (
    "tl.program_id(1) // 2\n",
    "tile, e = tl.program_id(0), ",
    "tile, network = tl.program_id(0), ",
)
#: of several learners' launches: (module, old, new)
WRONG_COUNTS = [
    (WHOLE, "(due > 0).to(tl.int64)", "(due >= 0).to(tl.int64)"),
    (WHOLE, "    if due <= 0:\n        return\n", ""),
    (WHOLE, SAMPLED + LEARNER + DUE, SAMPLED + LEARNER),
    (DESCENT, f"{CRITICS_TILE}tl.program_id(1)\n{LEARNER}{DUE}", f"{CRITICS_TILE}tl.program_id(1)\n{LEARNER}"),
    (DESCENT, f"{ACTORS_TILE}tl.program_id(1)\n{LEARNER}{DUE}", f"{ACTORS_TILE}tl.program_id(1)\n{LEARNER}"),
    (DESCENT, "tl.load(due_ptr + learner * 2) - 1", "tl.load(due_ptr + learner * 2)"),
    (
        DESCENT,
        "mean_ptr + first, square_ptr + first, weights_ptr + first",
        "mean_ptr, square_ptr + first, weights_ptr + first",
    ),
]


@pytest.mark.parametrize(("module", "old", "new"), WRONG_COUNTS, ids=lambda part: str(part)[:40])
def test_a_learner_that_is_not_left_alone_is_noticed(
    module: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch, tmp_path, module, old, new, {DESCENT: (LAUNCH,), WHOLE: (LAUNCH,)}[module])
    assert difference_from_alone({"batch_size": 4}, [(1, 2)]) != ""


def test_what_is_not_finite_does_not_hide() -> None:
    for name in ("critic", "actor", "target_critic"):
        config = Config(batch_size=9, hidden_sizes=(64, 64), precision="fp32")
        learner = FusedCudaLearner(config, 5, 3, "cpu", 0)
        learner._flat[name].values[70] = float("nan")
        learner.update(filled(5, 3))
        assert not learner.metrics()["critic_loss"].isfinite(), name
