"""One contender of `benchmarks.peers` in its own process: one JSON request per line in, one JSON reply per line out.

Runs under the peers' Python as well as under ours, so it imports only the standard library until it is told which
contender it is. Between requests it blocks on stdin.

Requests: {"do": "start", "contender", "env_id", "seed"}, {"do": "update", "updates", "per_call"},
{"do": "learn", "num_envs", "steps"}, {"do": "finish"}. Replies: {"ok": true, ...} or {"ok": false, "error": LINE}.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import time
from typing import Any

BATCH_SIZE = 256
HIDDEN = [256, 256]
FILL_STEPS = 2048  # real transitions in the buffer before updates are timed
LEARNING_STARTS = 1024  # random steps of each end-to-end agent, never timed
WARM_STEPS = 320  # steps with updates after those, never timed: compilation, allocator, caches
VEC_ENVS = 16  # also the number of updates a call in the "16 updates a call" blocks
PACKAGES = ("stable_baselines3", "sbx-rl", "jax", "jaxlib", "flax", "optax", "fastsac", "torch", "numpy", "gymnasium")
FASTSAC_VARIANTS: dict[str, dict[str, Any]] = {
    "fastsac reference": {"engine": "reference", "precision": "fp32"},
    "fastsac pathwise fp32": {"precision": "fp32"},
    "fastsac pathwise bf16": {"precision": "bf16"},
    "fastsac score+loo fp32": {"estimator": "score", "baseline": "loo", "precision": "fp32"},
    "fastsac score+loo bf16": {"estimator": "score", "baseline": "loo", "precision": "bf16"},
    "fastsac score+none bf16": {"estimator": "score", "baseline": "none", "precision": "bf16"},
}
CONTENDERS = ("sb3", "sbx", *FASTSAC_VARIANTS)
SETTINGS = {
    "batch_size": BATCH_SIZE,
    "hidden_sizes": HIDDEN,
    "activation": "relu",
    "device": "cpu",
    "transitions_before_updates": FILL_STEPS,
    "untimed_random_steps": LEARNING_STARTS,
    "untimed_training_steps": WARM_STEPS,
}


class BaselinesContender:
    """Stable-Baselines3 or SBX: one public interface, two libraries."""

    def __init__(self, name: str, env_id: str, seed: int) -> None:
        if name == "sb3":
            from stable_baselines3 import SAC
        else:
            from sbx import SAC  # type: ignore[no-redef]
        from stable_baselines3.common.env_util import make_vec_env

        def make(num_envs: int, learning_starts: int) -> Any:
            return SAC(
                "MlpPolicy",
                make_vec_env(env_id, n_envs=num_envs, seed=seed),  # a DummyVecEnv, also for one environment
                learning_starts=learning_starts,
                batch_size=BATCH_SIZE,
                train_freq=1,
                gradient_steps=num_envs,  # with N environments a step is N transitions: one update for each
                policy_kwargs={"net_arch": HIDDEN},
                device="cpu",
                seed=seed,
            )

        self.name = name
        self.updater = make(1, FILL_STEPS)
        self.updater.learn(FILL_STEPS)  # random actions, no update: `learn` trains only beyond learning_starts
        self.settings = {"buffer_size": self.updater.buffer_size}
        self.threads = self._choose_threads() if name == "sb3" else {"chosen": "XLA default"}
        self.learners: dict[int, Any] = {num_envs: make(num_envs, LEARNING_STARTS) for num_envs in (1, VEC_ENVS)}

    def _choose_threads(self) -> dict[str, Any]:
        """Time updates with 1, 2, 4, ... torch threads, in turn so that noise hits all, and keep the fastest."""
        import torch

        cores = len(os.sched_getaffinity(0))
        counts = sorted({min(2**power, cores) for power in range(cores.bit_length() + 1)})
        samples: dict[int, list[float]] = {count: [] for count in counts}
        self.update(32, 1)
        for _ in range(7):
            for count in counts:
                torch.set_num_threads(count)
                self.update(2, 1)  # starting or stopping threads is not part of an update
                seconds, updates = self.update(12, 1)
                samples[count].append(1e3 * seconds / updates)
        medians = {count: statistics.median(values) for count, values in samples.items()}
        chosen = min(medians, key=lambda count: medians[count])
        torch.set_num_threads(chosen)
        return {"chosen": chosen, "measured_ms_per_update": medians}

    def update(self, updates: int, per_call: int) -> tuple[float, int]:
        before = self.updater._n_updates
        start = time.perf_counter()
        for _ in range(updates // per_call):
            self.updater.train(gradient_steps=per_call, batch_size=BATCH_SIZE)  # ends in .item(): nothing is pending
        return time.perf_counter() - start, self.updater._n_updates - before

    def learn(self, num_envs: int, steps: int) -> tuple[float, int, int]:
        model = self.learners[num_envs]
        before = model.num_timesteps, model._n_updates
        start = time.perf_counter()
        model.learn(steps, reset_num_timesteps=False)  # goes on where the last block ended: no reset
        seconds = time.perf_counter() - start
        return seconds, model.num_timesteps - before[0], model._n_updates - before[1]

    def evidence(self) -> dict[str, Any]:
        """log alpha moves by at most about the learning rate an update: a trace of the updates that really ran."""
        values = {}
        for role, model in [("updater", self.updater), *self.learners.items()]:
            alpha = model.log_ent_coef.detach() if self.name == "sb3" else model.ent_coef_state.params["log_ent_coef"]
            values[str(role)] = {"updates": model._n_updates, "log_alpha": float(alpha)}
        return values


class FastsacContender:
    """One variant of fastsac, by its public interface."""

    def __init__(self, name: str, env_id: str, seed: int) -> None:
        from fastsac import SAC, Config

        def make(num_envs: int, learning_starts: int) -> Any:
            settings = {**FASTSAC_VARIANTS[name], "num_envs": num_envs, "learning_starts": learning_starts}
            settings |= {"batch_size": BATCH_SIZE, "utd": 1.0, "eval_every": 0, "device": "cpu", "num_threads": 0}
            return SAC(Config(env_id=env_id, seed=seed, **settings))

        self.updater = make(VEC_ENVS, FILL_STEPS)
        self.updater.learn(total_steps=FILL_STEPS)
        self.learners: dict[int, Any] = {num_envs: make(num_envs, LEARNING_STARTS) for num_envs in (1, VEC_ENVS)}
        choice = self.updater.learner.choice
        self.settings = {
            "engine": self.updater.engine,
            "baseline": choice.baseline,
            "num_action_samples": choice.num_action_samples,
        }

    @property
    def threads(self) -> dict[str, Any]:
        """Chosen while training, so only known after the warm-up."""
        agents = [("updater", self.updater), *self.learners.items()]
        return {"chosen": {str(role): agent.num_threads for role, agent in agents}}

    def _use_threads_of(self, agent: Any) -> None:
        """torch's thread count is the process's: the agent made last would otherwise decide for all three."""
        import torch

        torch.set_num_threads(agent.num_threads)

    def update(self, updates: int, per_call: int) -> tuple[float, int]:
        agent = self.updater
        self._use_threads_of(agent)
        before = agent.updates
        start = time.perf_counter()
        for _ in range(updates // per_call):
            agent.learner.update(agent.replay, num_updates=per_call)
        return time.perf_counter() - start, agent.updates - before

    def learn(self, num_envs: int, steps: int) -> tuple[float, int, int]:
        agent = self.learners[num_envs]
        self._use_threads_of(agent)
        before = agent.steps, agent.updates
        start = time.perf_counter()
        agent.learn(total_steps=agent.steps + steps)
        return time.perf_counter() - start, agent.steps - before[0], agent.updates - before[1]

    def evidence(self) -> dict[str, Any]:
        return {
            str(role): {"updates": agent.updates, "log_alpha": float(agent.learner.log_alpha.detach())}
            for role, agent in [("updater", self.updater), *self.learners.items()]
        }


def start(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build the contender and run everything that will be timed once, untimed."""
    name = request["contender"]
    kind = FastsacContender if name in FASTSAC_VARIANTS else BaselinesContender
    contender = kind(name, request["env_id"], request["seed"])
    for per_call in (1, VEC_ENVS):
        contender.update(2 * VEC_ENVS, per_call)
    for num_envs in (1, VEC_ENVS):
        contender.learn(num_envs, LEARNING_STARTS)
        contender.learn(num_envs, WARM_STEPS)
    about = {"threads": contender.threads, "settings": contender.settings}
    return contender, {**about, "python": platform.python_version(), "versions": versions()}


def versions() -> dict[str, str]:
    """Versions of those of PACKAGES that this Python has."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def answer(contender: Any, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "update":
        seconds, updates = contender.update(request["updates"], request["per_call"])
        return {"seconds": seconds, "updates": updates}
    if request["do"] == "learn":
        seconds, steps, updates = contender.learn(request["num_envs"], request["steps"])
        return {"seconds": seconds, "steps": steps, "updates": updates}
    return {"evidence": contender.evidence()}


def without_paths(text: str) -> str:
    """One line of at most 400 characters, fit for a result file that is published: no absolute path is left."""
    return re.sub(r"(?<![\w.])/[\w.+-]+(?:/[\w.+-]+)+", "<path>", " ".join(text.split()))[:400]


def main() -> None:
    # Replies go to the real stdout; whatever a library prints goes to stderr.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contender: Any = None
    idle_cpu, cpu = 0.0, time.process_time()
    for line in sys.stdin:
        # CPU time of all threads while waiting: shows whether an idle contender spins at the others' cost.
        idle_cpu += time.process_time() - cpu
        request = json.loads(line)
        cpu = time.process_time()
        try:
            if request["do"] == "start":
                contender, reply = start(request)
            else:
                reply = answer(contender, request)
            reply = {"ok": True, "idle_cpu_s": round(idle_cpu, 4), "cpu_s": time.process_time() - cpu, **reply}
        except Exception as error:  # whatever a library raises is this contender's result, not this process's end
            reply = {"ok": False, "error": without_paths(f"{type(error).__name__}: {error}")}
        cpu = time.process_time()
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
