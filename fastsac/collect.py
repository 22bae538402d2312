"""Records episodes of a trained agent as a Minari dataset: `fastsac collect`."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from fastsac.config import Config
from fastsac.dataset import require_minari
from fastsac.env_gymnasium import stack
from fastsac.envs import Step, VectorEnv
from fastsac.errors import FastsacError, UsageError
from fastsac.evaluate import Evaluation
from fastsac.rollout import LEARNER, child_seed
from fastsac.signals import stop_signals
from fastsac.spaces import Bools
from fastsac.train import SAC


def collect(agent: SAC, dataset_id: str, episodes: int, seed: int, deterministic: bool) -> tuple[Evaluation, Path]:
    """Play complete episodes and save them as a Minari dataset, in Minari's own directory.

    The dataset is written under a temporary name, and renamed once it is complete.

    Args:
        agent: plays in its evaluation environments; its noise is seeded again.
        dataset_id: namespace/name-v0.
        episodes: number of episodes.
        seed: random seed for the environments and the noise.
        deterministic: whether to use the mean action instead of a sample.

    Returns:
        The episodes' returns and lengths, and the dataset's directory.

    Raises:
        UsageError: if Minari is missing, or the id is invalid or already exists.
        FastsacError: if the dataset cannot be written, or a signal interrupted it.
    """
    path = check_new(dataset_id)
    agent.learner.reseed(child_seed(seed, LEARNER))
    root = path.parents[dataset_id.count("/")]  # which Minari creates
    try:
        with tempfile.TemporaryDirectory(prefix=".fastsac-", dir=root) as place, stop_signals() as stop:
            whole = Path(place) / "dataset"
            recorder = Recorder(whole / "data", agent.config)
            result = agent.evaluate(
                episodes, seed, lambda: bool(stop), deterministic=deterministic, watch=recorder.watch
            )
            if stop:
                raise FastsacError(f"interrupted: the dataset {dataset_id} was not written")
            recorder.describe(dataset_id, _description(agent, seed, deterministic))
            _make_namespace(dataset_id)
            if path.exists():
                check_new(dataset_id)
            whole.rename(path)
    except OSError as error:
        raise FastsacError(f"cannot write the dataset {path}: {error.strerror or error}") from error
    return result, path


def check_new(dataset_id: str) -> Path:
    """Return the directory for a new dataset; UsageError if the id is invalid or exists, or Minari is missing."""
    require_minari()
    from minari.dataset.minari_dataset import DATASET_ID_RE
    from minari.storage import get_dataset_path

    match = DATASET_ID_RE.fullmatch(dataset_id)
    if match is None or match["version"] is None:
        raise UsageError(f"--out must be the id of a Minari dataset, such as pendulum/sac-v0, got {dataset_id!r}")
    path: Path = get_dataset_path(dataset_id)
    if path.exists():
        raise UsageError(f"{path} already exists: choose another --out, or run `minari delete {dataset_id}` first")
    return path


def _make_namespace(dataset_id: str) -> None:
    from minari.namespace import create_namespace, list_local_namespaces

    namespace = dataset_id.rpartition("/")[0]
    if namespace and namespace not in list_local_namespaces():
        create_namespace(namespace)


class Recorder:
    """Writes each episode to Minari's storage when it ends."""

    def __init__(self, path: Path, config: Config) -> None:
        """Store the arguments; the storage is created later.

        Args:
            path: the directory of the storage.
            config: the agent's settings.
        """
        self._path, self._config = path, config
        self._storage: Any = None
        self._episodes: dict[int, _Episode] = {}

    def watch(self, envs: VectorEnv, step: Step | None, counts: Bools) -> None:
        """Record one step of the environments that count (see `fastsac.evaluate.Watch`)."""
        if self._storage is None:
            self._storage = self._create(envs)
        obs_space, action_space = envs.own_spaces
        for index in np.flatnonzero(counts).tolist():
            obs = _of_one(obs_space, envs.raw.obs, index)
            if step is None or not step.valid[index]:
                self._episodes[index] = _Episode([obs], [], [], [], [])
                continue
            action = np.array(envs.raw.action[index], dtype=action_space.dtype)
            done = bool(step.terminated[index]), bool(step.truncated[index])
            row = obs, action, float(envs.raw.reward[index]), *done
            columns: tuple[list[Any], ...] = self._episodes[index]
            for column, value in zip(columns, row, strict=True):
                column.append(value)
            if any(done):
                self._write(self._episodes.pop(index))

    def _create(self, envs: VectorEnv) -> Any:
        from minari.dataset.minari_storage import MinariStorage

        self._path.parent.mkdir()
        obs_space, action_space = envs.own_spaces
        spec = _env_spec(self._config, envs.backend_name)
        return MinariStorage.new(self._path, observation_space=obs_space, action_space=action_space, env_spec=spec)

    def _write(self, episode: _Episode) -> None:
        from minari.data_collector import EpisodeBuffer

        obs, action, *rest = episode
        names = "rewards", "terminations", "truncations"
        columns = dict(zip(names, map(np.array, rest), strict=True))
        self._storage.update_episodes([EpisodeBuffer(observations=stack(obs), actions=np.stack(action), **columns)])

    def describe(self, dataset_id: str, description: str) -> None:
        """Write the dataset's metadata."""
        import minari

        self._storage.update_metadata(
            {
                "dataset_id": dataset_id,
                "minari_version": minari.__version__,
                "algorithm_name": "SAC",
                "description": description,
            }
        )


class _Episode(NamedTuple):
    obs: list[Any]
    action: list[Any]
    reward: list[float]
    terminated: list[bool]
    truncated: list[bool]


def _of_one(space: Any, batch: Any, index: int) -> Any:
    """Return a copy of one environment's observation."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {key: _of_one(part, batch[key], index) for key, part in space.items()}
    if isinstance(space, gymnasium.spaces.Tuple):
        return tuple(_of_one(part, each, index) for part, each in zip(space, batch, strict=True))
    return np.array(batch[index], dtype=space.dtype)


def _env_spec(config: Config, backend_name: str) -> EnvSpec | None:
    """Return the spec that creates the environment with Gymnasium alone, or None if there is none."""
    if config.env_wrappers or (backend_name == "envpool" and config.env_kwargs):
        return None
    try:
        with warnings.catch_warnings():  # about newer versions
            warnings.simplefilter("ignore")
            spec = copy.deepcopy(gymnasium.spec(config.env_id.rpartition(":")[2]))
        spec.kwargs.update(config.env_kwargs)
        spec.max_episode_steps = config.max_episode_steps or spec.max_episode_steps
        spec.to_json()
    except Exception:  # only EnvPool has it, or its arguments are not JSON
        return None
    return spec


def _description(agent: SAC, seed: int, deterministic: bool) -> str:
    from fastsac import __version__

    config, choice = agent.config, agent.learner.choice
    kind = "mean" if deterministic else "sampled"
    estimator = config.estimator if choice.baseline == "none" else f"{config.estimator} with baseline {choice.baseline}"
    return (
        f"The {kind} actions of a SAC agent in {config.env_id}, trained by fastsac {__version__} for {agent.steps:,} "
        f"steps with seed {config.seed} and the actor gradient estimator {estimator}; collected with seed {seed}."
    )
