import zipfile

import gymnasium
import minari
import numpy as np
import pytest

from minrl.cli import main
from minrl.data.array_source import import_arrays
from minrl.data.dataset_ids import dataset_folder
from minrl.data.minari_source import load_dataset
from minrl.data.minari_writer import DatasetCard
from minrl.errors import ConfigError, DatasetError
from minrl.scripts.datasets import import_arrays_command

PENDULUM = {"environment": "Pendulum-v1"}


def make_arrays(rows=25, **changes):
    """Episodes of 10, 8 (terminated) and 7 steps, the last without an end."""
    generator = np.random.default_rng(0)
    terminals, timeouts = np.zeros(rows, bool), np.zeros(rows, bool)
    timeouts[9], terminals[17] = True, True
    arrays = {
        "observations": generator.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "actions": generator.uniform(-2, 2, (rows, 1)).astype(np.float32),
        "rewards": generator.normal(size=rows),
        "terminals": terminals,
        "timeouts": timeouts,
    } | changes
    return {name: values for name, values in arrays.items() if values is not None}


@pytest.fixture
def save(tmp_path):
    def save(**changes):
        path = tmp_path / "arrays.npz"
        np.savez(path, **make_arrays(**changes))
        return path

    return save


def test_every_step_arrives_in_its_episode(save):
    arrays = make_arrays()
    import_arrays_command(save(), id="test/arrays/plain-v0", **PENDULUM)
    episodes = load_dataset("test/arrays/plain-v0")
    assert episodes.lengths.tolist() == [10, 8, 7]
    assert episodes.terminated.tolist() == [False, True, False]
    assert episodes.truncated.tolist() == [True, False, True]
    np.testing.assert_array_equal(episodes.observations, arrays["observations"])
    np.testing.assert_array_equal(episodes.actions, arrays["actions"])
    np.testing.assert_array_equal(episodes.rewards, arrays["rewards"].astype(np.float32))
    assert episodes.info.environment_id == "Pendulum-v1"
    assert episodes.info.reference_min is None


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"on_bad_episode": "Raise"}, ConfigError, 'must be "raise" or "drop", got \'Raise\''),
        ({"environment": "Pendulums-v1"}, DatasetError, "Pendulums-v1 is not known: .*Pendulum"),
    ],
)
def test_what_is_misspelt_is_named_from_python_too(save, options, kind, message):
    environment = gymnasium.make("Pendulum-v1")
    card = DatasetCard(
        dataset_id="test/arrays/misspelt-v0",
        environment_id=options.pop("environment", "Pendulum-v1"),
        observation_space=environment.observation_space,
        action_space=environment.action_space,
        algorithm_name="random",
        description="none",
    )
    with pytest.raises(kind, match=message):
        import_arrays(save(), card, **options)
    assert not dataset_folder(card.dataset_id).exists()


def test_ends_that_are_not_marked_are_noticed(save):
    path = save(rows=300, terminals=np.zeros(300, bool), timeouts=np.zeros(300, bool))
    with pytest.warns(
        UserWarning, match="episode 0 has 300 steps, where Pendulum-v1 ends after 200"
    ):
        import_arrays_command(path, id="test/arrays/endless-v0", **PENDULUM)


def test_next_observations_and_reference_scores_are_kept(save):
    following = np.random.default_rng(1).uniform(-1, 1, (25, 3)).astype(np.float32)
    path = save(next_observations=following)
    scores = (-1200.0, -150.0)
    import_arrays_command(path, id="test/arrays/next-v0", reference_scores=scores, **PENDULUM)
    episodes = load_dataset("test/arrays/next-v0")
    np.testing.assert_array_equal(episodes.final_observations, following[[9, 17, 24]])
    assert (episodes.info.reference_min, episodes.info.reference_max) == scores


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, "has no array 'rewards'; it has observations, actions, terminals"),
        (
            {"observations": np.zeros((25, 4))},
            r"have shape \(25, 4\), expected \(25, 3\)",
        ),
        ({"actions": np.zeros(24)}, r"actions have shape \(24,\), expected \(25, 1\)"),
        ({"rewards": np.array(["a"] * 25)}, "rewards are <U1, not real numbers"),
        ({"rewards": np.float64(3)}, r"rewards have shape \(\), expected \(25,\)"),
        ({"rewards": np.zeros(24)}, r"rewards have shape \(24,\), expected \(25,\)"),
        (dict.fromkeys(make_arrays(), np.zeros(0)), "no rows"),
        (
            {"terminals": None, "terminated": np.zeros(25)},
            r"no array 'terminals' \(terminals are Gymnasium's terminated\); .* timeouts, term",
        ),
        ({"terminals": np.full(25, np.nan)}, "terminals must be 0 or 1 each, not nan as at step 0"),
        ({"timeouts": np.arange(25)}, "timeouts must be 0 or 1 each, not 2 as at step 2"),
        ({"rewards": np.full(25, np.nan)}, r"rule finite, episode 0, step 0: rewards = nan"),
        ({"actions": np.full((25, 1), 3.0)}, r"rule bounds, episode 0.*outside \[-2, 2\]"),
        ({"rewards": np.array([print] * 25)}, "cannot be read as an .npz file: Object arrays"),
    ],
)
def test_what_is_wrong_is_named(save, changes, message):
    with pytest.raises(DatasetError, match=message):
        import_arrays_command(save(**changes), id="test/arrays/wrong-v0", **PENDULUM)
    assert not dataset_folder("test/arrays/wrong-v0").exists()  # in the way of what is right


@pytest.mark.parametrize("scores", [(5.0, 5.0), (5.0, 4.0), (float("nan"), 5.0)])
def test_reference_scores_that_are_no_scale_are_refused(save, scores):
    with pytest.raises(DatasetError, match="reference scores must be finite, the lower first"):
        import_arrays_command(
            save(), id="test/arrays/wrong-v0", reference_scores=scores, **PENDULUM
        )
    assert not dataset_folder("test/arrays/wrong-v0").exists()


@pytest.mark.parametrize("name", ["entry_point", "kwargs"])
def test_environments_registered_with_classes_are_written_or_named(save, monkeypatch, name):
    from gymnasium.envs.classic_control import PendulumEnv

    given = {"entry_point": PendulumEnv} | (
        {"kwargs": {"g": np.ones(1)}} if name == "kwargs" else {}
    )
    monkeypatch.setattr(gymnasium, "registry", dict(gymnasium.registry))
    monkeypatch.setattr("gymnasium.envs.registration.registry", gymnasium.registry)
    gymnasium.register("Mine-v0", max_episode_steps=10, **given)
    if name == "kwargs":
        with pytest.raises(DatasetError, match="Mine-v0 is registered with arguments that a data"):
            import_arrays_command(save(), id="test/arrays/odd-v0", environment="Mine-v0")
        assert not dataset_folder("test/arrays/odd-v0").exists()
    else:
        import_arrays_command(save(), id="test/arrays/own-v0", environment="Mine-v0")
        made = minari.load_dataset("test/arrays/own-v0").recover_environment()
        assert isinstance(made.unwrapped, PendulumEnv)


def test_the_ids_of_embedded_datasets_are_refused(save):
    with pytest.raises(DatasetError, match="begin with minrl/ are those of embedded datasets"):
        import_arrays_command(save(), id="minrl/hopper/medium-v0", **PENDULUM)


def test_bad_episodes_can_be_left_out(save):
    rewards = np.ones(25)
    rewards[12] = np.inf
    path, name = save(rewards=rewards), "test/arrays/dropped-v0"
    with pytest.warns(UserWarning, match="1 of 3 episodes are bad and dropped"):
        import_arrays_command(path, id=name, on_bad_episode="drop", **PENDULUM)
    assert load_dataset(name).lengths.tolist() == [10, 7]
    with pytest.raises(ConfigError, match='must be "raise" or "drop", got'):
        import_arrays_command(path, id=name, on_bad_episode="keep", **PENDULUM)


def test_what_is_no_npz_file_is_refused(tmp_path, save):
    text, single = tmp_path / "text.npz", tmp_path / "single.npy"
    text.write_text("not a zip")
    np.save(single, np.zeros(3))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(save().read_bytes()[:-100])
    damaged = tmp_path / "damaged.npz"
    np.savez_compressed(damaged, **make_arrays())
    content = bytearray(damaged.read_bytes())
    content[200:400] = bytes(200)
    damaged.write_bytes(content)
    encrypted = bytearray(save().read_bytes())
    for at in (encrypted.index(b"PK\x03\x04") + 6, encrypted.index(b"PK\x01\x02") + 8):
        encrypted[at] |= 1
    locked, text_inside, bomb = (tmp_path / f"{name}.npz" for name in ("locked", "inside", "bomb"))
    locked.write_bytes(encrypted)
    with zipfile.ZipFile(save()) as source, zipfile.ZipFile(text_inside, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"no array" if name == "rewards.npy" else source.read(name))
    np.savez_compressed(bomb, **make_arrays() | {"rewards": np.zeros(10**7)})
    for path in (text, single, cut, damaged, locked, text_inside, bomb, tmp_path):
        with pytest.raises(DatasetError, match=path.name):
            import_arrays_command(path, id="test/arrays/wrong-v0", **PENDULUM)
    with pytest.raises(DatasetError, match=r"bomb.npz unpack to 76 MiB; 64 MiB are allowed"):
        import_arrays_command(bomb, id="test/arrays/wrong-v0", **PENDULUM)
    for path in (tmp_path, tmp_path / "missing.npz"):
        with pytest.raises(DatasetError, match="there is no file"):
            import_arrays_command(path, id="test/arrays/wrong-v0", **PENDULUM)


def test_an_id_that_is_taken_is_left_alone_and_the_command_says_so(save, capsys):
    arguments = ["datasets", "import", str(save()), "--environment", "Pendulum-v1", "--id"]
    assert main([*arguments, "test/arrays/taken-v0"]) == 0
    output = capsys.readouterr().out
    assert "3 (1 terminated, 2 truncated" in output
    assert "no reference scores are known" in output
    assert main([*arguments, "test/arrays/taken-v0"]) == 2
    assert "exists already" in capsys.readouterr().err
