"""Chooses the engine that makes the updates."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sysconfig

import torch

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.learner.fused import FusedLearner, fused_obstacle
from fastsac.learner.fused_cuda import FusedCudaLearner, fused_cuda_obstacle
from fastsac.learner.graphed import GraphedLearner
from fastsac.learner.reference import Learner
from fastsac.own_networks import STANDARD, OwnNetworks

#: the lowest compute capability that the kernels are compiled for
CAPABILITY = (8, 0)
ENGINES: dict[str, type[Learner]] = {"reference": Learner, "graphed": GraphedLearner, "fused": FusedLearner}
CUDA_ENGINES: dict[str, type[Learner]] = {**ENGINES, "fused": FusedCudaLearner}


def engine_class(name: str, device: torch.device) -> type[Learner]:
    """Return the learner class of an engine."""
    return (CUDA_ENGINES if device.type == "cuda" else ENGINES)[name]


def make_learner(
    config: Config,
    obs_size: int,
    action_size: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    own: OwnNetworks = STANDARD,
) -> Learner:
    """Return a learner with the engine for this configuration (see `choose_engine`)."""
    engine, _ = choose_engine(config, torch.device(device), own)
    return engine_class(engine, torch.device(device))(config, obs_size, action_size, device, seed, own)


@functools.cache
def graphed_obstacle() -> str:
    """Return why Triton's kernels cannot run on this GPU, as far as can be told without running them, or nothing."""
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        found = ".".join(map(str, capability))
        return f"it needs a GPU of compute capability 8.0 or more, but {torch.cuda.get_device_name()} has {found}"
    try:
        importlib.import_module("triton")
    except (ImportError, OSError) as error:
        return f"it needs Triton, which cannot be imported ({error}): pip install triton"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None:
        return (
            f"Triton needs a C compiler, but there is no {' or '.join(compilers) or 'name in CC'}: "
            "install gcc (Debian and Ubuntu: apt install gcc), or name one in CC"
        )
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    command = [compiler, "-fsyntax-only", "-x", "c", f"-I{sysconfig.get_path('include', scheme)}", "-"]
    try:
        compiled = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Triton needs a C compiler, but {compiler} does not run: {error}"
    if compiled.returncode:
        return "Triton needs Python's header files: install them (Debian and Ubuntu: apt install python3-dev)"
    return ""


def choose_engine(
    config: Config,
    device: torch.device,
    own: OwnNetworks = STANDARD,
) -> tuple[str, str]:
    """Return the engine's name and, in a few words, why it was chosen.

    Args:
        config: of the run.
        device: where the learner lives.
        own: the user's own networks.

    Raises:
        UsageError: if the engine cannot run on the device, or does not support the configuration.
    """
    on_cuda = device.type == "cuda"
    not_fused = fused_cuda_obstacle(config, own) if on_cuda else fused_obstacle(config, own)
    if config.engine == "graphed" and not on_cuda:
        raise UsageError(
            f"--engine graphed records CUDA graphs, which needs a GPU, but this run is on the {device.type}: "
            "use --engine auto"
        )
    if config.engine == "fused" and not_fused:
        raise UsageError(f"--engine fused: {not_fused}: use --engine auto")
    if config.engine in ("graphed", "fused") and on_cuda and (obstacle := graphed_obstacle()):
        raise UsageError(f"--engine {config.engine}: {obstacle}; or use --engine auto")
    if config.engine != "auto":
        return config.engine, "requested"
    if on_cuda:
        if obstacle := graphed_obstacle():
            return "reference", f"not graphed: {obstacle}"
        return ("graphed", f"a CUDA GPU, and {not_fused}") if not_fused else ("fused", "a CUDA GPU")
    if not_fused:
        return "reference", f"no CUDA GPU, and {not_fused}"
    return "fused", "no CUDA GPU"
