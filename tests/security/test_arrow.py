"""Arrow and Parquet datasets that declare more than they hold, or hold something else."""

import json
import shutil

import numpy as np
import pyarrow
import pyarrow.dataset
import pytest
from hopper_files import ROWS, hopper_arrays, metadata

from minrl.data.minari_source import load_dataset
from minrl.errors import DatasetError

NAME = "hostile/arrow-v0"


def numbers(array):
    array = np.concatenate([array, array[:1]])  # Minari pads to the length of the observations
    if array.ndim == 1:
        return pyarrow.array(array)
    kind = pyarrow.list_(pyarrow.from_numpy_dtype(array.dtype), array.shape[1])
    return pyarrow.FixedSizeListArray.from_arrays(array.reshape(-1), type=kind)


def columns():
    arrays = hopper_arrays()
    arrays["terminations"], arrays["truncations"] = arrays.pop("terminals"), arrays.pop("timeouts")
    return {name: numbers(array) for name, array in arrays.items()}


@pytest.fixture(params=["arrow", "parquet"])
def write(request, tmp_path, monkeypatch):
    """Return a function that writes the one episode, with some columns replaced."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = tmp_path / NAME / "data"

    def write(**changes):
        table = pyarrow.table({n: c for n, c in (columns() | changes).items() if c is not None})
        pyarrow.dataset.write_dataset(table, data / "0", format=request.param)
        (data / "metadata.json").write_text(json.dumps(metadata() | {"data_format": request.param}))
        return data / "0"

    return write


def test_the_honest_file_is_read(write):
    write(infos=pyarrow.array(["any"] * (ROWS + 1)))
    episodes = load_dataset(NAME)
    assert np.array_equal(episodes.rewards, hopper_arrays()["rewards"].astype(np.float32))
    assert np.array_equal(episodes.observations, hopper_arrays()["observations"].astype(np.float32))


@pytest.mark.parametrize(
    ("column", "rule"),
    [
        (None, "arrays"),
        (pyarrow.array([[0.0] * 11] * (ROWS + 1)), "arrays"),  # lists of any length
        (pyarrow.array(["text"] * (ROWS + 1)), "arrays"),
        (pyarrow.array([b"JPEG"] * (ROWS + 1)), "arrays"),
        (pyarrow.array([{"x": 0.0}] * (ROWS + 1)), "arrays"),
        (pyarrow.nulls(ROWS + 1), "arrays"),
        (pyarrow.array(["text"] * (ROWS + 1)).dictionary_encode(), "arrays"),
        (numbers(np.zeros((ROWS, 10))), "shape"),
        (numbers(np.zeros(ROWS)), "shape"),
    ],
    ids=["none", "lists", "text", "bytes", "struct", "nulls", "dictionary", "width", "numbers"],
)
def test_other_columns_are_a_bad_episode(write, column, rule):
    write(observations=column)
    with pytest.raises(DatasetError, match=f"rule {rule}, episode 0"):
        load_dataset(NAME)


def test_missing_values_are_a_bad_episode(write):
    write(rewards=pyarrow.array([None] + [0.0] * ROWS))
    with pytest.raises(DatasetError, match="rule finite, episode 0, step 0: rewards = nan"):
        load_dataset(NAME)


def test_many_rows_in_a_small_file_are_refused_before_they_are_read(write):
    rows = 800_000
    flat = pyarrow.array(np.zeros(rows * 11))
    wide = pyarrow.FixedSizeListArray.from_arrays(flat, 11)
    folder = write(
        **{name: pyarrow.array(np.zeros(rows)) for name in ("rewards", "terminations")},
        truncations=None,
        actions=None,
        observations=wide,
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    is_packed = size < 2 * rows  # Arrow's own format is as large as it says
    expected = "episodes 0 to 0 declare 83200000 bytes, where the" if is_packed else "rule arrays"
    with pytest.raises(DatasetError, match=expected):
        load_dataset(NAME)


def replace_numbers(path, old, new):
    """Change every aligned number of 8 bytes in a file that is `old`."""
    content = path.read_bytes()
    words = np.frombuffer(content[: len(content) // 8 * 8], "<i8").copy()
    assert (words == old).any()
    words[words == old] = new
    path.write_bytes(words.tobytes() + content[len(words) * 8 :])


@pytest.mark.parametrize("write", ["arrow"], indirect=True)
@pytest.mark.parametrize("name", ["terminations", "with nulls", "rewards", "actions"])
def test_columns_that_are_shorter_than_their_rows_are_refused(write, name):
    column = columns().get(name, pyarrow.array([True, None] * 4 + [False]))
    folder = write(
        **dict.fromkeys(columns(), None) | {name.replace("with nulls", "terminations"): column}
    )
    replace_numbers(next(folder.iterdir()), ROWS + 1, 20_000)
    with pytest.raises(DatasetError, match=r"data in .* cannot be read .(ArrowInvalid|OSError)"):
        load_dataset(NAME)


def test_files_with_other_types_in_one_episode_are_refused(write):
    folder = write()
    path = next(folder.iterdir())
    shutil.move(path, folder.parent / path.name)
    write(terminations=pyarrow.array(np.zeros(ROWS + 1)))
    shutil.move(folder.parent / path.name, folder / f"part-1{path.suffix}")
    with pytest.raises(
        DatasetError, match="the files of episode 0 have columns of different types"
    ):
        load_dataset(NAME)


def test_more_episodes_than_the_metadata_counts_are_refused(write):
    folder = write()
    shutil.copytree(folder, folder.parent / "_ours")
    shutil.copytree(folder, folder.parent / ".hidden")
    assert load_dataset(NAME).num_episodes == 1
    shutil.copytree(folder, folder.parent / "1")
    with pytest.raises(DatasetError, match=r"rule total_episodes: the metadata says 1 .* has 2"):
        load_dataset(NAME)


def test_damaged_files_are_refused(write):
    folder = write()
    path = next(folder.iterdir())
    content = path.read_bytes()
    for damaged in (content[:100], b"", content[: len(content) // 2], b"x" * len(content)):
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"data in .* cannot be read|rule"):
            load_dataset(NAME)
