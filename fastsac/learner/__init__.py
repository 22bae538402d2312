"""The learner: its state, and `update` with one signature and several engines."""

from fastsac.learner.device import fastest_num_threads, resolve_device, set_up_torch
from fastsac.learner.reference import Learner

__all__ = ["Learner", "fastest_num_threads", "resolve_device", "set_up_torch"]
