"""A directory that holds a policy and nothing else, to be shared: weights, settings and a model card."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsac import checkpoint
from fastsac.config import Config
from fastsac.errors import FastsacError, UsageError
from fastsac.evaluate import Evaluation
from fastsac.model_card import model_card
from fastsac.run_dir import refuse_if_taken, replace_text
from fastsac.saver import Saver
from fastsac.spaces import Spaces

MODEL_CARD = "README.md"
#: prefixes of the learner's tensors that are needed to act
POLICY = ("actor.", "normalizer.obs_")


def write(
    directory: Path,
    config: Config,
    spaces: Spaces,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    evaluation: Evaluation | None,
) -> None:
    """Write the directory.

    Args:
        directory: a new one, or one without a run and a README.md.
        config: the run's settings.
        spaces: of the environment.
        tensors: all of the learner's.
        state: of a checkpoint of the run.
        evaluation: for the model card.

    Raises:
        UsageError: if the directory holds a run or a README.md.
        FastsacError: if it cannot be written.
    """
    # how it was trained need not be possible where it is used
    config = dataclasses.replace(config, device="auto", engine="auto", precision="auto", num_threads=0)
    card = model_card(config, spaces, state["steps"], state["learner"]["updates"], evaluation)
    refuse_if_taken(directory)
    if os.path.lexists(directory / MODEL_CARD):
        raise UsageError(f"{directory / MODEL_CARD} already exists: choose another directory")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(POLICY)}
    state = {**state, "config": dataclasses.asdict(config), "envs": None, "replay": None}
    with Saver(directory, config, None, logging.getLogger("fastsac").warning):
        checkpoint.save_checkpoint(checkpoint.step_directory(directory, state["steps"]), {"policy": kept}, state)
        try:
            replace_text(directory / MODEL_CARD, card)
        except OSError as error:
            raise FastsacError(f"cannot write {directory / MODEL_CARD}: {error.strerror}") from error


def completed(policy: Mapping[str, Tensor], ours: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return a new learner's tensors with the stored policy's.

    Raises:
        FastsacError: if a tensor of the policy is missing, or is not finite.
    """
    needed = {name for name in ours if name.startswith(POLICY)}
    if policy.keys() != needed or not all(each.isfinite().all() for each in policy.values()):
        raise FastsacError(f"{path} holds no policy of these settings: a tensor is missing, or is not finite")
    return {**ours, **policy}
