import hashlib
import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from minrl.data.flat_cache import FlatArrays, digest_files, read_cache, write_cache


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    """Return a function that makes another user's cache folder the current one."""

    def become(name):
        monkeypatch.setenv("MINRL_CACHE", str(tmp_path / name / "cache"))
        return tmp_path / name / "cache"

    become("me")
    return become


@pytest.fixture
def folder(tmp_path):
    """The folder of the dataset."""
    (tmp_path / "dataset").mkdir()
    return tmp_path / "dataset"


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return FlatArrays(
        observations=generator.normal(size=(50, 11)).astype(np.float32),
        actions=generator.normal(size=(50, 3)).astype(np.float32),
        rewards=generator.normal(size=50).astype(np.float32),
        offsets=np.array([0, 20, 50]),
        terminated=np.array([True, False]),
        truncated=np.array([False, True]),
        final_observations=generator.normal(size=(2, 11)).astype(np.float32),
    )


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_cache_returns_what_was_written(folder, arrays):
    write_cache(folder, "abc", arrays)
    assert_equal(read_cache(folder, "abc"), arrays)
    assert names_in(folder) == ["minrl_flat.cache"]


def test_cache_of_other_content_is_not_used(folder, arrays):
    assert read_cache(folder, "abc") is None
    write_cache(folder, "abc", arrays)
    assert read_cache(folder, "abd") is None


def test_a_cache_that_another_user_wrote_is_not_believed_but_replaced(folder, arrays, user):
    user("somebody else")
    write_cache(folder, "abc", arrays)
    user("me")
    assert read_cache(folder, "abc") is None
    write_cache(folder, "abc", arrays)
    assert_equal(read_cache(folder, "abc"), arrays)


def test_what_comes_along_with_a_dataset_is_not_believed(folder, arrays):
    content = io.BytesIO()
    for array in arrays:
        np.save(content, array)
    content = content.getvalue()
    seals = [bytes(32), hashlib.sha256(content).digest(), hashlib.sha256(b"abc" + content).digest()]
    for seal in (b"", *seals):
        (folder / "minrl_flat.cache").write_bytes(seal + content)
        assert read_cache(folder, "abc") is None
    np.savez(folder / "minrl_flat.npz", key=np.array("1:abc"), **arrays._asdict())  # of old
    (folder / "minrl_flat.cache").unlink()
    assert read_cache(folder, "abc") is None
    os.mkfifo(folder / "minrl_flat.cache")
    assert read_cache(folder, "abc") is None


def test_damaged_cache_is_never_believed(folder, arrays):
    write_cache(folder, "abc", arrays)
    path = folder / "minrl_flat.cache"
    sound = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(sound)
        damaged[generator.integers(len(sound))] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        assert read_cache(folder, "abc") is None
    for length in generator.integers(len(sound), size=50):
        path.write_bytes(sound[:length])
        assert read_cache(folder, "abc") is None
    path.write_bytes(sound)
    assert_equal(read_cache(folder, "abc"), arrays)


def test_the_key_is_the_users_alone_and_made_anew_if_it_was_cut_short(folder, arrays, user):
    key = user("me") / "key"
    write_cache(folder, "abc", arrays)
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == 32
    key.write_bytes(b"")  # made by a process that was killed before it wrote
    assert read_cache(folder, "abc") is None
    write_cache(folder, "abc", arrays)
    assert len(key.read_bytes()) == 32
    assert_equal(read_cache(folder, "abc"), arrays)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"MINRL_CACHE": "a", "XDG_CACHE_HOME": "b"}, "a/key"),
        ({"XDG_CACHE_HOME": "b", "HOME": "c"}, "b/minrl/key"),
        ({"HOME": "c"}, "c/.cache/minrl/key"),
    ],
)
def test_the_key_is_in_the_users_cache(tmp_path, folder, arrays, monkeypatch, variables, place):
    for name in ("MINRL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    write_cache(folder, "abc", arrays)
    assert len((tmp_path / place).read_bytes()) == 32


def test_unwritable_folders_mean_no_cache_and_no_failure(tmp_path, folder, arrays, user):
    write_cache(tmp_path / "is" / "not" / "there", "abc", arrays)
    (folder / "file").write_text("")
    write_cache(folder / "file", "abc", arrays)
    cache = user("without a folder of caches")
    cache.parent.mkdir()
    cache.write_text("")  # cannot become a folder, not even by root
    write_cache(folder, "abc", arrays)
    assert read_cache(folder, "abc") is None
    assert names_in(folder) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_cache_is_as_readable_as_the_users_other_files(folder, arrays, mask):
    before = os.umask(mask)
    try:
        write_cache(folder, "abc", arrays)
    finally:
        os.umask(before)
    assert (folder / "minrl_flat.cache").stat().st_mode & 0o777 == 0o666 & ~mask


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from minrl.data.flat_cache import FlatArrays, write_cache

row = np.zeros(9, np.float32)
real = np.save
def save(file, array, **settings):
    if array is None:
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(file, array, **settings)
np.save = save
write_cache(Path(sys.argv[1]), "abc", FlatArrays(row, row, row, row, row, None, None))
"""


def test_what_a_killed_load_left_is_removed_by_the_next(folder, arrays):
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)])
    assert done.returncode == -signal.SIGKILL
    assert len(names_in(folder)) == 1
    assert read_cache(folder, "abc") is None
    write_cache(folder, "abc", arrays)
    assert names_in(folder) == ["minrl_flat.cache"]


def test_digest_is_that_of_the_contents_in_a_row(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"x" * 3_000_000)
    second.write_bytes(b"y")
    assert digest_files([first, second]) == hashlib.sha256(b"x" * 3_000_000 + b"y").hexdigest()
