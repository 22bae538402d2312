"""The learner: its state, and `update` with one signature and several engines."""

from fastsac.learner.device import fastest_num_threads, resolve_device, set_up_torch
from fastsac.learner.graphed import GraphedLearner, choose_engine, make_learner
from fastsac.learner.reference import Learner

__all__ = [
    "GraphedLearner",
    "Learner",
    "choose_engine",
    "fastest_num_threads",
    "make_learner",
    "resolve_device",
    "set_up_torch",
]
