"""The filters of HDF5's chunks undone in Python, within a limit.

libhdf5 unpacks a gzip stream to its end, however long, and then copies as many bytes as the chunk
should have, however few there are.

Source: HDF5 File Format Specification, message 0x000B,
https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t4.html
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

GZIP, SHUFFLE, CHECKSUM = 1, 2, 3

_CHECKSUM_BYTES = 4
_SUMMED_AT_ONCE = 1 << 16  # words; their sums stay below 2**63
_LOSS = 4096  # bytes; deflate adds five for every 16 KiB that it cannot compress


def most_packed(size: int) -> int:
    """Return the most bytes that a chunk of this size takes after any of the filters."""
    return size + size // 1000 + _LOSS


def undo_filters(content: bytes, filters: Sequence[tuple[int, int]], size: int) -> bytes:
    """Return a chunk as it was before its filters.

    Args:
        content: The chunk as stored.
        filters: Number and first parameter of each, in the order in which they were applied.
        size: Bytes that there should be; no more than a few above are ever unpacked.

    Raises:
        ValueError: If a gzip stream or a checksum is damaged, or there are more or less bytes.
    """
    for number, parameter in reversed(filters):
        if number == GZIP:
            content = _unpack(content, size + _CHECKSUM_BYTES)
        elif number == SHUFFLE:
            content = _unshuffle(content, parameter)
        else:
            content = _check_sums(content)
    if len(content) != size:
        raise ValueError(f"has a chunk that unpacks to more or less than {size} bytes")
    return content


def _unpack(packed: bytes, most: int) -> bytes:
    """Return what is in a zlib stream, checked by the sum at its end."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(packed, most + 1)
    except zlib.error as error:
        raise ValueError(f"has a damaged chunk ({error})") from error
    if len(content) <= most and not stream.eof:
        raise ValueError("has a chunk whose gzip stream is cut short")
    return content


def _unshuffle(content: bytes, width: int) -> bytes:
    """Put the bytes of each value together; stored are all first ones, then all second ones."""
    count = len(content) // width if width > 1 else 0
    if count == 0:
        return content
    planes = np.frombuffer(content, np.uint8, count * width).reshape(width, count)
    return planes.T.tobytes() + content[count * width :]


def _check_sums(content: bytes) -> bytes:
    """Return what is before a Fletcher-32 checksum, if it fits.

    Its two sums are compared modulo 65535, in which HDF5 has two spellings of zero.
    """
    body, stored = content[:-_CHECKSUM_BYTES], int.from_bytes(content[-_CHECKSUM_BYTES:], "little")
    words = np.frombuffer(body + b"\0" * (len(body) % 2), ">u2")
    plain, weighted = 0, 0
    for start in range(0, len(words), _SUMMED_AT_ONCE):
        block = words[start : start + _SUMMED_AT_ONCE].astype(np.int64)
        weighted += len(block) * plain + int(np.arange(len(block), 0, -1) @ block)
        plain += int(block.sum())
    if ((stored & 0xFFFF) - plain) % 65535 or ((stored >> 16) - weighted) % 65535:
        raise ValueError("has a chunk with a wrong checksum")
    return body
