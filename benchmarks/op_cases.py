"""The operations that are timed, each as PyTorch in eager mode, as torch.compile makes it, and as a Triton kernel.

The comparison is with what a user would write. Without our kernels, noise comes from `torch.randn` and indices from
`torch.randint`, within the compiled function too; a loss whose kernel draws its noise again takes it as a tensor then.
(Philox spelled out in eager PyTorch, the kernels' oracle, is about a hundred small operations, which nobody would
choose.) `PhiloxState.advance`, one small launch per update for any number of operations, is in none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsac_kernels import (
    PhiloxState,
    categorical_loss,
    pathwise_loss,
    replay_gather,
    sample_squashed_gaussian,
    score_function_loss,
    td_loss,
)

BACKENDS = ("compile", "triton", "reference")
BATCHES, ACTIONS = (256, 4096, 65536), (1, 6, 17, 32)
#: what the targets are about, and therefore first: a time budget may end before the last
LAUNCH_SIZES = ((65536, 32), (256, 6))
#: what tables show; on a GPU all kinds of operations are timed at these sizes, and eager PyTorch at no other
TABLE_SIZES = (*LAUNCH_SIZES, (4096, 6))
SIZES = [*LAUNCH_SIZES, *((b, a) for b in BATCHES for a in ACTIONS if (b, a) not in LAUNCH_SIZES)]
SCORES = (("none", 1), ("constant", 1), ("value", 1), ("loo", 2), ("loo", 4), ("loo", 8))
#: estimator, baseline and K of whole updates
ESTIMATORS = (("pathwise", "auto", 1), ("pathwise", "auto", 2), *(("score", *score) for score in SCORES))
#: those that are measured at every size
MAIN = (("pathwise", "auto", 1), ("score", "loo", 2))
#: whole updates at batch 256 on a GPU: launches take the time there, of which A changes little
GPU_UPDATES = [(estimator, a) for estimator in ESTIMATORS for a in ACTIONS if a == 6 or estimator in MAIN]
CRITICS, OBS_SIZE, NUM_ENVS, RING, ATOMS = 2, 17, 16, 2**20, 101
FORWARD, BOTH = "fwd", "fwd+bwd"
ACTOR, UPDATE = "actor", "update"


class Case(NamedTuple):
    """One operation at one size; A is None where it has no say."""

    op: str
    B: int
    A: int | None
    K: int = 1
    baseline: str | None = None

    @property
    def passes(self) -> tuple[str, ...]:
        return (FORWARD,) if self.op == "gather" else (FORWARD, BOTH)

    @property
    def judged(self) -> tuple[str, ...]:
        """The passes that an update makes: no loss is computed without its gradient."""
        return self.passes if self.op == "sample" else self.passes[-1:]

    @property
    def id(self) -> str:
        parts = (self.op, self.baseline, f"K{self.K}", f"B{self.B}", f"A{self.A}" if self.A else None)
        return "-".join(part for part in parts if part)

    @property
    def size(self) -> tuple[int, int | None]:
        return self.B, self.A


def _cases() -> list[Case]:
    cases = []
    for b, a in SIZES:
        cases += [Case("sample", b, a, k) for k in (1, 2, 8)]
        cases += [Case("score", b, a, k, baseline) for baseline, k in SCORES]
        cases.append(Case("gather", b, a))
        if (b, None) not in [case.size for case in cases]:
            cases += [Case("pathwise", b, None, k) for k in (1, 2)] + [Case("td", b, None)]
            cases.append(Case("categorical", b, None))
    return cases


CASES = _cases()


class Measurement(NamedTuple):
    """A pass of an operation to be timed."""

    case: Case
    backend: str
    which: str

    @property
    def counted(self) -> bool:
        """Whether its launches are counted on a GPU; eager PyTorch's are counted without one (`launches.py`)."""
        sizes = [*LAUNCH_SIZES, *((b, None) for b, _ in LAUNCH_SIZES)]
        return self.case.size in sizes and self.which == self.case.passes[-1] and self.backend != "reference"


def _in_table(case: Case) -> bool:
    return case.A is None or case.size in TABLE_SIZES


def _on_gpu(case: Case) -> bool:
    """Whether the case says enough for its time: what is left out lies between others, or does nearly the same."""
    kind = case.op, case.baseline, case.K
    if _in_table(case):
        return kind not in (("sample", None, 2), ("score", "constant", 1), ("score", "loo", 4))
    return kind in (("sample", None, 1), ("score", "loo", 2))


GPU_CASES = [case for case in CASES if _on_gpu(case)]
GPU_MEASUREMENTS = [
    Measurement(case, backend, which)
    for case in GPU_CASES
    for backend in BACKENDS
    for which in case.judged
    if backend != "reference" or _in_table(case)
]
# what the targets compare, before a time budget may end
GPU_MEASUREMENTS.sort(key=lambda measurement: measurement.backend == "reference")

#: seconds on a GPU, if anything too many: the first pass of a case, compiled before (torch.compile traces it again and
#: tunes); a pass (0.1 s of calls, half of that of graphs, as many behind a flush, two captures); a look at launches
FIRST_S = {"compile": 0.7, "triton": 0.1, "reference": 0.05}
PASS_S, COUNT_S, START_S = 0.3, 0.3, 12.0


def seconds(measurements: list[Measurement]) -> float:
    """Return about how long they take together on a GPU."""
    first = {(case, backend) for case, backend, _ in measurements}
    passes = sum(PASS_S + COUNT_S * measurement.counted for measurement in measurements)
    return START_S + passes + sum(FIRST_S[backend] for _, backend in first)


class Bytes(NamedTuple):
    """What the Triton kernels read and write, each tensor once: a number that is loaded again comes from a cache."""

    forward: int
    backward: int = 0


def bytes_moved(case: Case) -> Bytes:
    """Return the bytes of the forward and of the backward pass: float32, indices 8 bytes, flags 1 byte.

    A loss's forward pass writes its gradient, which its backward pass only multiplies.
    """
    b, a, k, e = case.B, case.A or 0, case.K, CRITICS
    if case.op == "sample":  # mean, log_std -> action, log_prob; their gradients, mean, log_std -> two gradients
        return Bytes(4 * (2 * b * a + k * b * (a + 1)), 4 * (k * b * (a + 1) + 4 * b * a))
    if case.op == "pathwise":  # log_prob, q -> their gradients
        return Bytes(*[8 * k * b * (e + 1)] * 2)
    if case.op == "score":  # mean, log_std, q, log_prob, perhaps a baseline -> two gradients
        values = b if case.baseline == "value" else 0
        return Bytes(4 * (4 * b * a + k * (e + 1) * b + values), 4 * 4 * b * a)
    if case.op == "td":  # q, next_q, reward, next_log_prob, flag -> the gradient of q
        return Bytes(4 * b * (3 * e + 2) + b, 8 * e * b)
    if case.op == "categorical":  # logits, next_logits, reward, next_log_prob, flag -> the gradient of logits, q
        return Bytes(4 * b * (3 * e * ATOMS + e + 2) + b, 8 * e * b * ATOMS)
    return Bytes(8 * b + 2 * (4 * b * (2 * OBS_SIZE + a + 1) + b))  # the queue's entries; transitions in and out


class Runner(NamedTuple):
    """An operation with its arguments. The last inputs may be constants: gradients are those of `leaves`."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    leaves: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]

    def forward(self, grad: bool = True) -> Any:
        with torch.set_grad_enabled(grad):
            return self.function(*self.inputs)

    def backward(self, outputs: Any) -> Any:
        return torch.autograd.grad(outputs, self.leaves, self.upstream)

    def call(self, case: Case, which: str) -> Callable[[], Any]:
        """Both passes, or the forward one as an update makes it: a loss with autograd, the others without."""
        if which == BOTH:
            return lambda: self.backward(self.forward())
        return lambda: self.forward(grad=case.op not in ("sample", "gather"))


def build(case: Case, backend: str, device: torch.device) -> Runner:
    """Return the operation with random arguments on the device."""
    torch.manual_seed(0)
    function, inputs, leaves = _MAKERS[case.op](case, backend, device)
    if backend == "compile":
        torch._dynamo.reset()  # or else the same source, compiled for one case after the other, gives up
        function = torch.compile(function, fullgraph=True, dynamic=False)
    if case.op == "gather":
        return Runner(function, inputs, (), ())
    shapes = [(case.K, case.B, case.A), (case.K, case.B)] if case.op == "sample" else [()]
    upstream = tuple(torch.randn(shape, device=device) for shape in shapes)
    return Runner(function, inputs, tuple(leaf.requires_grad_() for leaf in leaves), upstream)


def _name(backend: str) -> Any:
    return "triton" if backend == "triton" else "reference"


def _sample(case: Case, backend: str, device: torch.device) -> Any:
    mean, log_std = (torch.randn(case.B, case.A or 0, device=device) for _ in range(2))
    shape = (case.K, case.B, case.A)

    if backend == "triton":
        rng = PhiloxState(0, device)
        return lambda m, s: sample_squashed_gaussian(m, s, rng, case.K, "triton"), (mean, log_std), (mean, log_std)

    def sample(mean: Tensor, log_std: Tensor) -> Any:
        return sample_squashed_gaussian(mean, log_std, torch.randn(shape, device=device), backend="reference")

    return sample, (mean, log_std), (mean, log_std)


def _q(case: Case, device: torch.device) -> Tensor:
    return torch.randn(CRITICS, case.K, case.B, device=device).transpose(0, 1)  # as the stacked critics return it


def _pathwise(case: Case, backend: str, device: torch.device) -> Any:
    log_prob, q, alpha = torch.randn(case.K, case.B, device=device), _q(case, device), torch.tensor(0.2, device=device)
    name = _name(backend)
    return lambda log_prob, q, alpha: pathwise_loss(log_prob, q, alpha, name), (log_prob, q, alpha), (log_prob, q)


def _score(case: Case, backend: str, device: torch.device) -> Any:
    mean, log_std = (torch.randn(case.B, case.A or 0, device=device) for _ in range(2))
    noise = PhiloxState(0, device) if backend == "triton" else torch.randn(case.K, case.B, case.A, device=device)
    baseline = torch.randn(case.B, device=device) if case.baseline == "value" else case.baseline
    name, q, alpha = _name(backend), _q(case, device), torch.tensor(0.2, device=device)
    log_prob = torch.randn(case.K, case.B, device=device)  # the sampler's, as the learner hands it over

    def loss(
        mean: Tensor, log_std: Tensor, noise: Any, q: Tensor, alpha: Tensor, baseline: Any, log_prob: Any
    ) -> Tensor:
        return score_function_loss(mean, log_std, noise, q, alpha, baseline, name, log_prob)

    return loss, (mean, log_std, noise, q, alpha, baseline, log_prob), (mean, log_std)


def _td(case: Case, backend: str, device: torch.device) -> Any:
    q, next_q = (torch.randn(CRITICS, case.B, device=device) for _ in range(2))
    reward, next_log_prob = (torch.randn(case.B, device=device) for _ in range(2))
    terminated, alpha = torch.rand(case.B, device=device) < 0.01, torch.tensor(0.2, device=device)
    name = _name(backend)

    def loss(q: Tensor, *constants: Tensor) -> Tensor:
        return td_loss(q, *constants, 0.99, name)

    return loss, (q, reward, terminated, next_q, next_log_prob, alpha), (q,)


def _categorical(case: Case, backend: str, device: torch.device) -> Any:
    logits, next_logits = (torch.randn(CRITICS, case.B, ATOMS, device=device) for _ in range(2))
    reward, next_log_prob = (torch.randn(case.B, device=device) for _ in range(2))
    terminated, alpha = torch.rand(case.B, device=device) < 0.01, torch.tensor(0.2, device=device)
    name = _name(backend)

    def loss(logits: Tensor, *constants: Tensor) -> Tensor:
        return categorical_loss(logits, *constants, 0.99, -20.0, 20.0, "own", name)[0]

    return loss, (logits, next_logits, reward, terminated, next_log_prob, alpha), (logits,)


def _gather(case: Case, backend: str, device: torch.device) -> Any:
    shape = (RING // NUM_ENVS, NUM_ENVS)  # the default replay, a million transitions
    obs, action = (torch.ones(*shape, size or 0, device=device) for size in (OBS_SIZE, case.A))
    reward, terminated = torch.ones(shape, device=device), torch.zeros(shape, dtype=torch.bool, device=device)
    queue, span = torch.arange(RING, device=device), torch.tensor([0, RING], device=device)
    rng, name = PhiloxState(0, device), _name(backend)

    def gather(*ring: Tensor) -> Any:
        draws = rng if name == "triton" else torch.randint(RING, (case.B,), device=device)
        return replay_gather(*ring, draws, case.B, name)

    return gather, (obs, action, reward, terminated, queue, span), ()


_MAKERS = {"sample": _sample, "pathwise": _pathwise, "score": _score, "td": _td, "gather": _gather}
_MAKERS["categorical"] = _categorical
