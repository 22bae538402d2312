"""Soft Actor-Critic at speed, with the actor's gradient estimator as a choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastsac.config import Config
from fastsac.errors import FastsacError, UsageError

if TYPE_CHECKING:
    from fastsac.train import SAC

__version__ = "0.1.0"
__all__ = ["SAC", "Config", "FastsacError", "UsageError"]


def __getattr__(name: str) -> Any:
    """Import the agent, and with it PyTorch, only when it is asked for."""
    if name == "SAC":
        from fastsac.train import SAC

        return SAC
    raise AttributeError(f"module 'fastsac' has no attribute {name!r}")
