"""A dataset whose bytes have changed is refused, or known to be another one; nothing crashes."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from minrl.data.d4rl_source import import_d4rl
from minrl.data.episodes import Episode
from minrl.data.minari_source import load_dataset
from minrl.data.minari_writer import DatasetCard, write_dataset

DAMAGES = [(40, 15), pytest.param((500, 50), marks=pytest.mark.slow)]  # flipped bits, truncations
NAME = "test/toy/random-v0"

LOAD_DAMAGED = """
import hashlib, json, shutil, sys
from pathlib import Path
import numpy as np
from minrl.data.d4rl_source import import_d4rl
from minrl.data.minari_source import load_dataset
from minrl.errors import DatasetError

path, root, name, flips, truncations = sys.argv[1:]
path, generator = Path(path), np.random.default_rng(0)
sound = path.read_bytes()
places = [int(place) for place in generator.integers(8 * len(sound), size=int(flips))]
lengths = [0, 1, len(sound) - 1]
lengths += [int(length) for length in generator.integers(len(sound), size=int(truncations))]
jobs = [("flip", place) for place in places]
jobs += [("cut", length) for length in lengths[: int(truncations)]]
for kind, number in jobs:
    damaged = bytearray(sound)
    if kind == "flip":
        damaged[number // 8] ^= 1 << number % 8
    else:
        del damaged[number:]
    path.write_bytes(damaged)
    print(json.dumps([kind, number]), end=" ", flush=True)  # the last one, if this process dies
    try:
        if path.suffix == ".hdf5" and path.parent.name != "data":
            shutil.rmtree(Path(root) / name, ignore_errors=True)
            import_d4rl(path)
        episodes = load_dataset(name, download=False)
    except DatasetError:
        print(json.dumps("refused"), flush=True)
    else:
        arrays = episodes.observations, episodes.actions, episodes.rewards, episodes.offsets
        values = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
        print(json.dumps([episodes.info.sha256, values]), flush=True)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def toy_episodes():
    generator = np.random.default_rng(0)
    return [
        Episode(
            observations=generator.normal(size=(steps + 1, 11)),
            actions=generator.uniform(-1, 1, (steps, 3)).astype(np.float32),
            rewards=generator.normal(size=steps),
            terminated=True,
            truncated=False,
        )
        for steps in (9, 5, 14)
    ]


def load_all_damaged(path, root, name, damages):
    """Return what became of each: "refused", or the digests of the files and of the arrays."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD_DAMAGED, str(path), str(root), name, *map(str, damages)],
        env=os.environ | {"MINARI_DATASETS_PATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-200:]}\n{done.stderr}"
    decoder = json.JSONDecoder()
    outcomes = []
    for line in done.stdout.splitlines():
        (kind, _), end = decoder.raw_decode(line)
        outcomes.append((kind, json.loads(line[end:])))
    assert len(outcomes) == sum(damages)
    return outcomes


@pytest.mark.parametrize("damages", DAMAGES, ids=str)
def test_a_damaged_minari_file_is_refused_or_has_another_digest(root, damages):
    from gymnasium.spaces import Box

    card = DatasetCard(
        dataset_id=NAME,
        environment_id="Hopper-v5",
        observation_space=Box(-np.inf, np.inf, (11,), np.float64),
        action_space=Box(-1, 1, (3,), np.float32),
        algorithm_name="random",
        description="made by a test",
    )
    write_dataset(card, toy_episodes())
    recorded = load_dataset(NAME).info.sha256  # leaves a cache, which must not be taken
    outcomes = load_all_damaged(root / NAME / "data" / "main_data.hdf5", root, NAME, damages)
    assert all(outcome[0] != recorded for _, outcome in outcomes)
    assert all(outcome == "refused" for kind, outcome in outcomes if kind == "cut")


@pytest.mark.parametrize("damages", DAMAGES, ids=str)
def test_a_damaged_d4rl_file_with_checksums_is_refused_or_almost_always_the_same(
    root, tmp_path, damages
):
    import h5py

    path = tmp_path / "hopper_medium-v2.hdf5"
    episodes = toy_episodes()
    with h5py.File(path, "w") as file:
        for name in ("observations", "actions", "rewards"):
            stop = -1 if name == "observations" else None
            values = np.concatenate([getattr(episode, name)[:stop] for episode in episodes])
            file.create_dataset(name, data=values, compression="gzip", fletcher32=True)
        ends = np.zeros(28, bool)
        ends[[8, 13, 27]] = True
        file.create_dataset("terminals", data=ends, compression="gzip", fletcher32=True)
    name = import_d4rl(path)
    arrays = load_dataset(name)
    parts = arrays.observations, arrays.actions, arrays.rewards, arrays.offsets
    values = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    outcomes = load_all_damaged(path, root, name, damages)
    # Nothing is recorded before the first import, and HDF5 has checksums of chunks, none of what
    # says where and how long they are.
    silent = [outcome for _, outcome in outcomes if outcome != "refused" and outcome[1] != values]
    assert len(silent) <= 0.01 * len(outcomes)
    assert all(outcome == "refused" for kind, outcome in outcomes if kind == "cut")
