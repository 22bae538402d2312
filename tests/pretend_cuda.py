"""A pretended GPU: tensors that say ``cuda:0``, lie on the CPU, and count what would make the host wait.

`torch.cuda` is there, the Triton kernels are interpreted, and a CUDA graph is what a real one is: a list of calls with
fixed arguments and fixed places for their results, which were not carried out when they were recorded. What a real
capture forbids, or would record otherwise than it seems, raises `CaptureError`: reading on the host, PyTorch's random
numbers, copies between host and device. Matrix products need their stream's cuBLAS workspace, which comes and goes as
in PyTorch 2.13.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from fastsac.learner.self_check import Verdict

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
original_to, original_tensor = Tensor.to, torch.tensor
#: wait until the device has computed what is read
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias"}
RANDOM = {"normal_", "uniform_", "random_", "bernoulli_", "randn", "rand", "randint", "randperm", "multinomial"}


class CaptureError(RuntimeError):
    """Something that must not be in a CUDA graph."""


class OnGpu(Tensor):
    """A tensor of the pretended GPU; `inner` is its memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        # PyTorch itself takes it for one of its meta device, since a build for CPUs cannot guard a CUDA device
        return Tensor._make_wrapper_subclass(cls, inner.shape, device="meta", **layout)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def _take(self, other: OnGpu) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inner = other.inner

    data = property(lambda self: Tensor.data.__get__(self), _take)  # type: ignore[attr-defined]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnGpu({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on the pretended GPU, which is not there any more")


def inner(tree: Any) -> Any:
    return tree_map_only(OnGpu, lambda tensor: tensor.inner, tree)


class Workspace:
    """What cuBLAS uses on one stream, in a graph's own memory or in everyone's."""

    def __init__(self, owner: CUDAGraph | None) -> None:
        self.owner, self.freed = owner and weakref.ref(owner), False

    def release(self) -> None:
        """No new product uses it; a graph's own memory stays as long as the graph."""
        self.freed = self.owner is None or self.owner() is None


class CUDAGraph:
    """Calls, what they point at, and the tensors that were there before."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: set[int] = set()  # addresses
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was there before, and its values
        self.workspaces: list[Workspace] = []
        self.stream = 0

    def __del__(self) -> None:
        """PyTorch frees the workspace of the stream that the graph was recorded on."""
        if Gpu._active and (workspace := Gpu.current().workspaces.pop(self.stream, None)):
            workspace.release()

    def replay(self) -> None:
        Gpu.current().counts["graph launches"] += 1
        if any(workspace.freed for workspace in self.workspaces):
            raise RuntimeError("CUDA error: an illegal memory access was encountered: a workspace is gone")
        for func, args, kwargs, places in self.calls:
            results = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for place, result in zip(places, results, strict=True):
                if place.data_ptr() != result.data_ptr():
                    place.copy_(result)


class Gpu(TorchDispatchMode):
    """The mode in which everything runs. `counts` has waits, copies each way, kernels and graph launches."""

    _active: list[Gpu] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.pinned: set[int] = set()
        self.graph: CUDAGraph | None = None
        self.streams = [Stream()]  # the current one is the last
        self.workspaces: dict[int, Workspace] = {}
        self.ops: set[Any] = set()  # all that ran, for whoever empties it
        self.collecting = False  # whether garbage could have been collected during a capture

    @classmethod
    def current(cls) -> Gpu:
        return cls._active[-1]

    def wait(self, why: str) -> None:
        if self.graph is not None:
            raise CaptureError(why)
        self.counts["waits"] += 1
        self.counts[f"waits: {why}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        target = "cuda" if target == "meta" else target
        if kwargs.pop("pin_memory", None):
            result = func(*args, **kwargs)
            self.pinned.add(result.untyped_storage().data_ptr())
            return result
        if func is aten.is_pinned.default:
            return args[0].untyped_storage().data_ptr() in self.pinned
        if not on_gpu and target != "cuda":
            return func(*args, **kwargs)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        name = func.overloadpacket.__name__
        if func in READS or (func is aten.index.Tensor and any(i.dtype == torch.bool for i in tree_leaves(args[1]))):
            self.wait(name)
        if name in RANDOM and self.graph is not None:
            raise CaptureError(f"{name} draws PyTorch's random numbers")
        crossing = self.cross(func, args, kwargs, target, on_gpu, leaves)
        if crossing is None and any(leaf.dim() for leaf in leaves if not isinstance(leaf, OnGpu)):
            raise RuntimeError(f"{func}: all tensors must be on one device")
        result = self.carry_out(func, args, kwargs)
        if crossing == "to host" and func is not aten.copy_.default:
            return result
        return self.wrapped(func, args, kwargs, result)

    def cross(self, func: Any, args: Any, kwargs: Any, target: str | None, on_gpu: Any, leaves: Any) -> str | None:
        """Count a copy between host and device, and the wait that it may mean."""
        if func is aten.copy_.default:
            to, source = args[:2]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            way = isinstance(source, OnGpu), isinstance(to, OnGpu)
        elif func is aten._to_copy.default:
            to, source = None, args[0]
            non_blocking = kwargs.get("non_blocking", False)
            way = isinstance(source, OnGpu), target == "cuda" or (target is None and isinstance(source, OnGpu))
        else:
            return None
        if way[0] == way[1]:
            return "within"
        host = source if way[1] else to
        pinned = host is not None and host.untyped_storage().data_ptr() in self.pinned
        kind = "to device" if way[1] else "to host"
        if self.graph is not None:
            raise CaptureError(f"a copy {kind}")
        self.counts[f"copies {kind}"] += 1
        if not (non_blocking and pinned):
            self.wait(f"a copy {kind}")
        return kind

    def carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.ops.add(func)
        plain_args, plain_kwargs = inner(args), inner(kwargs)
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            stream = self.streams[-1].cuda_stream
            workspace = self.workspaces.setdefault(stream, Workspace(self.graph))
            if self.graph is not None:
                self.graph.workspaces.append(workspace)
        if self.graph is None:
            self.counts["kernels"] += not func.is_view and name not in NO_KERNEL
            return func(*plain_args, **plain_kwargs)
        graph = self.graph
        self.collecting |= gc.isenabled()
        for tensor in tree_leaves((plain_args, plain_kwargs)):
            if isinstance(tensor, Tensor):
                key = tensor.untyped_storage().data_ptr()
                if key not in graph.made and key not in graph.before:
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    graph.before[key] = whole, whole.clone()
        result = func(*plain_args, **plain_kwargs)
        places = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        graph.made |= {place.untyped_storage().data_ptr() for place in places} - set(graph.before)
        graph.calls.append((func, plain_args, plain_kwargs, places))
        return result

    def wrapped(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        schema = func._schema
        if any(out.alias_info is not None for out in schema.returns):
            wrapped = tree_map_only(Tensor, OnGpu, result)
            return return_and_correct_aliasing(func, args, kwargs, wrapped)
        return tree_map_only(Tensor, OnGpu, result)

    def begin_capture(self, graph: CUDAGraph) -> None:
        self.graph, graph.stream = graph, self.streams[-1].cuda_stream

    def end_capture(self) -> None:
        """A capture carries nothing out: put back what was there, and leave nothing of use in what was made."""
        graph, self.graph = self.graph, None
        assert graph is not None
        for tensor, values in graph.before.values():
            tensor.copy_(values)
        for _, _, _, places in graph.calls:
            for place in places:
                if place.untyped_storage().data_ptr() in graph.made and place.is_floating_point():
                    place.fill_(float("nan"))


class Stream:
    """A stream: as everything runs at once, only its name matters."""

    numbers = iter(range(1, 10**9))

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = next(self.numbers)

    def wait_stream(self, _: Stream) -> None:
        pass

    def synchronize(self) -> None:
        Gpu.current().wait("a stream")


def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, which otherwise asks CUDA for its current device."""
    args = tuple("meta" if isinstance(arg, str | torch.device) and torch.device(arg) != CPU else arg for arg in args)
    if kwargs.get("device") is not None and torch.device(kwargs["device"]) != CPU:
        kwargs["device"] = "meta"
    return original_to(tensor, *args, **kwargs)


def tensor(*args: Any, device: Any = CPU, **kwargs: Any) -> Tensor:
    """`torch.tensor`, which makes a tensor on the host and copies it."""
    made = original_tensor(*args, **kwargs)
    return made if torch.device(device) == CPU else to(made, device)


class Generator(torch.Generator):
    def __new__(cls, _: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


@contextlib.contextmanager
def graph(cuda_graph: CUDAGraph, stream: Stream | None = None, **_: Any) -> Iterator[None]:
    gpu = Gpu.current()
    with torch.cuda.stream(stream or Stream()):
        gpu.begin_capture(cuda_graph)
        try:
            yield
        finally:
            gpu.end_capture()


@contextlib.contextmanager
def stream(which: Stream) -> Iterator[None]:
    Gpu.current().streams.append(which)
    try:
        yield
    finally:
        Gpu.current().streams.pop()


def clear_workspaces() -> None:
    workspaces = Gpu.current().workspaces
    while workspaces:
        workspaces.popitem()[1].release()


@contextlib.contextmanager
def pretended(memory: int = 80 * 2**30, capability: tuple[int, int] = (9, 0)) -> Iterator[Gpu]:
    """Run on the pretended GPU."""
    gpu = Gpu()
    replacements = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "stream": stream,
        "current_stream": lambda _=None: gpu.streams[-1],
        "is_current_stream_capturing": lambda: gpu.graph is not None,
        "synchronize": lambda _=None: gpu.wait("the device"),
        "device": lambda _: contextlib.nullcontext(),
        "mem_get_info": lambda _=None: (memory, memory),
        "get_device_capability": lambda _=None: capability,
        "get_device_name": lambda _=None: "a pretended GPU",
        "get_device_properties": lambda _=None: SimpleNamespace(
            name="a pretended GPU", total_memory=memory, major=capability[0], minor=capability[1]
        ),
    }
    with contextlib.ExitStack() as stack:
        for name, value in replacements.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch._C, "_cuda_clearCublasWorkspaces", clear_workspaces, create=True))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        stack.enter_context(patch.object(Tensor, "to", to))
        stack.enter_context(patch.object(torch, "tensor", tensor))
        Gpu._active.append(gpu)
        stack.callback(Gpu._active.pop)
        stack.enter_context(gpu)
        yield gpu


def trust_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take it that everything is there that the graphed engine needs, and that its check on the GPU was passed."""
    monkeypatch.setattr("fastsac.learner.engines.graphed_obstacle", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("fastsac.learner.self_check.verdict", lambda *_: Verdict(""))
