"""Dataset ids: which exist, which are refused, and where their files lie."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from minrl.errors import DatasetError

EMBEDDED_IDS = tuple(
    f"minrl/{environment}/{level}-v0"
    for environment in ("hopper", "halfcheetah", "walker2d")
    for level in ("medium", "medium-replay", "medium-expert")
)
"""Datasets that minrl makes itself, without a download."""

REMOTE_IDS = tuple(
    f"mujoco/{environment}/{level}-v0"
    for environment in ("hopper", "halfcheetah", "walker2d")
    for level in ("simple", "medium", "expert")
)
"""Well-known ids on Minari's server, to suggest from; others can be downloaded too."""

# Minari wants two characters at least before the last "/".
_ID = re.compile(r"(?!./[^/]*$)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*-v[0-9]+")
_one_writer = threading.Lock()
_before_writing: dict[str, str | None] = {}  # the path while Minari is shown another
_LONGEST_ID = 200  # characters; some file systems take no more than 255 in a name


def check_id(dataset_id: str) -> str:
    """Return the id if it is well formed; looks at the text only, no file is touched.

    Ids come from command lines and from files, and become paths: ``..``, absolute paths and
    anything else outside letters, digits, ``_``, ``-`` and ``/`` is refused.

    Raises:
        DatasetError: If the id is malformed.
    """
    if (
        not isinstance(dataset_id, str)
        or len(dataset_id) > _LONGEST_ID
        or not _ID.fullmatch(dataset_id)
    ):
        raise DatasetError(
            f"malformed dataset id {str(dataset_id)[:_LONGEST_ID]!r}: an id is made of letters, "
            "digits, '_' and '-', parted by '/' (at least two characters before it), and ends in "
            "-v and a number, for example minrl/hopper/medium-v0"
        )
    return dataset_id


def datasets_root() -> Path:
    """Return the folder of all Minari datasets: MINARI_DATASETS_PATH or ~/.minari/datasets."""
    configured = _before_writing.get("path", os.environ.get("MINARI_DATASETS_PATH"))
    return Path(configured) if configured else Path.home() / ".minari" / "datasets"


@contextlib.contextmanager
def temporary_datasets() -> Iterator[Path]:
    """Have datasets lie in an empty folder, for this process and those it starts; then remove it.

    Yields:
        The folder.
    """
    with (
        tempfile.TemporaryDirectory(prefix="minrl-datasets-") as folder,
        _environment_path(folder),
    ):
        yield Path(folder)


@contextlib.contextmanager
def minari_writing_to(folder: Path) -> Iterator[None]:
    """Have Minari, which knows only the environment variable, write to another folder.

    One thread at a time; what ``datasets_root`` tells the others stays as it is.
    """
    with _one_writer:
        _before_writing["path"] = os.environ.get("MINARI_DATASETS_PATH")
        try:
            with _environment_path(str(folder)):
                yield
        finally:
            _before_writing.clear()


@contextlib.contextmanager
def _environment_path(path: str) -> Iterator[None]:
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def dataset_folder(dataset_id: str) -> Path:
    """Return the folder of this dataset, whether it exists or not.

    Raises:
        DatasetError: If the id is malformed, or a link on the way leads out of the datasets'
            folder.
    """
    check_id(dataset_id)
    root = datasets_root()
    folder = root / dataset_id
    if not folder.resolve().is_relative_to(root.resolve()):
        raise DatasetError(
            f"dataset {dataset_id} lies outside {root}: a link leads out of the datasets' folder; "
            "move the dataset inside, or set MINARI_DATASETS_PATH"
        )
    return folder


def refuse_links_out(dataset_id: str, path: Path, folder: Path) -> None:
    """Do nothing, unless a link on the way to a file leads out of a folder.

    Raises:
        DatasetError: If one does.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DatasetError(
            f"dataset {dataset_id}: {path} is a link out of the dataset's folder, which minrl "
            "refuses; put the file itself there"
        )


def near_matches(dataset_id: str, known: Iterable[str]) -> list[str]:
    """Return up to three ids that look like this one, the likeliest first."""
    return difflib.get_close_matches(dataset_id, sorted(set(known)), n=3, cutoff=0.6)
