"""The fused engine on CUDA, on a pretended GPU whose graphs are as a GPU's: what it serves, and that it learns."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.learner import FusedCudaLearner, FusedLearner, Learner, choose_engine, make_learner
from fastsac.learner import graphed as engine
from fastsac.learner.compare import compare, compare_rounded, compare_together
from fastsac.learner.fused_cuda import fused_cuda_obstacle
from fastsac.learner.reference import ACTION, BATCH, NEXT_ACTION
from fastsac.learner.self_check import Verdict, right_engine
from fastsac.learner.together import Together
from fastsac.own_networks import OwnNetworks
from fastsac.replay import Replay
from fastsac.types import Batch, Sampler
from fastsac_kernels import PhiloxState, philox_normal
from fastsac_kernels.whole_update import STAGES
from tests.kernels.whole import as_tensor_cores, filled
from tests.pretend_cuda import CUDA, trust_engines

O, A, B, HIDDEN = 5, 3, 17, (64, 64)  # noqa: E741
SMALL: dict[str, Any] = {"hidden_sizes": HIDDEN, "batch_size": B, "precision": "fp32"}
VALUE: dict[str, Any] = {"estimator": "score", "baseline": "value"}


class Eager(FusedCudaLearner):
    """Without any graph."""

    def _forget(self, replay: Sampler | None) -> None:
        super()._forget(replay)
        self._warm_ups_left = 10**9


def tensors_of(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in learner.state()[0].items() if name != "generator"}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.cpu(), second[name].cpu()), name


@pytest.mark.usefixtures("quick_gpu")
@pytest.mark.parametrize(
    "settings", [{"policy_delay": 2}, pytest.param({**VALUE, "lr_schedule": "linear"}, marks=pytest.mark.slow)], ids=str
)
def test_replayed_graphs_make_the_same_updates(settings: dict[str, Any]) -> None:
    config = Config(**{**SMALL, **settings})
    learners = [kind(config, O, A, "cuda", 0) for kind in (FusedCudaLearner, Eager)]
    replays = [filled(O, A, "cuda") for _ in learners]
    for number in (1, 1, 5):
        for learner, replay in zip(learners, replays, strict=True):
            learner.set_progress(0.3)
            learner.update(replay, number)
    assert len(learners[0]._graphs) > 1
    assert_equal(tensors_of(learners[0]), tensors_of(learners[1]))
    assert_equal(learners[0].metrics(), learners[1].metrics())
    assert learners[0].metrics().keys() >= {"critic_loss", "q", "actor_loss", "alpha", "entropy"}
    assert ("value_loss" in learners[0].metrics()) == ("baseline" in settings)


@pytest.mark.usefixtures("quick_gpu")
@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_also_after_resuming() -> None:
    config = Config(**SMALL)
    whole, first, second = (FusedCudaLearner(config, O, A, "cuda", seed) for seed in (0, 0, 9))
    replay = filled(O, A, "cuda")
    whole.update(replay, 5)
    first.update(replay, 2)
    second.load_state(*first.state())
    second.update(replay, 3)
    assert_equal(tensors_of(whole), tensors_of(second))


def launches(learner: Learner, replay: Replay) -> int:
    from benchmarks.launches import Eager as Counter
    from benchmarks.launches import count_update

    return count_update(learner, replay, Counter()).launches


@pytest.mark.parametrize("settings", [{}, VALUE, {"estimator": "score", "num_action_samples": 4}], ids=str)
def test_an_update_is_six_launches(settings: dict[str, Any]) -> None:
    learner = FusedCudaLearner(Config(**{**SMALL, **settings}), O, A, "cpu")
    assert launches(learner, filled(O, A)) == len(STAGES) == 6


def test_without_the_actors_turn_it_is_three() -> None:
    learner = FusedCudaLearner(Config(**SMALL, policy_delay=2), O, A, "cpu")
    assert launches(learner, filled(O, A)) == 3  # of the second update


SERVED: list[dict[str, Any]] = [
    {},
    VALUE,
    {"estimator": "score", "baseline": "loo", "num_action_samples": 8},
    {"estimator": "score", "baseline": "none", "alpha": 0.2, "entropy_split": 1.0},
    {"estimator": "score", "baseline": "constant", "policy_delay": 3, "optimizer": "adamw", "lr_schedule": "cosine"},
    {"hidden_sizes": (64, 512), "num_action_samples": 2, "entropy_split": 0.0},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"estimator": "pathwise-stl"}, "--estimator pathwise-stl has no whole-update kernel"),
    ({"estimator": "score", "baseline": "mean-action"}, "--estimator score with --baseline mean-action has no whole"),
    ({"hidden_sizes": (256,)}, "--hidden-sizes must be two multiples of 64 up to 512"),
    ({"hidden_sizes": (100, 64)}, "--hidden-sizes must be two multiples of 64 up to 512"),
    ({"hidden_sizes": (64, 576)}, "--hidden-sizes must be two multiples of 64 up to 512"),
    ({"activation": "silu"}, "--activation silu has no whole-update kernel"),
    ({"layer_norm": True}, "--layer-norm has no whole-update kernel"),
    ({"num_critics": 3}, "--num-critics 3 has no whole-update kernel"),
    ({"critic_reduction": "mean"}, "--critic-reduction mean has no whole-update kernel"),
    ({"critic": "categorical", "v_min": -1.0, "v_max": 1.0}, "--critic categorical has no whole-update kernel"),
    ({"n_step": 3}, "--n-step 3 has no whole-update kernel"),
    ({"max_grad_norm": 1.0}, "--max-grad-norm has no whole-update kernel"),
    ({"normalize_obs": True}, "--normalize-obs has no whole-update kernel"),
    ({"normalize_reward": True}, "--normalize-reward has no whole-update kernel"),
    ({"reward_scale": 0.1}, "--reward-scale 0.1 has no whole-update kernel"),
    ({"entropy_split": 0.5}, "--entropy-split 0.5 has no whole-update kernel"),
]


@pytest.mark.parametrize("settings", SERVED, ids=str)
def test_what_it_serves_it_is_chosen_for(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trust_engines(monkeypatch)
    assert choose_engine(Config(**settings), CUDA) == ("fused", "a CUDA GPU")
    assert choose_engine(Config(**settings, engine="fused"), CUDA) == ("fused", "requested")


@pytest.mark.parametrize(("settings", "why"), REFUSED, ids=str)
def test_anything_else_gets_the_next_engine_and_the_reason(
    settings: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust_engines(monkeypatch)
    chosen, reason = choose_engine(Config(**settings), CUDA)
    assert chosen == "graphed"
    assert reason.startswith(f"a CUDA GPU, and {why}")
    with pytest.raises(UsageError, match=f"--engine fused: {why}.*: use --engine auto"):
        choose_engine(Config(**settings, engine="fused"), CUDA)
    with pytest.raises(ValueError, match=why):
        FusedCudaLearner(Config(**settings), O, A, "cpu")


def test_networks_of_the_users_own_are_not_served() -> None:
    assert fused_cuda_obstacle(Config(), OwnNetworks(torch.nn.Linear(1, 1), None)).startswith("a network of your own")


@pytest.mark.usefixtures("quick_gpu")
@pytest.mark.parametrize(("asked", "resolved"), [("auto", "tf32"), ("fp32", "fp32"), ("bf16", "bf16")])
def test_tf32_is_the_default_precision(asked: Any, resolved: str) -> None:
    from fastsac.learner import precisions, set_up_torch

    config: Any = Config(precision=asked, hidden_sizes=HIDDEN)
    assert precisions(config, CUDA)[0] == resolved
    assert set_up_torch(config, CUDA, O, A).precision == resolved
    set_up_torch(dataclasses.replace(config, precision="tf32"), CUDA, O, A)
    assert torch.get_float32_matmul_precision() == "highest"  # it acts in float32
    set_up_torch(dataclasses.replace(config, precision="tf32", engine="graphed"), CUDA, O, A)
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    graphed = dataclasses.replace(config, hidden_sizes=(32,))
    if asked == "bf16":
        with pytest.raises(UsageError, match="--precision bf16 needs --engine fused, but this run uses graphed"):
            precisions(graphed, CUDA)
    else:
        assert precisions(graphed, CUDA) == ["fp32"]


def failing(*engines: str) -> Any:
    return lambda config, o, a, name, say: Verdict("it is wrong" if name in engines else "")


@pytest.mark.usefixtures("quick_gpu")
@pytest.mark.parametrize(
    ("wrong", "engine", "reason"),
    [
        ((), "fused", ""),
        (("fused",), "graphed", "the check of fused failed"),
        (("fused", "graphed"), "reference", "the check of fused failed; the check of graphed failed"),
    ],
)
def test_an_engine_that_fails_its_check_gives_way_to_the_next(
    wrong: tuple[str, ...], engine: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsac.learner.self_check.verdict", failing(*wrong))
    config = Config(hidden_sizes=HIDDEN, batch_size=B, precision="tf32", device="cuda")
    learner, said = make_learner(config, O, A, "cuda"), list[str]()
    learner.update(filled(O, A, "cuda"))
    found, told = right_engine(learner, False, O, A, said.append)
    assert (found.engine, told, len(said)) == (engine, reason, len(wrong))
    assert found.config.precision == ("tf32" if engine == "fused" else "fp32")  # the fused engine's default only
    assert torch.get_float32_matmul_precision() == "highest"
    if wrong:
        assert right_engine(learner, False, O, A, said.append, in_tf32=True)[0].config.precision == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
        torch.set_float32_matmul_precision("highest")
    both = tensors_of(learner).keys() & tensors_of(found).keys() - {"philox"}
    assert_equal(*({name: tensors_of(each)[name] for name in both} for each in (learner, found)))
    if wrong:
        with pytest.raises(UsageError, match="engine fused does not compute what the reference engine does"):
            right_engine(learner, True, O, A, said.append)
        bf16 = make_learner(dataclasses.replace(config, precision="bf16"), O, A, "cuda")
        with pytest.raises(UsageError, match="engine fused does not compute"):  # no other engine has bfloat16
            right_engine(bf16, False, O, A, said.append)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_gpu")
def test_the_check_of_the_engine_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("compare", "graphed"):
        monkeypatch.setattr(f"fastsac.learner.{module}.UPDATES_PER_GRAPH", 2)
    monkeypatch.setattr("fastsac.learner.compare.SINGLE_UPDATES", 4)
    assert compare(FusedCudaLearner, Config(**SMALL, policy_delay=2), O, A, CUDA) == ""
    assert compare_rounded(FusedCudaLearner, Config(**{**SMALL, "precision": "tf32"}), O, A, CUDA) == ""


@pytest.mark.slow
def test_the_check_notices_learners_that_are_not_what_each_would_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Eager):
        """The others make one update more than are due."""

        def update_each(self, dues: Sequence[int]) -> None:
            super().update_each([dues[0], *(due + 1 for due in dues[1:])])

    for name in ("UPDATES_PER_GRAPH", "WARM_UPS"):
        monkeypatch.setattr(f"fastsac.learner.compare.{name}", 1)
    cpu = torch.device("cpu")
    assert compare_together(Eager, Config(**SMALL), O, A, cpu) == ""
    told = compare_together(Late, Config(**SMALL), O, A, cpu)
    assert told.endswith("of a learner that shares launches differs from the same learner alone")


@pytest.mark.usefixtures("quick_gpu")
def test_the_check_notices_a_wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(FusedCudaLearner):
        """Its targets move at another speed."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._plan = dataclasses.replace(self._plan, tau=0.006)

    monkeypatch.setattr("fastsac.learner.compare.SINGLE_UPDATES", 2)
    monkeypatch.setattr("fastsac.learner.compare.UPDATES_PER_GRAPH", 1)
    assert "target_critic" in compare(Wrong, Config(**SMALL), O, A, CUDA)


def test_nothing_is_recorded_that_has_not_run_before() -> None:
    """Also where learners resume at different places of a policy delay: warm-ups are spent on one after the other."""
    calls: list[tuple[str, bool]] = []

    class Noting(FusedCudaLearner):
        def _run(self, replay: Sampler, length: int, with_actor: bool) -> Any:
            calls.append(("run", with_actor))
            return self._measured_there(with_actor)

        def _record(self, replay: Sampler, length: int, with_actor: bool) -> Any:
            calls.append(("record", with_actor))
            return engine.Graph(lambda: None, self._measured_there(with_actor))

    together, updates = Together(2), (1, 2)
    learners = [Noting(Config(**SMALL, policy_delay=4), O, A, "cpu", seed) for seed in range(2)]
    for learner, number in zip(learners, updates, strict=True):
        together.add(learner, filled(O, A))
        learner.updates = number
    together.complete()
    together.update([1, 1])
    together.update([5, 9])
    assert [learner.updates for learner in learners] == [7, 12]
    for with_actor in (True, False):
        assert calls.index(("run", with_actor)) < calls.index(("record", with_actor))
    with pytest.raises(RuntimeError, match="this learner shares launches with others"):
        learners[1].update(filled(O, A))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize(
    "settings", [{}, VALUE, {"estimator": "score"}, {"policy_delay": 2, "hidden_sizes": (512, 192)}], ids=str
)
def test_it_passes_its_check(settings: dict[str, Any], precision: Any) -> None:
    config, cuda = Config(**settings, precision=precision), torch.device("cuda")
    assert compare(FusedCudaLearner, dataclasses.replace(config, precision="fp32"), 17, 6, cuda) == ""
    assert compare_rounded(FusedCudaLearner, config, 17, 6, cuda) == ""
    assert compare_together(FusedCudaLearner, config, 17, 6, cuda) == ""


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_device() -> None:
    learner, replay = FusedCudaLearner(Config(), O, A, "cuda"), filled(O, A, "cuda")
    learner.update(replay, 31)  # records all graphs
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        learner.update(replay, 30)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite() for value in learner.metrics().values())


@pytest.mark.gpu
def test_on_a_gpu_the_same_seed_gives_the_same_bits() -> None:
    learners = [FusedCudaLearner(Config(precision="tf32"), O, A, "cuda", 0) for _ in range(2)]
    for learner in learners:
        learner.update(filled(O, A, "cuda"), 50)
    assert_equal(tensors_of(learners[0]), tensors_of(learners[1]))


def test_a_replay_is_what_it_draws_from() -> None:
    learner = FusedCudaLearner(Config(**SMALL), O, A, "cpu")
    for other in (object(), Replay(10, 1, O, A, n_step=3)):
        if isinstance(other, Replay):
            other.size = 1
        for _ in range(2):
            with pytest.raises(TypeError, match="needs a Replay of single steps"):
                learner.update(other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the replay buffer is empty"):
        learner.update(Replay(10, 1, O, A))
    learner.update(filled(O, A))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_gpu")
def test_the_check_notices_copies_that_are_not_rounded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    as_tensor_cores(monkeypatch)
    monkeypatch.setattr("fastsac.learner.compare.UPDATES_PER_GRAPH", 1)

    class Stale(FusedCudaLearner):
        """Its products read targets that have never moved."""

        def _run(self, *args: Any) -> Any:
            before = self._weights["target_critic"].clone()
            result = super()._run(*args)
            self._weights["target_critic"].copy_(before)
            return result

    config = Config(**{**SMALL, "precision": "bf16"}, tau=0.5)
    assert compare_rounded(FusedCudaLearner, config, O, A, CUDA) == ""
    assert (
        compare_rounded(Stale, config, O, A, CUDA)
        == "the rounded copy of the target_critic does not match its parameters"
    )


class SameFused(FusedLearner):
    """The fused engine of a CPU with the random numbers of the one on CUDA, each batch in an order of its own."""

    order = torch.arange(32)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rng = PhiloxState(args[-1])

    def _draw_noise(self, with_actor: bool) -> None:
        size = len(self.order), self._noise.shape[2]
        numbers = philox_normal(self.rng.of_stream(NEXT_ACTION), (1, *size))
        more = philox_normal(self.rng.of_stream(ACTION), (len(self._noise) - 1, *size))
        self._noise.copy_(torch.cat([numbers, more])[:, self.order])

    @torch.inference_mode()
    def update(self, replay: Sampler, num_updates: int = 1) -> None:
        for _ in range(num_updates):
            batch = replay.sample(len(self.order), self.rng.of_stream(BATCH))
            self._update_fused(Batch(*(part[self.order] for part in batch[:5])), True, self._measured)
            self.rng.advance()


class Reordered(SameFused):
    order = torch.arange(32).flip(0)


def reach(steps: int = 60) -> Replay:
    """A tiny task, seen at random: an episode is one step, and its reward is highest for the action 0.6 - 0.3 obs."""
    rng = np.random.default_rng(0)
    replay = Replay(4096, 64, 1, 1)
    replay.begin(rng.uniform(-1.0, 1.0, (64, 1)).astype(np.float32))
    for _ in range(steps):
        obs = replay.newest_obs().numpy()
        action = rng.uniform(-1.0, 1.0, (64, 1)).astype(np.float32)
        reward = (-10.0 * (action - 0.6 + 0.3 * obs) ** 2)[:, 0].astype(np.float32)
        next_obs = rng.uniform(-1.0, 1.0, (64, 1)).astype(np.float32)
        replay.add(action, reward, np.ones(64, np.bool_), next_obs, np.ones(64, np.bool_))
    return replay


def parameters(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for net in learner._networks().values() for p in net.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"estimator": "score"}], ids=str)
@pytest.mark.parametrize(("updates", "gap"), [(20, 1.0), (300, 0.2)])
def test_it_learns_as_the_cpus_engine_does(settings: dict[str, Any], updates: int, gap: float) -> None:
    """Their weights drift apart as those of two orders of the same sums do, and both find the action."""
    rates = dict.fromkeys(("actor_lr", "critic_lr", "alpha_lr"), 0.003)
    config = Config(batch_size=32, hidden_sizes=HIDDEN, precision="fp32", initial_alpha=0.1, **rates, **settings)
    learners = [kind(config, 1, 1, "cpu", 0) for kind in (SameFused, Reordered, Eager)]
    start, replay = parameters(learners[0]), reach()
    for learner in learners:
        learner.update(replay, updates)
    expected, reordered, found = map(parameters, learners)
    way, drift = (expected - start).abs().mean(), (reordered - expected).abs().mean()
    assert 0.0 < drift < 0.02 * way
    assert (found - expected).abs().mean() < 3.0 * drift
    obs = torch.linspace(-1.0, 1.0, 9)[:, None]
    errors = [(learner.act(obs, deterministic=True) - 0.6 + 0.3 * obs).abs().mean() for learner in learners]
    assert max(errors) < gap * 0.7  # 0.6 at first
