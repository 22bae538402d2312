"""The graphed engine: the reference's update with the Triton kernels, recorded once as a CUDA graph and then replayed.

A replay costs the host one call for several whole updates: drawing the batch, critic, actor, alpha, Adam, targets and
the random numbers' offset. Nothing in it is read on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.learner.reference import ACTING, BATCH, Learner, Metrics
from fastsac.types import Batch, Draw, Sampler
from fastsac_kernels import PhiloxState
from fastsac_kernels.launch import Backend

#: updates in the longer graph, about; the shorter one has a single update
UPDATES_PER_GRAPH = 8
#: updates without a graph, in which kernels are compiled and optimisers make their state
WARM_UPS = 3


class Graph(NamedTuple):
    """A recorded run of updates: how to run it again, and where it leaves its metrics."""

    replay: Callable[[], None]
    names: tuple[str, ...]
    values: Tensor


class GraphedLearner(Learner):
    """A learner whose updates are CUDA graphs. Made for another replay or loaded anew, it records them again."""

    engine = "graphed"
    backend: Backend = "triton"

    def __init__(
        self, config: Config, obs_size: int, action_size: int, device: torch.device | str = "cuda", seed: int = 0
    ) -> None:
        """Initialise the networks, as the reference engine does from the same seed."""
        super().__init__(config, obs_size, action_size, device, seed)
        self.rng = PhiloxState(seed, self.device)
        self.acting_rng = PhiloxState(seed, self.device, ACTING)  # acting goes on where no update is made
        on_cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_cuda else None  # type: ignore[no-untyped-call]
        self._forget(None)

    def _forget(self, replay: Sampler | None) -> None:
        """Drop what was recorded: it holds the addresses of one replay and of the optimisers' state."""
        self._recorded_for = replay
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self._warm_ups_left = max(WARM_UPS, self.config.actor_every)  # the actor's kernels among them

    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Return actions [N, A] in [-1, 1] for obs [N, O]: a sample, or the squashed mean."""
        action = super().act(obs, deterministic)
        if not deterministic:
            self.acting_rng.advance()
        return action

    def update(self, replay: Sampler, num_updates: int = 1) -> Metrics:
        """Make `num_updates` gradient updates, each on a new batch, without waiting for the device.

        The first ones on a new replay run without a graph, the next ones record it.

        Returns:
            Scalars as those of the reference engine.
        """
        if replay is not self._recorded_for:
            self._forget(replay)
        metrics: Metrics = {}
        while num_updates > 0:
            with_actor = self.updates % self.config.actor_every == 0
            if self._warm_ups_left:
                length = 1
                metrics |= self._warm_up(replay, with_actor)
            else:
                length = self._graph_length(num_updates, with_actor)
                if (length, with_actor) not in self._graphs:
                    self._graphs[length, with_actor] = self._record(replay, length, with_actor)
                graph = self._graphs[length, with_actor]
                graph.replay()
                metrics |= dict(zip(graph.names, graph.values.clone().unbind(), strict=True))
            self.updates += length
            num_updates -= length
        return metrics

    def _graph_length(self, num_updates: int, with_actor: bool) -> int:
        """One update, or as many as make whole rounds of `actor_every` from the actor's turn on."""
        rounds = UPDATES_PER_GRAPH // self.config.actor_every
        length = rounds * self.config.actor_every
        return length if rounds and with_actor and num_updates >= length else 1

    def _run(self, replay: Sampler, length: int, with_actor: bool) -> Metrics:
        """Updates as they are recorded; at the start of several it is the actor's turn."""
        metrics: Metrics = {}
        for index in range(length):
            metrics |= self._update_once(replay, with_actor and index % self.config.actor_every == 0)
            self.rng.advance()
        return metrics

    def _warm_up(self, replay: Sampler, with_actor: bool) -> Metrics:
        self._warm_ups_left -= 1
        if self._stream is None:
            return self._run(replay, 1, with_actor)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            metrics = self._run(replay, 1, with_actor)
        current.wait_stream(self._stream)
        return metrics

    def _record(self, replay: Sampler, length: int, with_actor: bool) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            metrics = self._run(replay, length, with_actor)
            values = torch.stack(list(metrics.values()))
        return Graph(graph.replay, tuple(metrics), values)

    def _sample_batch(self, replay: Sampler) -> Batch:
        return replay.sample(self.config.batch_size, self.rng.of_stream(BATCH), self.backend)

    def _draw(self, purpose: int, num_samples: int, mean: Tensor) -> Draw:
        rng = self.acting_rng if purpose == ACTING else self.rng.of_stream(purpose)
        return Draw(rng, num_samples, self.backend)

    def _adam(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=self.device.type == "cuda")

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return all that a resumed run needs: tensors by name, and counters for JSON."""
        tensors, counters = super().state()
        return tensors | {"philox": self.acting_rng.state}, counters  # the other one's offset is the number of updates

    def load_state(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Take over what `state` returned, also of another engine's learner.

        Raises:
            UsageError: if it comes from a learner of another shape or another estimator's networks.
        """
        super().load_state(tensors, counters)
        if "philox" in tensors and tensors["philox"].shape != self.acting_rng.state.shape:
            raise UsageError("the checkpoint's random numbers do not fit this version")
        if "philox" in tensors:
            self.acting_rng.state.copy_(tensors["philox"])
        else:  # from the reference: no number that a graphed learner may have drawn before is drawn again
            self.acting_rng.state[1] = self.updates << 16
        self.rng.state[0], self.rng.state[1] = self.acting_rng.state[0], self.updates
        self._forget(None)
