"""The guarded reader of HDF5: what it allows, it reads as h5py does."""

import itertools
import os
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from minrl.data import hdf5_guard
from minrl.data.hdf5_guard import GuardedFile
from minrl.errors import DatasetError

EXAMPLES = [60, pytest.param(3000, marks=pytest.mark.slow)]
DTYPES = ["<f8", ">f8", "<f4", ">f4", "<f2", "<i8", ">i2", "i1", "u1", ">u4", "?", "<c16", "S5"]
INDEXES = ["earliest", "latest"]  # B-trees; single chunks, fixed and extensible arrays, B-trees 2


@pytest.mark.parametrize("examples", EXAMPLES)
def test_honest_arrays_are_read_bit_for_bit_as_h5py_reads_them(tmp_path, examples):
    def draw(generator):
        """Return an array's values, the settings of its chunks and filters, and what to write."""
        shape = tuple(generator.integers(1, 40, size=generator.integers(1, 4)))
        chunk = tuple(int(generator.integers(1, size + 4)) for size in shape)
        growing = bool(generator.integers(2)) or any(np.greater(chunk, shape))
        dtype = np.dtype(DTYPES[generator.integers(len(DTYPES))])
        values = generator.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
        settings = {
            "chunks": chunk,
            "maxshape": (None,) * len(shape) if growing else None,
            "shuffle": bool(generator.integers(2)),
            "compression": "gzip" if generator.integers(3) else None,
            "fletcher32": generator.integers(4) == 0,
            "fillvalue": values.flat[0] if generator.integers(2) else None,
        }
        if settings["compression"]:
            settings["compression_opts"] = int(generator.integers(10))
        stop = tuple(slice(int(generator.integers(size + 1))) for size in shape)
        return values.view("u1") % 2 == 1 if dtype.kind == "b" else values, settings, stop

    generator = np.random.default_rng(0)
    path = tmp_path / "a.hdf5"
    for number in range(examples // 20):
        with h5py.File(path, "w", libver=INDEXES[number % 2]) as file:
            for name in "abcdefghijklmnopqrst":
                values, settings, part = draw(generator)
                array = file.create_dataset(
                    name, shape=values.shape, dtype=values.dtype, **settings
                )
                array[part] = values[part]  # where not all is written, chunks are missing
        with GuardedFile(path) as file, h5py.File(path) as plain:
            for name in plain:
                found, expected = file.read(name), plain[name][()]
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                assert found.tobytes() == expected.tobytes(), (number, name)


def test_filters_in_any_order_are_undone_as_libhdf5_does(tmp_path):
    values = np.random.default_rng(0).integers(0, 9, (50, 7)).astype("<i4")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for order in itertools.permutations([1, 2, 3]):
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_chunk((20, 3))
            for number in order:
                (properties.set_deflate, properties.set_shuffle, properties.set_fletcher32)[
                    number - 1
                ]()
            space = h5py.h5s.create_simple(values.shape)
            name = "".join(map(str, order))
            identity = h5py.h5d.create(
                file.id, name.encode(), h5py.h5t.STD_I32LE, space, dcpl=properties
            )
            h5py.Dataset(identity)[...] = values
    with GuardedFile(tmp_path / "a.hdf5") as file:
        for order in itertools.permutations("123"):
            assert np.array_equal(file.read("".join(order)), values)


def test_arrays_without_chunks_scalars_and_names_that_are_not_there(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["plain"] = np.arange(12.0).reshape(3, 4)
        file["one"] = np.float32(0.5)
        file["none"] = np.zeros((0, 4))
        file.create_dataset(
            "growing", dtype="f8", shape=(0, 4), maxshape=(None, 4), chunks=(100, 4)
        )
    with GuardedFile(tmp_path / "a.hdf5") as file:
        assert len(file) == 4
        assert np.array_equal(file.read("plain"), np.arange(12.0).reshape(3, 4))
        assert file.read("one") == np.float32(0.5)
        assert file.read("none").shape == file.read("growing").shape == (0, 4)
        assert file.read("no such name") is None


def test_an_h5py_that_cannot_list_chunks_is_named(tmp_path, monkeypatch):
    class Older:
        """What h5py offers where its HDF5 is older than 1.12.3."""

        def __init__(self, dataset):
            self._dataset = dataset

        def __getattr__(self, name):
            if name == "chunk_iter":
                raise AttributeError(name)
            return getattr(self._dataset, name)

    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("x", data=np.arange(9.0), chunks=(4,))
    open_ = h5py.h5d.open
    monkeypatch.setattr(h5py.h5d, "open", lambda *place: Older(open_(*place)))
    with (
        GuardedFile(tmp_path / "a.hdf5") as file,
        pytest.raises(DatasetError, match=r"x is in chunks.*HDF5 \(.*install h5py from PyPI"),
    ):
        file.read("x")


def test_reading_goes_on_when_the_file_is_reopened(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_guard, "_READS_PER_OPENING", 7)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for number in range(30):
            file[f"{number}/x"] = number
    opened, open_ = [], GuardedFile._open
    monkeypatch.setattr(GuardedFile, "_open", lambda file: opened.append(1) or open_(file))
    with GuardedFile(tmp_path / "a.hdf5") as file:
        assert [int(file.read(f"{number}/x")) for number in range(30)] == list(range(30))
    assert len(opened) == 1 + 1 + 30 // 7  # to check the links, to read, again every 7 reads


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_file_is_closed_whether_it_was_read_or_refused(tmp_path):
    def is_open(path):
        return str(path) in [os.path.realpath(one) for one in Path("/proc/self/fd").iterdir()]

    good, bad = tmp_path / "good.hdf5", tmp_path / "bad.hdf5"
    with h5py.File(good, "w") as file:
        file.create_dataset("x", data=np.arange(9.0), chunks=(4,))
    with h5py.File(bad, "w") as file:
        file["x"] = h5py.SoftLink("/y")
    with GuardedFile(good) as file:
        file.read("x")
        assert is_open(good)
    with pytest.raises(DatasetError):
        GuardedFile(bad)
    assert not is_open(good)
    assert not is_open(bad)


@pytest.mark.parametrize("skipped", [0b01, 0b10, 0b11])
def test_filters_that_a_chunk_skipped_are_not_undone(tmp_path, skipped):
    values = np.arange(64, dtype="<i4") // 5
    content = values.tobytes()
    if not skipped & 0b01:
        content = values.view("u1").reshape(-1, 4).T.tobytes()
    if not skipped & 0b10:
        content = zlib.compress(content)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        array = file.create_dataset(
            "x", (64,), "<i4", chunks=(64,), shuffle=True, compression="gzip"
        )
        array.id.write_direct_chunk((0,), content, filter_mask=skipped)
    with GuardedFile(tmp_path / "a.hdf5") as file, h5py.File(tmp_path / "a.hdf5") as plain:
        assert np.array_equal(plain["x"][()], values)
        assert np.array_equal(file.read("x"), values)


def test_groups_may_be_nested_so_deep_and_a_bad_link_may_have_any_name(tmp_path):
    deepest = "/".join(["g"] * hdf5_guard._DEEPEST)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file[f"{deepest}/x"] = 0
    with pytest.raises(DatasetError, match="lies more than 32 groups deep"):
        GuardedFile(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file[f"{deepest[2:]}/x"] = 5
    with GuardedFile(tmp_path / "a.hdf5") as file:
        assert file.read(f"{deepest[2:]}/x") == 5
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.id.links.create_soft(b"\xff\xfe", b"/elsewhere")
    with pytest.raises(DatasetError, match=r"is a link \(soft\) to another place"):
        GuardedFile(tmp_path / "a.hdf5")
