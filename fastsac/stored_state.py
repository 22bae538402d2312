"""The schema of a checkpoint's state.json, checked before use: it may come from an untrusted source."""

from __future__ import annotations

from typing import Any

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.estimators import choose

#: settings that the weights depend on
KEPT = (
    *("hidden_sizes", "activation", "layer_norm", "num_critics", "critic", "num_atoms", "v_min", "v_max"),
    *("normalize_obs", "normalize_reward"),
)
_COUNT = range(2**62)
_FLAG, _NUMBER, _ANY = bool, float, object
#: numbers in the shape of an action
_NESTED = ([_NUMBER], [[_NUMBER]], [[[_NUMBER]]], [[[[_NUMBER]]]])
#: a mapping has exactly these keys; a list holds any number of one kind; a tuple lists what is allowed
_STATE: dict[str, Any] = {
    "config": {str: _ANY},
    "steps": _COUNT,
    "time_s": _NUMBER,
    "updates_due": _NUMBER,
    "warm_up_left": _COUNT,
    "exploration": {str: _ANY},
    "learner": {"updates": _COUNT},
    "precision": ("fp32", "tf32", "bf16"),
    "obs_shapes": {str: [_COUNT]},
    "action_low": _NESTED,
    "action_high": _NESTED,
    "metrics": {str: _NUMBER},
    "episodes": {"returns": [_NUMBER], "lengths": [_COUNT], "finished": [[_NUMBER]]},
    "evaluation_due": _FLAG,
    "reached": (None, _NUMBER),
    "env_seed": _COUNT,
    "envs": (None, {"backend": str, "resets": [_COUNT], "elapsed": [_COUNT], "streams": (None, [(None, {str: _ANY})])}),
    "replay": (None, {"newest": _COUNT, "first": _COUNT, "size": _COUNT, "num_rows": _COUNT, "blocks": [str]}),
}
_BEST = {**_STATE, "eval_return": _NUMBER}


def refuse_other_state(state: dict[str, Any]) -> None:
    """Raise ValueError unless this has exactly the keys and types of a state.json."""
    schema = _BEST if "eval_return" in state else _STATE
    for name in schema.keys() | state.keys():
        if name not in schema or name not in state or not _fits(state[name], schema[name]):
            raise ValueError(f"{name!r} is missing, unknown or of the wrong type")


def refuse_other_settings(config: Config, stored: Config, state: dict[str, Any]) -> None:
    """Raise UsageError for settings with which a run cannot continue.

    Args:
        config: the settings to continue with.
        stored: those of the checkpoint.
        state: its state.
    """
    for name in KEPT:
        old, new = getattr(stored, name), getattr(config, name)
        if old != new:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} cannot be changed from {old} to {new}: the stored networks depend on it")
    if choose(config).value_sign and not choose(stored).value_sign:
        raise UsageError(f"--baseline {config.baseline} needs a value network, and the stored run has none")
    if config.alpha == "auto" and config.initial_alpha != stored.initial_alpha:
        raise UsageError("--initial-alpha cannot be changed: the run has already started")
    replay = state["replay"] if config.checkpoint_replay else None
    if replay is not None and replay["newest"] and config.offline not in (None, stored.offline):
        raise UsageError(
            "--offline needs an empty replay buffer, but the checkpoint holds one: --no-checkpoint-replay drops it"
        )


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return any(_fits(value, each) for each in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(each, kind[0]) for each in value)
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return False
        if str in kind:
            return all(_fits(each, kind[str]) for each in value.values())
        return value.keys() == kind.keys() and all(_fits(value[key], kind[key]) for key in kind)
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if kind is _NUMBER:
        return type(value) in (int, float) and abs(value) < 1e300
    return isinstance(value, kind) if isinstance(kind, type) else value == kind
