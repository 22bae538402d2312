"""An environment that fails on purpose, for tests: FAULT is `kind:step:marker`, and with a marker it fails only once.

The marker is a file that the failure leaves behind. Steps are counted over all episodes of one environment object.
"""

import ctypes
import os
import signal
import time
from pathlib import Path

import gymnasium
import numpy as np


class Faulty(gymnasium.Env):
    """A point that is pushed about, with a random start and random pushes; episodes of 25 steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self) -> None:
        kind, step, marker = [*os.environ.get("FAULT", "").split(":", 2), "", ""][:3]
        self.kind, self.fails_at, self.marker = kind, int(step or -1), Path(marker) if marker else None
        self.steps = 0

    def observation(self) -> np.ndarray:
        return np.array([self.position, self.time], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.time = float(self.np_random.normal()), 0
        return self.observation(), {}

    def step(self, action):
        self.steps += 1
        obs, reward = None, -abs(self.position)
        if self.steps == self.fails_at and not (self.marker and self.marker.exists()):
            if self.marker:
                self.marker.touch()
            obs, reward = self.fail(reward)
        self.time += 1
        self.position += 0.1 * float(action[0]) + 0.1 * float(self.np_random.normal())
        return self.observation() if obs is None else obs, reward, False, self.time == 25, {}

    def fail(self, reward):
        if self.kind == "raise":
            raise ValueError("broken")
        if self.kind == "abort":
            os.abort()
        if self.kind == "segfault":
            ctypes.string_at(0)
        if self.kind == "oom":  # as the kernel's out-of-memory killer does it
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "exit":
            os._exit(77)
        if self.kind == "hang":
            time.sleep(1e6)
        if self.kind == "nan":
            return np.full(2, np.nan, np.float32), reward
        if self.kind == "nan-reward":
            return None, float("nan")
        if self.kind == "shape":
            return np.zeros(3, np.float32), reward
        if self.kind == "huge":
            return None, 1e38
        raise AssertionError(self.kind)


gymnasium.register("Faulty-v0", Faulty)
