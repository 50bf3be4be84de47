"""HDF5 files made to harm: refused by both readers, in a process that may take little memory."""

import json
import os
import re
import subprocess
import sys

import h5py
import pytest
from hopper_files import write_d4rl, write_minari
from hostile_hdf5 import KINDS, MEBI

from minrl.data import hdf5_guard
from minrl.data.d4rl_source import import_d4rl
from minrl.data.hdf5_guard import GuardedFile
from minrl.errors import DatasetError

MOST_MEMORY = 256 << 20  # above what importing and an honest load take

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


def test_a_pipe_or_a_folder_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "hopper-v2.hdf5")
    for path in (tmp_path / "hopper-v2.hdf5", tmp_path):
        with pytest.raises(DatasetError, match="there is no file"):
            import_d4rl(path, "d4rl/hopper/none-v0")
        with pytest.raises(FileNotFoundError, match="no file at"):
            GuardedFile(path)
