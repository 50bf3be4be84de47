"""HDF5 files made to harm: refused by both readers, in a process that may take little memory."""

import itertools
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hopper_files import ROWS, write_d4rl, write_minari

from minrl.data import hdf5_guard
from minrl.data.d4rl_source import import_d4rl
from minrl.data.hdf5_guard import GuardedFile
from minrl.errors import DatasetError

MEBI = 1 << 20
MOST_MEMORY = 256 << 20  # above what importing and an honest load take


def parent_of(file, name):
    return file[name.rpartition("/")[0] or "/"]


def put(link):
    """Return a function that puts a link in the place of an array."""

    def spoil(file, name):
        with h5py.File(f"{file.filename}.other", "w") as other:
            other["secret"] = np.ones((ROWS, 11))
        file.move(name, "elsewhere")
        file[name] = link(file)

    return spoil


def nested_external_link(file, name):
    parent_of(file, name)["infos/deep/x"] = h5py.ExternalLink("/etc/hostname", "/")


def soft_link_loop(file, name):
    infos = parent_of(file, name).create_group("infos")
    infos["a"], infos["b"] = h5py.SoftLink(f"{infos.name}/b"), h5py.SoftLink(f"{infos.name}/a")


def user_defined_link(file, name):
    """An external link, whose number in the file becomes one that programs may give a meaning."""
    file["here"] = h5py.ExternalLink("no-such-file", "/")
    path = Path(file.filename)
    file.close()
    content = bytearray(path.read_bytes())
    place = content.index(b"\x04here") - 1  # kind, length of the name, name
    assert content[place] == h5py.h5l.TYPE_EXTERNAL
    content[place] = 200
    path.write_bytes(content)


def hard_link_loop(file, name):
    infos = parent_of(file, name).create_group("infos")
    infos["again"] = parent_of(file, name)


def second_name(file, name):
    file.create_group("infos")["again"] = file[name]


def deep_groups(file, name):
    group = parent_of(file, name)
    for _ in range(3_000):  # a walk by libhdf5 alone overflows its stack at some thousands
        group = group.create_group("a")


def replace(**settings):
    """Return a function that puts an array made with these settings in the place of another."""

    def spoil(file, name):
        del file[name]
        file.create_dataset(name, **({"shape": (ROWS, 11), "dtype": "f8"} | settings))

    return spoil


def external_storage(file, name):
    replace(external=[("/etc/passwd", 0, ROWS * 11 * 8)])(file, name)


def virtual_dataset(file, name):
    with h5py.File(f"{file.filename}.other", "w") as other:
        other["secret"] = np.ones((ROWS, 11))
    layout = h5py.VirtualLayout((ROWS, 11), "f8")
    layout[:] = h5py.VirtualSource(f"{file.filename}.other", "secret", (ROWS, 11))
    del file[name]
    file.create_virtual_dataset(name, layout)


def with_chunks(shape, chunk, packed, **settings):
    """Return a function that writes chunks as they are, without HDF5's filters."""

    def spoil(file, name):
        replace(shape=shape, chunks=chunk, **settings)(file, name)
        for start in range(0, shape[0], chunk[0]):
            file[name].id.write_direct_chunk((start, 0), packed)

    return spoil


def short_chunk(mask=0, **settings):
    """Return a function that stores 16 bytes as a chunk of 704."""

    def spoil(file, name):
        replace(chunks=(ROWS, 11), **settings)(file, name)
        file[name].id.write_direct_chunk((0, 0), b"\x01" * 16, filter_mask=mask)

    return spoil


def chunk_of_an_empty_array(file, name):
    """A gibibyte of zeros in the one chunk of an array whose extent becomes zero."""
    with_chunks((1 << 27, 1), (1 << 27, 1), zeros(1024), maxshape=(None, 1), compression="gzip")(
        file, name
    )
    path = Path(file.filename)
    file.close()
    content = path.read_bytes()
    before = np.array([1 << 27, 1, -1, 1], "<i8").tobytes()  # extent, then the most it may become
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, bytes(8) + before[8:]))


def with_index(*, size=ROWS * 88, start=0):
    """Return a function that changes what the index says of the one chunk of a plain array."""

    def spoil(file, name):
        values = np.random.default_rng(0).normal(size=(ROWS, 11))
        replace(data=values, chunks=(ROWS, 11))(file, name)
        path = Path(file.filename)
        file.close()
        content = bytearray(path.read_bytes())
        place = content.index(b"TREE\x01") + 24  # behind signature, kind, level, count, siblings
        assert content[place : place + 8] == (ROWS * 88).to_bytes(8, "little")
        content[place : place + 4] = size.to_bytes(4, "little")
        content[place + 8 : place + 16] = start.to_bytes(8, "little")  # behind the filter mask
        path.write_bytes(content)

    return spoil


def user_block(file, name):
    path = Path(file.filename)
    file.close()
    content = path.read_bytes()
    with h5py.File(path, "w", userblock_size=512):
        pass
    path.write_bytes(path.read_bytes()[:512] + content)


def cut_stream(file, name):
    """A gzip stream that unpacks to the right size, without the checksum at its end."""
    packed = zlib.compress(bytes(ROWS * 88))[:-4]
    with_chunks((ROWS, 11), (ROWS, 11), packed, compression="gzip")(file, name)


def swapped_words(file, name):
    """Two words change places, which a sum of the words alone does not see."""
    replace(data=np.arange(ROWS * 11.0).reshape(ROWS, 11), fletcher32=True)(file, name)
    identity = file[name].id
    packed = bytearray(identity.read_direct_chunk((0, 0))[1])
    packed[8:16], packed[16:24] = packed[16:24], packed[8:16]
    identity.write_direct_chunk((0, 0), bytes(packed))


def odd_type(file, name):
    """Whole numbers of 12 bits in 16, which libhdf5 would convert."""
    del file[name]
    kind = h5py.h5t.STD_I16LE.copy()
    kind.set_precision(12)
    h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple((ROWS, 11)))


def zeros(mebibytes):
    """Return a zlib stream of so many zeros, made without packing them all."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(MEBI)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = (mebibytes * MEBI % 65521) << 16 | 1
    return b"\x78\x01" + block * mebibytes + b"\x03\x00" + checksum.to_bytes(4, "big")


def with_filters(*filters):
    def spoil(file, name):
        del file[name]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((ROWS, 11))
        for number in filters:
            properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (1,))
        space = h5py.h5s.create_simple((ROWS, 11))
        h5py.h5d.create(
            file.id, name.encode(), h5py.h5t.IEEE_F64LE, space, dcpl=properties
        ).write_direct_chunk((0, 0), zlib.compress(bytes(ROWS * 88)))

    return spoil


def group_instead(file, name):
    del file[name]
    file.create_group(name)


def empty_value(file, name):
    del file[name]
    file[name] = h5py.Empty("f8")


EXTERNAL, SOFT, OTHER = (
    rf"is not stored here but is a link \({kind}\) to another place"
    for kind in ("external", "soft", "user-defined")
)
TWICE = "is a second link to an object"
TOO_LARGE = "declares [0-9]+ bytes, .* the size of the file allows [0-9]+"
NO_ARRAY = "rule arrays, episode 0: observations|it has no array 'observations'"
NOT_704 = "has a chunk that unpacks to more or less than 704 bytes"
FILTERS = r"has the HDF5 filters \[{}\]"
KINDS = {
    "external link": (put(lambda f: h5py.ExternalLink(f"{f.filename}.other", "secret")), EXTERNAL),
    "nested external link": (nested_external_link, EXTERNAL),
    "soft link": (put(lambda file: h5py.SoftLink("/elsewhere")), SOFT),
    "dangling soft link": (put(lambda file: h5py.SoftLink("/nowhere")), SOFT),
    "soft links in a loop": (soft_link_loop, SOFT),
    "user-defined link": (user_defined_link, OTHER),
    "hard links in a loop": (hard_link_loop, TWICE),
    "second name of an array": (second_name, TWICE),
    "deep groups": (deep_groups, "lies more than 32 groups deep"),
    "external storage": (external_storage, "has its values in another file"),
    "virtual dataset": (virtual_dataset, "is a virtual dataset"),
    "shape bomb": (replace(shape=(3 << 28, 11)), TOO_LARGE),
    "shape bomb in chunks": (replace(shape=(3 << 28, 11), chunks=(1000, 11)), TOO_LARGE),
    "shape beyond 64 bits": (replace(shape=(1 << 60, 11), chunks=(1000, 11)), TOO_LARGE),
    "chunk bomb": (replace(shape=(ROWS, 11), chunks=(1 << 25, 11), maxshape=(None, 11)), TOO_LARGE),
    "item bomb": (replace(dtype="S4000000"), TOO_LARGE),
    "gzip bomb": (
        with_chunks((12 * MEBI, 11), (MEBI, 11), zeros(88), compression="gzip"),
        TOO_LARGE,
    ),
    "gzip bomb in one chunk": (
        with_chunks((ROWS, 11), (ROWS, 11), zeros(1024), compression="gzip"),
        "has a chunk of [0-9]+ bytes for 704 unpacked",
    ),
    "small gzip bomb in one chunk": (
        with_chunks((ROWS, 11), (ROWS, 11), zeros(4), compression="gzip"),
        NOT_704,
    ),
    "chunk that unpacks to less": (
        with_chunks((ROWS, 11), (ROWS, 11), zlib.compress(b"short"), compression="gzip"),
        NOT_704,
    ),
    "chunk that cannot be unpacked": (
        with_chunks((ROWS, 11), (ROWS, 11), b"no gzip at all", compression="gzip"),
        "has a damaged chunk .Error -3",
    ),
    "short chunk shuffled": (short_chunk(shuffle=True), NOT_704),
    "short chunk gzip masked": (short_chunk(mask=1, compression="gzip"), NOT_704),
    "short chunk checksum": (short_chunk(fletcher32=True), "has a chunk with a wrong checksum"),
    "words in another order": (swapped_words, "has a chunk with a wrong checksum"),
    "short chunk checksum masked": (short_chunk(mask=1, fletcher32=True), NOT_704),
    "short chunk without filters": (with_index(size=16), NOT_704),
    "long chunk shuffled": (
        with_chunks((ROWS, 11), (ROWS, 11), bytes(1000), shuffle=True),
        NOT_704,
    ),
    "gzip stream without an end": (cut_stream, "has a chunk whose gzip stream is cut short"),
    "chunk of an empty array": (
        chunk_of_an_empty_array,
        "has more chunks than belong to its shape",
    ),
    "long chunk without filters": (with_index(size=1000), NOT_704),
    "chunk outside of the shape": (with_index(start=ROWS), "has a chunk that does not belong to"),
    "user block": (user_block, "the file begins with a block that is not HDF5's"),
    "type that NumPy has not": (odd_type, "has values of a type that NumPy has not"),
    "gzip in gzip": (with_filters(1, 1), FILTERS.format("1, 1")),
    "checksum twice": (with_filters(3, 3), FILTERS.format("3, 3")),
    "filter nobody knows": (with_filters(31_999), FILTERS.format("31999")),
    "filter of a plug-in": (replace(compression="lzf", chunks=True), FILTERS.format("32000")),
    "filter that drops bits": (
        replace(dtype="i4", scaleoffset=2, chunks=True),
        FILTERS.format("6"),
    ),
    "values of any length": (replace(dtype=h5py.string_dtype()), NO_ARRAY),
    "references": (replace(dtype=h5py.ref_dtype), NO_ARRAY),
    "group in place of an array": (group_instead, NO_ARRAY),
    "no value at all": (empty_value, NO_ARRAY),
}


LOAD_ALL = """
import json, resource, sys
from minrl.data.d4rl_source import import_d4rl
from minrl.data.minari_source import load_dataset
from minrl.errors import DatasetError

read = {"d4rl": import_d4rl, "minari": lambda name: load_dataset(name, download=False)}
jobs = json.load(sys.stdin)
for reader, target in jobs.pop("honest"):
    load_dataset(read["d4rl"](target)) if reader == "d4rl" else read[reader](target)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for kind, targets in jobs.items():
    for reader, target in targets:
        before = peak
        try:
            read[reader](target)
        except DatasetError as error:
            message = str(error)
        else:
            message = "read"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([kind, reader, message, (peak - before) << 10]), flush=True)
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What each reader said of each kind, and the memory it took, all from one process."""
    folder, root = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("datasets")
    kinds = {"honest": (lambda file, name: None, "")} | KINDS
    jobs = {
        kind: [
            ["d4rl", str(write_d4rl(folder, kind, spoil))],
            ["minari", write_minari(root, kind, spoil)],
        ]
        for kind, (spoil, _) in kinds.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(MOST_MEMORY)],
        input=json.dumps(jobs),
        env=os.environ | {"MINARI_DATASETS_PATH": str(root)},
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {rows[-1:]}: {done.stderr}"
    return {(kind, reader): (message, memory) for kind, reader, message, memory in rows}


@pytest.mark.parametrize("reader", ["d4rl", "minari"])
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_file_is_refused_with_the_reason_at_little_memory(verdicts, kind, reader):
    message, memory = verdicts[kind, reader]
    assert re.search(KINDS[kind][1], message), message
    assert memory <= MOST_MEMORY


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


def test_what_is_read_in_all_is_bounded_by_the_size_of_the_file(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name in "abc":
            file.create_dataset(name, shape=(30 * MEBI,), dtype="u1")
    with GuardedFile(tmp_path / "a.hdf5") as file:
        assert len(file.read("a")) == len(file.read("b")) == 30 * MEBI
        with pytest.raises(
            DatasetError, match=f"a.hdf5: c declares {30 * MEBI} bytes, {90 * MEBI}"
        ):
            file.read("c")


def test_no_file_is_allowed_more_than_eight_gibibytes(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["x"] = 0.0
        file.create_dataset("y", shape=((8 << 30) + 1,), dtype="u1")
    os.truncate(tmp_path / "a.hdf5", 1 << 30)  # takes no room on the disk
    with (
        GuardedFile(tmp_path / "a.hdf5") as file,
        pytest.raises(
            DatasetError, match=f"size of the file allows {8 << 30}, which minrl refuses"
        ),
    ):
        file.read("y")


def test_absurdly_many_objects_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_guard, "_MOST_LINKS", 50)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for number in range(50):
            file[str(number)] = 0.0
    with GuardedFile(tmp_path / "a.hdf5") as file:
        assert len(file) == 50
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file["one more"] = 0.0
    with pytest.raises(DatasetError, match="one more comes after 50 other objects"):
        GuardedFile(tmp_path / "a.hdf5")


def test_reading_goes_on_when_the_file_is_reopened(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_guard, "_READS_PER_OPENING", 7)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for number in range(30):
            file[f"{number}/x"] = number
    with GuardedFile(tmp_path / "a.hdf5") as file:
        assert [int(file.read(f"{number}/x")) for number in range(30)] == list(range(30))


def test_a_pipe_or_a_folder_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "hopper-v2.hdf5")
    with pytest.raises(DatasetError, match="cannot be read as an HDF5 file: no file at"):
        import_d4rl(tmp_path / "hopper-v2.hdf5")
    with pytest.raises(DatasetError, match="cannot be read as an HDF5 file: no file at"):
        import_d4rl(tmp_path, "d4rl/hopper/folder-v0")
