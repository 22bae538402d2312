"""`fastsac lab cost`: times the actor's step and a whole update with each arm, interleaved in one run."""

from __future__ import annotations

import random
import shlex
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.lab.arguments import Cost
from fastsac.lab.arms import Arm, parse_arms
from fastsac.lab.quadratic import every_arm
from fastsac.lab.results import make_directory
from fastsac.lab.watch import tracked
from fastsac.learner import Learner, choose_engine, make_learner, resolve_device, set_up_torch
from fastsac.learner.compare import random_replay
from fastsac.machine import describe_machine, write_json

#: of HalfCheetah-v5
OBS_SIZE, ACTION_SIZE = 17, 6
#: updates in one measurement
UPDATES = 8
#: measurements before the first one that counts: on a GPU, the second one still records graphs
WARM_UPS = 2
SEED = 0


def run(options: Cost) -> dict[str, Any]:
    """Measure every arm; write cost.json if a directory is given.

    Each arm runs on the engine that `--engine auto` chooses for it, and on the reference engine, which is the same for
    all; the actor's step alone is the reference engine's.

    Raises:
        UsageError: if an arm is wrong, or a number is too small.
    """
    for name in ("batch_size", "rounds"):
        if getattr(options, name) < 2:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be a whole number of at least 2, got {getattr(options, name)}")
    arms = every_arm() if options.arms is None else parse_arms(options.arms)
    device = resolve_device("auto")
    if options.out is not None:
        make_directory(options.out)  # before anything slow
    plain = Config(batch_size=options.batch_size, precision="fp32", num_threads=1)
    set_up_torch(plain, device, OBS_SIZE, ACTION_SIZE)  # as for training
    replay = random_replay(OBS_SIZE, ACTION_SIZE, device)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    engines = {}
    for arm in arms:
        config = arm.config(plain)
        engines[arm.label], _ = choose_engine(config, device)
        chosen = make_learner(config, OBS_SIZE, ACTION_SIZE, device, SEED)
        reference = Learner(config, OBS_SIZE, ACTION_SIZE, device, SEED)
        obs = replay.sample(options.batch_size).obs
        calls[arm.label, "update"] = partial(chosen.update, replay, UPDATES)
        calls[arm.label, "reference_update"] = partial(reference.update, replay, UPDATES)
        calls[arm.label, "actor_step"] = partial(actor_steps, reference, obs)
    times = interleaved(calls, options.rounds, device.type == "cuda")
    words = ["fastsac", "lab", "cost", "--batch-size", str(options.batch_size), "--rounds", str(options.rounds)]
    words += ["--arms", *options.arms] if options.arms else []
    result = {
        **{"command": shlex.join(words), "machine": describe_machine(), "batch_size": options.batch_size},
        "rows": [_row(arm, arms[0], engines[arm.label], times) for arm in arms],
    }
    if options.out is not None:
        write_json(options.out / "cost.json", result)
    return result


def actor_steps(learner: Learner, obs: torch.Tensor) -> None:
    """Make as many of the actor's steps as there are updates in one measurement."""
    for _ in range(UPDATES):
        learner._update_actor_and_alpha(obs, measure=False)


def interleaved(
    calls: dict[tuple[str, str], Callable[[], object]], rounds: int, synchronize: bool = False
) -> dict[tuple[str, str], list[float]]:
    """Return milliseconds per update of each call in each round; the order is shuffled in every round."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    order, rng = list(calls), random.Random(SEED)
    for _ in range(WARM_UPS):
        for call in calls.values():
            call()
    for _ in tracked(range(rounds), "rounds"):
        rng.shuffle(order)
        for key in order:
            if synchronize:
                torch.cuda.synchronize()
            started = time.perf_counter()
            calls[key]()
            if synchronize:
                torch.cuda.synchronize()
            times[key].append(1e3 * (time.perf_counter() - started) / UPDATES)
    return times


def _row(arm: Arm, first: Arm, engine: str, times: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm.label, "engine": engine, "K": arm.choice.num_action_samples}
    for kind in ("actor_step", "update", "reference_update"):
        own = np.array(times[arm.label, kind])
        row[f"{kind}_ms"] = _quartiles(own)
        row[f"{kind}_ratio"] = _quartiles(own / np.array(times[first.label, kind]))
    return row


def _quartiles(values: Any) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "low": low, "high": high}


def table(result: dict[str, Any]) -> str:
    """Return the results as a table in plain text."""
    rows = [["arm", "K", "actor's step", "update, reference", "update", "engine"]]
    for row in result["rows"]:
        cells = [
            f"{row[f'{kind}_ms']['median']:.2f} ms ({row[f'{kind}_ratio']['median']:.2f}x)"
            for kind in ("actor_step", "reference_update", "update")
        ]
        rows.append([row["arm"], str(row["K"]), *cells, row["engine"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"medians; x: against {result['rows'][0]['arm']} in the same round; batch size {result['batch_size']}")
    return "\n".join(lines)
