"""Adam and AdamW from the configuration, and learning rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastsac.config import Config

#: parameters and learning rate, by network
Groups = dict[str, tuple[list[nn.Parameter], float]]
#: PyTorch's default for AdamW
DEFAULT_WEIGHT_DECAY = 0.01


def weight_decay(config: Config, name: str) -> float:
    """Return the weight decay of one group: none with Adam, and none for alpha."""
    if config.optimizer == "adam" or name == "alpha":
        return 0.0
    return DEFAULT_WEIGHT_DECAY if config.weight_decay is None else config.weight_decay


def make_adam(
    config: Config, name: str, parameters: list[nn.Parameter], lr: float, capturable: bool = False
) -> torch.optim.Adam:
    """Return the optimiser of one group of parameters: Adam or AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        config: its optimiser, betas, weight decay and schedule are used.
        name: of the group.
        parameters: on one device.
        lr: the learning rate.
        capturable: whether steps are recorded in CUDA graphs; a learning rate that changes is then on the device.
    """
    rate = torch.tensor(lr, device=parameters[0].device) if capturable and config.lr_schedule != "constant" else lr
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, rate, config.adam_betas, fused=True, capturable=capturable)
    decay = weight_decay(config, name)
    return torch.optim.AdamW(parameters, rate, config.adam_betas, weight_decay=decay, fused=True, capturable=capturable)


def rate_factor(schedule: str, fraction: float) -> float:
    """Return the factor for learning rates after this fraction of training, from 0 to 1."""
    fraction = min(max(fraction, 0.0), 1.0)
    if schedule == "linear":
        return 1.0 - fraction
    return 0.5 * (1.0 + math.cos(math.pi * fraction)) if schedule == "cosine" else 1.0
