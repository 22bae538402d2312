"""Named settings, from presets.toml."""

from __future__ import annotations

import itertools
import logging
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastsac.config import Config
from fastsac.errors import UsageError, did_you_mean

FILE = Path(__file__).with_name("presets.toml")
AUTO, DEFAULTS = "auto", "sac"
NO_BREAK = "\N{NO-BREAK SPACE}"
#: a setting -> the one value that other settings need, and those settings
_NEEDED = {
    "critic": ("categorical", ("num_atoms", "v_min", "v_max")),
    "optimizer": ("adamw", ("weight_decay",)),
    "alpha": ("auto", ("initial_alpha",)),
}


class Preset(NamedTuple):
    """Settings that were tuned together; all others have their defaults."""

    name: str
    env_ids: tuple[str, ...]  # the environments of a task's preset; empty for a recipe
    source: str
    settings: dict[str, Any]

    def config(self, env_id: str | None = None, **settings: Any) -> Config:
        """Return the configuration; `settings` override the preset.

        Raises:
            UsageError: if the preset is for another environment, or a setting is out of range.
        """
        if self.env_ids and env_id is not None and env_id not in self.env_ids:
            other = "`auto` selects the environment's own preset, if there is one"
            raise UsageError(f"preset {self.name} is not for {env_id}, but for {', '.join(self.env_ids)}; {other}")
        if env_id is None:
            env_id = self.env_ids[0] if self.env_ids else Config.env_id
        return Config(**{"env_id": env_id, **without_unused(self.settings, settings), **settings})


def presets() -> dict[str, Preset]:
    """Return all presets by name: first the recipes, then the tasks.

    Raises:
        UsageError: if presets.toml has a setting that is unknown or out of range.
    """
    found = {}
    for name, values in tomllib.loads(FILE.read_text(encoding="utf-8")).items():
        env_ids, source = tuple(values.pop("env_ids", ())), values.pop("source")
        found[name] = Preset(name, env_ids, source, values)
        try:
            found[name].config()
        except (TypeError, UsageError) as error:
            raise UsageError(f"{FILE}: [{name}]: {error}") from error
    return found


def find(name: str, env_id: str | None = None) -> Preset:
    """Return the preset with this name; `auto` is the environment's own preset if there is one, otherwise `sac`.

    Raises:
        UsageError: if there is no preset with this name.
    """
    known = presets()
    if name == AUTO:
        env_id = Config.env_id if env_id is None else env_id
        return next((each for each in known.values() if env_id in each.env_ids), known[DEFAULTS])
    if name not in known:
        hint = did_you_mean(name, [AUTO, *known]) or ": `fastsac presets` lists them"
        raise UsageError(f"unknown preset {name!r}{hint}")
    return known[name]


def preset(name: str, env_id: str | None = None, **settings: Any) -> Config:
    """Return the configuration of a preset.

    Args:
        name: `sac` (the defaults), `sac-large`, a task such as `Hopper` (`fastsac presets` lists them), or `auto`: the
            environment's own preset if it has one, otherwise `sac`, with a warning from the logger "fastsac".
        env_id: the environment; by default the first one that the preset is for.
        settings: fields of `Config` that override the preset. With a different `critic`, `optimizer` or `alpha`, the
            preset's settings that need its own choice are dropped.

    Raises:
        UsageError: if there is no such preset, it is for other environments, or a setting is out of range.
    """
    found = find(name, env_id)
    if name == AUTO and not found.env_ids:
        logging.getLogger("fastsac").warning(f"there is no preset for {env_id}: using {found.name}, the defaults")
    return found.config(env_id, **settings)


def without_unused(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` without the settings that have no effect with those given explicitly."""
    kept = dict(values)
    for name, (needed, others) in _NEEDED.items():
        if given.get(name, needed) != needed:
            for other in (name, *others):
                kept.pop(other, None)
    return kept


def table() -> str:
    """Return all presets as a table, with the settings as command-line options."""
    rows = [("preset", "environments", "settings", "source")]
    for preset in presets().values():
        settings = " ".join(option.replace(" ", NO_BREAK) for option in options(preset))
        rows.append((preset.name, " ".join(preset.env_ids) or "any", settings, preset.source))
    widths = (max(len(row[0]) for row in rows), 24, 60, 40)
    lines = []
    for row in rows:
        cells = [textwrap.wrap(text, width, break_on_hyphens=False) for text, width in zip(row, widths, strict=True)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            padded = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
            lines.append("  ".join(padded).replace(NO_BREAK, " ").rstrip())
    return "\n".join(lines)


def options(preset: Preset) -> list[str]:
    """Return the settings as command-line options, one string each."""
    found = []
    for name, value in preset.settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found.append(" ".join([f"--{flag}", *map(str, value if isinstance(value, list) else [value])]))
    return found
