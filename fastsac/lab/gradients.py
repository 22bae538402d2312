"""`fastsac lab gradients`: the estimators' noise and bias on the networks of a trained run.

The networks are frozen, all arms see the same states, and they take turns, estimate by estimate. The gradient that they
are held against is the mean of many pathwise samples, whose own error is taken into account. The loss depends on the
actor's parameters through mean and log_std only, so a gradient at the policy head goes back through the actor to all of
its parameters.
"""

from __future__ import annotations

import dataclasses
import math
import random
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
from fastsac.run_dir import newest_step, read_config
from fastsac.train import SAC
from fastsac.types import Draw

#: action samples per state, and over all states, in one pass through the critics
CHUNK, ROWS = 100, 2**14
#: parts of the oracle, whose spread says how certain it is
PARTS = 100
#: action samples per state for the value without lag
VALUE_SAMPLES = 1000
EXACT = " (exact)"
#: in place of a zero that is divided by
TINY = 1e-200


def run(options: Gradients) -> dict[str, Any]:
    """Measure every arm at the newest checkpoint and the best one; write gradients.json and a picture if asked to.

    Raises:
        UsageError: if there is no run, or a number is too small.
        FastsacError: if a checkpoint is damaged.
    """
    for name, least in (("num_states", 2), ("num_replicates", 10), ("oracle_samples", PARTS), ("seed", 0)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be a whole number of at least {least}, got {getattr(options, name)}")
    arms = parse_arms(options.arms) if options.arms else every_arm()
    arms = list(dict.fromkeys([parse_arm("pathwise"), *arms]))  # what the others are held against
    config = _plain(options.run_dir)
    if newest_step(options.run_dir) is None:
        raise UsageError(f"{options.run_dir} has no checkpoint yet: train it for longer, or name another run")
    newest = SAC.load(options.run_dir, config)
    obs, source = states(newest, options.num_states, options.seed)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)  # before anything takes its time
    agents = {newest.steps: newest}
    if checkpoint.best_checkpoint(options.run_dir).exists():
        best = SAC.load(options.run_dir, config, best=True)
        agents.setdefault(best.steps, best)
    rows, skipped = list[dict[str, Any]](), dict[str, str]()
    for steps, agent in sorted(agents.items()):
        for row in measure(agent, obs, arms, options, skipped):
            rows.append({"checkpoint": steps, **row})
    numbers = ("num_states", "num_replicates", "oracle_samples", "seed")
    words = ["fastsac", "lab", "gradients", options.run_dir.name]
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

    def gradient(self, choice: Choice, baseline: str | Tensor) -> Tensor:
        """Return one estimate of the minibatch's gradient at the head, [2, B, A]."""
        mean, log_std = (each.clone().requires_grad_() for each in (self.mean, self.log_std))
        draw = Draw(self.noise(choice.num_noise), choice.num_action_samples)
        estimate = choice.estimator(mean, log_std, draw, self.q_function, self.learner.alpha, baseline)
        return torch.stack(torch.autograd.grad(estimate.loss, (mean, log_std)))

    def through(self, head: Tensor) -> Tensor:
        """Return the gradient in all of the actor's parameters, flat, for one at the head [2, B, A]."""
        found = torch.autograd.grad(self.outputs, self.parameters, list(head), retain_graph=True, allow_unused=True)
        return torch.cat([each.flatten() for each in found if each is not None])

    def at(self, name: str, head: Tensor) -> Tensor:
        """Return a gradient at the head, or what becomes of it in the parameters, flat."""
        return head.flatten() if name == "head" else self.through(head)

    def chunks(self, samples: int) -> list[int]:
        """Return numbers of samples that add up, each of which fits into one pass."""
        chunk = max(1, min(CHUNK, ROWS // len(self.obs)))
        return [chunk] * (samples // chunk) + [samples % chunk] * (samples % chunk > 0)

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return V(s) [B] from many samples."""
        total = torch.zeros_like(self.mean[:, 0])
        for chunk in self.chunks(VALUE_SAMPLES):
            action, log_prob = Draw(self.noise(chunk), chunk).sample(self.mean, self.log_std)
            total += (self.q_function(action).amin(1) - self.learner.alpha * log_prob).sum(0)
        return total / VALUE_SAMPLES


class Oracle(NamedTuple):
    """A gradient, and how certain it is along its own direction and a random one."""

    gradient: Tensor  # [n], float64
    directions: Tensor  # [2, n], of length 1
    errors: Tensor  # [2], standard errors along them


class Moments:
    """Where an arm's estimates lie around the oracle's gradient; they are not kept."""

    def __init__(self, truth: Oracle) -> None:
        """Begin with none."""
        self._truth, self._off = truth, torch.zeros_like(truth.gradient)
        self._squares, self._along, self._cosines = list[Tensor](), list[Tensor](), list[Tensor]()

    def add(self, estimates: Tensor) -> None:
        """Add estimates [R, n]."""
        estimates = estimates.double()
        off = estimates - self._truth.gradient
        self._off += off.sum(0)
        self._squares.append(off.square().sum(1))
        self._along.append(off @ self._truth.directions.T)
        self._cosines.append(estimates @ self._truth.directions[0] / estimates.norm(dim=1).clamp_min(TINY))

    def statistics(self) -> dict[str, float]:
        """Return what they come to.

        `variance` is the trace of their covariance over the gradient's squared norm, `cosine` the mean over estimates.
        `signal_to_noise` is the norm of their mean over the root of the trace; of the squared norm, what noise adds to
        it is taken off, and 0 means that no signal was found. `bias_sigmas` and `bias_random_sigmas` are the mean's
        distance from the gradient, along it and along a random direction, in standard errors of both.
        """
        along, squares = torch.cat(self._along), torch.cat(self._squares)
        count, off = len(squares), self._off / len(squares)
        trace = ((squares.sum() - count * off.square().sum()) / (count - 1)).clamp_min(0.0).item()
        signal = (self._truth.gradient + off).square().sum().item() - trace / count
        errors = (along.var(0) / count + self._truth.errors.square()).sqrt()
        bias = (along.mean(0) / errors.clamp_min(TINY)).tolist()
        return {
            "variance": trace / self._truth.gradient.square().sum().item(),
            "signal_to_noise": math.sqrt(max(signal, 0.0) / max(trace, TINY)),
            "cosine": torch.cat(self._cosines).mean().item(),
            **dict(zip(("bias_sigmas", "bias_random_sigmas"), bias, strict=True)),
        }


class Trial:
    """One arm's estimates: what they took, and where they lie."""

    def __init__(self, label: str, choice: Choice, baseline: str | Tensor, truth: dict[str, Oracle]) -> None:
        """Begin with none."""
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
        """Return what was found."""
        number = len(self._times)
        return {
            **{"arm": self.label, "K": self._choice.num_action_samples, "evaluations": self._evaluations / number},
            "time_ms": 1e3 * float(np.median(self._times)),
            **{name: moments.statistics() for name, moments in self._moments.items()},
        }


def measure(
    agent: SAC, obs: Tensor, arms: Sequence[Arm], options: Gradients, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """Return a row for each arm; what cannot be measured is told in `skipped`."""
    head = Head(agent, obs, options.seed)
    truth = oracles(head, options.oracle_samples, options.seed)
    trials = [
        Trial(label, arm.choice, baseline, truth) for arm in arms for label, baseline in _baselines(head, arm, skipped)
    ]
    order, rng = list(trials), random.Random(options.seed)
    for _ in range(options.num_replicates):
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


def oracles(head: Head, samples: int, seed: int = 0) -> dict[str, Oracle]:
    """Return the pathwise gradient from so many samples per state or a few more, at the head and in the parameters."""
    choice, per_part, parts = choose(Config()), math.ceil(samples / PARTS), list[Tensor]()
    for _ in range(PARTS):
        part = torch.zeros(2, *head.mean.shape, dtype=torch.float64, device=head.mean.device)
        for chunk in head.chunks(per_part):
            of_chunk = choice._replace(num_action_samples=chunk, num_noise=chunk)
            part += head.gradient(of_chunk, "none") * (chunk / per_part)
        parts.append(part)
    rng, found = torch.Generator().manual_seed(seed), dict[str, Oracle]()
    for name in ("head", "parameters"):
        gradient = head.at(name, torch.stack(parts).mean(0).to(head.mean.dtype)).double()
        anywhere = torch.randn(len(gradient), generator=rng, dtype=torch.float64).to(gradient.device)
        directions = torch.nn.functional.normalize(torch.stack([gradient, anywhere]), dim=1)
        along = torch.stack([directions @ head.at(name, part.to(head.mean.dtype)).double() for part in parts])
        found[name] = Oracle(gradient, directions, along.std(0) / math.sqrt(PARTS))
    return found


def _wait_for(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


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
    names = ["checkpoint", "arm", "K", "evaluations", "ms", "variance", "cosine"]
    rows = [[*names, "bias, sigmas", "elsewhere", "at equal evaluations", "at equal time"]]
    for row in result["rows"]:
        of = row["parameters"]
        rows.append(
            [
                *(f"{row['checkpoint']:,}", row["arm"], str(row["K"]), f"{row['evaluations']:g}"),
                *(f"{row['time_ms']:.2f}", f"{of['variance']:.3g}", f"{of['cosine']:.3f}"),
                *(f"{of['bias_sigmas']:+.1f}", f"{of['bias_random_sigmas']:+.1f}"),
                *(f"{of['equal_evaluations']:.3g}", f"{of['equal_time']:.3g}"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        "variance: trace of the covariance over the squared norm; at equal ...: relative to pathwise's",
        f"bias: along the gradient, and in a random direction; states from {result['states']}",
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
