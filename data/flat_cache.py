"""A dataset's flat arrays kept beside it, so that it is read and validated only once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

_FILE = "minrl_flat.npz"
_LAYOUT = "1"  # raise it when the arrays or the rules of validate.py change


class FlatArrays(NamedTuple):
    """The arrays of `Episodes`."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    offsets: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final_observations: np.ndarray


def digest_files(paths: list[Path]) -> str:
    """Return the SHA-256, in hex, of the files' contents one after the other."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    return digest.hexdigest()


def read_cache(folder: Path, sha256: str) -> FlatArrays | None:
    """Return the arrays cached for the content with this digest, None if there are none.

    A damaged cache counts as none. The zip format's checksums are verified on reading.
    """
    try:
        # Opened here, because np.load leaves a damaged file open.
        with (folder / _FILE).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if str(file["key"]) != _key(sha256):
                return None
            arrays = FlatArrays(*(file[name] for name in FlatArrays._fields))
    except Exception:  # damage shows as almost any error; the source is still there
        return None
    return arrays


def write_cache(folder: Path, sha256: str, arrays: FlatArrays) -> None:
    """Keep the arrays beside the dataset if its folder can be written, otherwise do nothing."""
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(prefix=".minrl_flat-", suffix=".tmp", dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, key=np.array(_key(sha256)), **arrays._asdict())
            os.replace(name, folder / _FILE)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def _key(sha256: str) -> str:
    return f"{_LAYOUT}:{sha256}"
