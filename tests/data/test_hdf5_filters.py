"""The filters of chunks, undone from bytes alone."""

import zlib

import h5py
import numpy as np
import pytest

from minrl.data.hdf5_filters import CHECKSUM, GZIP, SHUFFLE, most_packed, undo_filters


@pytest.fixture(scope="module")
def summed(tmp_path_factory):
    """Return a chunk of 700 KiB as libhdf5 stores it with a checksum, and what is in it."""
    values = np.random.default_rng(0).integers(0, 256, 700 << 10, dtype=np.uint8)
    path = tmp_path_factory.mktemp("summed") / "a.hdf5"
    with h5py.File(path, "w") as file:
        array = file.create_dataset("a", data=values, chunks=values.shape, fletcher32=True)
        return array.id.read_direct_chunk((0,))[1], values.tobytes()


@pytest.mark.parametrize("size", [1, 1000, 10**5, 10**7])
def test_what_deflate_and_a_checksum_add_is_allowed_and_little_more(size):
    noise = np.random.default_rng(size).bytes(size)  # deflate makes it longer
    for level in (0, 1, 9):
        assert len(zlib.compress(noise, level)) + 4 <= most_packed(size)
    assert most_packed(size) <= 1.002 * size + 5000


def test_a_bit_of_a_checksum_or_of_what_it_sums_is_missed_by_none(summed):
    stored, content = summed
    assert undo_filters(stored, [(CHECKSUM, 0)], len(content)) == content
    places = [0, 1, 999, 1 << 17, (1 << 18) + 1, len(content) - 1]
    for place in (*places, *range(len(content), len(stored))):
        for bit in (1, 128):
            damaged = bytearray(stored)
            damaged[place] ^= bit
            with pytest.raises(ValueError, match="wrong checksum"):
                undo_filters(bytes(damaged), [(CHECKSUM, 0)], len(content))


@pytest.mark.parametrize("cut", [1, 4])
def test_a_stream_cut_after_its_last_value_is_refused(summed, cut):
    stored, content = summed
    packed = zlib.compress(stored)
    filters = [(CHECKSUM, 0), (GZIP, 6)]  # as much to unpack as there ever may be
    assert undo_filters(packed, filters, len(content)) == content
    with pytest.raises(ValueError, match="cut short"):
        undo_filters(packed[:-cut], filters, len(content))


@pytest.mark.parametrize("more", [-1, 1, 5])
def test_another_size_than_the_declared_one_is_refused(more):
    packed = zlib.compress(bytes(1000 + more))
    with pytest.raises(ValueError, match="more or less than 1000 bytes"):
        undo_filters(packed, [(GZIP, 6)], 1000)


def test_bytes_that_fill_no_whole_value_stay_at_the_end():
    assert undo_filters(b"acbde", [(SHUFFLE, 2)], 5) == b"abcde"
