"""Updates of several independent learners, which differ in their seeds only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsac.learner.flat import Row
from fastsac.learner.fused_cuda import FusedCudaLearner
from fastsac.learner.reference import Learner
from fastsac.replay import Replay


class Together:
    """Makes the updates of all learners, each bit for bit as it would make them alone.

    The fused engine on CUDA makes them in the launches of one learner; the learners' memory lies side by side for that.
    Any other engine makes those of one learner after those of the other.
    """

    def __init__(self, num_learners: int) -> None:
        """Wait for up to so many learners."""
        self._num_learners = num_learners
        self._memory: list[Tensor] = []
        self._members: list[tuple[Learner, Replay]] = []
        self._first: FusedCudaLearner | None = None

    def add(self, learner: Learner, replay: Replay) -> None:
        """Take in the next learner and its replay; they must not be replaced from now on."""
        if isinstance(learner, FusedCudaLearner) and self._num_learners > 1:
            row = Row(learner.device, self._memory, len(self._members), self._num_learners)
            learner.move(row)
            replay.move(row.moved)
            if learner.device.type == "cuda":
                torch.cuda.empty_cache()  # what was left there is free for the next one
        self._members.append((learner, replay))

    def complete(self) -> None:
        """Begin to go together: no further learner is added."""
        fused = [(each, own) for each, own in self._members if isinstance(each, FusedCudaLearner)]
        if len(fused) == len(self._members) > 1:
            self._first, first_replay = fused[0]
            self._first.join(first_replay, fused[1:])

    def update(self, dues: Sequence[int]) -> None:
        """Make so many updates of each learner, without waiting for the device."""
        if self._first is not None:
            self._first.update_each(dues)
            return
        for (learner, replay), due in zip(self._members, dues, strict=True):
            learner.update(replay, due)
