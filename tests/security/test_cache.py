"""Flat arrays that come along with a dataset, as if minrl had made them from it."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hopper_files import ROWS, hopper_arrays, write_minari

from minrl.data.minari_source import load_dataset


def hostile_arrays():
    """Return what would train on NaN and read far behind the arrays' end."""
    return {
        "observations": np.zeros((ROWS, 11), np.float32),
        "actions": np.full((ROWS, 3), np.nan, np.float32),
        "rewards": np.zeros(ROWS, np.float32),
        "offsets": np.array([0, 10**9]),
        "terminated": np.ones(1, bool),
        "truncated": np.zeros(1, bool),
        "final_observations": np.zeros((1, 11), np.float32),
    }


def old_cache(folder, sha256):
    """The form it once had, which anybody could write."""
    key = np.array(f"1:{sha256}")
    np.savez_compressed(folder / "minrl_flat.npz", key=key, **hostile_arrays())


def sealed_by_somebody(folder, sha256):
    content = io.BytesIO()
    for array in hostile_arrays().values():
        np.save(content, array)
    seal = hashlib.sha256(f"2:{sha256}:".encode() + content.getvalue()).digest()
    (folder / "minrl_flat.cache").write_bytes(seal + content.getvalue())


def pickled(folder, sha256):
    content = io.BytesIO()
    for _ in range(7):
        np.save(content, np.array([Path("/")], object))
    (folder / "minrl_flat.cache").write_bytes(bytes(32) + content.getvalue())


def link_to_the_memory(folder, sha256):
    os.symlink("/dev/zero", folder / "minrl_flat.cache")


@pytest.mark.parametrize("spoil", [old_cache, sealed_by_somebody, pickled, link_to_the_memory])
def test_a_cache_that_came_with_the_dataset_is_not_believed(tmp_path, monkeypatch, spoil):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write_minari(tmp_path, "honest")
    name = write_minari(tmp_path, "with a cache")
    spoil(tmp_path / name, load_dataset("hostile/honest-v0").info.sha256)  # of the same files
    rewards = hopper_arrays()["rewards"].astype(np.float32)
    assert np.array_equal(load_dataset(name).rewards, rewards)
    assert np.abs(load_dataset(name).actions).max() <= 1
