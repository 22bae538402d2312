"""Values that are not finite: which ones, and which setting probably causes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from fastsac.config import Config
from fastsac.errors import Divergence
from fastsac.metrics import Value, read_scalars

#: a loss or a group of parameters -> its learning rate, in the order in which divergence spreads
_RATES = {
    "critic_loss": "critic_lr",
    "q": "critic_lr",
    "critic": "critic_lr",
    "target_critic": "critic_lr",
    "value_loss": "value_lr",
    "value": "value_lr",
    "actor_loss": "actor_lr",
    "entropy": "actor_lr",
    "actor": "actor_lr",
    "alpha": "alpha_lr",
}
_LOSSES = ("critic_loss", "q", "value_loss", "actor_loss", "entropy", "alpha")
#: a learning rate more than this many times its default is a likelier cause than the loss that diverged first
_SUSPICIOUS = 3.0


def finite_flags(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return for each group of a learner's state, such as `actor`, whether its parameters and moments are finite.

    The flags are scalars on the device.
    """
    flags: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not name.endswith(".step"):
            group = name.removeprefix("optimizer.").partition(".")[0]
            finite = tensor.isfinite().all()
            flags[group] = flags[group] & finite if group in flags else finite
    return flags


def read_finite(
    metrics: Mapping[str, Value], state: Mapping[str, Tensor], config: Config, where: str, last_good: Callable[[], str]
) -> dict[str, float]:
    """Read the metrics from the device, and check that the learner's state is finite, in a single transfer.

    Raises:
        Divergence: if anything is not finite (see `refuse_divergence`).
    """
    flags = {f"finite {name}": flag for name, flag in finite_flags(state).items()}
    values = read_scalars({**metrics, **flags})
    finite = {name.removeprefix("finite "): values.pop(name) for name in flags}
    refuse_divergence(values, finite, config, where, last_good)
    return values


def refuse_divergence(
    metrics: Mapping[str, float], finite: Mapping[str, float], config: Config, where: str, last_good: Callable[[], str]
) -> None:
    """Raise Divergence if a metric or a group of parameters is not finite.

    Args:
        metrics: the latest metrics.
        finite: the values of the flags from `finite_flags`.
        config: the settings, one of which the message suggests to change.
        where: for example "step 1,000 (900 updates)".
        last_good: returns which checkpoint to go back to.
    """
    bad = [name for name in _LOSSES if not math.isfinite(metrics.get(name, 0.0))]
    groups = list(dict.fromkeys(name.removeprefix("log_") for name, good in finite.items() if not good))
    if not bad + groups:
        return
    defaults = Config()
    ratios = {name: getattr(config, name) / getattr(defaults, name) for name in dict.fromkeys(_RATES.values())}
    rate = max(ratios, key=lambda name: ratios[name])
    if ratios[rate] <= _SUSPICIOUS:
        rate = _RATES[(bad + groups)[0]]
    advice = f"a smaller --{rate.replace('_', '-')} than {getattr(config, rate):g} may help"
    if ratios[rate] <= 1.0:
        advice += ", or smaller rewards"
    what = ", ".join(bad + ([f"parameters of {' and '.join(groups)}"] if groups else []))
    raise Divergence(f"training diverged by {where}: not finite: {what}; {advice}; {last_good()}")
