"""`fastsac doctor`: this machine's hardware and packages, what would run, how fast, and what is missing."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.learner import (
    choose_engine,
    has_bfloat16_products,
    make_learner,
    precisions,
    resolve_device,
    self_check,
    set_up_torch,
)
from fastsac.learner.compare import random_replay
from fastsac.learner.device import measure_updates
from fastsac.machine import describe_cpu, describe_gpu, memory_gib, nvidia_driver, package_versions

PACKAGES = ("fastsac", "torch", "triton", "numpy", "envpool", "gymnasium", "mujoco")
#: HalfCheetah's; the other settings are the defaults
OBS_SIZE, ACTION_SIZE = 17, 6
CHILD_SECONDS = 120.0
STEP = """
import sys
from fastsac.env_backends import EnvSpec
from fastsac.envs import make_envs
import numpy as np
render = sys.argv[2] == "render"
envs = make_envs(EnvSpec(sys.argv[1]), 1, 0, render=render)
envs.reset()
if render:
    envs.render()
envs.send(np.zeros((1, envs.spaces.action_size), np.float32))
envs.recv()
print(envs.backend_name)
envs.close()
"""


class Report:
    """The findings by topic, and the problems."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.problems: list[dict[str, Any]] = []

    def problem(self, what: str, fix: str, stops_training: bool = False) -> None:
        """Add a problem, and how the user can fix it."""
        self.problems.append({"what": what, "fix": fix, "stops_training": stops_training})

    @property
    def works(self) -> bool:
        """Whether training would work."""
        return not any(problem["stops_training"] for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Return everything."""
        return {**self.facts, "problems": self.problems, "training_works": self.works}


def examine() -> Report:
    """Examine everything. Takes some seconds; on a GPU that has not been checked yet, up to a few minutes."""
    report = Report()
    facts = report.facts
    facts["python"], facts["system"] = platform.python_version(), f"{platform.system()} {platform.release()}"
    facts["versions"] = package_versions(PACKAGES)
    usable = True
    try:
        facts["gpu"] = _gpu(report)
    except RuntimeError as error:  # CUDA's own
        facts["gpu"], usable = None, False
        what = f"the GPU cannot be used: {error}".splitlines()[0]
        report.problem(what, "check it with `nvidia-smi`, or train with --device cpu", stops_training=True)
    cpu = describe_cpu()
    facts["cpu"] = cpu | {"memory_gib": memory_gib(), "bfloat16_products": has_bfloat16_products()}
    facts["environments"] = _environments(report)
    facts["rendering"] = facts["environments"]["stepped_with"] is not None and _rendering(report)
    facts["engine"] = _engine(report, resolve_device("auto" if usable else "cpu"))
    return report


def _gpu(report: Report) -> dict[str, Any] | None:
    gpu, driver = describe_gpu(), nvidia_driver()
    if gpu is not None:
        free = torch.cuda.mem_get_info()[0]
        return gpu | {"driver": driver, "free_gib": round(free / 2**30, 1)}
    if torch.version.cuda is not None and (driver is not None or shutil.which("nvidia-smi")):
        fix = "check the driver with `nvidia-smi`; it must be new enough for this CUDA version"
        report.problem(f"PyTorch is built for CUDA {torch.version.cuda}, but finds no GPU", fix)
    elif driver is not None:
        fix = "install a CUDA build of PyTorch (the command is on PyTorch's Get Started page)"
        report.problem(f"there is an NVIDIA driver, {driver}, but this build of PyTorch has no CUDA support", fix)
    return None


def _child(env_id: str, what: str) -> tuple[str, str]:
    """Step or render an environment in a separate process; return the backend's name, and what went wrong."""
    command = [sys.executable, "-P", "-c", STEP, env_id, what]
    try:
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        environment = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {CHILD_SECONDS:g} s"
    if done.returncode == 0 and done.stdout.strip():
        return done.stdout.split()[-1], ""
    ended = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return "", ([ended, *done.stderr.strip().splitlines()][-1])[:200]


def _environments(report: Report) -> dict[str, Any]:
    tasks = 0
    try:
        import envpool

        tasks = len(envpool.list_all_envs())
    except Exception as error:  # a broken installation may raise anything
        fix = "pip install --force-reinstall envpool; until then, Gymnasium's slower environments are used"
        report.problem(f"EnvPool cannot be imported: {error}", fix)
    backend, wrong = _child("Pendulum-v1", "step")
    if wrong:
        report.problem(f"no environment can be stepped: {wrong}", "pip install envpool gymnasium", stops_training=True)
    return {"envpool_tasks": tasks, "stepped_with": backend or None}


def _rendering(report: Report) -> bool:
    _, wrong = _child("HalfCheetah-v5", "render")
    if wrong:
        fix = "install EGL or OSMesa (Debian and Ubuntu: apt install libegl1 libosmesa6); training needs neither"
        report.problem(f"no videos of MuJoCo tasks: {wrong}", fix)
    return not wrong


def _engine(report: Report, device: torch.device) -> dict[str, Any]:
    config = Config()
    engine, reason = choose_engine(config, device)
    found: dict[str, Any] = {"device": device.type, "name": engine, "reason": reason, "self_check": None}
    if device.type == "cuda" and engine == "reference":
        fix = "install what is missing; until then, the slower reference engine is used"
        report.problem(reason, fix)
    while device.type == "cuda" and engine != "reference":
        config = dataclasses.replace(config, engine=engine)  # type: ignore[arg-type]
        precision = precisions(config, device)[0]
        verdict = self_check.verdict(dataclasses.replace(config, precision=precision), OBS_SIZE, ACTION_SIZE, engine)
        found["self_check"] = "; ".join(filter(None, (found["self_check"], verdict.problem or "passed")))
        if not verdict.problem:
            break
        following = self_check.FOLLOWING[engine]
        fix = f"please report the output of `fastsac doctor --json`; until then, the {following} engine is used"
        what = "could not be checked" if verdict.crashed else "does not agree with the reference engine"
        report.problem(f"engine {engine} {what}: {verdict.problem}", fix)
        found["reason"], engine = f"the check of {engine} failed", following
        found["name"] = engine
    found |= {"earlier_checks": self_check.kept(), "updates_per_s": None}
    try:
        config = dataclasses.replace(config, engine=engine)  # type: ignore[arg-type]
        setup = set_up_torch(config, device, OBS_SIZE, ACTION_SIZE)
        config = dataclasses.replace(config, precision=setup.precision)
        found |= setup._asdict()
        found["updates_per_s"] = round(_cuda_rate(config, device) if device.type == "cuda" else _cpu_rate(config))
    except Exception as error:  # it would stop training, too
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        report.problem(f"no update can be made: {what}", "reinstall PyTorch", stops_training=True)
    return found


def _cpu_rate(config: Config) -> float:
    times = measure_updates(config, OBS_SIZE, ACTION_SIZE, [config.precision], [torch.get_num_threads()])  # type: ignore[list-item]
    return 1.0 / min(times.values())


def _cuda_rate(config: Config, device: torch.device, updates: int = 256) -> float:
    learner = make_learner(config, OBS_SIZE, ACTION_SIZE, device)
    replay = random_replay(OBS_SIZE, ACTION_SIZE, device)
    learner.update(replay, 32)
    torch.cuda.synchronize()
    start = time.perf_counter()
    learner.update(replay, updates)
    torch.cuda.synchronize()
    return updates / (time.perf_counter() - start)


def describe(report: Report) -> str:
    """Return the report as text."""
    facts = report.facts
    versions, cpu, gpu, engine = facts["versions"], facts["cpu"], facts["gpu"], facts["engine"]
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    drawn = "videos can be recorded" if facts["rendering"] else "no videos"
    tasks = f"{versions['envpool'] or 'is missing'}, {facts['environments']['envpool_tasks']} tasks"
    products = "has" if cpu["bfloat16_products"] else "no"
    rows = {
        "fastsac": f"{versions['fastsac']}, Python {facts['python']}, {facts['system']}",
        "PyTorch": f"{versions['torch']}, {cuda}; Triton {versions['triton'] or 'is missing'}",
        "GPU": _gpu_row(gpu),
        "CPU": f"{cpu['model']}, {cpu['cores_allowed']} of {cpu['cores']} cores, {cpu['memory_gib'] or 'unknown'} GiB, "
        f"{products} bfloat16 products",
        "Environments": f"EnvPool {tasks}; Gymnasium {versions['gymnasium']}, MuJoCo {versions['mujoco']}; {drawn}",
        "Engine": f"{engine['name']} ({engine['reason']})",
        "Self-check": engine["self_check"] or "only on a GPU",
        "Updates": "none" if engine["updates_per_s"] is None else _speed_row(engine),
    }
    lines = [f"{name:14}{text}" for name, text in rows.items()]
    if not report.problems:
        return "\n".join([*lines, f"{'Problems':14}none"])
    lines += ["", "Problems"]
    for problem in report.problems:
        mark = "training does not work" if problem["stops_training"] else "training works"
        lines += [f"  - {problem['what']} ({mark})", f"    {problem['fix']}"]
    return "\n".join(lines)


def _gpu_row(gpu: dict[str, Any] | None) -> str:
    if gpu is None:
        return "none found by PyTorch"
    memory = f"{gpu['free_gib']} of {gpu['memory_gib']} GiB free"
    return f"{gpu['name']}, compute capability {gpu['capability']}, {memory}, driver {gpu['driver'] or 'unknown'}"


def _speed_row(engine: dict[str, Any]) -> str:
    threads = f", threads {engine['num_threads']}" if engine["device"] == "cpu" else ""
    setting = "HalfCheetah-v5, batch 256, hidden layers 256 and 256"
    precision = f"{engine['precision']} ({engine['precision_reason']})"
    return f"{engine['updates_per_s']:,} a second, measured now ({setting}); {precision}{threads}"


def run(as_json: bool, say: Callable[[str], None] = print) -> bool:
    """Examine the machine and print what was found; return whether training would work."""
    try:
        report = examine()
    except UsageError as error:
        report = Report()
        report.problem(str(error), "change the setting named there", stops_training=True)
        say(json.dumps(report.to_json(), indent=1) if as_json else f"fastsac: {error}")
        return False
    say(json.dumps(report.to_json(), indent=1) if as_json else describe(report))
    return report.works
