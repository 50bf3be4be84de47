"""Small honest files of Hopper data in both layouts, which a test then spoils."""

import json

import h5py
import numpy as np

ROWS = 8


def hopper_arrays():
    generator = np.random.default_rng(0)
    return {
        "observations": generator.normal(size=(ROWS, 11)),
        "actions": generator.uniform(-1, 1, (ROWS, 3)).astype(np.float32),
        "rewards": generator.normal(size=ROWS),
        "terminals": np.zeros(ROWS, bool),
        "timeouts": np.eye(ROWS, dtype=bool)[-1],
    }


def write_d4rl(folder, kind, spoil=lambda file, name: None):
    """Write a D4RL file, let `spoil(file, name)` change an array of it, and return its path."""
    path = folder / f"hopper_{kind.replace(' ', '-')}-v2.hdf5"
    with h5py.File(path, "w") as file:
        for name, array in hopper_arrays().items():
            file[name] = array
        spoil(file, "observations")
    return path


def box(low, high, size):
    """Return a Box as Minari writes it."""
    return json.dumps(
        {
            "type": "Box",
            "dtype": "float64",
            "shape": [size],
            "low": [low] * size,
            "high": [high] * size,
        }
    )


def metadata():
    """Return what metadata.json says of the dataset below."""
    return {
        "data_format": "hdf5",
        "total_episodes": 1,
        "total_steps": ROWS,
        "observation_space": box(-9, 9, 11),
        "action_space": box(-1, 1, 3),
    }


def write_minari(root, kind, spoil=lambda file, name: None):
    """Write a Minari dataset of one episode in the same way, and return its id."""
    dataset_id = f"hostile/{kind.replace(' ', '-')}-v0"
    data = root / dataset_id / "data"
    data.mkdir(parents=True)
    arrays = hopper_arrays()
    arrays["terminations"] = arrays.pop("terminals")
    arrays["truncations"] = arrays.pop("timeouts")
    arrays["observations"] = np.concatenate([arrays["observations"], np.zeros((1, 11))])
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for name, array in arrays.items():
            file[f"episode_0/{name}"] = array
        spoil(file, "episode_0/observations")
    (data / "metadata.json").write_text(json.dumps(metadata()))
    return dataset_id
