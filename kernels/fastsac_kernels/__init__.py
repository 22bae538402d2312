"""The operations of Soft Actor-Critic with a tanh-squashed Gaussian policy: PyTorch everywhere, Triton on CUDA."""

from fastsac_kernels.categorical_loss import categorical_loss
from fastsac_kernels.pathwise_loss import pathwise_loss
from fastsac_kernels.philox import PhiloxState, philox_normal
from fastsac_kernels.replay_gather import replay_gather
from fastsac_kernels.score_function_loss import score_function_loss
from fastsac_kernels.squashed_gaussian import sample_squashed_gaussian
from fastsac_kernels.td_loss import td_loss

__all__ = [
    "PhiloxState",
    "categorical_loss",
    "pathwise_loss",
    "philox_normal",
    "replay_gather",
    "sample_squashed_gaussian",
    "score_function_loss",
    "td_loss",
]
