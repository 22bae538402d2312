"""The graphed engine: the reference's update with the Triton kernels, recorded once as a CUDA graph and then replayed.

A replay costs the host one call for several whole updates: drawing the batch, critic, actor, alpha, Adam, targets and
the random numbers' offset. Nothing in it is read on the host.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.learner.optimizers import Groups, make_adam
from fastsac.learner.reference import ACTING, BATCH, Learner, Metrics
from fastsac.own_networks import STANDARD, OwnNetworks
from fastsac.types import Batch, Draw, Sampler
from fastsac_kernels import PhiloxState
from fastsac_kernels.launch import Backend

#: about how many updates the longer graph has; the shorter one has a single update
UPDATES_PER_GRAPH = 8
#: updates, and actions of one batch size in a row, without a graph: kernels compile, optimisers create their state
WARM_UPS = 3

T = TypeVar("T")
#: metrics' names, and their values in one tensor
Measured = tuple[tuple[str, ...], Tensor]


class Graph(NamedTuple):
    """A recorded run of updates: how to run it again, and where it leaves its metrics."""

    replay: Callable[[], None]
    measured: Measured


class ActingGraph(NamedTuple):
    """The recorded policy: how to run it again, where it reads observations [N, O] and leaves actions [N, A]."""

    replay: Callable[[], None]
    obs: Tensor
    action: Tensor


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Record a CUDA graph that owns all the memory that it points at, except for what was allocated before.

    cuBLAS keeps a workspace for each stream, and streams come from a small pool. When a graph is destroyed, PyTorch
    frees the workspace of the stream that it was recorded on, which another graph may point at (PyTorch issue 193402).
    So workspaces are dropped before and after, as in PyTorch's ``cudagraph_trees``: the graph's own is made while it is
    recorded, in its own memory. Garbage collection is off meanwhile, since it could free device memory.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
        if enabled:
            gc.enable()


class GraphedLearner(Learner):
    """A learner whose updates are CUDA graphs. For a new replay buffer or a loaded state, it records them again."""

    engine = "graphed"
    backend: Backend = "triton"

    def __init__(
        self,
        config: Config,
        obs_size: int,
        action_size: int,
        device: torch.device | str = "cuda",
        seed: int = 0,
        own: OwnNetworks = STANDARD,
    ) -> None:
        """Initialise the networks as the reference engine does with the same seed."""
        super().__init__(config, obs_size, action_size, device, seed, own)
        self.rng = PhiloxState(seed, self.device)
        self.acting_rng = PhiloxState(seed, self.device, ACTING)  # actions are drawn between updates, too
        on_cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_cuda else None  # type: ignore[no-untyped-call]
        self._latest: dict[bool, Measured] = {}  # by whether the actor was updated; the newest comes last
        self._forget(None)

    def _make_optimizers(self, groups: Groups) -> None:
        on_cuda = self.device.type == "cuda"
        self.optimizers = {name: make_adam(self.config, name, *group, on_cuda) for name, group in groups.items()}

    def _set_rate(self, name: str, lr: float) -> None:
        rate = self.optimizers[name].param_groups[0]["lr"]
        if isinstance(rate, Tensor):  # where recorded graphs find it
            rate.fill_(lr)
        else:
            super()._set_rate(name, lr)

    def _forget(self, replay: Sampler | None) -> None:
        """Drop what was recorded: it holds the addresses of one replay and of the optimisers' state."""
        self._measured, self._latest = self.metrics(), {}
        self._recorded_for = replay
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self._warm_ups_left = max(WARM_UPS, self.config.policy_delay)
        self._made = set[bool]()  # kinds of updates that were made without a graph: with the actor, and without
        self._acting: ActingGraph | None = None
        self._acted: list[torch.Size] = []  # shapes of the latest observations

    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Return actions [N, A] in [-1, 1] for obs [N, O]: a sample, or the squashed mean.

        Repeated sampling for the same N is recorded, too.
        """
        if deterministic:
            return super().act(obs, deterministic)
        if self._acting is None or self._acting.obs.shape != obs.shape:
            self._acted = [*self._acted, obs.shape][-WARM_UPS - 1 :]
            if self._stream is None or self._acted != [obs.shape] * (WARM_UPS + 1):
                return self._beside(self._sample, obs)
            self._acting = self._record_acting(obs.clone())
        self._acting.obs.copy_(obs)
        self._acting.replay()
        return self._acting.action.clone()

    def _sample(self, obs: Tensor) -> Tensor:
        action = super().act(obs)
        self.acting_rng.advance()
        return action

    def _record_acting(self, obs: Tensor) -> ActingGraph:
        graph = torch.cuda.CUDAGraph()
        with recording(graph, self._stream):
            action = self._sample(obs)
        return ActingGraph(graph.replay, obs, action)

    def update(self, replay: Sampler, num_updates: int = 1) -> None:
        """Make `num_updates` gradient updates, each on a new batch, without waiting for the device.

        The first updates on a new replay buffer run without a graph; the next ones record it.
        """
        if replay is not self._recorded_for:
            self._forget(replay)
        for length, with_actor, measured in self._make(replay, self.updates, num_updates):
            self._note(length, with_actor, measured)

    def _make(self, replay: Sampler, updates: int, num_updates: int) -> Iterator[tuple[int, bool, Measured]]:
        """Make updates after `updates` earlier ones; yield how many, whether the actor was updated, and metrics."""
        while num_updates > 0:
            with_actor = updates % self.config.policy_delay == 0
            length = 1
            if self._warm_ups_left or not self._warm:
                self._warm_ups_left = max(0, self._warm_ups_left - 1)
                self._made.add(with_actor)
                measured = self._beside(self._run, replay, 1, with_actor)
            else:
                length = self._graph_length(num_updates, with_actor)
                if (length, with_actor) not in self._graphs:
                    self._graphs[length, with_actor] = self._record(replay, length, with_actor)
                graph = self._graphs[length, with_actor]
                graph.replay()
                measured = graph.measured
            yield length, with_actor, measured
            updates += length
            num_updates -= length

    def _note(self, length: int, with_actor: bool, measured: Measured) -> None:
        """Count the updates that were made, and keep their metrics."""
        self._latest = {True: measured} if with_actor else self._latest | {False: measured}
        self.updates += length

    def metrics(self) -> Metrics:
        """Return scalars of the last update, on the device, as the reference engine does."""
        metrics = dict(self._measured)
        for names, values in self._latest.values():
            metrics |= dict(zip(names, values.clone().unbind(), strict=True))  # a replay overwrites them
        return metrics

    @property
    def _warm(self) -> bool:
        """Whether everything that will be recorded has run before."""
        return True in self._made and (False in self._made or self.config.policy_delay == 1)

    def _graph_length(self, num_updates: int, with_actor: bool) -> int:
        """Return 1, or as many updates as make whole rounds of `policy_delay` that start with the actor."""
        rounds = UPDATES_PER_GRAPH // self.config.policy_delay
        length = rounds * self.config.policy_delay
        return length if rounds and with_actor and num_updates >= length else 1

    def _run(self, replay: Sampler, length: int, with_actor: bool) -> Measured:
        """Make updates as they are recorded; several of them start with the actor's."""
        metrics: Metrics = {}
        every = self.config.policy_delay
        for index in range(length):
            turn = with_actor and index % every == 0
            metrics |= self._update_once(replay, turn, measure=length - index <= every)
            self.rng.advance()
        return tuple(metrics), torch.stack(list(metrics.values()))

    def _beside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run it on the stream that graphs are recorded on: libraries set up resources for each stream."""
        if self._stream is None:
            return function(*arguments)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function(*arguments)
        current.wait_stream(self._stream)
        return result

    def _record(self, replay: Sampler, length: int, with_actor: bool) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with recording(graph, self._stream):
            measured = self._run(replay, length, with_actor)
        return Graph(graph.replay, measured)

    def _sample_batch(self, replay: Sampler) -> Batch:
        return replay.sample(self.config.batch_size, self.rng.of_stream(BATCH), self.backend)

    def _draw(self, purpose: int, num_samples: int, mean: Tensor, num_noise: int | None = None) -> Draw:
        rng = self.acting_rng if purpose == ACTING else self.rng.of_stream(purpose)
        return Draw(rng, num_samples, self.backend)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return everything that a resumed run needs: tensors by name, and counters for JSON."""
        tensors, counters = super().state()
        return tensors | {"philox": self.acting_rng.state}, counters  # the other one's offset is the number of updates

    def load_state(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Load what `state` returned, also for another engine's learner.

        Raises:
            UsageError: if it comes from a learner of another shape or another estimator's networks.
        """
        super().load_state(tensors, counters)
        self._latest = {}
        if "philox" in tensors and tensors["philox"].shape != self.acting_rng.state.shape:
            raise UsageError("the checkpoint's random number state does not fit this version")
        if "philox" in tensors:
            self.acting_rng.state.copy_(tensors["philox"])
        else:  # from the reference engine: numbers that a graphed learner may have drawn are not drawn again
            self.acting_rng.state[1] = self.updates << 16
        self.rng.state[0], self.rng.state[1] = self.acting_rng.state[0], self.updates
        self._forget(None)
