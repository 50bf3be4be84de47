"""Flat arrays of anybody's own, in an .npz file, turned into a Minari dataset."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minrl.data.columns import Columns, count_rows, fit, fit_flags, write_columns
from minrl.data.dataset_ids import check_id
from minrl.data.hdf5_guard import bytes_allowed
from minrl.data.minari_writer import DatasetCard
from minrl.data.validate import OnBadEpisode
from minrl.errors import DatasetError

_GYMNASIUM = {"terminals": "terminated", "timeouts": "truncated"}


def import_arrays(
    path: str | Path, card: DatasetCard, on_bad_episode: OnBadEpisode = "raise"
) -> None:
    """Turn an .npz file of flat arrays into an ordinary Minari dataset.

    The arrays are those of D4RL, N steps each, one episode after the other: observations (N, O),
    actions (N, A), rewards (N,), terminals (N,) and timeouts (N,), which say at which step an
    episode ended, and next_observations (N, O) if they are known. Steps after the last end become
    a last episode, marked truncated.

    Args:
        path: The file, as ``numpy.savez`` writes it.
        card: Id, environment and spaces of the dataset.
        on_bad_episode: "raise" refuses the file if an episode breaks a rule, "drop" leaves such
            episodes out and warns.

    Raises:
        DatasetError: If an array is missing or of another shape than the spaces say, an episode is
            bad, the file cannot be read, or the id is taken.
    """
    check_id(card.dataset_id)
    write_columns(_read(Path(path), card), card, on_bad_episode=on_bad_episode)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of what goes wrong in here that the file cannot be read."""
    try:
        yield
    # RuntimeError: encrypted, or packed in a way that Python cannot unpack
    except (OSError, ValueError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        hint = "; make them arrays of numbers" if "Object arrays" in str(error) else ""
        raise DatasetError(f"{path} cannot be read as an .npz file: {error}{hint}") from error


def _read(path: Path, card: DatasetCard) -> Columns:
    if not path.is_file():
        raise DatasetError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):  # numpy would read one array, or look for a pickle
        raise DatasetError(f"{path} is not an .npz file")
    with _reading(path), zipfile.ZipFile(path) as archive:
        sizes = [(member.filename, member.file_size) for member in archive.infolist()]
    unpacked = sum(size for name, size in sizes if name.removesuffix(".npy") in Columns._fields)
    if unpacked > (allowed := bytes_allowed(path.stat().st_size)):
        raise DatasetError(
            f"the arrays of {path} unpack to {unpacked / 2**20:,.0f} MiB; {allowed / 2**20:,.0f} "
            "MiB are allowed, a hundred times the file's size, at least 64 MiB and at most 8 GiB"
        )
    with _reading(path), np.load(path, allow_pickle=False) as file:
        names = file.files
        given = {name: file[name] for name in Columns._fields if name in names}
    for name in Columns._fields:
        if name not in (*given, "next_observations"):
            hint = f" ({name} are Gymnasium's {_GYMNASIUM[name]})" if name in _GYMNASIUM else ""
            there = ", ".join(names) or "none at all"
            raise DatasetError(f"{path} has no array {name!r}{hint}; it has {there}")
        if not isinstance(given.get(name, np.empty(0)), np.ndarray):  # NumPy gives bytes
            raise DatasetError(f"{path}: {name} is no array")
    if given["rewards"].ndim == 2 and given["rewards"].shape[1] > 1:
        raise DatasetError(
            f"{path}: rewards have shape {given['rewards'].shape}; arrays are flat, one step after "
            "the other, with terminals and timeouts where an episode ends"
        )
    rows = count_rows(given.values(), path)
    shapes = {
        "observations": (rows, *card.observation_space.shape),
        "next_observations": (rows, *card.observation_space.shape),
        "actions": (rows, *card.action_space.shape),
    }
    fitted = {
        name: (
            fit_flags(values, name, path, rows)
            if name in ("terminals", "timeouts")
            else fit(values, name, path, shapes.get(name, (rows,)))
        )
        for name, values in given.items()
    }
    return Columns(**{"next_observations": None, **fitted})
