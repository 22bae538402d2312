"""Arms of a comparison: `estimator[:baseline[:K]]`, such as `pathwise:2`, `score:loo:2`, `score:none`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.estimators import ESTIMATORS, Choice, choose


class Arm(NamedTuple):
    """An estimator with its baseline and its number of action samples; omitted parts have their defaults."""

    estimator: str
    baseline: str = "auto"
    num_action_samples: int | None = None

    def config(self, config: Config) -> Config:
        """Return the configuration with this arm's estimator, baseline and K."""
        return dataclasses.replace(config, **self._asdict())

    @property
    def choice(self) -> Choice:
        """What the arm resolves to (see `fastsac.estimators.choose`)."""
        return choose(self.config(Config()))

    @property
    def label(self) -> str:
        """The arm with its defaults written out, so that two spellings of one arm are equal."""
        choice = self.choice
        baseline = f":{choice.baseline}" if choice.takes_baseline else ""
        plain = choice.num_action_samples == choice.least_samples and choice.baseline != "loo"
        return f"{self.estimator}{baseline}" + ("" if plain else f":{choice.num_action_samples}")


def parse_arm(text: str) -> Arm:
    """Return the arm that `text` stands for.

    Raises:
        UsageError: if it has another form, or its parts cannot be combined.
    """
    estimator, *rest = text.split(":")
    if rest and estimator not in ESTIMATORS:  # module:name
        estimator, *rest = f"{estimator}:{rest[0]}", *rest[1:]
    samples = rest.pop() if rest and rest[-1].isdecimal() else None
    if not estimator or len(rest) > 1 or (rest and not rest[0]):
        raise UsageError(f"an arm is estimator[:baseline[:K]], such as pathwise:2 or score:loo:2; got {text!r}")
    arm = Arm(estimator, rest[0] if rest else "auto", None if samples is None else int(samples))
    try:
        _ = arm.choice
    except UsageError as error:
        raise UsageError(f"arm {text!r}: {error}") from None
    return arm


def parse_arms(texts: list[str] | tuple[str, ...]) -> list[Arm]:
    """Return the arms, each once.

    Raises:
        UsageError: if there are none, or one of them is wrong.
    """
    arms = {arm.label: arm for arm in map(parse_arm, texts)}
    if not arms:
        raise UsageError("name at least one arm, such as pathwise or score:loo:2")
    return list(arms.values())
