"""The files of a Minari dataset, read and validated into flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minrl.data.arrow_files import iterate_arrow
from minrl.data.episodes import offsets_from_lengths
from minrl.data.flat_cache import FlatArrays
from minrl.data.hdf5_guard import GuardedFile, bytes_allowed
from minrl.data.metadata import Metadata
from minrl.data.validate import EPISODE_ARRAYS, Violation, find_violation
from minrl.errors import DatasetError


def _iterate(metadata: Metadata, data: Path, size_on_disk: int) -> Iterator[Mapping[str, Any]]:
    """Yield the arrays of every episode, in order."""
    try:
        if metadata.data_format == "hdf5":
            yield from _iterate_hdf5(metadata, data / "main_data.hdf5")
        else:
            yield from iterate_arrow(metadata, data, size_on_disk)
    except DatasetError:
        raise
    except Exception as error:  # of many kinds, depending on where a reader stumbles
        raise DatasetError(
            f"dataset {metadata.dataset_id}: its {metadata.data_format} data in {data} cannot be "
            f"read ({type(error).__name__}: {error}); remove it and make or download it again"
        ) from error


def _iterate_hdf5(metadata: Metadata, path: Path) -> Iterator[Mapping[str, Any]]:
    """Read Minari's HDF5 layout directly: faster than h5py's ordinary objects, and guarded."""
    with GuardedFile(path) as file:
        if len(file) != metadata.num_episodes:
            raise DatasetError(
                f"dataset {metadata.dataset_id}: rule total_episodes: the metadata says "
                f"{metadata.num_episodes} episodes, {path.name} has {len(file)}"
            )
        for index in range(metadata.num_episodes):
            yield {
                name: array
                for name in EPISODE_ARRAYS
                if (array := file.read(f"episode_{index}/{name}")) is not None
            }


class _Flattener:
    """Fills flat arrays, allocated once, with one episode after the other."""

    def __init__(self, observation_size: int, action_size: int, num_steps: int) -> None:
        self.row = 0
        self._num_steps = num_steps
        self._observations = np.empty((num_steps, observation_size), np.float32)
        self._actions = np.empty((num_steps, action_size), np.float32)
        self._rewards = np.empty(num_steps, np.float32)
        self._finals: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._ends: list[tuple[bool, bool]] = []

    def add(self, episode: Mapping[str, np.ndarray]) -> bool:
        """Append an episode; False, and nothing done, if there is no room for it."""
        steps = len(episode["rewards"])
        stop = self.row + steps
        if stop > self._num_steps:
            return False
        self._observations[self.row : stop] = episode["observations"][:-1]
        self._actions[self.row : stop] = episode["actions"]
        self._rewards[self.row : stop] = episode["rewards"]
        self._finals.append(episode["observations"][-1].astype(np.float32))  # a copy, not a view
        self._lengths.append(steps)
        self._ends.append((bool(episode["terminations"][-1]), bool(episode["truncations"][-1])))
        self.row = stop
        return True

    def finish(self) -> FlatArrays:
        """Return the arrays, cut to what was added."""
        ends = np.array(self._ends, bool).reshape(-1, 2)
        return FlatArrays(
            observations=self._observations[: self.row],
            actions=self._actions[: self.row],
            rewards=self._rewards[: self.row],
            offsets=offsets_from_lengths(self._lengths),
            terminated=ends[:, 0].copy(),
            truncated=ends[:, 1].copy(),
            final_observations=np.array(self._finals).reshape(-1, self._observations.shape[1]),
        )


def read_arrays(
    metadata: Metadata, data: Path, size_on_disk: int
) -> tuple[FlatArrays, list[Violation]]:
    """Read and validate all episodes; bad ones are left out of the arrays.

    Args:
        metadata: Says how many episodes and steps there are; that is checked.
        data: The dataset's ``data`` folder.
        size_on_disk: Bytes of its files; bounds what is allocated.

    Raises:
        DatasetError: If a file is damaged, or the metadata's counts are false.
    """
    wrong = f"dataset {metadata.dataset_id}: rule total_steps: the metadata says "
    wrong += f"{metadata.num_steps} steps"
    sizes = (metadata.observation_size, len(metadata.bounds.low))
    if 4 * (sum(sizes) + 1) * metadata.num_steps > bytes_allowed(size_on_disk):
        raise DatasetError(f"{wrong}, which cannot be in {size_on_disk} bytes of files")
    flat = _Flattener(*sizes, metadata.num_steps)
    violations = []
    for index, episode in enumerate(_iterate(metadata, data, size_on_disk)):
        violation = find_violation(
            episode,
            index,
            observation_size=sizes[0],
            bounds=metadata.bounds,
            is_last=index == metadata.num_episodes - 1,
        )
        if violation is not None:
            violations.append(violation)
        elif not flat.add(episode):
            raise DatasetError(f"{wrong}, but episodes 0 to {index} have more")
    if flat.row < metadata.num_steps and not violations:
        raise DatasetError(f"{wrong}, the episodes have {flat.row}")
    return flat.finish(), violations
