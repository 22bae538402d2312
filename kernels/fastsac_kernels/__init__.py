"""The operations of Soft Actor-Critic with a tanh-squashed Gaussian policy. Needs torch only."""

from fastsac_kernels.pathwise_loss import pathwise_loss
from fastsac_kernels.score_function_loss import score_function_loss
from fastsac_kernels.squashed_gaussian import sample_squashed_gaussian
from fastsac_kernels.td_loss import td_loss

__all__ = ["pathwise_loss", "sample_squashed_gaussian", "score_function_loss", "td_loss"]
