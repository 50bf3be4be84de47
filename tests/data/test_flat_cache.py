import numpy as np
import pytest

from minrl.data.flat_cache import FlatArrays, digest_files, read_cache, write_cache


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


def test_cache_returns_what_was_written(tmp_path, arrays):
    write_cache(tmp_path, "abc", arrays)
    assert_equal(read_cache(tmp_path, "abc"), arrays)
    assert [path.name for path in tmp_path.iterdir()] == ["minrl_flat.npz"]


def test_cache_of_other_content_is_not_used(tmp_path, arrays):
    assert read_cache(tmp_path, "abc") is None
    write_cache(tmp_path, "abc", arrays)
    assert read_cache(tmp_path, "abd") is None


def test_damaged_cache_is_never_silently_different(tmp_path, arrays):
    write_cache(tmp_path, "abc", arrays)
    path = tmp_path / "minrl_flat.npz"
    sound = path.read_bytes()
    generator = np.random.default_rng(0)
    rejected = 0
    for _ in range(300):
        damaged = bytearray(sound)
        damaged[generator.integers(len(sound))] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        found = read_cache(tmp_path, "abc")
        if found is None:
            rejected += 1
        else:  # the bit did not matter, as in a time stamp
            assert_equal(found, arrays)
    assert rejected > 200
    for length in generator.integers(len(sound), size=50):
        path.write_bytes(sound[:length])
        assert read_cache(tmp_path, "abc") is None


def test_unwritable_folder_means_no_cache_and_no_failure(tmp_path, arrays):
    write_cache(tmp_path / "is" / "not" / "there", "abc", arrays)
    (tmp_path / "file").write_text("")
    write_cache(tmp_path / "file", "abc", arrays)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_digest_is_that_of_the_contents_in_a_row(tmp_path):
    import hashlib

    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"x" * 3_000_000)
    second.write_bytes(b"y")
    assert digest_files([first, second]) == hashlib.sha256(b"x" * 3_000_000 + b"y").hexdigest()
