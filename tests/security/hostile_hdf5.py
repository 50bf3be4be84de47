"""HDF5 files made to harm: how each kind is made, and what a reader says of it."""

import zlib
from pathlib import Path

import h5py
import numpy as np
from hopper_files import ROWS

MEBI = 1 << 20


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
