import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minrl.data.d4rl_source import import_d4rl
from minrl.data.minari_source import load_dataset
from minrl.errors import DatasetError

EXAMPLES = [20, pytest.param(200, marks=pytest.mark.slow)]


def columns(rows, seed=0):
    generator = np.random.default_rng(seed)
    observations = generator.normal(size=(rows + 1, 11)).astype(np.float32)
    return {
        "observations": observations[:-1],
        "next_observations": observations[1:].copy(),
        "actions": generator.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": generator.normal(size=rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.zeros(rows, bool),
    }


def write_file(path, arrays):
    """Write D4RL's layout: flat gzip arrays, with groups of scalars and policy weights beside."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")
        rows = len(arrays["rewards"])
        file["infos/qpos"] = np.zeros((rows, 6))
        file["infos/action_log_probs"] = np.zeros(rows)
        file["metadata/algorithm"] = np.bytes_("SAC")
        file["metadata/iteration"] = np.array(600)
        file["metadata/policy/fc0/weight"] = np.zeros((256, 11))
    return path


def load_file(path, arrays, **settings):
    return load_dataset(import_d4rl(write_file(path, arrays), **settings))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_d4rl_round_trip_is_bit_equal(fresh_root, tmp_path, examples):
    @settings(max_examples=examples)
    @given(
        lengths=st.lists(st.integers(1, 15), min_size=1, max_size=6),
        kinds=st.lists(st.sampled_from(["terminal", "timeout", "both"]), min_size=6, max_size=6),
        tail=st.integers(0, 5),
        seed=st.integers(0, 1000),
    )
    def check(lengths, kinds, tail, seed):
        fresh_root()
        arrays = columns(sum(lengths) + tail, seed)
        ends = np.cumsum(lengths) - 1
        for end, kind in zip(ends, kinds, strict=False):
            arrays["terminals"][end] = kind in ("terminal", "both")
            arrays["timeouts"][end] = kind in ("timeout", "both")
        episodes = load_file(tmp_path / "hopper_medium-v2.hdf5", arrays)
        assert episodes.lengths.tolist() == lengths + [tail] * bool(tail)
        for name in ("observations", "actions", "rewards"):
            assert np.array_equal(getattr(episodes, name), arrays[name])
        last_rows = episodes.offsets[1:] - 1
        assert np.array_equal(episodes.final_observations, arrays["next_observations"][last_rows])
        terminated = [kind != "timeout" for kind in kinds[: len(lengths)]]  # terminal wins
        assert episodes.terminated.tolist() == terminated + [False] * bool(tail)
        assert np.array_equal(episodes.truncated, ~episodes.terminated)  # the tail too

    check()


def test_imported_dataset_says_where_it_belongs(root, tmp_path):
    arrays = columns(10)
    arrays["terminals"][9] = True
    path = tmp_path / "hopper_medium_replay-v2.hdf5"
    episodes = load_file(path, arrays, reference_scores={"hopper": (-20.0, 3234.0)})
    info = episodes.info
    assert info.dataset_id == "d4rl/hopper/medium-replay-v2"
    assert (info.environment_id, info.max_episode_steps) == ("Hopper-v4", 1000)
    assert (info.reference_min, info.reference_max) == (-20.0, 3234.0)
    assert info.score_note == "D4RL-v2 data on Hopper-v4, D4RL reference scores"


def test_older_versions_are_called_what_they_are(root, tmp_path):
    arrays = columns(10)
    arrays["terminals"][9] = True
    info = load_file(tmp_path / "hopper_medium-v0.hdf5", arrays).info
    assert info.score_note == "D4RL-v0 data on Hopper-v4, D4RL reference scores"


@pytest.mark.parametrize(
    ("name", "dataset_id", "expected"),
    [
        ("hopper_medium-v2.hdf5", None, "d4rl/hopper/medium-v2"),
        ("hopper-medium-expert-v2.hdf5", None, "d4rl/hopper/medium-expert-v2"),
        ("Hopper_random-v0.hdf5", None, "d4rl/hopper/random-v0"),
        ("hopper.hdf5", None, "d4rl/hopper/data-v2"),
        ("file.hdf5", "mine/hopper/x-v3", "mine/hopper/x-v3"),
        ("walker2d_medium-v2.hdf5", "mine/hopper/x-v3", "mine/hopper/x-v3"),
    ],
)
def test_id_comes_from_the_name_unless_given(root, tmp_path, name, dataset_id, expected):
    assert import_d4rl(write_file(tmp_path / name, columns(5)), dataset_id) == expected


def test_file_without_timeouts_is_cut_after_a_thousand_steps(root, tmp_path):
    arrays = columns(2705)
    del arrays["timeouts"]
    arrays["terminals"][[199, 1199]] = True
    episodes = load_file(tmp_path / "hopper_medium-v2.hdf5", arrays)
    assert episodes.lengths.tolist() == [200, 1000, 1000, 505]
    assert episodes.terminated.tolist() == [True, True, False, False]
    assert np.array_equal(episodes.rewards, arrays["rewards"])


def test_missing_timeouts_among_others_are_cut_too(root, tmp_path):
    arrays = columns(2500)
    arrays["timeouts"][999] = True  # that of row 1,999 is missing
    episodes = load_file(tmp_path / "hopper_medium_replay-v2.hdf5", arrays)
    assert episodes.lengths.tolist() == [1000, 1000, 500]


def test_rewards_and_flags_in_a_column_are_flattened(root, tmp_path):
    arrays = columns(8)
    arrays["terminals"][7] = True
    for name in ("rewards", "terminals", "timeouts"):
        arrays[name] = arrays[name][:, None]
    episodes = load_file(tmp_path / "hopper_medium-v2.hdf5", arrays)
    assert np.array_equal(episodes.rewards, arrays["rewards"][:, 0])
    assert episodes.terminated.tolist() == [True]


def test_without_next_observations_no_step_and_no_reward_is_lost(root, tmp_path):
    arrays = columns(8)
    del arrays["next_observations"]
    arrays["timeouts"][[3, 7]] = True
    episodes = load_file(tmp_path / "hopper_medium-v2.hdf5", arrays)
    assert episodes.lengths.tolist() == [4, 4]
    assert np.array_equal(episodes.rewards, arrays["rewards"])
    assert np.array_equal(episodes.final_observations, arrays["observations"][[3, 7]])
    assert episodes.returns[0] == pytest.approx(arrays["rewards"][:4].sum(dtype=float))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terminals": None}, "no array 'terminals'"),
        ({"rewards": np.zeros((8, 2))}, r"rewards have shape \(8, 2\), expected \(8,\)"),
        ({"actions": np.zeros((8, 6), np.float32)}, r"actions have shape \(8, 6\), expected"),
        ({"observations": np.zeros((7, 11))}, r"observations have shape \(7, 11\), expected"),
        ({"rewards": np.array([b"x"] * 8)}, "rewards are .*not real numbers"),
        ({"rewards": np.zeros(0), "infos": None}, "no rows"),
    ],
)
def test_file_of_another_layout_is_refused(root, tmp_path, changes, message):
    arrays = columns(8) | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(DatasetError, match=message):
        load_file(tmp_path / "hopper_medium-v2.hdf5", arrays)
    assert not (root / "d4rl").exists()


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_observations_that_are_whole_numbers_are_taken(root, tmp_path, dtype):
    arrays = columns(10)
    for name in ("observations", "next_observations"):
        arrays[name] = (arrays[name] > 0).astype(dtype)
    episodes = load_file(tmp_path / "hopper_medium-v2.hdf5", arrays)
    assert np.array_equal(episodes.observations, arrays["observations"])


@pytest.mark.parametrize("name", ["terminals", "timeouts"])
def test_a_flag_that_is_not_a_number_is_no_end(root, tmp_path, name):
    arrays = columns(10) | {name: np.full(10, np.nan)}
    with pytest.raises(DatasetError, match=f"{name} must be 0 or 1 each, not nan as at step 0"):
        load_file(tmp_path / "hopper_medium-v2.hdf5", arrays)


def test_bad_episodes_can_be_left_out(root, tmp_path):
    arrays = columns(10)
    arrays["timeouts"][[3, 6, 9]] = True
    arrays["rewards"][5] = np.nan
    path = tmp_path / "hopper_medium-v2.hdf5"
    with pytest.raises(DatasetError, match="episode 1"):
        load_file(path, arrays)
    with pytest.warns(UserWarning, match="dropped"):
        episodes = load_file(path, arrays, on_bad_episode="drop")
    assert episodes.lengths.tolist() == [4, 3]


def test_pickles_and_other_files_are_refused(root, tmp_path):
    for name in ("hopper-medium-v2.pkl", "hopper-medium-v2.pickle"):
        with pytest.raises(DatasetError, match="is a pickle, which can run any code"):
            import_d4rl(tmp_path / name)
    text = tmp_path / "hopper_medium-v2.hdf5"
    with pytest.raises(DatasetError, match="there is no file"):
        import_d4rl(text)
    text.write_text("not HDF5")
    with pytest.raises(DatasetError, match="cannot be read as an HDF5 file"):
        import_d4rl(text)


def test_unknown_task_hostile_id_and_taken_id_are_refused(root, tmp_path):
    ant = write_file(tmp_path / "ant_medium-v2.hdf5", columns(5))
    with pytest.raises(DatasetError, match=r"tells the task.*halfcheetah, hopper, walker2d"):
        import_d4rl(ant)
    hopper = write_file(tmp_path / "hopper_medium-v2.hdf5", columns(5))
    with pytest.raises(DatasetError, match="malformed dataset id"):
        import_d4rl(hopper, "../hopper-v0")
    import_d4rl(hopper)
    with pytest.raises(DatasetError, match="d4rl/hopper/medium-v2 exists already"):
        import_d4rl(hopper)
