"""Everything that can be set, in one frozen dataclass. The docstrings are the command line's help."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from fastsac.errors import UsageError

#: the baseline with the sign that the note prints: unbiased, and worse than none; `fastsac compare` alone takes it
AS_PRINTED = "value-as-printed"


@dataclass(frozen=True)
class Config:
    """Settings of a run. The defaults are those of SAC's second version (arXiv 1812.05905)."""

    env_id: str = "HalfCheetah-v5"
    """Environment: an EnvPool or Gymnasium id, or `module:Id-v0` to import `module` first."""
    total_steps: int = 1_000_000
    """Environment steps, over all environments."""
    estimator: str = "pathwise"
    """The actor's gradient estimator: `pathwise`, `score`, `pathwise-stl`, `pathwise-antithetic`, `score-antithetic`,
    `mix` or `measure-valued`; or your own, as `module:name`, where `module` registers it."""
    baseline: str = "auto"
    """Baseline of the score function: `none`, `constant`, `value`, `mean-action` or `loo`, which `auto` takes."""
    num_action_samples: int | None = None
    """Action samples per state in the actor's update (K). Default: as few as estimator and baseline need, which is 1,
    or 2 with `loo`, in pairs or in a mix, or 4 with `loo` over pairs."""
    entropy_split: float | Literal["auto"] = "auto"
    """How much of the Gaussian's log-density is sampled in the actor's gradient, from 1 (all) to 0 (the exact gradient
    of its entropy). `auto`: 1 for the score function and `pathwise-stl`, which is `pathwise` with 1; else 0."""
    seed: int = 0
    """Seeds the environments, the networks' initial weights and all noise."""

    num_envs: int = 16
    """Parallel environments."""
    env_backend: Literal["auto", "envpool", "gymnasium", "gymnasium-async", "python"] = "auto"
    """`auto` takes EnvPool where it has the id, else Gymnasium. `gymnasium-async` steps each environment in a process
    of its own, for slow simulators. `python` stands for environments that were handed to `SAC(config, envs=...)`."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment, as a JSON object: '{"frame_skip": 2}'."""
    env_wrappers: tuple[str, ...] = ()
    """Gymnasium wrappers, the innermost first, as `module:Wrapper`; they are called with the environment only."""
    max_episode_steps: int | None = None
    """Steps after which an episode is truncated, in place of the environment's own limit."""
    utd: float = 1.0
    """Gradient updates per environment step; below 1 they are spread evenly."""
    utd_end: float | None = None
    """Let the updates per step go linearly from --utd to this over --total-steps."""
    learning_starts: int = 1000
    """Environment steps with uniformly random actions before the first update. With --offline, 0 updates from the first
    step on."""
    buffer_size: int = 1_000_000
    """Transitions that the replay buffer holds."""
    batch_size: int = 256
    """Transitions per update."""
    offline: str | None = None
    """Minari dataset that fills the replay buffer before the first environment step: the id of a local dataset, or its
    directory. Its transitions do not count as steps."""

    gamma: float = 0.99
    """Discount per step."""
    n_step: int = 1
    """Rewards that are summed before the target critics' value is added (n-step returns)."""
    normalize_obs: bool = False
    """Normalise observations by their running mean and standard deviation, and clip them to [-10, 10]."""
    normalize_reward: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    reward_scale: float = 1.0
    """Multiply rewards by this."""
    tau: float = 0.005
    """Fraction of the new weights in each update of the target critics."""
    alpha: float | Literal["auto"] = "auto"
    """Entropy temperature: a number keeps it fixed, `auto` learns it."""
    initial_alpha: float = 1.0
    """Where an automatic alpha begins."""
    target_entropy: float | Literal["auto"] = "auto"
    """Entropy that an automatic alpha aims at, in nats; `auto` is minus the action size."""
    actor_lr: float = 3e-4
    """Learning rate of the actor."""
    critic_lr: float = 3e-4
    """Learning rate of the critics."""
    value_lr: float = 1e-3
    """Learning rate of the value network of `--baseline value`, which has to follow the critics."""
    alpha_lr: float = 3e-4
    """Learning rate of an automatic alpha."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What becomes of all learning rates over --total-steps: `linear` and `cosine` go down to 0."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """`adamw` also lets the weights of actor, critics and value network decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the means of gradients and of their squares."""
    weight_decay: float | None = None
    """Weight decay of `--optimizer adamw`, times the learning rate in each update. Default: 0.01."""
    max_grad_norm: float | None = None
    """Scale a network's gradient down if its norm is larger; the norm is over all critics."""
    actor_every: int = 1
    """Critic updates per actor and alpha update (policy delay)."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Hidden layers of every network."""
    activation: Literal["relu", "elu", "silu", "tanh"] = "relu"
    """Activation of every hidden layer."""
    layer_norm: bool = False
    """Layer normalisation before every activation of actor and critics."""
    num_critics: int = 2
    """Critics (E)."""
    critic_reduction: Literal["min", "mean"] = "min"
    """Which value of the critics counts, for their targets and for the actor: the smallest, or the mean. With `mean`,
    each categorical critic learns from its own target."""
    critic: Literal["scalar", "categorical"] = "scalar"
    """`categorical` critics learn the distribution of the return over --num-atoms values from --v-min to --v-max."""
    num_atoms: int = 101
    """Values of the return that a categorical critic tells apart."""
    v_min: float | None = None
    """Lowest discounted return, entropy included, of a categorical critic, in the units of scaled rewards."""
    v_max: float | None = None
    """Highest discounted return of a categorical critic."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is a GPU."""
    engine: Literal["auto", "reference", "graphed", "fused"] = "auto"
    """`reference`: PyTorch with autograd. `fused`: gradients written out by hand; on CUDA an update is six launches.
    `graphed`: a Triton kernel for each operation, in CUDA graphs. `auto` takes `fused` if it serves the settings, else
    `graphed` on CUDA and `reference` on a CPU. On CUDA an engine has to pass a check, or the next one is taken."""
    precision: Literal["auto", "fp32", "bf16", "tf32"] = "auto"
    """Precision of matrix products: `fp32`; `bf16` with engine `fused`, on CUDA and on CPUs that have it in hardware;
    `tf32` on CUDA. `auto` takes `tf32` with `fused` on an A100, H100 or B200; on a CPU `bf16` where a measurement at
    start-up finds it faster; else `fp32`."""
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
            raise UsageError("--target-return is compared with evaluations, and --eval-every 0 never evaluates")
        self._check_environment()
        self._check_optimizer()
        self._check_critic()

    def _check_environment(self) -> None:
        kwargs: object = self.env_kwargs
        try:
            if not isinstance(kwargs, dict) or any(not isinstance(key, str) for key in kwargs):
                raise ValueError
            object.__setattr__(self, "env_kwargs", json.loads(json.dumps(kwargs, allow_nan=False)))  # a copy of its own
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


#: the least value of each whole number
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
    "actor_every": 1,
    "num_critics": 1,
    "num_threads": 0,
    "eval_every": 0,
    "eval_episodes": 1,
    "log_every": 1,
    "checkpoint_every": 0,
}
#: starting a million threads crashes the process; a batch takes as many operations as there are steps
_MOST = {"num_threads": 1024, "n_step": 1000, "num_atoms": 4096}
_FLAGS = ("checkpoint_replay", "normalize_obs", "normalize_reward", "layer_norm")
#: the numbers that may be left out
_OPTIONAL = (
    *("num_action_samples", "max_episode_steps", "target_return", "utd_end", "weight_decay", "max_grad_norm"),
    *("v_min", "v_max"),
)
#: the real numbers that may be left to the program
_AUTOMATIC = ("alpha", "target_entropy", "entropy_split")
#: the values of each choice, for those who come by way of Python
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
#: the range of each real number, which also refuses NaN and infinities
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
