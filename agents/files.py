"""Files that are written whole or not at all, and read only if they are files."""

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from minrl.errors import CheckpointError

LARGEST_TEXT = 4 << 20
"""Bytes of JSON that are read: a thousand times what a run writes, and parsed in 200 MiB."""

# What file systems say that cannot sync a folder, some of those on networks or in user space.
_NO_SYNC_OF_FOLDERS = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EACCES}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one.

    Raises:
        CheckpointError: If the disk is full or not writable; the old file is still there.
    """
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files so that a crash at any moment leaves each of them as it was, or new.

    They take their names in the order given, and only when all are on the disk: if there is no room
    for the last, the first has not changed.

    Raises:
        CheckpointError: If the disk is full or not writable; nothing is left behind.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            staged[path] = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
            with staged[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in staged.items():
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except BaseException as error:  # after Ctrl-C, too, nothing is left behind
        for temporary in staged.values():
            with contextlib.suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            reason = error.strerror or error  # without the temporary file's name
            raise CheckpointError(f"cannot write {path}: {reason}") from error
        raise


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, of which little is in memory at any time.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
    """
    check_is_file(path)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """Return what is in a file of JSON.

    Raises:
        CheckpointError: If there is none, or it cannot be read, or is too large to be one.
    """
    check_is_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_TEXT + 1)
        if len(content) > LARGEST_TEXT:
            raise CheckpointError(f"{path} is larger than any such file should be")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def check_is_file(path: Path) -> None:
    """Refuse what is no file: opening a named pipe would wait for ever, a device do anything.

    Raises:
        CheckpointError: If it is none, or nothing is there.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"cannot read {path}: there is no such file")


def _sync_folder(path: Path) -> None:
    """Make a rename in a folder survive a power cut, where the system can."""
    if os.name == "nt":  # cannot open a folder
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_SYNC_OF_FOLDERS:
            raise
    finally:
        os.close(folder)
