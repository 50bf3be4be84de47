"""Minari datasets, local, embedded or downloaded, read into ``Episodes``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minrl.data.dataset_ids import (
    EMBEDDED_IDS,
    check_id,
    dataset_folder,
    datasets_root,
    refuse_links_out,
)
from minrl.data.download import download_dataset, unknown_dataset
from minrl.data.episodes import Episodes, concatenate
from minrl.data.flat_cache import digest_files, read_cache, write_cache
from minrl.data.metadata import describe_dataset, read_metadata
from minrl.data.minari_files import read_arrays
from minrl.data.validate import OnBadEpisode, check_on_bad_episode, settle_violations
from minrl.errors import ConfigError, DatasetError


@dataclass(frozen=True)
class DatasetRow:
    """A line of the list of datasets; counts are None where the dataset is not there yet."""

    dataset_id: str
    is_local: bool
    num_episodes: int | None
    num_steps: int | None
    environment_id: str | None


def load_dataset(
    dataset: str | Sequence[str],
    *,
    on_bad_episode: OnBadEpisode = "raise",
    download: bool = True,
    progress: bool = True,
) -> Episodes:
    """Load a dataset, or the union of several, into memory.

    Embedded ids (``minrl/...``) are made on first use, other ids are downloaded when they are not
    on this machine. The first load validates every episode and leaves the flat arrays beside the
    dataset; later loads of the same user read those as long as the dataset's files have the same
    content.

    Args:
        dataset: A Minari id, or several, in a sequence or joined with "+".
        on_bad_episode: "raise" refuses a dataset with a bad episode; "drop" leaves such episodes
            out and warns with their number and the rules they break.
        download: False never uses the network.
        progress: Show a progress bar (on a terminal) while an embedded dataset is made.

    Raises:
        DatasetError: If an id is malformed or unknown, the download fails, or the data is refused.
        ConfigError: If ``on_bad_episode`` is neither of the two.
    """
    check_on_bad_episode(on_bad_episode)
    named = [dataset] if isinstance(dataset, str) else dataset
    ids = [dataset_id for name in named for dataset_id in name.split("+")]
    if not ids:
        raise ConfigError("dataset must name at least one dataset id, got none")
    for dataset_id in ids:
        check_id(dataset_id)
    return concatenate(
        [_load_one(dataset_id, on_bad_episode, download, progress) for dataset_id in ids]
    )


def local_ids() -> list[str]:
    """Return the ids of all datasets on this machine, sorted."""
    root = datasets_root()
    found = []
    for folder, names, _ in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        if (Path(folder) / "data" / "metadata.json").is_file():
            found.append(Path(folder).relative_to(root).as_posix())
            names.clear()
    return sorted(found)


def list_datasets() -> list[DatasetRow]:
    """List the datasets on this machine, then the embedded ones that are not made yet.

    A local dataset whose metadata cannot be used is listed without counts.
    """
    rows = []
    for dataset_id in local_ids():
        try:
            metadata = read_metadata(dataset_id, dataset_folder(dataset_id))
        except DatasetError:
            rows.append(DatasetRow(dataset_id, True, None, None, None))
        else:
            rows.append(
                DatasetRow(
                    dataset_id,
                    True,
                    metadata.num_episodes,
                    metadata.num_steps,
                    metadata.environment_id,
                )
            )
    local = {row.dataset_id for row in rows}
    return rows + [DatasetRow(i, False, None, None, None) for i in EMBEDDED_IDS if i not in local]


def _load_one(
    dataset_id: str, on_bad_episode: OnBadEpisode, download: bool, progress: bool
) -> Episodes:
    """Load one dataset, from its cache where that is up to date."""
    folder = _make_local(dataset_id, download, progress)
    metadata = read_metadata(dataset_id, folder)
    files = _list_files(dataset_id, folder / "data")
    sha256 = digest_files(files)
    arrays = read_cache(folder, sha256)
    if arrays is None:
        size_on_disk = sum(path.stat().st_size for path in files)
        arrays, violations = read_arrays(metadata, folder / "data", size_on_disk)
        settle_violations(dataset_id, violations, metadata.num_episodes, on_bad_episode)
        if not violations:  # what is left of a damaged dataset is not the dataset
            write_cache(folder, sha256, arrays)
    return Episodes(*arrays, info=describe_dataset(metadata, arrays.actions, sha256))


def _list_files(dataset_id: str, data: Path) -> list[Path]:
    """Return the dataset's files in a fixed order, refusing links to what is not in its folder."""
    entries = sorted(data.rglob("*"))
    for path in entries:
        if path.is_symlink():
            refuse_links_out(dataset_id, path, data)
    return [path for path in entries if path.is_file()]


def _make_local(dataset_id: str, download: bool, progress: bool) -> Path:
    """Return the dataset's folder, made or downloaded if need be."""
    folder = dataset_folder(dataset_id)
    if _is_complete(folder):
        return folder
    if dataset_id in EMBEDDED_IDS:
        from minrl.data.behaviours import make_embedded_dataset

        make_embedded_dataset(dataset_id, progress=progress)
    elif not download:
        raise unknown_dataset(dataset_id, "downloads are off", local_ids())
    else:
        download_dataset(dataset_id)
    if not _is_complete(folder):
        raise DatasetError(f"dataset {dataset_id} is incomplete; remove {folder} and try again")
    return folder


def _is_complete(folder: Path) -> bool:
    """Tell whether there is metadata and something beside it (a broken download may lack it)."""
    data = folder / "data"
    return (data / "metadata.json").is_file() and sum(1 for _ in data.iterdir()) > 1
