"""All settings, in one frozen dataclass. The docstrings of its fields are the command-line help."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from fastsac.errors import UsageError

#: the value baseline with the sign printed in the note: unbiased, but worse than none; only for `fastsac compare`
AS_PRINTED = "value-as-printed"


@dataclass(frozen=True)
class Config:
    """Settings of a run. The defaults are those of the second SAC paper (arXiv 1812.05905)."""

    env_id: str = "HalfCheetah-v5"
    """Environment: an EnvPool or Gymnasium id, or `module:Id-v0` to import `module` first."""
    total_steps: int = 1_000_000
    """Environment steps, summed over all environments."""
    estimator: str = "pathwise"
    """Gradient estimator of the actor: `pathwise`, `score`, `pathwise-stl`, `pathwise-antithetic`, `score-antithetic`,
    `mix` or `measure-valued`; or your own as `module:name`, where `module` registers it."""
    baseline: str = "auto"
    """Baseline of the score function: `none`, `constant`, `value`, `mean-action` or `loo`; `auto` selects `loo`."""
    num_action_samples: int | None = None
    """Action samples per state in the actor update (K). Default: the fewest that the estimator and the baseline need:
    1; or 2 with `loo`, antithetic pairs or `mix`; or 4 with `loo` over pairs."""
    entropy_split: float | Literal["auto"] = "auto"
    """Fraction of the Gaussian's log-density that is sampled in the actor gradient, from 1 (all) to 0 (the exact
    gradient of its entropy). `auto`: 1 for the score function and `pathwise-stl` (`pathwise` with 1), otherwise 0."""
    seed: int = 0
    """Random seed for the environments, the initial weights and all noise."""

    num_envs: int = 16
    """Number of parallel environments."""
    env_backend: Literal["auto", "envpool", "gymnasium", "gymnasium-async", "python"] = "auto"
    """`auto` uses EnvPool if it has the environment, otherwise Gymnasium. `gymnasium-async` steps each environment in
    its own process, for slow simulators. `python` means environments passed to `SAC(config, envs=...)`."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for the environment, as a JSON object: '{"frame_skip": 2}'."""
    env_wrappers: tuple[str, ...] = ()
    """Gymnasium wrappers as `module:Wrapper`, innermost first. Each is called with the environment only."""
    max_episode_steps: int | None = None
    """Truncate episodes after this many steps, instead of at the environment's own time limit."""
    utd: float = 1.0
    """Gradient updates per environment step (update-to-data ratio); below 1, updates are spread evenly."""
    utd_end: float | None = None
    """Change the updates per step linearly from --utd to this value over --total-steps."""
    learning_starts: int = 1000
    """Environment steps with uniformly random actions before the first update. With --offline, 0 starts updates at the
    first step."""
    buffer_size: int = 1_000_000
    """Size of the replay buffer, in transitions."""
    batch_size: int = 256
    """Transitions per update (minibatch size)."""
    offline: str | None = None
    """Minari dataset to load into the replay buffer before the first environment step: the id of a local dataset, or
    its directory. Its transitions do not count as steps."""

    gamma: float = 0.99
    """Discount factor per step."""
    n_step: int = 1
    """Number of rewards summed before bootstrapping from the target critics (n-step returns)."""
    normalize_obs: bool = False
    """Normalise observations with their running mean and standard deviation, and clip them to [-10, 10]."""
    normalize_reward: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    reward_scale: float = 1.0
    """Multiply rewards by this factor."""
    tau: float = 0.005
    """Soft update coefficient of the target critics: the share of the new weights in each update."""
    alpha: float | Literal["auto"] = "auto"
    """Entropy temperature: a fixed number, or `auto` to learn it."""
    initial_alpha: float = 1.0
    """Initial value of a learned alpha."""
    target_entropy: float | Literal["auto"] = "auto"
    """Target entropy of a learned alpha, in nats; `auto` is minus the action size."""
    actor_lr: float = 3e-4
    """Learning rate of the actor."""
    critic_lr: float = 3e-4
    """Learning rate of the critics."""
    value_lr: float = 1e-3
    """Learning rate of the value network of `--baseline value`, which must keep up with the critics."""
    alpha_lr: float = 3e-4
    """Learning rate of a learned alpha."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of all learning rates over --total-steps; `linear` and `cosine` decay to 0."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """`adamw` adds weight decay to the actor, the critics and the value network."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates for the running means of the gradients and of their squares."""
    weight_decay: float | None = None
    """Weight decay of `--optimizer adamw`, multiplied by the learning rate in each update. Default: 0.01."""
    max_grad_norm: float | None = None
    """Gradient clipping: scale down a network's gradient if its norm is larger. All critics share one norm."""
    policy_delay: int = 1
    """Critic updates per update of the actor and alpha."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Hidden layer sizes of every network."""
    activation: Literal["relu", "elu", "silu", "tanh"] = "relu"
    """Activation function of every hidden layer."""
    layer_norm: bool = False
    """Apply layer normalisation before every activation of the actor and the critics."""
    num_critics: int = 2
    """Number of critics (E)."""
    critic_reduction: Literal["min", "mean"] = "min"
    """How the critics' values are combined, for their targets and for the actor: the minimum or the mean. With `mean`,
    each categorical critic learns from its own target."""
    critic: Literal["scalar", "categorical"] = "scalar"
    """`categorical` critics learn the distribution of the return over --num-atoms values from --v-min to --v-max."""
    num_atoms: int = 101
    """Number of values (atoms) in a categorical critic's distribution of the return."""
    v_min: float | None = None
    """Lowest discounted return of a categorical critic, entropy included, in units of the scaled rewards."""
    v_max: float | None = None
    """Highest discounted return of a categorical critic."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses CUDA if there is a GPU."""
    engine: Literal["auto", "reference", "graphed", "fused"] = "auto"
    """`reference`: PyTorch with autograd. `fused`: hand-written gradients; on CUDA, six kernel launches per update.
    `graphed`: one Triton kernel per operation, in CUDA graphs. `auto` uses `fused` if it supports the settings,
    otherwise `graphed` on CUDA and `reference` on a CPU. On CUDA an engine must pass a check; if it fails, `auto` uses
    the next one."""
    precision: Literal["auto", "fp32", "bf16", "tf32"] = "auto"
    """Precision of matrix products: `fp32`; `bf16` with engine `fused`, on CUDA and on CPUs that have it in hardware;
    `tf32` on CUDA. `auto` uses `tf32` with `fused` on an A100, H100 or B200; `bf16` on a CPU if a measurement at
    start-up finds it faster; otherwise `fp32`."""
    num_threads: int = 0
    """CPU threads for PyTorch; 0 measures which number is fastest."""

    eval_every: int = 10_000
    """Steps between evaluations of the deterministic policy; 0 disables evaluation."""
    eval_episodes: int = 10
    """Episodes per evaluation."""
    target_return: float | None = None
    """Early stopping: end training once an evaluation's mean return reaches this value."""
    log_every: int = 1000
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 50_000
    """Steps between checkpoints; 0 saves only at the end."""
    checkpoint_replay: bool = False
    """Save the replay buffer in checkpoints, too, so that a resumed run does not need to refill it."""

    def __post_init__(self) -> None:
        """Raise UsageError for the first setting that is out of range."""
        for name in ("env_id", "estimator", "baseline"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise UsageError(f"{_flag(name)} must be a name, got {value!r}")
        if self.offline is not None and (not isinstance(self.offline, str) or not self.offline):
            raise UsageError(f"--offline must be the id or directory of a Minari dataset, got {self.offline!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{_flag(name)} must be true or false, got {getattr(self, name)!r}")
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise UsageError(f"{_flag(name)} must be a whole number of at least {least}, got {value}")
            object.__setattr__(self, name, int(value))
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise UsageError(f"{_flag(name)} must be at most {most}, got {getattr(self, name)}")
        for name, (low, high, meaning) in _REALS.items():
            value = getattr(self, name)
            if (value == "auto" and name in _AUTOMATIC) or (value is None and name in _OPTIONAL):
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
                raise UsageError(f"{_flag(name)} must be {meaning}, got {value!r}")
            object.__setattr__(self, name, float(value))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{_flag(name)} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        sizes: object = self.hidden_sizes
        if not isinstance(sizes, list | tuple) or not sizes or any(not isinstance(s, Integral) or s < 1 for s in sizes):
            raise UsageError(f"--hidden-sizes must be whole numbers of at least 1, got {sizes}")
        object.__setattr__(self, "hidden_sizes", tuple(map(int, sizes)))
        if self.buffer_size < self.num_envs:
            raise UsageError(f"--buffer-size must be at least --num-envs ({self.num_envs}), got {self.buffer_size}")
        if self.target_return is not None and not self.eval_every:
            raise UsageError("--target-return needs evaluations, and --eval-every 0 disables them")
        self._check_environment()
        self._check_optimizer()
        self._check_critic()

    def _check_environment(self) -> None:
        kwargs: object = self.env_kwargs
        try:
            if not isinstance(kwargs, dict) or any(not isinstance(key, str) for key in kwargs):
                raise ValueError
            object.__setattr__(self, "env_kwargs", json.loads(json.dumps(kwargs, allow_nan=False)))  # its own copy
        except (TypeError, ValueError):
            raise UsageError(
                f"--env-kwargs must be a JSON object such as '{{\"frame_skip\": 2}}', got {kwargs!r}"
            ) from None
        wrappers: object = self.env_wrappers
        if not isinstance(wrappers, list | tuple) or any(not _is_place(each) for each in wrappers):
            raise UsageError(f"--env-wrappers must be given as module:Wrapper, got {wrappers!r}")
        object.__setattr__(self, "env_wrappers", tuple(wrappers))

    def _check_optimizer(self) -> None:
        betas: object = self.adam_betas
        if not isinstance(betas, list | tuple) or len(betas) != 2 or any(not _is_beta(beta) for beta in betas):
            raise UsageError(f"--adam-betas must be two numbers in [0, 1), got {betas}")
        object.__setattr__(self, "adam_betas", (float(betas[0]), float(betas[1])))
        if self.weight_decay is not None and self.optimizer != "adamw":
            raise UsageError("--weight-decay needs --optimizer adamw")
        if self.initial_alpha != 1.0 and self.alpha != "auto":
            raise UsageError(f"--initial-alpha needs --alpha auto, and --alpha {self.alpha:g} is fixed")

    def _check_critic(self) -> None:
        given = {"v_min": self.v_min, "v_max": self.v_max}
        if self.critic == "scalar":
            for name, value in given.items():
                if value is not None:
                    raise UsageError(f"{_flag(name)} needs --critic categorical")
            if self.num_atoms != Config.num_atoms:
                raise UsageError("--num-atoms needs --critic categorical")
            return
        if self.v_min is None or self.v_max is None:
            raise UsageError("--critic categorical needs --v-min and --v-max, between which all discounted returns lie")
        if self.v_min >= self.v_max:
            raise UsageError(f"--v-min must be below --v-max, got {self.v_min:g} and {self.v_max:g}")


def _is_place(value: object) -> bool:
    return isinstance(value, str) and all(value.partition(":")[::2])


def _is_beta(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0.0 <= float(value) < 1.0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


#: the smallest value of each whole number
_INTEGERS = {
    "total_steps": 1,
    "num_action_samples": 1,
    "max_episode_steps": 1,
    "n_step": 1,
    "num_atoms": 2,
    "seed": 0,
    "num_envs": 1,
    "learning_starts": 0,
    "buffer_size": 1,
    "batch_size": 1,
    "policy_delay": 1,
    "num_critics": 1,
    "num_threads": 0,
    "eval_every": 0,
    "eval_episodes": 1,
    "log_every": 1,
    "checkpoint_every": 0,
}
#: a million threads would crash the process; a batch of n-step returns needs n operations
_MOST = {"num_threads": 1024, "n_step": 1000, "num_atoms": 4096, "batch_size": 2**20}
_FLAGS = ("checkpoint_replay", "normalize_obs", "normalize_reward", "layer_norm")
#: the numbers that may be None
_OPTIONAL = (
    *("num_action_samples", "max_episode_steps", "target_return", "utd_end", "weight_decay", "max_grad_norm"),
    *("v_min", "v_max"),
)
#: the real numbers that may be `auto`
_AUTOMATIC = ("alpha", "target_entropy", "entropy_split")
#: the allowed values of each choice, for callers from Python
_CHOICES = {
    "env_backend": ("auto", "envpool", "gymnasium", "gymnasium-async", "python"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "optimizer": ("adam", "adamw"),
    "critic_reduction": ("min", "mean"),
    "critic": ("scalar", "categorical"),
    "activation": ("relu", "elu", "silu", "tanh"),
    "device": ("auto", "cpu", "cuda"),
    "engine": ("auto", "reference", "graphed", "fused"),
    "precision": ("auto", "fp32", "bf16", "tf32"),
}
_TINY, _HUGE = sys.float_info.min, sys.float_info.max
#: the range of each real number; it also excludes NaN and infinities
_REALS = {
    "utd": (_TINY, 1e6, "above 0 and at most a million"),
    "utd_end": (0.0, 1e6, "at least 0 and at most a million"),
    "reward_scale": (_TINY, _HUGE, "above 0"),
    "initial_alpha": (_TINY, _HUGE, "above 0"),
    "weight_decay": (0.0, _HUGE, "at least 0"),
    "max_grad_norm": (_TINY, _HUGE, "above 0"),
    "v_min": (-_HUGE, _HUGE, "a finite number"),
    "v_max": (-_HUGE, _HUGE, "a finite number"),
    "gamma": (0.0, 1.0, "in [0, 1]"),
    "tau": (_TINY, 1.0, "in (0, 1]"),
    "alpha": (0.0, _HUGE, "`auto` or a finite number of at least 0"),
    "target_entropy": (-_HUGE, _HUGE, "`auto` or a finite number"),
    "entropy_split": (0.0, 1.0, "`auto` or a number from 0 to 1"),
    "actor_lr": (_TINY, _HUGE, "above 0"),
    "critic_lr": (_TINY, _HUGE, "above 0"),
    "value_lr": (_TINY, _HUGE, "above 0"),
    "alpha_lr": (_TINY, _HUGE, "above 0"),
    "target_return": (-_HUGE, _HUGE, "a finite number"),
}
