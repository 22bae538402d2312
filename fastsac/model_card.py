"""The README.md of a shared policy, with the metadata that model hubs read (as in Hugging Face model cards)."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from fastsac.config import Config
from fastsac.evaluate import Evaluation
from fastsac.machine import PACKAGES, package_versions
from fastsac.spaces import Floats, Spaces

#: settings that say nothing about the policy
_UNTOLD = ("env_id", "log_every", "checkpoint_every", "checkpoint_replay", "device", "num_threads")


def model_card(config: Config, spaces: Spaces, steps: int, updates: int, evaluation: Evaluation | None) -> str:
    """Return the model card: task, usage, evaluation, settings and versions.

    Args:
        config: the run's settings.
        spaces: the environment's spaces.
        steps: environment steps of training.
        updates: gradient updates.
        evaluation: the evaluation of the deterministic policy, if any.
    """
    sections = [
        f"# Soft Actor-Critic agent for {_code(config.env_id)}",
        f"A policy for {_code(config.env_id)}, trained with fastsac for {steps:,} environment steps "
        f"({updates:,} gradient updates) with the {config.estimator} estimator of the actor's gradient.",
        _evaluation(evaluation),
        _use(config),
        _task(config, spaces),
        _settings(config),
        _table(
            "Versions when this was written",
            "package",
            {name: version or "-" for name, version in package_versions(PACKAGES).items()},
        ),
    ]
    return _front_matter(config, evaluation) + "\n" + "\n\n".join(sections) + "\n"


def _front_matter(config: Config, evaluation: Evaluation | None) -> str:
    """Return the metadata; JSON is YAML."""
    tags = ["reinforcement-learning", "deep-reinforcement-learning", "soft-actor-critic", config.env_id, "fastsac"]
    metadata: dict[str, Any] = {"library_name": "fastsac", "tags": tags}
    if evaluation is not None:
        mean, spread = evaluation.returns.mean(), evaluation.returns.std()
        metric = {
            "type": "mean_reward",
            "name": "mean_reward",
            "value": f"{mean:.2f} +/- {spread:.2f}",
            "verified": False,
        }
        task = {"type": "reinforcement-learning", "name": "reinforcement-learning"}
        dataset = {"name": config.env_id, "type": config.env_id}
        results = [{"task": task, "dataset": dataset, "metrics": [metric]}]
        metadata["model-index"] = [{"name": "SAC", "results": results}]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in metadata.items()]
    return "\n".join(["---", *lines, "---", ""])


def _evaluation(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "## Evaluation\n\nThis policy was not evaluated when it was saved."
    returns, lengths = evaluation.returns, evaluation.lengths
    number = f"{len(returns)} episode{'s' * (len(returns) > 1)}"
    return (
        f"## Evaluation\n\nThe deterministic policy over {number}: return {returns.mean():.2f} +- "
        f"{returns.std():.2f} (lowest {returns.min():.2f}, highest {returns.max():.2f}), episode length "
        f"{lengths.mean():.0f} steps."
    )


def _use(config: Config) -> str:
    load = 'agent = SAC.load("path/to/this/directory")'
    if config.env_backend == "python":
        load = 'agent = SAC.load("path/to/this/directory", envs=make_env)  # a function that makes the environment'
    return (
        "## Use\n\nWith fastsac installed:\n\n```\nfastsac eval path/to/this/directory --episodes 10\n```\n\n"
        f"```python\nfrom fastsac import SAC\n\n{load}\n"
        "action = agent.predict(obs)  # in the environment's own units\n```"
    )


def _task(config: Config, spaces: Spaces) -> str:
    parts = {name or "obs": list(shape) for name, shape in spaces.obs_shapes.items()}
    low, high = _bound(spaces.action_low), _bound(spaces.action_high)
    task: dict[str, Any] = {
        "environment": _code(config.env_id),
        "keyword arguments": _code(json.dumps(config.env_kwargs)),
        "observation": ", ".join(f"{_code(name)} {shape}" for name, shape in parts.items()),
        "action": f"{list(spaces.action_low.shape)}, from {low} to {high}",
    }
    return _table("Task", "", task)


def _bound(bound: Floats) -> str:
    """Return one number if all dimensions have the same bound."""
    return f"{bound.flat[0]:g}" if (bound == bound.flat[0]).all() else str(bound.tolist())


def _settings(config: Config) -> str:
    defaults = dataclasses.asdict(Config())
    given = {k: v for k, v in dataclasses.asdict(config).items() if v != defaults[k] and k not in _UNTOLD}
    if not given:
        return "## Settings\n\nfastsac's defaults; `config.json` has all of them."
    return _table("Settings", "setting", {_code(k): _code(json.dumps(v)) for k, v in given.items()}) + (
        "\n\nAll other settings are fastsac's defaults; `config.json` has all of them."
    )


def _code(text: str) -> str:
    """Return it as Markdown's code, so that nothing in it is taken for Markdown or HTML."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _table(title: str, what: str, rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", f"| {what} | |", "|---|---|", *lines])
