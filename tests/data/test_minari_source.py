import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

import minrl.data.minari_source as source
from minrl.data import dataset_ids, minari_writer
from minrl.data.episodes import Episode
from minrl.data.minari_source import list_datasets, load_dataset, local_ids
from minrl.errors import ConfigError, DatasetError

EXAMPLES = [20, pytest.param(200, marks=pytest.mark.slow)]

NAME = "test/toy/random-v0"


def data_folder(root, name=NAME):
    return root / name / "data"


def edit_metadata(root, **changes):
    path = data_folder(root) / "metadata.json"
    metadata = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in metadata.items() if v is not ...}))


def assert_equal_to(episodes, originals):
    assert episodes.lengths.tolist() == [len(original.actions) for original in originals]
    for index, original in enumerate(originals):
        rows = slice(episodes.offsets[index], episodes.offsets[index + 1])
        expected = original.observations.astype(np.float32)
        assert np.array_equal(episodes.observations[rows], expected[:-1])
        assert np.array_equal(episodes.final_observations[index], expected[-1])
        assert np.array_equal(episodes.actions[rows], original.actions)
        assert np.array_equal(episodes.rewards[rows], original.rewards.astype(np.float32))
        assert episodes.terminated[index] == original.terminated
        assert episodes.truncated[index] == original.truncated


@pytest.mark.parametrize("examples", EXAMPLES)
def test_minari_round_trip_is_bit_equal(fresh_root, make_episodes, write, examples):
    @settings(max_examples=examples)
    @given(
        lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
        seed=st.integers(0, 1000),
        unfinished=st.booleans(),
    )
    def check(lengths, seed, unfinished):
        fresh_root()
        originals = make_episodes(lengths, seed)
        if unfinished:
            originals[-1] = originals[-1]._replace(terminated=False, truncated=False)
        write(NAME, originals)
        for _ in range(2):  # from Minari's files, then from the cache
            episodes = load_dataset(NAME)
            assert_equal_to(episodes, originals)
            assert episodes.num_steps == sum(lengths)

    check()


def test_what_minari_reads_is_what_was_written(root, make_episodes, write):
    import minari

    originals = make_episodes([3, 6, 2])
    write(NAME, originals, reference_scores=(-1.5, 20.0))
    load_dataset(NAME)  # leaves its cache in the folder
    assert list(minari.list_local_datasets()) == [NAME]
    dataset = minari.load_dataset(NAME)
    assert (dataset.total_episodes, dataset.total_steps) == (3, 11)
    for original, episode in zip(originals, dataset, strict=True):
        assert np.array_equal(episode.observations, original.observations)
        assert np.array_equal(episode.actions, original.actions)
        assert np.array_equal(episode.rewards, original.rewards)
        assert bool(episode.terminations[-1]) == original.terminated
        assert not episode.terminations[:-1].any()
    assert minari.get_normalized_score(dataset, np.array([20.0])) == 1.0


@pytest.mark.filterwarnings("ignore:.*is set to None:UserWarning")
@pytest.mark.filterwarnings("ignore:env_spec is None:UserWarning")
@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_other_formats_give_the_same_episodes(root, make_episodes, data_format):
    import minari
    from minari.data_collector import EpisodeBuffer

    originals = make_episodes([3, 6, 2])
    minari.create_dataset_from_buffers(
        NAME,
        [
            EpisodeBuffer(
                id=index,
                observations=one.observations,
                actions=one.actions,
                rewards=one.rewards,
                terminations=np.eye(len(one.rewards), dtype=bool)[-1] & one.terminated,
                truncations=np.eye(len(one.rewards), dtype=bool)[-1] & one.truncated,
            )
            for index, one in enumerate(originals)
        ],
        observation_space=spaces.Box(-np.inf, np.inf, (11,), np.float64),
        action_space=spaces.Box(-1, 1, (3,), np.float32),
        data_format=data_format,
    )
    assert_equal_to(load_dataset(NAME), originals)


def test_info_says_what_the_data_is(root, make_episodes, write):
    box = spaces.Box(np.array([-2, -np.inf, -1]), np.array([2, np.inf, 1]), dtype=np.float64)
    originals = make_episodes([5, 4])
    write(NAME, originals, action_space=box, reference_scores=(-20.0, 3000.0))
    info = load_dataset(NAME).info
    seen = np.concatenate([one.actions for one in originals])[:, 1]
    assert info.action_low == pytest.approx((-2, seen.min(), -1))
    assert info.action_high == pytest.approx((2, seen.max(), 1))
    assert (info.environment_id, info.max_episode_steps) == ("Hopper-v5", 1000)
    assert (info.reference_min, info.reference_max) == (-20.0, 3000.0)
    assert info.score_note == "Minari data on Hopper-v5, the dataset's own reference scores"
    assert json.loads(json.dumps(asdict(info)))["sha256"] == info.sha256
    assert len(info.sha256) == 64


@pytest.mark.parametrize("bound", [np.inf, 3.4e38, 1.1e30])
def test_bounds_that_no_action_comes_near_count_as_none(root, make_episodes, write, bound):
    box = spaces.Box(np.array([-bound, -1e30, -1]), np.array([bound, 1e30, 1]), dtype=np.float64)
    originals = make_episodes([5, 4])
    write(NAME, originals, action_space=box)
    info = load_dataset(NAME).info
    seen = np.concatenate([one.actions for one in originals])[:, 0]
    assert info.action_low == pytest.approx((seen.min(), -1e30, -1))
    assert info.action_high == pytest.approx((seen.max(), 1e30, 1))
    with np.errstate(all="raise"):
        assert np.isfinite(np.subtract(info.action_high, info.action_low, dtype=np.float32)).all()


def test_union_by_several_ids_or_a_plus(root, make_episodes, write):
    first, second = make_episodes([3, 4], 0), make_episodes([5], 1)
    write("test/a-v0", first)
    write("test/b-v0", second)
    union = load_dataset(["test/a-v0", "test/b-v0"])
    assert_equal_to(union, first + second)
    assert union.info == load_dataset("test/a-v0+test/b-v0").info
    assert union.info.sha256 not in (
        load_dataset(i).info.sha256 for i in ("test/a-v0", "test/b-v0")
    )


def test_second_load_does_not_read_the_source_again(root, make_episodes, write, monkeypatch):
    originals = make_episodes([3, 4])
    write(NAME, originals)
    load_dataset(NAME)
    monkeypatch.setattr(source, "read_arrays", None)
    assert_equal_to(load_dataset(NAME), originals)


def test_changed_content_is_noticed_whatever_the_time_stamps(root, make_episodes, write):
    originals = make_episodes([3, 4])
    write(NAME, originals)
    before = load_dataset(NAME)
    path = data_folder(root) / "main_data.hdf5"
    times = path.stat()
    with h5py.File(path, "r+") as file:
        file["episode_1/rewards"][2] = 0.25
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = load_dataset(NAME)
    assert after.rewards[5] == 0.25
    assert after.info.sha256 != before.info.sha256


def test_folder_that_cannot_be_written_is_no_failure(root, make_episodes, write, monkeypatch):
    originals = make_episodes([3, 4])
    write(NAME, originals)
    (root / NAME / "minrl_flat.cache").mkdir()  # cannot be replaced by a file, not even by root
    assert_equal_to(load_dataset(NAME), originals)
    assert sorted(path.name for path in (root / NAME).iterdir()) == ["data", "minrl_flat.cache"]


def test_bad_episode_is_named_or_dropped_with_its_count(root, make_episodes, write):
    originals = make_episodes([3, 4, 2])
    originals[1].rewards[2] = np.nan
    write(NAME, originals)
    with pytest.raises(DatasetError, match="rule finite, episode 1, step 2: rewards = nan"):
        load_dataset(NAME)
    with pytest.warns(UserWarning, match=r"1 of 3 episodes are bad and dropped \(finite 1\)"):
        kept = load_dataset(NAME, on_bad_episode="drop")
    assert_equal_to(kept, [originals[0], originals[2]])
    with pytest.raises(DatasetError, match="rule finite"):  # what was kept is not cached
        load_dataset(NAME)
    with pytest.raises(ConfigError, match='"raise" or "drop", got \'skip\''):
        load_dataset(NAME, on_bad_episode="skip")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 8}, "rule total_steps: the metadata says 8 steps, the episodes have 7"),
        ({"total_steps": 6}, "rule total_steps: .* 6 steps, but episodes 0 to 1 have more"),
        ({"total_steps": 10**12}, "rule total_steps: .* cannot be in [0-9]+ bytes"),
        ({"total_episodes": 3}, "rule total_episodes: the metadata says 3 episodes, .* has 2"),
        ({"total_episodes": 1}, "rule total_episodes"),
        ({"total_episodes": "2"}, "total_episodes must be a positive whole number, got '2'"),
        ({"total_steps": -1}, "total_steps must be a positive whole number"),
        ({"data_format": ...}, "not usable .KeyError: 'data_format'"),
        ({"data_format": "pickle"}, "data_format must be one of .*, got 'pickle'"),
        ({"observation_space": ...}, "no observation_space, and minrl builds no environment"),
        ({"action_space": "{"}, "not usable"),
        ({"action_space": "[]"}, "not usable"),
        ({"env_spec": "[" * 100_000}, "not usable"),
    ],
)
def test_false_metadata_is_refused(root, make_episodes, write, changes, message):
    write(NAME, make_episodes([3, 4]))
    edit_metadata(root, **changes)
    with pytest.raises(DatasetError, match=f"dataset {NAME}.*{message}"):
        load_dataset(NAME)


@pytest.mark.parametrize(
    ("role", "space", "message"),
    [
        ("action", spaces.Discrete(3), "the action space is of type Discrete"),
        (
            "observation",
            spaces.Dict(position=spaces.Box(-1, 1, (2,))),
            "the observation space is of type Dict",
        ),
        (
            "observation",
            spaces.Box(0, 255, (64, 64, 3), np.uint8),
            r"the observation space is a Box of shape \(64, 64, 3\), as of images",
        ),
        ("action", spaces.MultiDiscrete([2, 3]), "the action space is of type MultiDiscrete"),
    ],
)
def test_other_spaces_are_refused_naming_what_is_supported(
    root, make_episodes, write, role, space, message
):
    from minari.serialization import serialize_space

    write(NAME, make_episodes([3, 4]))
    edit_metadata(root, **{f"{role}_space": serialize_space(space)})
    with pytest.raises(DatasetError, match=f"{message}; minrl supports one-dimensional Box"):
        load_dataset(NAME)


def test_missing_arrays_and_damaged_files_are_refused(root, make_episodes, write):
    write(NAME, make_episodes([3, 4]))
    path = data_folder(root) / "main_data.hdf5"
    with h5py.File(path, "r+") as file:
        del file["episode_1/actions"]
    with pytest.raises(DatasetError, match="rule arrays, episode 1: actions missing"):
        load_dataset(NAME)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DatasetError, match=r"hdf5 data in .* cannot be read"):
        load_dataset(NAME)
    path.unlink()
    with pytest.raises(DatasetError, match="not on this machine and downloads are off"):
        load_dataset(NAME, download=False)


def test_unknown_id_names_near_matches_and_an_embedded_one(root, make_episodes, write):
    write("test/hopper/mine-v0", make_episodes([3]))
    with pytest.raises(DatasetError, match="Did you mean test/hopper/mine-v0"):
        load_dataset("test/hopper/mine-v1", download=False)
    message = "Did you mean minrl/hopper/medium-v0.*embedded dataset such as minrl/hopper/medium-v0"
    with pytest.raises(DatasetError, match=message):
        load_dataset("minrl/hoper/medium-v0", download=False)
    with pytest.raises(ConfigError, match="at least one dataset id"):
        load_dataset([])


def test_list_shows_local_broken_and_embedded_datasets(root, make_episodes, write):
    assert [row.is_local for row in list_datasets()] == [False] * 9
    write("test/a-v0", make_episodes([3, 4]))
    write("test/deeper/still/b-v1", make_episodes([2]))
    write("test/c-v0", make_episodes([2]))
    (data_folder(root, "test/c-v0") / "metadata.json").write_text("{")
    rows = {row.dataset_id: row for row in list_datasets()}
    assert len(rows) == 12
    assert (rows["test/a-v0"].num_episodes, rows["test/a-v0"].num_steps) == (2, 7)
    assert rows["test/a-v0"].environment_id == "Hopper-v5"
    assert rows["test/c-v0"] == source.DatasetRow("test/c-v0", True, None, None, None)
    assert local_ids() == ["test/a-v0", "test/c-v0", "test/deeper/still/b-v1"]


def test_interrupted_write_leaves_nothing_and_can_be_repeated(
    root, make_episodes, write, monkeypatch
):
    import minari

    create = minari.create_dataset_from_buffers

    def fail(*arguments, **settings):
        create(*arguments, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(minari, "create_dataset_from_buffers", fail)
    with pytest.raises(KeyboardInterrupt):
        write(NAME, make_episodes([3, 4]))
    assert os.environ["MINARI_DATASETS_PATH"] == str(root)
    assert list(root.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    leftover = root / ".minrl-making--test--toy--random-v0"
    shutil.copytree(__file__.rpartition("/")[0], leftover)  # of a write that was killed
    write(NAME, make_episodes([3, 4]))
    assert load_dataset(NAME).num_steps == 7
    assert not leftover.exists()
    with pytest.raises(DatasetError, match="exists already"):
        write(NAME, make_episodes([3, 4]))


@pytest.mark.slow
def test_a_million_steps_load_within_five_seconds_and_half_a_second_after(root, write):
    generator = np.random.default_rng(0)
    write(
        NAME,
        [
            Episode(
                generator.normal(size=(501, 11)),
                generator.uniform(-1, 1, (500, 3)).astype(np.float32),
                generator.normal(size=500),
                True,
                False,
            )
            for _ in range(2000)
        ],
    )
    for limit in (5.0, 0.5):
        begin = time.perf_counter()
        assert load_dataset(NAME).num_steps == 1_000_000
        assert time.perf_counter() - begin < limit


def test_while_a_dataset_is_written_others_are_found(root, write, make_episodes, monkeypatch):
    write("test/there/before-v0", make_episodes([5]))
    create, found = minari_writer._create, []

    def look_meanwhile(card, episodes):
        found.append(load_dataset("test/there/before-v0", download=False).num_steps)
        create(card, episodes)

    monkeypatch.setattr(minari_writer, "_create", look_meanwhile)
    write("test/there/after-v0", make_episodes([7]))
    assert found == [5]
    assert load_dataset("test/there/after-v0", download=False).num_steps == 7
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    with dataset_ids.minari_writing_to(root):
        assert dataset_ids.datasets_root() == Path.home() / ".minari" / "datasets"
