"""The learner: its state, and `update` with one signature and several engines."""

from fastsac.learner import self_check
from fastsac.learner.device import Setup, ThreadTrial, has_bfloat16_products, precisions, resolve_device, set_up_torch
from fastsac.learner.engines import choose_engine, make_learner
from fastsac.learner.fused import FusedLearner
from fastsac.learner.fused_cuda import FusedCudaLearner
from fastsac.learner.graphed import GraphedLearner
from fastsac.learner.reference import Learner, refuse_other_networks

__all__ = [
    "FusedCudaLearner",
    "FusedLearner",
    "GraphedLearner",
    "Learner",
    "Setup",
    "ThreadTrial",
    "choose_engine",
    "has_bfloat16_products",
    "make_learner",
    "precisions",
    "refuse_other_networks",
    "resolve_device",
    "self_check",
    "set_up_torch",
]
