"""`fastsac lab gradients`: the estimators' noise and bias on the networks of a trained run.

The networks are frozen, and all arms see the same states. The gradient that they are held against is the mean of many
pathwise samples, whose own error is taken into account. The loss depends on the actor's parameters through mean and
log_std only, so a gradient at the policy head goes back through the actor to all of its parameters.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsac import checkpoint
from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.estimators import Choice, choose
from fastsac.lab.arguments import Gradients
from fastsac.lab.arms import Arm, parse_arm, parse_arms
from fastsac.lab.quadratic import every_arm
from fastsac.machine import describe_machine, write_json
from fastsac.run_dir import read_config
from fastsac.train import SAC
from fastsac.types import Draw

#: action samples per state in one pass of the oracle
CHUNK = 100
#: action samples per state for the value without lag
VALUE_SAMPLES = 1000
EXACT = " (exact)"


def run(options: Gradients) -> dict[str, Any]:
    """Measure every arm at the newest checkpoint and the best one; write gradients.json and a picture if asked to.

    Raises:
        UsageError: if there is no run, or a number is too small.
        FastsacError: if a checkpoint is damaged.
    """
    for name, least in (("num_states", 2), ("num_replicates", 10), ("oracle_samples", CHUNK), ("seed", 0)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be a whole number of at least {least}, got {getattr(options, name)}")
    arms = parse_arms(options.arms) if options.arms else every_arm()
    arms = list(dict.fromkeys([parse_arm("pathwise"), *arms]))  # what the others are held against
    newest = SAC.load(options.run_dir, _plain(options.run_dir))
    obs, source = states(newest, options.num_states, options.seed)
    agents = {newest.steps: newest}
    if checkpoint.best_checkpoint(options.run_dir).exists():
        best = SAC.load(options.run_dir, _plain(options.run_dir), best=True)
        agents.setdefault(best.steps, best)
    rows, skipped = list[dict[str, Any]](), dict[str, str]()
    for steps, agent in sorted(agents.items()):
        for row in measure(agent, obs, arms, options, skipped):
            rows.append({"checkpoint": steps, **row})
    numbers = ("num_states", "num_replicates", "oracle_samples", "seed")
    words = ["fastsac", "lab", "gradients", options.run_dir.name]
    words += [word for name in numbers for word in ("--" + name.replace("_", "-"), str(getattr(options, name)))]
    words += ["--arms", *options.arms] if options.arms else []
    config = newest.config
    about = {name: getattr(config, name) for name in ("env_id", "estimator", "baseline", "seed", "hidden_sizes")}
    result = {
        **{"command": shlex.join(words), "machine": describe_machine(), "run": about, "states": source},
        **{"skipped": skipped, "rows": rows},
    }
    for agent in agents.values():
        agent.close()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "gradients.json", result)
        draw(result, options.out / "gradients.png")
    return result


def states(agent: SAC, number: int, seed: int) -> tuple[Tensor, str]:
    """Return observations [B, O] of the replay buffer, or of the policy's own episodes where it was not stored."""
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


class Counted:
    """The critics as a function of the action, which counts evaluations per state: 1 forward, 1 more backward."""

    def __init__(self, q_function: Callable[[Tensor], Tensor]) -> None:
        """Count from zero."""
        self._q_function, self.evaluations = q_function, 0

    def __call__(self, action: Tensor) -> Tensor:
        """Return q [K, E, B] for actions [K, B, A]."""
        self.evaluations += len(action)
        q = self._q_function(action)
        if q.requires_grad:
            q.register_hook(lambda _: self._back(len(action)))  # type: ignore[no-untyped-call]
        return q

    def _back(self, number: int) -> None:
        self.evaluations += number


class Head:
    """Gradients of an agent's actor loss at the policy head for fixed states, and through the actor from there."""

    def __init__(self, agent: SAC, obs: Tensor, seed: int) -> None:
        """Freeze the networks' outputs for obs [B, O]."""
        self.learner = learner = agent.learner
        self.obs = learner.normalizer.obs(obs)
        self.rng = torch.Generator(obs.device).manual_seed(seed)
        self.parameters = list(learner.actor.parameters())
        self.outputs = tuple(learner.actor(self.obs))
        self.mean, self.log_std = (output.detach() for output in self.outputs)
        self.q_function = Counted(lambda action: learner._q_of_samples(self.obs, action))

    def noise(self, number: int) -> Tensor:
        """Return normal numbers [number, B, A]."""
        shape = (number, *self.mean.shape)
        return torch.randn(shape, generator=self.rng, device=self.mean.device, dtype=self.mean.dtype)

    def gradient(self, choice: Choice, samples: int, num_noise: int, baseline: str | Tensor) -> Tensor:
        """Return one estimate of the minibatch's gradient at the head, [2, B, A]."""
        mean, log_std = (each.clone().requires_grad_() for each in (self.mean, self.log_std))
        draw = Draw(self.noise(num_noise), samples)
        estimate = choice.estimator(mean, log_std, draw, self.q_function, self.learner.alpha, baseline)
        return torch.stack(torch.autograd.grad(estimate.loss, (mean, log_std)))

    def through(self, head: Tensor) -> Tensor:
        """Return the gradient in all of the actor's parameters, flat, for one at the head [2, B, A]."""
        found = torch.autograd.grad(self.outputs, self.parameters, list(head), retain_graph=True, allow_unused=True)
        return torch.cat([each.flatten() for each in found if each is not None])

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return V(s) [B] from many samples."""
        total = torch.zeros_like(self.mean[:, 0])
        for _ in range(VALUE_SAMPLES // CHUNK):
            action, log_prob = Draw(self.noise(CHUNK), CHUNK).sample(self.mean, self.log_std)
            total += (self.q_function(action).amin(1) - self.learner.alpha * log_prob).mean(0)
        return total / (VALUE_SAMPLES // CHUNK)


class Oracle(NamedTuple):
    """A gradient, flat, and the standard error of its projection on itself."""

    gradient: Tensor
    error: float


def measure(
    agent: SAC, obs: Tensor, arms: Sequence[Arm], options: Gradients, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """Return a row for each arm; what cannot be measured is told in `skipped`."""
    head = Head(agent, obs, options.seed)
    truth = oracles(head, options.oracle_samples)
    rows = []
    for arm in arms:
        for label, baseline in _baselines(head, arm, skipped):
            rows.append({"arm": label, **measure_arm(head, arm.choice, baseline, truth, options.num_replicates)})
    first = rows[0]
    for row in rows:
        for name in truth:
            share = row[name]["variance"] / first[name]["variance"]
            row[name]["equal_evaluations"] = share * row["evaluations"] / first["evaluations"]
            row[name]["equal_time"] = share * row["time_ms"] / first["time_ms"]
    return rows


def oracles(head: Head, samples: int) -> dict[str, Oracle]:
    """Return the pathwise gradient from many samples, at the head and in the parameters."""
    choice = choose(Config())
    chunks = [head.gradient(choice, CHUNK, CHUNK, "none") for _ in range(math.ceil(samples / CHUNK))]
    found = {}
    for name, of_chunk in (("head", torch.flatten), ("parameters", head.through)):
        mean = of_chunk(torch.stack(chunks).mean(0))
        direction = mean / mean.norm()
        along = torch.stack([of_chunk(chunk) @ direction for chunk in chunks])
        error = along.std().item() / math.sqrt(len(chunks)) if len(chunks) > 1 else math.inf
        found[name] = Oracle(mean, error)
    return found


def measure_arm(
    head: Head, choice: Choice, baseline: str | Tensor, truth: dict[str, Oracle], replicates: int
) -> dict[str, Any]:
    """Return the statistics of one arm's estimates."""
    samples, times, estimates = choice.num_action_samples, list[float](), list[Tensor]()
    head.q_function.evaluations = 0
    for _ in range(replicates):
        started = time.perf_counter()
        estimates.append(head.gradient(choice, samples, choice.num_noise, baseline))
        if estimates[-1].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    row: dict[str, Any] = {
        "K": samples,
        "evaluations": head.q_function.evaluations / replicates,
        "time_ms": 1e3 * float(np.median(times)),
    }
    for name, of_estimate in (("head", torch.flatten), ("parameters", head.through)):
        row[name] = statistics(torch.stack([of_estimate(each) for each in estimates]), truth[name])
    return row


def statistics(estimates: Tensor, truth: Oracle) -> dict[str, float]:
    """Return how estimates [R, n] lie around the oracle's gradient [n].

    `variance` is the trace of their covariance over the gradient's squared norm, `signal_to_noise` the root of its
    inverse, `cosine` the mean over estimates, and `bias_sigmas` the mean's distance from the gradient, along it, in
    standard errors of both.
    """
    estimates, gradient = estimates.double(), truth.gradient.double()
    size = gradient.norm()
    variance = (estimates.var(0).sum() / size**2).item()
    along = estimates @ (gradient / size)
    error = math.hypot(along.std().item() / math.sqrt(len(along)), truth.error)
    return {
        "variance": variance,
        "signal_to_noise": variance**-0.5 if variance > 0.0 else math.inf,
        "cosine": (along / estimates.norm(dim=1)).mean().item(),
        "bias_sigmas": (along.mean() - size).item() / error if error > 0.0 else 0.0,
    }


def _baselines(head: Head, arm: Arm, skipped: dict[str, str]) -> list[tuple[str, str | Tensor]]:
    """Return labels and baselines of an arm: a learned V is the run's own, and beside it one without lag."""
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
    return dataclasses.replace(read_config(run_dir), engine="reference", precision="fp32", num_threads=1)


def table(result: dict[str, Any]) -> str:
    """Return the outcome for people to read, in the actor's parameters."""
    names = ["checkpoint", "arm", "K", "evaluations", "ms", "variance", "cosine", "bias"]
    rows = [[*names, "at equal evaluations", "at equal time"]]
    for row in result["rows"]:
        of = row["parameters"]
        rows.append(
            [
                *(f"{row['checkpoint']:,}", row["arm"], str(row["K"]), f"{row['evaluations']:g}"),
                *(f"{row['time_ms']:.2f}", f"{of['variance']:.3g}", f"{of['cosine']:.3f}"),
                *(f"{of['bias_sigmas']:+.1f} sigmas", f"{of['equal_evaluations']:.3g}", f"{of['equal_time']:.3g}"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("variance: trace of the covariance over the squared norm; at equal ...: of pathwise's; states from")
    lines[-1] += f" {result['states']}"
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
