"""A dataset whose bytes have changed is refused, or read as what is there now; nothing crashes."""

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

DAMAGES = [(40, 15), pytest.param((500, 50), marks=pytest.mark.slow)]  # flipped bits, truncations
NAME = "test/toy/random-v0"
LENGTHS = (9, 5, 14)

LOAD_DAMAGED = """
import hashlib, json, shutil, sys
from pathlib import Path
import numpy as np
from minrl.data.d4rl_source import import_d4rl
from minrl.data.minari_source import load_dataset
from minrl.errors import DatasetError

def digest(*columns):
    content = [np.concatenate(parts).astype(np.float32).tobytes() for parts in columns]
    return hashlib.sha256(b"".join(content)).hexdigest()

def read_plainly(path):
    '''Read all episodes without minrl.'''
    if path.suffix == ".hdf5":
        import h5py

        with h5py.File(path) as file:
            episodes = [file[f"episode_{index}"] for index in range(len(file))]
            columns = [[e[n][()] for e in episodes] for n in ("observations", "actions", "rewards")]
            return digest([rows[:-1] for rows in columns[0]], *columns[1:])
    import pyarrow.ipc, pyarrow.parquet

    read = pyarrow.parquet.read_table if path.suffix == ".parquet" else (
        lambda file: pyarrow.ipc.open_file(file).read_all()
    )
    tables = [read(file) for file in sorted(path.parents[1].glob("*/part-0.*"))]
    columns = [
        [np.array(table[name].to_pylist())[:-1] for table in tables]
        for name in ("observations", "actions", "rewards")
    ]
    return digest(*columns)

path, root, name, flips, truncations = sys.argv[1:]
path, generator = Path(path), np.random.default_rng(0)
is_d4rl = not path.is_relative_to(root)
sound = path.read_bytes()
places = [int(place) for place in generator.integers(8 * len(sound), size=int(flips))]
lengths = [0, 1, len(sound) - 1]
lengths += [int(length) for length in generator.integers(len(sound), size=int(truncations))]
jobs = [("none", 0)]
jobs += [("flip", place) for place in places]
jobs += [("cut", length) for length in lengths[: int(truncations)]]
for kind, number in jobs:
    damaged = bytearray(sound)
    if kind == "flip":
        damaged[number // 8] ^= 1 << number % 8
    elif kind == "cut":
        del damaged[number:]
    path.write_bytes(damaged)
    print(json.dumps([kind, number]), end=" ", flush=True)  # the last one, if this process dies
    try:
        if is_d4rl:
            shutil.rmtree(Path(root) / name, ignore_errors=True)
            import_d4rl(path)
        episodes = load_dataset(name, download=False)
    except DatasetError:
        print(json.dumps(["refused"] * 3), flush=True)
    else:
        found = digest([episodes.observations], [episodes.actions], [episodes.rewards])
        there = found if is_d4rl else read_plainly(path)
        print(json.dumps([episodes.info.sha256, found, there]), flush=True)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def write_minari(root, data_format):
    """Write three episodes by Minari, and return the file to damage."""
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    generator = np.random.default_rng(0)
    root.mkdir()
    minari.create_dataset_from_buffers(
        NAME,
        [
            EpisodeBuffer(
                id=index,
                observations=generator.normal(size=(steps + 1, 11)),
                actions=generator.uniform(-1, 1, (steps, 3)).astype(np.float32),
                rewards=generator.normal(size=steps),
                terminations=np.eye(steps, dtype=bool)[-1],
                truncations=np.zeros(steps, bool),
            )
            for index, steps in enumerate(LENGTHS)
        ],
        observation_space=Box(-np.inf, np.inf, (11,), np.float64),
        action_space=Box(-1, 1, (3,), np.float32),
        data_format=data_format,
    )
    data = root / NAME / "data"
    return data / "main_data.hdf5" if data_format == "hdf5" else data / f"1/part-0.{data_format}"


def write_d4rl(path):
    generator = np.random.default_rng(0)
    rows = sum(LENGTHS)
    columns = {
        "observations": generator.normal(size=(rows, 11)),
        "actions": generator.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": generator.normal(size=rows),
        "terminals": np.isin(np.arange(rows) + 1, np.cumsum(LENGTHS)),
    }
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file.create_dataset(name, data=values, compression="gzip", fletcher32=True)
    return path


def load_all_damaged(path, root, name, damages):
    """Return what the sound file gave, and what became of each kind of damage.

    Each is "refused" thrice, or the digests of the files, of the arrays loaded, and of those that
    another reader finds.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOAD_DAMAGED, str(path), str(root), name, *map(str, damages)],
        env=os.environ | {"MINARI_DATASETS_PATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-200:]}\n{done.stderr}"
    decoder = json.JSONDecoder()
    outcomes = {"none": [], "flip": [], "cut": []}
    for line in done.stdout.splitlines():
        (kind, _), end = decoder.raw_decode(line)
        outcomes[kind].append(tuple(json.loads(line[end:])))
    assert (len(outcomes["flip"]), len(outcomes["cut"])) == damages
    return outcomes["none"][0], outcomes["flip"], outcomes["cut"]


REFUSED = ("refused",) * 3


def count(flips, sound):
    refused = sum(one == REFUSED for one in flips)
    same = sum(one[1] == sound[1] for one in flips)
    return f"refused {refused}, the same {same}, other values {len(flips) - refused - same}"


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.parametrize("damages", DAMAGES, ids=str)
@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_damaged_minari_data_is_refused_or_read_as_it_is_now(root, data_format, damages):
    path = write_minari(root, data_format)
    sound, flips, cuts = load_all_damaged(path, root, NAME, damages)  # the first leaves a cache
    print(count(flips, sound))
    assert sound[1] == sound[2]
    assert all(one == REFUSED for one in cuts)
    assert all(one[1] == one[2] for one in flips)  # never the cache, nor anybody's memory
    # Formats without checksums cannot tell; but a run that has recorded the digest can.
    assert all(one[0] != sound[0] for one in flips if one[1] != sound[1])


@pytest.mark.parametrize("damages", DAMAGES, ids=str)
def test_a_damaged_d4rl_file_with_checksums_is_refused_or_almost_always_the_same(
    root, tmp_path, damages
):
    path = write_d4rl(tmp_path / "hopper_medium-v2.hdf5")
    sound, flips, cuts = load_all_damaged(path, root, "d4rl/hopper/medium-v2", damages)
    print(count(flips, sound))
    # Nothing is recorded before the first import, and HDF5 has checksums of chunks, none of what
    # says where and how long they are.
    silent = [one for one in flips if one != REFUSED and one[1] != sound[1]]
    assert len(silent) <= 0.01 * len(flips)
    assert all(one == REFUSED for one in cuts)
