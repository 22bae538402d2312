"""`fastsac lab gradients`: the estimators' noise and bias on the networks of a trained run.

The networks are frozen, all arms see the same states, and they take turns, estimate by estimate. They are compared with
the mean of many pathwise samples, whose own error is taken into account. The loss depends on the actor's parameters
only through mean and log_std, so a gradient at the policy head is backpropagated through the actor to all of its
parameters.
"""

from __future__ import annotations

import dataclasses
import random
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsac import checkpoint
from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.estimators import Choice
from fastsac.lab.arguments import Gradients
from fastsac.lab.arms import Arm, parse_arm, parse_arms
from fastsac.lab.head import PARTS, Head, Moments, Oracle, oracles
from fastsac.lab.quadratic import every_arm
from fastsac.lab.results import make_directory
from fastsac.lab.watch import tracked
from fastsac.machine import describe_machine, portable, write_json
from fastsac.run_dir import newest_step, read_config
from fastsac.train import SAC

EXACT = " (exact)"


def run(options: Gradients) -> dict[str, Any]:
    """Measure every arm at the newest checkpoint and the best one; write gradients.json and a picture if `out` is set.

    Raises:
        UsageError: if there is no run, or a number is too small.
        FastsacError: if a checkpoint is damaged.
    """
    for name, least in (("num_states", 2), ("num_replicates", 10), ("oracle_samples", PARTS), ("seed", 0)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be a whole number of at least {least}, got {getattr(options, name)}")
    chosen = every_arm() if options.arms is None else parse_arms(options.arms)
    # the others are compared with it
    arms = [parse_arm("pathwise"), *(arm for arm in chosen if arm.label != "pathwise")]
    config = _plain(options.run_dir)
    if newest_step(options.run_dir) is None:
        raise UsageError(f"{options.run_dir} has no checkpoint yet: train it for longer, or name another run")
    if options.out is not None:
        make_directory(options.out)  # before anything slow
    newest = SAC.load(options.run_dir, config)
    if newest.policy_only:
        raise UsageError(f"{options.run_dir} holds only a policy, without critics: name the run that it was saved from")
    obs, source = states(newest, options.num_states, options.seed)
    agents = {newest.steps: newest}
    if checkpoint.best_checkpoint(options.run_dir).exists():
        best = SAC.load(options.run_dir, config, best=True)
        agents.setdefault(best.steps, best)
    rows, skipped = list[dict[str, Any]](), dict[str, str]()
    for steps, agent in sorted(agents.items()):
        for row in measure(agent, obs, arms, options, skipped):
            rows.append({"checkpoint": steps, **row})
    numbers = ("num_states", "num_replicates", "oracle_samples", "seed")
    words = ["fastsac", "lab", "gradients", portable(options.run_dir)]
    words += [word for name in numbers for word in ("--" + name.replace("_", "-"), str(getattr(options, name)))]
    words += ["--arms", *options.arms] if options.arms else []
    about = {name: getattr(config, name) for name in ("env_id", "estimator", "baseline", "seed", "hidden_sizes")}
    result = {
        **{"command": shlex.join(words), "machine": describe_machine(), "run": about, "states": source},
        **{"skipped": skipped, "rows": rows},
    }
    for agent in agents.values():
        agent.close()
    if options.out is not None:
        write_json(options.out / "gradients.json", result)
        draw(result, options.out / "gradients.png")
    return result


def states(agent: SAC, number: int, seed: int) -> tuple[Tensor, str]:
    """Return observations [B, O] from the replay buffer, or from the policy's own episodes if it was not saved."""
    rng, source = np.random.default_rng(seed), "the replay buffer"
    if agent.config.checkpoint_replay and len(agent.replay):
        obs = agent.replay.transitions().obs
    else:
        seen: list[Tensor] = []

        def policy(obs: Any) -> Any:
            seen.append(torch.from_numpy(np.array(obs, dtype=np.float32)).to(agent.device))
            return agent.learner.act(seen[-1]).cpu().numpy()

        agent._evaluator.evaluate(policy, 4, seed)
        obs, source = torch.cat(seen), "episodes of the stochastic policy: the checkpoint has no replay buffer"
    if len(obs) < number:
        raise UsageError(f"--num-states must be at most {len(obs)}, which is what {source} has, got {number}")
    return obs[torch.from_numpy(rng.choice(len(obs), number, replace=False)).to(obs.device)], source


class Trial:
    """One arm's estimates: their cost and their statistics."""

    def __init__(self, label: str, choice: Choice, baseline: str | Tensor, truth: dict[str, Oracle]) -> None:
        """Start without estimates."""
        self.label, self._choice, self._baseline = label, choice, baseline
        self._evaluations, self._times = 0, list[float]()
        self._moments = {name: Moments(oracle) for name, oracle in truth.items()}

    def add(self, head: Head) -> None:
        """Make one more estimate."""
        before = head.q_function.evaluations
        _wait_for(head.mean)
        started = time.perf_counter()
        estimate = head.gradient(self._choice, self._baseline)
        _wait_for(estimate)
        self._times.append(time.perf_counter() - started)
        self._evaluations += head.q_function.evaluations - before
        for name, moments in self._moments.items():
            moments.add(head.at(name, estimate).unsqueeze(0))

    def row(self) -> dict[str, Any]:
        """Return the statistics."""
        number = len(self._times)
        return {
            **{"arm": self.label, "K": self._choice.num_action_samples, "evaluations": self._evaluations / number},
            "time_ms": 1e3 * float(np.median(self._times)),
            **{name: moments.statistics() for name, moments in self._moments.items()},
        }


def measure(
    agent: SAC, obs: Tensor, arms: Sequence[Arm], options: Gradients, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """Return a row for each arm; `skipped` gets the reason for each one that cannot be measured."""
    head = Head(agent, obs, options.seed)
    truth = oracles(head, options.oracle_samples, options.seed)
    trials = [
        Trial(label, arm.choice, baseline, truth) for arm in arms for label, baseline in _baselines(head, arm, skipped)
    ]
    order, rng = list(trials), random.Random(options.seed)
    for _ in tracked(range(options.num_replicates), "gradients"):
        rng.shuffle(order)
        for trial in order:
            trial.add(head)
    rows = [trial.row() for trial in trials]
    for row in rows:
        for name in truth:
            share = row[name]["variance"] / rows[0][name]["variance"]
            row[name]["equal_evaluations"] = share * row["evaluations"] / rows[0]["evaluations"]
            row[name]["equal_time"] = share * row["time_ms"] / rows[0]["time_ms"]
    return rows


def _wait_for(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _baselines(head: Head, arm: Arm, skipped: dict[str, str]) -> list[tuple[str, str | Tensor]]:
    """Return an arm's labels and baselines: for a learned V, the run's own one and one without lag."""
    sign = arm.choice.value_sign
    if not sign:
        return [(arm.label, arm.choice.baseline)]
    found: list[tuple[str, str | Tensor]] = [(arm.label + EXACT, sign * head.value())]
    value = head.learner.value
    if value is None:
        skipped[arm.label] = "the run was trained without a value network"
    else:
        found.insert(0, (arm.label, sign * value(head.obs, frozen=True).detach()))
    return found


def _plain(run_dir: Path) -> Config:
    """Return the run's configuration for the reference engine, whose parts are used here."""
    return dataclasses.replace(read_config(run_dir), device="auto", engine="reference", precision="fp32", num_threads=1)


def table(result: dict[str, Any]) -> str:
    """Return the results for the actor's parameters as a table in plain text."""
    names = ["checkpoint", "arm", "K", "evaluations", "ms", "noise at the head", "in the parameters", "cosine"]
    rows = [[*names, "bias, sigmas", "in a random direction", "at equal evaluations", "at equal time"]]
    for row in result["rows"]:
        of = row["parameters"]
        rows.append(
            [
                *(f"{row['checkpoint']:,}", row["arm"], str(row["K"]), f"{row['evaluations']:g}"),
                *(
                    f"{row['time_ms']:.2f}",
                    f"{row['head']['variance']:.3g}",
                    f"{of['variance']:.3g}",
                    f"{of['cosine']:.3f}",
                ),
                *(f"{of['bias_sigmas']:+.1f}", f"{of['bias_random_sigmas']:+.1f}"),
                *(f"{of['equal_evaluations']:.3g}", f"{of['equal_time']:.3g}"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        "noise: trace of the covariance over the squared norm of the gradient; at equal ...: relative to pathwise's",
        f"bias: along the gradient, and in a random direction; states from {result['states']}",
        "a biased estimator's noise says little: if its gradient is too small, its noise is smaller, too",
    ]
    lines += [f"{arm} was left out: {reason}" for arm, reason in result["skipped"].items()]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a picture of the variances at the last checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    last = max(row["checkpoint"] for row in result["rows"])
    rows = sorted(
        (row for row in result["rows"] if row["checkpoint"] == last), key=lambda row: -row["parameters"]["variance"]
    )
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.27 * len(rows)), layout="constrained")
    places = range(len(rows))
    for name, marker, colour in (("head", "o", "#0072B2"), ("parameters", "s", "#D55E00")):
        label = {"head": "at the policy head", "parameters": "in all of the actor's parameters"}[name]
        axes.plot([row[name]["variance"] for row in rows], places, marker, color=colour, label=label)
    axes.set_yticks(places, [row["arm"] for row in rows])
    axes.set(xscale="log", xlabel="trace of covariance / |gradient|²")
    axes.set_title(f"{result['run']['env_id']}, step {last:,}: noise of a gradient estimate")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
