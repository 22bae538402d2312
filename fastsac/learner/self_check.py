"""The check of an engine on the user's own GPU, before it trains.

The comparison (see `fastsac.learner.compare`) runs in a process of its own: a crash of a compiler or of a kernel counts
as a difference, and leaves this process as it was. What is found is kept for each GPU, driver, version and shape.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastsac_kernels
from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.learner.compare import compare
from fastsac.learner.engines import ENGINES, make_learner
from fastsac.learner.reference import Learner
from fastsac.machine import nvidia_driver

#: settings that decide which kernels run, with which shapes
SETTINGS = (
    *("estimator", "baseline", "num_action_samples", "batch_size", "hidden_sizes", "activation"),
    *("num_critics", "precision", "num_envs"),
)
#: seconds: the first time, Triton compiles all kernels
TIMEOUT = 300.0
COMMAND = [sys.executable, "-c", "from fastsac.learner.self_check import main; main()"]


class Verdict(NamedTuple):
    """What was found; the engine may run if there is no problem."""

    problem: str
    kept: bool = False  # it was found earlier


def right_engine(learner: Learner, asked: bool, obs_size: int, action_size: int) -> tuple[Learner, str]:
    """Return the learner if its engine is right here, else one of the reference engine with its state, and why.

    Only an engine for GPUs is checked.

    Raises:
        UsageError: if it is not right, but was asked for.
    """
    if learner.device.type != "cuda" or learner.engine == "reference":
        return learner, ""
    problem = verdict(learner.config, obs_size, action_size, learner.engine).problem
    if not problem:
        return learner, ""
    told = f"engine {learner.engine} does not compute what the reference engine does on this GPU: {problem}"
    report = "`fastsac doctor --json` makes a report"
    if asked:
        raise UsageError(f"{told}; --engine auto or reference works; {report}")
    logging.getLogger("fastsac").warning("%s; the reference engine is used; %s", told, report)
    config = dataclasses.replace(learner.config, engine="reference")
    reference = make_learner(config, obs_size, action_size, learner.device)
    reference.load_state(*learner.state())
    return reference, f"the check of {learner.engine} failed"


def verdict(config: Config, obs_size: int, action_size: int, engine: str, again: bool = False) -> Verdict:
    """Return whether the engine may run on the current GPU: what was found earlier, or what a child process finds now.

    Args:
        config: its settings of the update are used.
        obs_size: O.
        action_size: A.
        engine: its name.
        again: do not believe what was found earlier.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name in SETTINGS}
    settings["actor_every"] = min(2, config.actor_every)
    settings["alpha"] = config.alpha == "auto"
    case = {"engine": engine, "obs_size": obs_size, "action_size": action_size, **settings, **identity()}
    place = cache_folder() / f"{hashlib.sha256(json.dumps(case, sort_keys=True).encode()).hexdigest()[:32]}.json"
    if not again and (problem := _read(place)) is not None:
        return Verdict(problem, kept=True)
    request = {"config": dataclasses.asdict(config), "sizes": [obs_size, action_size], "engine": engine}
    problem, crashed = ask_child(request)
    _keep(place, case | {"problem": problem, "crashed": crashed})
    return Verdict(problem)


def ask_child(request: dict[str, Any], timeout: float = TIMEOUT) -> tuple[str, bool]:
    """Return what a process of its own finds, and whether it came to no end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            COMMAND, input=json.dumps(request), env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"the check did not end within {timeout:g} s", True
    except OSError as error:
        return f"the check could not be started: {error}", True
    lines = done.stdout.strip().splitlines()
    try:
        return str(json.loads(lines[-1])["problem"]), False
    except (IndexError, ValueError, KeyError, TypeError):
        pass
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name if -done.returncode in list(signal.Signals) else -done.returncode
        return f"the check was ended by {name}", True
    return f"the check failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1][:300]}", True


def main() -> None:
    """Answer a request on standard input, as the child process."""
    request = json.load(sys.stdin)
    config = Config(**request["config"])
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    obs_size, action_size = request["sizes"]
    problem = compare(ENGINES[request["engine"]], config, obs_size, action_size, torch.device("cuda"))
    print(json.dumps({"problem": problem}))


def identity() -> dict[str, Any]:
    """Return what a verdict holds for: the GPU, the driver, versions, and the sources of kernels and engines."""
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
    """Return a hash of all files of the kernels, and of what the updates are made of here."""
    package = Path(__file__).resolve().parents[1]
    names = sorted([*package.glob("learner/*.py"), *package.glob("estimators/*.py")])
    names += [package / "networks.py", package / "replay.py", package / "transfer.py"]
    names += sorted(Path(fastsac_kernels.__file__).parent.glob("*.py"))
    digest = hashlib.sha256()
    for path in names:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return where verdicts are kept; nothing is lost with it but time."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastsac" / "self_check"


def kept() -> list[dict[str, Any]]:
    """Return all that was found earlier, for a report."""
    return [found for path in sorted(cache_folder().glob("*.json")) if (found := _load(path)) is not None]


def _read(path: Path) -> str | None:
    """Return what was found earlier; a crash may have had its reason at that time only."""
    found = _load(path)
    return None if found is None or found.get("crashed") else str(found["problem"])


def _load(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("problem"), str) else None


def _keep(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError:  # it is checked again next time
        pass
