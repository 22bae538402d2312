"""Updates of several independent learners, which differ in their seeds only."""

from __future__ import annotations

from collections.abc import Sequence

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
        """Wait for so many learners."""
        self._num_learners = num_learners
        self._memory: list[Tensor] = []
        self._members: list[tuple[Learner, Replay]] = []
        self._first: FusedCudaLearner | None = None

    @property
    def in_one_launch(self) -> bool:
        """Whether one launch serves all learners."""
        return self._first is not None

    def add(self, learner: Learner, replay: Replay) -> None:
        """Take in the next learner and its replay; they must not be replaced from now on."""
        if isinstance(learner, FusedCudaLearner):
            row = Row(learner.device, self._memory, len(self._members), self._num_learners)
            learner.move(row)
            replay.move(row.moved)
        self._members.append((learner, replay))
        if len(self._members) == self._num_learners > 1:
            fused = [(each, own) for each, own in self._members if isinstance(each, FusedCudaLearner)]
            if len(fused) == self._num_learners:
                self._first, first_replay = fused[0]
                self._first.join(first_replay, fused[1:])

    def update(self, dues: Sequence[int]) -> None:
        """Make so many updates of each learner, without waiting for the device."""
        if self._first is not None:
            self._first.update_each(dues)
            return
        for (learner, replay), due in zip(self._members, dues, strict=True):
            learner.update(replay, due)
