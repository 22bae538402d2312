"""Counts what each op launches and moves, without a GPU: the Triton kernels interpreted, eager PyTorch call by call.

    python -m benchmarks.launches

Triton: launches, and bytes of loads and stores that are not masked out, as the interpreter carries them out. Eager:
calls of PyTorch that would each be a kernel on a GPU (no views, no allocations), and the bytes of their inputs and
outputs. Writes benchmarks/results/launches.json. What torch.compile makes of the reference is counted on a GPU only.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, _get_np_dtype

from benchmarks.machine import write_json
from fastsac.config import Config
from fastsac.learner import GraphedLearner, Learner
from fastsac.replay import Replay
from fastsac_kernels import (
    PhiloxState,
    pathwise_loss,
    replay_gather,
    sample_squashed_gaussian,
    score_function_loss,
    td_loss,
)

RESULT = Path(__file__).parent / "results" / "launches.json"
B, A, K, E, O = 256, 6, 2, 2, 17  # noqa: E741
NO_KERNEL = {"empty", "detach", "alias", "lift_fresh", "new_empty", "empty_like", "new_empty_strided", "_to_copy"}


class Eager(TorchDispatchMode):
    """Counts the calls that would be kernels, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in NO_KERNEL:
            self.launches += 1
            read = (result, args[2]) if func.overloadpacket.__name__ == "index_select" else (args, kwargs)
            tensors = [leaf for leaf in tree_leaves((read, result)) if isinstance(leaf, Tensor)]
            # an expanded scalar is read once
            self.bytes += sum(min(each.nbytes, each.untyped_storage().nbytes()) for each in tensors)
        return result


class Interpreted:
    """Counts the interpreter's launches, and the bytes that it loads and stores."""

    def __init__(self) -> None:
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

    def __enter__(self) -> Interpreted:
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
    return {
        "sample_squashed_gaussian": (sample, [mean, log_std]),
        "pathwise_loss": (lambda backend: pathwise_loss(log_prob, q, alpha, backend), [log_prob, q]),
        "score_function_loss (none)": (lambda backend: score("none", backend), [mean, log_std]),
        "score_function_loss (loo)": (lambda backend: score("loo", backend), [mean, log_std]),
        "td_loss": (lambda backend: td_loss(q[0], *target, backend), [q]),
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


def update_launches(kind: type[Learner], estimator: str) -> int:
    """Count the calls of one whole update after the first, by an engine's code run without a graph."""
    learner = kind(Config(estimator=estimator, hidden_sizes=(32, 32)), O, A, "cpu")  # sizes change no count
    replay = Replay(1024, 16, O, A, generator=torch.Generator().manual_seed(0))
    replay.begin(torch.randn(16, O))
    for _ in range(20):
        ends = torch.zeros(16, dtype=torch.bool)
        replay.add(torch.rand(16, A), torch.randn(16), ends, torch.randn(16, O), np.ones(16, np.bool_))
    learner.update(replay)
    with Eager() as counter:
        learner.update(replay)
    return counter.launches


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
    sizes = {"B": B, "A": A, "K": K, "E": E, "O": O}
    versions = {"torch": torch.__version__}
    command = "python -m benchmarks.launches"
    write_json(RESULT, {"command": command, "sizes": sizes, "versions": versions, "rows": rows, "updates": updates})


if __name__ == "__main__":
    main()
