"""Counts what each op launches and moves, without a GPU: the Triton kernels interpreted, eager PyTorch call by call.

    python -m benchmarks.launches

Triton: launches, and bytes of loads and stores that are not masked out, as the interpreter executes them. Eager:
PyTorch calls that would each be a kernel on a GPU (no views, no allocations), and the bytes of their inputs and
outputs. Writes benchmarks/results/launches.json. What torch.compile makes of the reference can only be counted on a
GPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import write_json
from fastsac.config import Config
from fastsac.learner import GraphedLearner, Learner
from fastsac.replay import Replay
from fastsac.types import Sampler
from fastsac_kernels import (
    PhiloxState,
    categorical_loss,
    pathwise_loss,
    replay_gather,
    sample_squashed_gaussian,
    score_function_loss,
    td_loss,
)

RESULT = Path(__file__).parent / "results" / "launches.json"
B, A, K, E, O, M = 256, 6, 2, 2, 17, 101  # noqa: E741
NO_KERNEL = {"empty", "detach", "alias", "lift_fresh", "new_empty", "empty_like", "new_empty_strided", "_to_copy"}
ONLY_WRITE = {"copy_", "normal_"}
#: calls whose first arguments, so many, are read only where they are gathered from
GATHERED = {"index_select": 1, "replay_gather": 5}


class Eager(TorchDispatchMode):
    """Counts the calls that would be kernels, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, tensors = func.overloadpacket.__name__, _touched(func, args, kwargs or {}, result)
        if func.is_view or name in NO_KERNEL or not tensors:
            return result
        if name == "baddbmm":  # copies the bias to the output first, which a dispatch mode does not see
            bias, *factors = tensors
            self.kernel("copy_", (), [bias, (result, 1)])
            tensors = [*factors[:2], (result, 2)]
        self.kernel(name, args, tensors)
        return result

    def kernel(self, name: str, args: Any, tensors: list[tuple[Tensor, int]]) -> None:
        """Count one launch; `tensors` are those that it touches, and how many times."""
        self.launches += 1
        self.bytes += sum(times * size_of(tensor) for tensor, times in tensors)


def size_of(tensor: Tensor) -> int:
    """Bytes; an expanded scalar is read once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _touched(func: Any, args: Any, kwargs: Any, result: Any) -> list[tuple[Tensor, int]]:
    """Return the tensors of a call, with 1 for what is read or written and 2 for what is changed in place."""
    name, touched = func.overloadpacket.__name__, []
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        once = name in ONLY_WRITE or argument.is_out or argument.name == "grads"  # Adam says that it changes those
        times = 2 if changed and not once else 1
        if index >= GATHERED.get(name, 0):  # of a ring, only the rows that are drawn are read
            touched += [(leaf, times) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    if not any(each.alias_info for each in func._schema.returns):  # else they are arguments
        times = 2 if name in GATHERED else 1
        touched += [(leaf, times) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return touched


class Interpreted:
    """Counts the interpreter's launches, and the bytes that it loads and stores."""

    def __init__(self) -> None:
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, _get_np_dtype

        self.launches = self.bytes = 0
        run, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load
        store = InterpreterBuilder.create_masked_store

        def counting_run(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches += 1
            return run(executor, *args, **kwargs)

        def counting_load(builder: Any, pointers: Any, mask: Any, *args: Any) -> Any:
            self.bytes += int(mask.data.sum()) * _get_np_dtype(pointers.get_element_ty()).itemsize
            return load(builder, pointers, mask, *args)

        def counting_store(builder: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
            self.bytes += int(mask.data.sum()) * value.data.dtype.itemsize
            return store(builder, pointers, value, mask, *args)

        self.patches = [
            patch.object(GridExecutor, "__call__", counting_run),
            patch.object(InterpreterBuilder, "create_masked_load", counting_load),
            patch.object(InterpreterBuilder, "create_masked_store", counting_store),
        ]

    def __enter__(self) -> Self:
        for each in self.patches:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.patches:
            each.stop()


def cases() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Each op as a function of its backend, and the leaves that get gradients. Eager draws as its users do: randn."""
    mean, log_std = (torch.randn(B, A, requires_grad=True) for _ in range(2))
    q, log_prob = torch.randn(K, E, B, requires_grad=True), torch.randn(K, B, requires_grad=True)
    rng, alpha, noise = PhiloxState(), torch.tensor(0.2), torch.randn(K, B, A)
    ring = torch.randn(64, 16, O), torch.randn(64, 16, A), torch.randn(64, 16), torch.zeros(64, 16, dtype=torch.bool)
    queue, span, ends = torch.arange(1024), torch.tensor([0, 1000]), torch.zeros(B, dtype=torch.bool)

    def sample(backend: Any) -> Any:
        source = rng if backend == "triton" else torch.randn(K, B, A)
        return sample_squashed_gaussian(mean, log_std, source, K, backend)

    def score(baseline: Any, backend: Any) -> Any:
        source = rng if backend == "triton" else noise
        return score_function_loss(mean, log_std, source, q.detach(), alpha, baseline, backend)

    def gather(backend: Any) -> Any:
        source = rng if backend == "triton" else torch.randint(1000, (B,))
        return replay_gather(*ring, queue, span, source, B, backend)

    target = torch.randn(B), ends, torch.randn(E, B), torch.randn(B), alpha, 0.99
    logits, next_logits = torch.randn(E, B, M, requires_grad=True), torch.randn(E, B, M)

    def categorical(backend: Any) -> Any:
        columns = torch.randn(B), ends, torch.randn(B), alpha, 0.99
        return categorical_loss(logits, next_logits, *columns, -20.0, 20.0, "own", backend)[0]

    return {
        "sample_squashed_gaussian": (sample, [mean, log_std]),
        "pathwise_loss": (lambda backend: pathwise_loss(log_prob, q, alpha, backend), [log_prob, q]),
        "score_function_loss (none)": (lambda backend: score("none", backend), [mean, log_std]),
        "score_function_loss (loo)": (lambda backend: score("loo", backend), [mean, log_std]),
        "td_loss": (lambda backend: td_loss(q[0], *target, backend), [q]),
        "categorical_loss": (categorical, [logits]),
        "replay_gather": (gather, []),
    }


def count(
    counter: Callable[[], Any], function: Callable[..., Any], leaves: list[Tensor], backend: str
) -> dict[str, Any]:
    """The launches and bytes of the forward pass and, where there are leaves, of the backward pass."""
    with counter() as forward:
        outputs = function(backend)
    counts = {"forward_launches": forward.launches, "forward_bytes": forward.bytes}
    if leaves:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.ones_like(output) for output in outputs]
        with counter() as backward:
            torch.autograd.grad(outputs, leaves, upstream)
        counts |= {"backward_launches": backward.launches, "backward_bytes": backward.bytes}
    return counts


def filled_replay() -> Replay:
    """Return a replay of random transitions."""
    replay = Replay(1024, 16, O, A, generator=torch.Generator().manual_seed(0))
    replay.begin(torch.randn(16, O))
    for _ in range(20):
        ends = torch.zeros(16, dtype=torch.bool)
        replay.add(torch.rand(16, A), torch.randn(16), ends, torch.randn(16, O), np.ones(16, np.bool_))
    return replay


def count_update(learner: Learner, sampler: Sampler, counter: Eager) -> Eager:
    """Count the calls of one whole update after the first, by an engine's code run without a graph."""
    learner.update(sampler)
    with counter:
        learner.update(sampler)
    return counter


def update_launches(kind: type[Learner], estimator: str) -> int:
    """Return the launches of one whole update."""
    learner = kind(Config(estimator=estimator, hidden_sizes=(32, 32)), O, A, "cpu")  # sizes change no count
    return count_update(learner, filled_replay(), Eager()).launches


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    rows: list[dict[str, Any]] = []
    for name, (function, leaves) in cases().items():
        for backend, counter in (("eager", Eager), ("triton", Interpreted)):
            counts = count(counter, function, leaves, "reference" if backend == "eager" else backend)
            rows.append({"op": name, "backend": backend, **counts})
            print(f"{name:28}{backend:8}", counts)
    updates = {
        estimator: {kind.engine: update_launches(kind, estimator) for kind in (Learner, GraphedLearner)}
        for estimator in ("pathwise", "score")
    }
    print("a whole update", updates)
    sizes = {"B": B, "A": A, "K": K, "E": E, "O": O, "M": M}
    versions = {"torch": torch.__version__}
    command = "python -m benchmarks.launches"
    write_json(RESULT, {"command": command, "sizes": sizes, "versions": versions, "rows": rows, "updates": updates})


if __name__ == "__main__":
    main()
