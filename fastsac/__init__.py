"""Fast Soft Actor-Critic, with a choice of gradient estimators for the actor."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastsac.config import Config
from fastsac.errors import FastsacError, UsageError

if TYPE_CHECKING:
    from fastsac.callbacks import Callback
    from fastsac.presets import preset
    from fastsac.train import SAC

__version__ = "0.1.0"
__all__ = ["SAC", "Callback", "Config", "FastsacError", "UsageError", "preset"]

_LATER = {"SAC": "fastsac.train", "Callback": "fastsac.callbacks", "preset": "fastsac.presets"}


def __getattr__(name: str) -> Any:
    """Import slow modules, such as PyTorch, only when they are needed."""
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'fastsac' has no attribute {name!r}")
