"""The files of a Minari dataset, read and validated into flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minrl.data.episodes import offsets_from_lengths
from minrl.data.flat_cache import FlatArrays
from minrl.data.metadata import Metadata
from minrl.data.validate import EPISODE_ARRAYS, Violation, find_violation
from minrl.errors import DatasetError

if TYPE_CHECKING:
    import h5py

_COMPRESSION_LIMIT = 1000  # declared bytes per byte on disk
_EPISODES_PER_OPENING = 25


def _iterate(metadata: Metadata, data: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the arrays of every episode, in order."""
    try:
        if metadata.data_format == "hdf5":
            yield from _iterate_hdf5(metadata, data / "main_data.hdf5")
        else:
            from minari.dataset.minari_storage import MinariStorage

            # Builds nothing from the metadata: both spaces are there, as was checked.
            yield from MinariStorage.read(data).get_episodes(range(metadata.num_episodes))
    except (OSError, RuntimeError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"dataset {metadata.dataset_id}: its {metadata.data_format} data in {data} cannot be "
            f"read ({type(error).__name__}: {error}); remove it and make or download it again"
        ) from error


def _iterate_hdf5(metadata: Metadata, path: Path) -> Iterator[Mapping[str, Any]]:
    """Read Minari's HDF5 layout directly: half the time of h5py's ordinary objects.

    HDF5 keeps every group it has seen in memory until the file is closed, so it is reopened now and
    then.
    """
    import h5py

    for first in range(0, metadata.num_episodes, _EPISODES_PER_OPENING):
        with h5py.File(path, "r") as file:
            if len(file) != metadata.num_episodes:
                raise DatasetError(
                    f"dataset {metadata.dataset_id}: rule total_episodes: the metadata says "
                    f"{metadata.num_episodes} episodes, {path.name} has {len(file)}"
                )
            stop = min(first + _EPISODES_PER_OPENING, metadata.num_episodes)
            for index in range(first, stop):
                yield {
                    name: array
                    for name in EPISODE_ARRAYS
                    if (array := _read_hdf5_array(file, f"episode_{index}/{name}")) is not None
                }


def _read_hdf5_array(file: h5py.File, name: str) -> np.ndarray | None:
    """Return a dataset's values, None if there is none of this name or it holds no plain values."""
    import h5py

    try:
        dataset = h5py.h5d.open(file.id, name.encode())
    except KeyError:
        return None
    if dataset.dtype.hasobject:
        return None
    values = np.empty(dataset.shape, dataset.dtype)
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


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
        metadata: says how many episodes and steps there are; that is checked.
        data: the dataset's `data` folder.
        size_on_disk: bytes of its files; bounds what is allocated.

    Raises:
        DatasetError: a file is damaged, or the metadata's counts are false.
    """
    wrong = f"dataset {metadata.dataset_id}: rule total_steps: the metadata says "
    wrong += f"{metadata.num_steps} steps"
    sizes = (metadata.observation_size, len(metadata.bounds.low))
    if 4 * (sum(sizes) + 1) * metadata.num_steps > _COMPRESSION_LIMIT * size_on_disk:
        raise DatasetError(f"{wrong}, which cannot be in {size_on_disk} bytes of files")
    flat = _Flattener(*sizes, metadata.num_steps)
    violations = []
    for index, episode in enumerate(_iterate(metadata, data)):
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
