"""HDF5 files that nobody vouches for: plain arrays of bounded size, or a refusal.

The format can name other files (links, external storage, virtual datasets), load code (filters from
plug-ins) and declare far more than it stores. libhdf5 follows all of it without a question.
"""

from __future__ import annotations

import functools
import math
import zlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from minrl.errors import DatasetError

if TYPE_CHECKING:
    import h5py

_MOST_BYTES = 8 << 30
_RATIO = 100  # declared bytes per byte of the file; recorded experience stays below 10
_FREE_BYTES = 64 << 20  # allowed whatever the size of the file: small files may be all zeros
_MOST_LINKS = 1_000_000
_DEEPEST = 32  # libhdf5 walks groups by recursion and overflows the stack at some thousands
_CHUNK_SLACK = 4096  # bytes; deflate adds five for every 16 KiB that it cannot compress
_CHECKSUM_BYTES = 4
_READS_PER_OPENING = 500

_GZIP, _SHUFFLE, _CHECKSUM = 1, 2, 3
_FILTERS = ([], [_GZIP], [_SHUFFLE], [_SHUFFLE, _GZIP])  # the checksum aside


def bytes_allowed(size_on_disk: int) -> int:
    """Return the bytes that what is read from files of this size may take."""
    return min(_MOST_BYTES, max(_FREE_BYTES, _RATIO * size_on_disk))


class GuardedFile:
    """An HDF5 file for reading, closed with `with`.

    Every link of the file is checked when it is opened: hard links only, one for each object. An
    array is checked when it is read, before any memory is taken for it: stored in this file, gzip,
    shuffle and checksum as the only filters, chunks that unpack to their size and no more, and at
    most 100 times the size of the file (64 MiB for small files, 8 GiB for any) in all.

    HDF5 keeps what it has seen in memory until a file is closed, so it is reopened now and then.

    Args:
        path: the file.

    Raises:
        DatasetError: a link is refused, naming file, object and reason.
        OSError: it is no HDF5 file; also RuntimeError, ValueError or KeyError where it is damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():  # a pipe would block for ever
            raise FileNotFoundError(f"no file at {path}")
        self._path = path
        self._allowed = bytes_allowed(path.stat().st_size)
        self._declared = 0
        self._reads = 0
        self._file = self._open()
        try:
            self._num_objects = len(self._file)
            self._check_links()
            self._reopen()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GuardedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        """Return the number of objects at the top level."""
        return self._num_objects

    def read(self, name: str) -> np.ndarray | None:
        """Return an array, None if there is none of this name or it holds no plain values.

        Raises:
            DatasetError: the array is refused, naming file, object and reason.
        """
        import h5py

        self._reads += 1
        if self._reads % _READS_PER_OPENING == 0:
            self._reopen()
        try:
            dataset = h5py.h5d.open(self._file.id, name.encode())
        except KeyError:
            return None
        filters, chunk = self._check_place(dataset, name)
        shape = dataset.get_space().get_simple_extent_dims()
        if shape is None:  # HDF5's empty value
            return None
        stored_type = dataset.get_type()
        item_size = stored_type.get_size()
        # Chunks are taken into memory whole.
        pairs = zip(shape, chunk, strict=True) if chunk else zip(shape, shape, strict=True)
        cells = math.prod(-(-size // step) * step if size else 0 for size, step in pairs)
        self._declare(name, cells * item_size)
        if _GZIP in filters:
            self._check_chunks(dataset, name, math.prod(chunk) * item_size, filters)
        memory_type, dtype = _types_in_memory(stored_type.encode())
        if dtype.hasobject:
            return None
        values = np.empty(shape, dtype)
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values, memory_type)
        return values

    def _open(self) -> h5py.File:
        import h5py

        return h5py.File(self._path, "r")

    def _reopen(self) -> None:
        self._file.close()
        self._file = self._open()

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise DatasetError(f"{self._path}: {name} {what}, which minrl refuses")

    def _check_links(self) -> None:
        """Walk all links, whether their objects are ever read or not."""
        import h5py

        seen = {h5py.h5o.get_info(self._file.id).addr}
        kinds = {h5py.h5l.TYPE_SOFT: "soft", h5py.h5l.TYPE_EXTERNAL: "external"}
        bad: tuple[str, str] | None = None

        def judge(name: bytes, link: h5py.h5l.LinkInfo) -> bool | None:
            """Return True, which ends the walk, at the first bad link."""
            nonlocal bad
            what = None
            if link.type != h5py.h5l.TYPE_HARD:
                kind = kinds.get(link.type, "user-defined")
                what = f"is not stored here but is a link ({kind}) to another place"
            elif link.u in seen:
                what = "is a second link to an object that has a name already (perhaps a loop)"
            elif name.count(b"/") >= _DEEPEST:
                what = f"lies more than {_DEEPEST} groups deep"
            elif len(seen) > _MOST_LINKS:
                what = f"comes after {_MOST_LINKS} other objects"
            if what is not None:
                bad = name.decode(errors="replace")[:200], what
                return True
            seen.add(link.u)
            return None

        self._file.id.links.visit(judge, info=True)
        if bad is not None:
            self._refuse(*bad)

    def _check_place(
        self, dataset: h5py.h5d.DatasetID, name: str
    ) -> tuple[list[int], tuple[int, ...]]:
        """Refuse values of another place or form; return the filters and the chunks' shape."""
        import h5py

        properties = dataset.get_create_plist()
        # Asked before the shape, for which libhdf5 would open the files of a virtual dataset.
        layout = properties.get_layout()
        if layout == h5py.h5d.VIRTUAL:
            self._refuse(name, "is a virtual dataset, whose values are in other files")
        if layout == h5py.h5d.CONTIGUOUS and properties.get_external_count():
            self._refuse(name, "has its values in another file (external storage)")
        filters = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
        if filters and (
            [one for one in filters if one != _CHECKSUM] not in _FILTERS
            or filters.count(_CHECKSUM) > 1
        ):
            self._refuse(
                name,
                f"has the HDF5 filters {filters} (gzip 1, shuffle 2 and checksum 3 are read, each "
                "once; write it again without others)",
            )
        return filters, properties.get_chunk() if layout == h5py.h5d.CHUNKED else ()

    def _declare(self, name: str, size: int) -> None:
        """Count what is about to be read."""
        self._declared += size
        if self._declared > self._allowed:
            self._refuse(
                name,
                f"declares {size} bytes, {self._declared} with what was read before, where the "
                f"size of the file allows {self._allowed}",
            )

    def _check_chunks(
        self, dataset: h5py.h5d.DatasetID, name: str, size: int, filters: list[int]
    ) -> None:
        """Unpack every chunk once: libhdf5 would take memory until a gzip stream ends."""
        chunks = []
        dataset.chunk_iter(chunks.append)
        wanted = {size}
        if _CHECKSUM in filters[: filters.index(_GZIP)]:
            wanted = {size + _CHECKSUM_BYTES}
        for chunk in chunks:
            if chunk.size > size + size // 1000 + _CHUNK_SLACK:
                self._refuse(name, f"has a chunk of {chunk.size} bytes for {size} unpacked")
            if chunk.filter_mask >> filters.index(_GZIP) & 1:
                continue  # this one is not compressed
            _, packed = dataset.read_direct_chunk(chunk.chunk_offset)
            try:
                unpacked = len(zlib.decompressobj().decompress(packed, max(wanted) + 1))
            except zlib.error as error:
                raise DatasetError(f"{self._path}: {name} is damaged: {error}") from error
            if unpacked not in wanted:
                self._refuse(name, f"has a chunk that unpacks to more or less than {size} bytes")


@functools.lru_cache(maxsize=64)
def _types_in_memory(encoded: bytes) -> tuple[h5py.h5t.TypeID, np.dtype]:
    """Return HDF5's and NumPy's type for values of a stored type.

    Kept, since making them takes longer than reading an episode's rewards.
    """
    import h5py

    dtype = h5py.h5t.decode(encoded).dtype
    return h5py.h5t.py_create(dtype), dtype
