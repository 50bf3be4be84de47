"""Legacy D4RL v2 files, turned into Minari datasets with h5py alone.

Layout and quirks: Farama-Foundation/D4RL, ``d4rl/offline_env.py`` and
``scripts/generation/mujoco/``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minrl.data.columns import Columns, count_rows, fit, fit_flags, write_columns
from minrl.data.dataset_ids import check_id
from minrl.data.hdf5_guard import GuardedFile
from minrl.data.minari_writer import DatasetCard
from minrl.data.validate import OnBadEpisode
from minrl.errors import DatasetError

_MAX_EPISODE_STEPS = 1000


class _Task(NamedTuple):
    """An environment of D4RL's gym tasks, as close as today's Gymnasium has it."""

    environment_id: str
    observation_size: int
    action_size: int


_TASKS = {
    "halfcheetah": _Task("HalfCheetah-v4", 17, 6),
    "hopper": _Task("Hopper-v4", 11, 3),
    "walker2d": _Task("Walker2d-v4", 17, 6),
}


def import_d4rl(
    path: str | Path,
    dataset_id: str | None = None,
    *,
    reference_scores: Mapping[str, tuple[float, float]] | None = None,
    on_bad_episode: OnBadEpisode = "raise",
) -> str:
    """Turn a D4RL v2 HDF5 file into an ordinary Minari dataset.

    Every step is kept, bit for bit. An episode ends at a terminal, a timeout, or after 1,000 steps
    (some files lack timeouts); terminal and timeout together count as terminated; rows after the
    last end become a last episode, marked truncated. The dataset belongs to Gymnasium's v4
    environments, the closest to those D4RL used.

    Args:
        path: A file such as ``hopper_medium_replay-v2.hdf5``.
        dataset_id: The id to give it; by default ``d4rl/hopper/medium-replay-v2`` and so on, after
            the file's name. The id or the file's name must tell hopper, halfcheetah or walker2d.
        reference_scores: Returns for 0 and 100 percent by those names, written into the metadata.
        on_bad_episode: "raise" refuses the file if an episode breaks a rule, "drop" leaves such
            episodes out and warns.

    Returns:
        The id of the dataset.

    Raises:
        DatasetError: If the file is not in D4RL's layout, its task is not known, an episode
            is bad, or the id is taken.
    """
    path = Path(path)
    if path.suffix in (".pkl", ".pickle"):
        raise DatasetError(
            f"{path} is a pickle, which can run any code when it is opened, so minrl does not; "
            "take D4RL's own .hdf5 file, or convert the pickle where you trust it (h5py: flat "
            "arrays observations, actions, rewards, terminals, timeouts)"
        )
    task_name, default_id = _name(path, dataset_id)
    dataset_id = check_id(dataset_id or default_id)
    task = _TASKS[task_name]
    if not path.is_file():
        raise DatasetError(f"there is no file {path}")
    columns = _read(path, task)
    version = default_id.rpartition("-")[2]
    references = (reference_scores or {}).get(task_name)
    card = _describe(path, dataset_id, version, task, columns, references)
    write_columns(columns, card, _MAX_EPISODE_STEPS, on_bad_episode)
    return dataset_id


def _name(path: Path, dataset_id: str | None) -> tuple[str, str]:
    """Return the task's name and the default id, after the id or the name of the file."""
    stem = path.name.removesuffix(".hdf5").lower().replace("_", "-")
    words = re.split(r"[^a-z0-9]+", f"{dataset_id or ''}/{stem}".lower())
    tasks = [word for word in words if word in _TASKS]
    if not tasks:
        raise DatasetError(
            f"neither {path.name} nor the id tells the task; give an id such as "
            f"d4rl/hopper/medium-v2 (tasks: {', '.join(_TASKS)})"
        )
    level = stem.partition(f"{tasks[0]}-")[2] or "data"
    level = level if re.search(r"-v[0-9]+$", level) else f"{level}-v2"
    return tasks[0], f"d4rl/{tasks[0]}/{level}"


def _read(path: Path, task: _Task) -> Columns:
    """Read the columns; anything else in the file (infos, metadata) is left alone."""
    try:
        with GuardedFile(path) as file:
            rewards = _column(file, "rewards", path)
            rows = count_rows([rewards], path)
            wide = (rows, task.observation_size)
            following = file.read("next_observations")
            timeouts = file.read("timeouts")
            return Columns(
                observations=_column(file, "observations", path, wide),
                actions=_column(file, "actions", path, (rows, task.action_size)),
                rewards=fit(rewards, "rewards", path, (rows,)),
                terminals=fit_flags(_column(file, "terminals", path), "terminals", path, rows),
                timeouts=(
                    np.zeros(rows, bool)
                    if timeouts is None
                    else fit_flags(timeouts, "timeouts", path, rows)
                ),
                next_observations=(
                    None if following is None else fit(following, "next_observations", path, wide)
                ),
            )
    except DatasetError:
        raise
    except Exception as error:  # of many kinds, depending on where the reader stumbles
        raise DatasetError(f"{path} cannot be read as an HDF5 file: {error}") from error


def _column(
    file: GuardedFile, name: str, path: Path, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Read a column that must be there."""
    values = file.read(name)
    if values is None:
        raise DatasetError(f"{path} is not in D4RL's layout: it has no array {name!r}")
    return fit(values, name, path, shape)


def _describe(
    path: Path,
    dataset_id: str,
    version: str,
    task: _Task,
    columns: Columns,
    reference_scores: tuple[float, float] | None,
) -> DatasetCard:
    """Say what the dataset is."""
    from gymnasium.spaces import Box

    dtype = columns.observations.dtype
    dtype = dtype.type if dtype.kind == "f" else np.float32  # a Box of others has to have bounds
    return DatasetCard(
        dataset_id=dataset_id,
        environment_id=task.environment_id,
        observation_space=Box(-np.inf, np.inf, (task.observation_size,), dtype),
        action_space=Box(-1.0, 1.0, (task.action_size,), np.float32),
        algorithm_name="see D4RL",
        description=(
            f"D4RL-{version} data imported from {path.name}. It was collected in mujoco-py's v2 "
            f"physics; {task.environment_id} is the closest environment of Gymnasium."
            + (
                ""
                if columns.next_observations is not None
                else " The file has no next observations: each episode's last one is repeated."
            )
        ),
        reference_scores=reference_scores,
    )
