"""Minari's Arrow and Parquet layouts: a folder for each episode, read column by column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minrl.data.hdf5_guard import bytes_allowed
from minrl.data.metadata import Metadata
from minrl.data.validate import EPISODE_ARRAYS
from minrl.errors import DatasetError

if TYPE_CHECKING:
    import pyarrow

_NO_DATA = ["_", ".", "metadata.json"]  # how the names of other files in the folder begin


def iterate_arrow(
    metadata: Metadata, data: Path, size_on_disk: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the arrays of every episode, in order; columns of other types are left out.

    Only columns of numbers, alone or a fixed number in a row, are read, so that rows and types say
    beforehand what they take in memory. pyarrow believes what a file says of its columns' lengths
    until it is asked to look. The padding that Minari gives all but the observations is cut off.

    Raises:
        DatasetError: If the files declare far more than they can hold, or more episodes than the
            metadata.
        Exception: If they are damaged, of many kinds.
    """
    import pyarrow.dataset

    _check_count(metadata, data)
    allowed, declared = bytes_allowed(size_on_disk), 0
    for index in range(metadata.num_episodes):
        files = pyarrow.dataset.dataset(
            data / str(index), format=metadata.data_format, ignore_prefixes=_NO_DATA
        )
        if any(fragment.physical_schema != files.schema for fragment in files.get_fragments()):
            raise DatasetError(  # pyarrow would convert columns before they can be validated
                f"dataset {metadata.dataset_id}: the files of episode {index} have columns of "
                "different types, which minrl refuses"
            )
        widths = {
            field.name: width
            for field in files.schema
            if field.name in EPISODE_ARRAYS and (width := _width(field.type))
        }
        declared += files.count_rows() * sum(widths.values())
        if declared > allowed:
            raise DatasetError(
                f"dataset {metadata.dataset_id}: episodes 0 to {index} declare {declared} bytes, "
                f"where the size of the files allows {allowed}, which minrl refuses"
            )
        table = files.to_table(columns=list(widths))
        table.validate(full=True)
        arrays = {name: _to_numpy(table[name].combine_chunks()) for name in widths}
        yield {
            name: array if name == "observations" else array[:-1] for name, array in arrays.items()
        }


def _check_count(metadata: Metadata, data: Path) -> None:
    """Refuse episodes that the metadata does not count."""
    found = sum(path.is_dir() and path.name[0] not in "_." for path in data.iterdir())
    if found != metadata.num_episodes:
        raise DatasetError(
            f"dataset {metadata.dataset_id}: rule total_episodes: the metadata says "
            f"{metadata.num_episodes} episodes, {data} has {found}"
        )


def _width(kind: pyarrow.DataType) -> int:
    """Return the bytes of a column's value; 0 for anything but numbers in a fixed number."""
    from pyarrow import types

    count = 1
    if types.is_fixed_size_list(kind):
        count, kind = kind.list_size, kind.value_type
    is_number = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    return count * max(1, kind.bit_width // 8) if is_number else 0


def _to_numpy(column: pyarrow.Array) -> np.ndarray:
    """Return a column's values; (N, count) for a fixed number in a row."""
    from pyarrow import types

    if not types.is_fixed_size_list(column.type):
        return column.to_numpy(zero_copy_only=False)
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, column.type.list_size)
