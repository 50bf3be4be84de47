"""HDF5 files that nobody vouches for: plain arrays of bounded size, or a refusal.

The format can name other files (links, external storage, virtual datasets), load code (filters from
plug-ins) and declare far more than it stores. libhdf5 follows all of it without a question.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import numpy as np

from minrl.data.hdf5_filters import CHECKSUM, GZIP, SHUFFLE, most_packed, undo_filters
from minrl.errors import DatasetError

if TYPE_CHECKING:
    import h5py

_MOST_BYTES = 8 << 30
_RATIO = 100  # declared bytes per byte of the file; recorded experience stays below 10
_FREE_BYTES = 64 << 20  # allowed whatever the size of the file: small files may be all zeros
_MOST_LINKS = 1_000_000
_DEEPEST = 32  # libhdf5 walks groups by recursion and overflows the stack at some thousands
_READS_PER_OPENING = 500


def bytes_allowed(size_on_disk: int) -> int:
    """Return the bytes that what is read from files of this size may take."""
    return min(_MOST_BYTES, max(_FREE_BYTES, _RATIO * size_on_disk))


class GuardedFile:
    """An HDF5 file for reading, closed with ``with``.

    Every link of the file is checked when it is opened: hard links only, one for each object. An
    array is checked when it is read, before any memory is taken for it: stored in this file, as
    values of a type that NumPy has, with gzip, shuffle and checksum as the only filters, and at
    most 100 times the size of the file (64 MiB for small files, 8 GiB for any) in all. libhdf5 only
    says where chunks are; they are read and unpacked here, each into its place and no further.

    HDF5 keeps what it has seen in memory until a file is closed, so it is reopened now and then.

    Args:
        path: The file.

    Raises:
        DatasetError: If a link is refused, naming file, object and reason.
        OSError: If it is no HDF5 file; also RuntimeError, ValueError or KeyError where it is
            damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():  # a pipe would block for ever
            raise FileNotFoundError(f"no file at {path}")
        self._path = path
        self._allowed = bytes_allowed(path.stat().st_size)
        self._declared = 0
        self._reads = 0
        self._file = self._open()
        self._bytes = path.open("rb", buffering=0)
        try:
            if self._file.userblock_size:  # libraries differ in where they count addresses from
                self._refuse("the file", "begins with a block that is not HDF5's")
            self._num_objects = len(self._file)
            self._check_links()
            self._reopen()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> GuardedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def __len__(self) -> int:
        """Return the number of objects at the top level."""
        return self._num_objects

    def read(self, name: str) -> np.ndarray | None:
        """Return an array, None if there is none of this name or it holds no plain values.

        Raises:
            DatasetError: If the array is refused, naming file, object and reason.
        """
        import h5py

        self._reads += 1
        if self._reads % _READS_PER_OPENING == 0:
            self._reopen()
        try:
            dataset = h5py.h5d.open(self._file.id, name.encode())
        except KeyError:
            return None
        properties = dataset.get_create_plist()
        # Asked before the shape, for which libhdf5 would open the files of a virtual dataset.
        is_chunked = self._check_layout(properties, name)
        shape = dataset.get_space().get_simple_extent_dims()
        memory_type, dtype = _types_in_memory(dataset.get_type().encode())
        if shape is None or dtype.hasobject:  # HDF5's empty value; text or lists of any length
            return None
        if memory_type is None:
            self._refuse(name, f"has values of a type that NumPy has not (it is like {dtype})")
        chunk = properties.get_chunk() if is_chunked else shape
        steps = zip(shape, chunk, strict=True)  # chunks are taken into memory whole
        cells = math.prod(-(-size // step) * step if size else 0 for size, step in steps)
        self._declare(name, cells * dtype.itemsize)
        values = np.zeros(shape, dtype)
        if is_chunked:
            self._read_chunks(dataset, properties, name, values)
        else:
            dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values, memory_type)
        return values

    def _open(self) -> h5py.File:
        import h5py

        return h5py.File(self._path, "r")

    def _reopen(self) -> None:
        self._file.close()
        self._file = self._open()

    def _close(self) -> None:
        self._file.close()
        self._bytes.close()

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

    def _check_layout(self, properties: h5py.h5p.PropDCID, name: str) -> bool:
        """Refuse values of another place; tell whether they are in chunks."""
        import h5py

        layout = properties.get_layout()
        if layout == h5py.h5d.VIRTUAL:
            self._refuse(name, "is a virtual dataset, whose values are in other files")
        if layout == h5py.h5d.CONTIGUOUS and properties.get_external_count():
            self._refuse(name, "has its values in another file (external storage)")
        return layout == h5py.h5d.CHUNKED

    def _list_filters(self, properties: h5py.h5p.PropDCID, name: str) -> list[tuple[int, int]]:
        """Return number and first parameter of each filter, in the order of writing."""
        every = [properties.get_filter(index) for index in range(properties.get_nfilters())]
        numbers = [number for number, *_ in every]
        if len(set(numbers)) < len(numbers) or not {GZIP, SHUFFLE, CHECKSUM}.issuperset(numbers):
            self._refuse(
                name,
                f"has the HDF5 filters {numbers} (gzip 1, shuffle 2 and checksum 3 are read, each "
                "once; write it again without others)",
            )
        return [(number, parameters[0] if parameters else 0) for number, _, parameters, _ in every]

    def _declare(self, name: str, size: int) -> None:
        """Count what is about to be read."""
        self._declared += size
        if self._declared > self._allowed:
            self._refuse(
                name,
                f"declares {size} bytes, {self._declared} with what was read before, where the "
                f"size of the file allows {self._allowed}",
            )

    def _read_chunks(
        self,
        dataset: h5py.h5d.DatasetID,
        properties: h5py.h5p.PropDCID,
        name: str,
        values: np.ndarray,
    ) -> None:
        """Fill an array with its chunks, and with the fill value where none was written."""
        import h5py

        if not hasattr(dataset, "chunk_iter"):
            raise DatasetError(
                f"{self._path}: {name} is in chunks, and this h5py was built with an HDF5 "
                f"({h5py.version.hdf5_version}) that cannot list them; install h5py from PyPI"
            )
        filters = self._list_filters(properties, name)
        chunk = properties.get_chunk()
        if properties.fill_value_defined() == h5py.h5d.FILL_VALUE_USER_DEFINED:
            fill = np.zeros((), values.dtype)
            properties.get_fill_value(fill)
            values[...] = fill
        room = math.prod(-(-whole // part) for whole, part in zip(values.shape, chunk, strict=True))
        numbers = itertools.count(1)

        def take(stored: h5py.h5d.StoreInfo) -> None:
            if next(numbers) > room:  # an index may lead in a circle
                raise ValueError("has more chunks than belong to its shape")
            _take_chunk(self._bytes, stored, filters, chunk, values)

        try:
            dataset.chunk_iter(take)
        except (ValueError, OverflowError) as error:
            self._refuse(name, str(error))


def _take_chunk(
    file: BinaryIO,
    stored: h5py.h5d.StoreInfo,
    filters: list[tuple[int, int]],
    chunk: tuple[int, ...],
    values: np.ndarray,
) -> None:
    """Copy a chunk from the file to its place; one at an edge is cut to the array.

    Raises:
        ValueError: If it does not fit, or is damaged.
    """
    begin, shape = stored.chunk_offset, values.shape
    size = math.prod(chunk) * values.itemsize
    if stored.size > most_packed(size):
        raise ValueError(f"has a chunk of {stored.size} bytes for {size} unpacked")
    place, part = [], []
    for at, step, stop in zip(begin, chunk, shape, strict=True):
        if at % step or at >= stop:
            raise ValueError("has a chunk that does not belong to its shape")
        place.append(slice(at, at + step))
        part.append(slice(stop - at))
    used = [one for bit, one in enumerate(filters) if not stored.filter_mask >> bit & 1]
    file.seek(stored.byte_offset)
    content = undo_filters(file.read(stored.size), used, size)
    values[tuple(place)] = np.frombuffer(content, values.dtype).reshape(chunk)[tuple(part)]


@functools.lru_cache(maxsize=64)
def _types_in_memory(encoded: bytes) -> tuple[h5py.h5t.TypeID | None, np.dtype]:
    """Return HDF5's and NumPy's type for values as they are stored.

    HDF5's is None where NumPy's nearest type has other bits. Kept, since making them takes longer
    than reading an episode's rewards.
    """
    import h5py

    stored = h5py.h5t.decode(encoded)
    dtype = stored.dtype
    memory_type = h5py.h5t.py_create(dtype)
    return memory_type if stored.equal(memory_type) else None, dtype
