"""Updates of several independent learners, which differ only in their seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsac.learner.flat import Row
from fastsac.learner.fused_cuda import FusedCudaLearner
from fastsac.learner.reference import Learner
from fastsac.replay import Replay


class Together:
    """Updates all learners, each with bit for bit the same results as alone.

    The fused engine on CUDA updates them all in the launches of one learner; for that, their memory lies side by side.
    Any other engine updates one learner after the other.
    """

    def __init__(self, num_learners: int) -> None:
        """Prepare for up to this many learners."""
        self._num_learners = num_learners
        self._memory: list[Tensor] = []
        self._members: list[tuple[Learner, Replay]] = []
        self._first: FusedCudaLearner | None = None

    def add(self, learner: Learner, replay: Replay) -> None:
        """Add the next learner and its replay buffer; they must not be replaced from now on."""
        if isinstance(learner, FusedCudaLearner) and self._num_learners > 1:
            row = Row(learner.device, self._memory, len(self._members), self._num_learners)
            learner.move(row)
            replay.move(row.moved)
            if learner.device.type == "cuda":
                torch.cuda.empty_cache()  # frees the old memory for the next learner
        self._members.append((learner, replay))

    def complete(self) -> None:
        """Finish adding learners; fused ones on CUDA share launches from now on."""
        fused = [(each, own) for each, own in self._members if isinstance(each, FusedCudaLearner)]
        if len(fused) == len(self._members) > 1:
            self._first, first_replay = fused[0]
            self._first.join(first_replay, fused[1:])

    def update(self, dues: Sequence[int]) -> None:
        """Make this many updates of each learner, without waiting for the device."""
        if self._first is not None:
            self._first.update_each(dues)
            return
        for (learner, replay), due in zip(self._members, dues, strict=True):
            learner.update(replay, due)
