"""Checks an engine on the user's own GPU before it trains.

The comparison (see `fastsac.learner.compare`) runs in its own process: a crash of a compiler or of a kernel counts as a
difference, and does not affect this process. The result is cached for each GPU, driver, version and shape.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

import fastsac_kernels
from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.learner.compare import compare, compare_rounded, compare_together
from fastsac.learner.device import set_products
from fastsac.learner.engines import CUDA_ENGINES, make_learner
from fastsac.learner.reference import Learner
from fastsac.machine import nvidia_driver
from fastsac.own_networks import STANDARD, OwnNetworks
from fastsac.system import kill_group

#: settings that decide which kernels run, and with which shapes
SETTINGS = (
    *("estimator", "baseline", "num_action_samples", "entropy_split", "batch_size", "hidden_sizes", "activation"),
    *("num_critics", "precision", "num_envs", "n_step", "normalize_obs", "normalize_reward", "layer_norm", "critic"),
    *("critic_reduction", "num_atoms", "optimizer", "adam_betas"),
)
#: the engine that replaces one that fails the check
FOLLOWING: dict[str, Literal["graphed", "reference"]] = {"fused": "graphed", "graphed": "reference"}
#: seconds: the first time, Triton compiles all kernels
TIMEOUT = 300.0
#: CUDA's message where only one process may use a GPU
BUSY = "busy or unavailable"
#: without the current folder, where anything may lie
COMMAND = [sys.executable, "-P", "-c", "from fastsac.learner.self_check import main; main()"]


Say = Callable[[str], None]
Precision = Literal["fp32", "tf32"]


class Verdict(NamedTuple):
    """The result of a check; the engine may run if there is no problem."""

    problem: str
    crashed: bool = False  # it could not be compared
    kept: bool = False  # it comes from the cache


def right_engine(
    learner: Learner,
    asked: bool,
    obs_size: int,
    action_size: int,
    say: Say | None = None,
    own: OwnNetworks = STANDARD,
    in_tf32: bool = False,
) -> tuple[Learner, str]:
    """Return the learner if its engine passes, else one with the next engine and the same state, and why.

    Only engines for GPUs are checked. After `fused` comes `graphed`, which is checked too, and then the reference.

    Args:
        learner: a new one, or one whose state is to be kept.
        asked: whether the user requested the engine by name.
        obs_size: O.
        action_size: A.
        say: receives messages for the user; by default the logger "fastsac" receives the problems only.
        own: the user's own networks in the learner. The check uses the configuration's networks instead.
        in_tf32: whether TF32 was requested, and is not only the fused engine's default.

    Raises:
        UsageError: if an engine fails that the user requested.
    """
    reason = ""
    while learner.device.type == "cuda" and learner.engine != "reference":
        found = verdict(learner.config, obs_size, action_size, learner.engine, say)
        if not found.problem:
            break
        what = "could not be checked" if found.crashed else "does not compute what the reference engine does"
        told = f"engine {learner.engine} {what} on this GPU: {found.problem.rstrip('.')}"
        report = "`fastsac doctor --json` makes a report"
        if learner.config.precision == "bf16":  # which no other engine for GPUs has
            raise UsageError(f"{told}; --precision auto works; {report}")
        if asked:
            raise UsageError(f"{told}; --engine auto or reference works; {report}")
        following = FOLLOWING[learner.engine]
        (say or logging.getLogger("fastsac").warning)(f"{told}; using the {following} engine instead; {report}")
        reason = "; ".join(filter(None, (reason, f"the check of {learner.engine} failed")))
        set_products(in_tf32)
        precision: Precision = "tf32" if in_tf32 else "fp32"
        config = dataclasses.replace(learner.config, engine=following, precision=precision)
        other = make_learner(config, obs_size, action_size, learner.device, own=own)
        other.load_state(*learner.state())
        learner = other
    return learner, reason


def verdict(config: Config, obs_size: int, action_size: int, engine: str, say: Say | None = None) -> Verdict:
    """Return whether the engine may run on the current GPU.

    An earlier success is trusted; otherwise a child process runs the check now.

    Args:
        config: its settings for updates are used.
        obs_size: O.
        action_size: A.
        engine: its name.
        say: receives a message before anything slow.
    """
    if engine == "fused" and config.precision == "auto":
        config = dataclasses.replace(config, precision="tf32")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name in SETTINGS}
    settings["policy_delay"] = min(2, config.policy_delay)
    settings |= {"alpha": config.alpha == "auto", "clips": config.max_grad_norm is not None}
    settings["changes_lr"] = config.lr_schedule != "constant"
    case = {"engine": engine, "obs_size": obs_size, "action_size": action_size, **settings, **identity()}
    place = cache_folder() / f"{hashlib.sha256(json.dumps(case, sort_keys=True).encode()).hexdigest()[:32]}.json"
    earlier = _load(place)
    if earlier is not None and not earlier["problem"]:
        return Verdict("", kept=True)
    if say is not None:
        say(f"checking engine {engine} on this GPU, once; this takes minutes if kernels must be compiled first")
    request = {"config": dataclasses.asdict(config), "sizes": [obs_size, action_size], "engine": engine}
    problem, crashed = ask_child(request | {"device": torch.cuda.current_device()})
    if crashed and BUSY in problem:  # one process at a time may use this GPU, and that is this one
        problem, crashed = _answer(request)
    _keep(place, case | {"problem": problem, "crashed": crashed})
    return Verdict(problem, crashed)


def ask_child(request: dict[str, Any], timeout: float = TIMEOUT) -> tuple[str, bool]:
    """Return the problem that a child process finds, and whether the check crashed."""
    paths = [os.path.abspath(path) for path in sys.path]  # an empty one is the current folder
    try:
        child = subprocess.Popen(
            COMMAND,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return f"the check could not be started: {error}", True
    try:
        output, errors = _talk(child, json.dumps(request), timeout)
    except subprocess.TimeoutExpired:
        return f"the check did not end within {timeout:g} s", True
    finally:
        kill_group(child)  # compilers that it has started, too
        child.wait()
        for pipe in filter(None, (child.stdout, child.stderr)):
            pipe.close()
    try:
        answer = json.loads(output.strip().splitlines()[-1])
        return str(answer["problem"]), bool(answer.get("crashed"))
    except (IndexError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if child.returncode < 0:
        names = {int(each): each.name for each in signal.Signals}
        return f"the check was ended by {names.get(-child.returncode, -child.returncode)}", True
    lines = errors.strip().splitlines() or ["it said nothing"]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return f"the check failed: {(named or lines)[-1][:300]}", True


def _talk(child: subprocess.Popen[str], request: str, timeout: float) -> tuple[str, str]:
    """Send the request, and return what the child answers. Its input stays open: it exits when this process is gone."""
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.write(request + "\n")
        child.stdin.flush()
    stdin, child.stdin = child.stdin, None  # or `communicate` closes it
    try:
        return child.communicate(timeout=timeout)
    finally:
        with suppress(BrokenPipeError):
            stdin.close()


def main() -> None:
    """Answer a request on standard input, as the child process."""
    request = json.loads(sys.stdin.readline())

    def end_with_the_parent() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    torch.cuda.set_device(request["device"])
    problem, crashed = _answer(request)
    print(json.dumps({"problem": problem, "crashed": crashed}), flush=True)


def _answer(request: dict[str, Any]) -> tuple[str, bool]:
    config, (obs_size, action_size) = Config(**request["config"]), request["sizes"]
    kind, device = CUDA_ENGINES[request["engine"]], torch.device("cuda")
    rounds = request["engine"] == "fused" and config.precision in ("tf32", "bf16")  # by itself, not by PyTorch
    before = torch.get_float32_matmul_precision()
    # products in TF32 would hide a kernel's errors, so it is checked in float32 first
    for precision in ("fp32", "tf32") if config.precision == "tf32" and not rounds else ("fp32",):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            exact = dataclasses.replace(config, precision="fp32") if rounds else config
            problem = compare(kind, exact, obs_size, action_size, device)
            if rounds and not problem:
                problem = compare_rounded(kind, config, obs_size, action_size, device)
            if request["engine"] == "fused" and not problem:
                problem = compare_together(kind, config, obs_size, action_size, device)
        except Exception as error:  # from a compiler or a launch, or out of memory
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}", True
        finally:
            torch.set_float32_matmul_precision(before)
        if problem:
            return problem, False
    return "", False


def identity() -> dict[str, Any]:
    """Return what a verdict applies to: the GPU, the driver, versions, and the sources of kernels and engines."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "driver": nvidia_driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": source_hash(),
    }


def source_hash() -> str:
    """Return a hash of all kernel sources, and of the modules that updates consist of."""
    package = Path(__file__).resolve().parents[1]
    names = sorted([*package.glob("learner/*.py"), *package.glob("estimators/*.py")])
    names += [package / f"{name}.py" for name in ("networks", "normalize", "replay", "transfer", "types")]
    names += sorted(Path(fastsac_kernels.__file__).parent.glob("*.py"))
    digest = hashlib.sha256()
    for path in names:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return the folder of cached verdicts; deleting it costs only time."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # no home: a path where nothing can be stored
        folder = Path(os.devnull)
    return folder / "fastsac" / "self_check"


def kept() -> list[dict[str, Any]]:
    """Return all cached results, for a report."""
    return [found for path in sorted(cache_folder().glob("*.json")) if (found := _load(path)) is not None]


def _load(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("problem"), str) else None


def _keep(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            temporary.write_text(json.dumps(content, indent=1))
            os.replace(temporary, path)
    except OSError:  # it is checked again next time
        pass
