"""A dataset's flat arrays kept beside it, so that it is read and validated only once.

A folder that was downloaded may bring anything along, and what is in the cache is taken unchecked.
So it is sealed with a key of the user's, and only what this user's minrl has written is believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from minrl.cache import cache_folder

_FILE = "minrl_flat.cache"
_LAYOUT = "2"  # raise it when the arrays or the rules of validate.py change
_KEY_BYTES = 32
_SEAL_BYTES = 32


class FlatArrays(NamedTuple):
    """The arrays of ``Episodes``."""

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
    for path in paths:
        with path.open("rb", buffering=0) as file:
            _take_in(file, digest)
    return digest.hexdigest()


def read_cache(folder: Path, sha256: str) -> FlatArrays | None:
    """Return what this user cached for the content with this digest, None if there is nothing.

    A cache of other content, a damaged one and what anybody else has written count as nothing.
    """
    path = folder / _FILE
    if not path.is_file():  # a pipe would block for ever
        return None
    try:
        with path.open("rb") as file:
            seal = file.read(_SEAL_BYTES)
            if not hmac.compare_digest(seal, _seal(file, sha256)):
                return None
            file.seek(_SEAL_BYTES)
            return FlatArrays(*(np.load(file, allow_pickle=False) for _ in FlatArrays._fields))
    except (OSError, RuntimeError):  # no cache, no key, or no home to keep it in
        return None


def write_cache(folder: Path, sha256: str, arrays: FlatArrays) -> None:
    """Keep the arrays beside the dataset if its folder can be written, otherwise do nothing."""
    unfinished = folder / f".{_FILE}-{secrets.token_hex(8)}"
    with contextlib.suppress(OSError, RuntimeError):
        for left in folder.glob(f".{_FILE}-*"):  # of a load that was killed
            left.unlink(missing_ok=True)
        try:
            with unfinished.open("xb+") as file:
                file.write(bytes(_SEAL_BYTES))
                for array in arrays:
                    np.save(file, array, allow_pickle=False)
                file.seek(_SEAL_BYTES)
                seal = _seal(file, sha256)
                file.seek(0)
                file.write(seal)
            os.replace(unfinished, folder / _FILE)
        finally:
            unfinished.unlink(missing_ok=True)


class _Digest(Protocol):
    def update(self, data: memoryview, /) -> None: ...


def _take_in(file: BinaryIO, digest: _Digest) -> None:
    """Add what is left of a file to a digest."""
    buffer = memoryview(bytearray(1 << 20))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])


def _seal(file: BinaryIO, sha256: str) -> bytes:
    """Return what only a holder of the key can say of the rest of a file, made for this content."""
    seal = hmac.new(_key(), f"{_LAYOUT}:{sha256}:".encode(), "sha256")
    _take_in(file, seal)
    return seal.digest()


def _key() -> bytes:
    """Return the user's key, which is made when it is first asked for.

    Raises:
        OSError: If it can be neither read nor kept.
    """
    path = cache_folder() / "key"
    with contextlib.suppress(FileNotFoundError):
        key = path.read_bytes()
        if len(key) == _KEY_BYTES:
            return key
        path.unlink()  # left by a process that was killed
    path.parent.mkdir(parents=True, exist_ok=True)
    key = secrets.token_bytes(_KEY_BYTES)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
    return key
