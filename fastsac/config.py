"""Everything that can be set, in one frozen dataclass. The docstrings are the command line's help."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from fastsac.errors import UsageError


@dataclass(frozen=True)
class Config:
    """Settings of a run. The defaults are those of SAC's second version (arXiv 1812.05905)."""

    env_id: str = "HalfCheetah-v5"
    """Environment: an EnvPool or Gymnasium id, or `module:Id-v0` to import `module` first."""
    total_steps: int = 1_000_000
    """Environment steps, over all environments."""
    estimator: str = "pathwise"
    """The actor's gradient estimator: `pathwise` or `score`."""
    baseline: str = "auto"
    """Baseline of the score function: `none`, `constant`, `value` or `loo`, which `auto` takes."""
    num_action_samples: int | None = None
    """Action samples per state in the actor's update (K). Default: 2 with `loo`, else 1."""
    seed: int = 0
    """Seeds the environments, the networks' initial weights and all noise."""

    num_envs: int = 16
    """Parallel environments."""
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """`auto` takes EnvPool where it has the id, else Gymnasium."""
    utd: float = 1.0
    """Gradient updates per environment step; below 1 they are spread evenly."""
    learning_starts: int = 1000
    """Steps with uniformly random actions before the first update."""
    buffer_size: int = 1_000_000
    """Transitions that the replay buffer holds."""
    batch_size: int = 256
    """Transitions per update."""

    gamma: float = 0.99
    """Discount per step."""
    tau: float = 0.005
    """Fraction of the new weights in each update of the target critics."""
    alpha: float | Literal["auto"] = "auto"
    """Entropy temperature: a number keeps it fixed, `auto` learns it."""
    target_entropy: float | Literal["auto"] = "auto"
    """Entropy that an automatic alpha aims at, in nats; `auto` is minus the action size."""
    actor_lr: float = 3e-4
    """Learning rate of the actor (Adam)."""
    critic_lr: float = 3e-4
    """Learning rate of the critics."""
    value_lr: float = 1e-3
    """Learning rate of the value network of `--baseline value`, which has to follow the critics."""
    alpha_lr: float = 3e-4
    """Learning rate of an automatic alpha."""
    actor_every: int = 1
    """Critic updates per actor and alpha update."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Hidden layers of every network."""
    activation: Literal["relu", "elu", "silu", "tanh"] = "relu"
    """Activation of every hidden layer."""
    num_critics: int = 2
    """Critics, of which the smallest value counts (E)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is a GPU."""
    engine: Literal["auto", "reference", "graphed", "fused"] = "auto"
    """`reference`: PyTorch with autograd. `fused`: gradients written out by hand, on a CPU. `graphed`: Triton kernels
    in CUDA graphs. `auto` takes `fused` on a CPU; on CUDA it takes `graphed` if that passes its check there, else
    `reference`."""
    precision: Literal["auto", "fp32", "bf16", "tf32"] = "auto"
    """Precision of matrix products: `fp32`; `bf16` with engine `fused`, on CPUs that have it in hardware; `tf32` on
    CUDA. `auto` takes `bf16` where a measurement at start-up finds it faster, else `fp32`."""
    num_threads: int = 0
    """CPU threads of PyTorch; 0 measures which number is fastest."""

    eval_every: int = 10_000
    """Steps between evaluations of the deterministic policy; 0 never evaluates."""
    eval_episodes: int = 10
    """Episodes of an evaluation."""
    target_return: float | None = None
    """Stop once an evaluation's mean return reaches this."""
    log_every: int = 1000
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 50_000
    """Steps between checkpoints; 0 saves only at the end."""
    checkpoint_replay: bool = False
    """Store the replay buffer in checkpoints too, so that a resumed run need not refill it."""

    def __post_init__(self) -> None:
        """Raise UsageError for the first setting that is out of its range."""
        for name in ("env_id", "estimator", "baseline"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise UsageError(f"{_flag(name)} must be a name, got {value!r}")
        if not isinstance(self.checkpoint_replay, bool):
            raise UsageError(f"--checkpoint-replay must be true or false, got {self.checkpoint_replay!r}")
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name == "num_action_samples":
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise UsageError(f"{_flag(name)} must be a whole number of at least {least}, got {value}")
            object.__setattr__(self, name, int(value))
        if self.num_threads > 1024:  # starting a million of them crashes the process
            raise UsageError(f"--num-threads must be at most 1024, got {self.num_threads}")
        for name, (low, high, meaning) in _REALS.items():
            value = getattr(self, name)
            if (value == "auto" and name in _AUTOMATIC) or (value is None and name == "target_return"):
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
                raise UsageError(f"{_flag(name)} must be {meaning}, got {value}")
            object.__setattr__(self, name, float(value))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{_flag(name)} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        sizes: object = self.hidden_sizes
        if not isinstance(sizes, list | tuple) or not sizes or any(not isinstance(s, int) or s < 1 for s in sizes):
            raise UsageError(f"--hidden-sizes must be whole numbers of at least 1, got {sizes}")
        object.__setattr__(self, "hidden_sizes", tuple(sizes))
        if self.buffer_size < self.num_envs:
            raise UsageError(f"--buffer-size must be at least --num-envs ({self.num_envs}), got {self.buffer_size}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


#: the least value of each whole number
_INTEGERS = {
    "total_steps": 1,
    "num_action_samples": 1,
    "seed": 0,
    "num_envs": 1,
    "learning_starts": 0,
    "buffer_size": 1,
    "batch_size": 1,
    "actor_every": 1,
    "num_critics": 1,
    "num_threads": 0,
    "eval_every": 0,
    "eval_episodes": 1,
    "log_every": 1,
    "checkpoint_every": 0,
}
#: the real numbers that may be left to the program
_AUTOMATIC = ("alpha", "target_entropy")
#: the values of each choice, for those who come by way of Python
_CHOICES = {
    "env_backend": ("auto", "envpool", "gymnasium"),
    "activation": ("relu", "elu", "silu", "tanh"),
    "device": ("auto", "cpu", "cuda"),
    "engine": ("auto", "reference", "graphed", "fused"),
    "precision": ("auto", "fp32", "bf16", "tf32"),
}
_TINY, _HUGE = sys.float_info.min, sys.float_info.max
#: the range of each real number, which also refuses NaN and infinities
_REALS = {
    "utd": (_TINY, 1e6, "above 0 and at most a million"),
    "gamma": (0.0, 1.0, "in [0, 1]"),
    "tau": (_TINY, 1.0, "in (0, 1]"),
    "alpha": (0.0, _HUGE, "`auto` or a finite number of at least 0"),
    "target_entropy": (-_HUGE, _HUGE, "`auto` or a finite number"),
    "actor_lr": (_TINY, _HUGE, "above 0"),
    "critic_lr": (_TINY, _HUGE, "above 0"),
    "value_lr": (_TINY, _HUGE, "above 0"),
    "alpha_lr": (_TINY, _HUGE, "above 0"),
    "target_return": (-_HUGE, _HUGE, "a finite number"),
}
