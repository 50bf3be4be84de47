"""A checkpoint whose bytes have changed is never taken for a sound one."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch

from minrl import DecisionAgent
from minrl.agents.checkpoint import CheckpointFolder, load_weights, pack_weights
from minrl.agents.files import digest_of
from minrl.agents.model_config import ModelConfig
from minrl.agents.training import OptimizationConfig, Trainer
from minrl.agents.trajectory import TrajectoryModel
from minrl.data.windows import Batch
from minrl.errors import CheckpointError

FLIPS = [150, pytest.param(1500, marks=pytest.mark.slow)]
TRUNCATIONS = 50
SUFFIXES = ("safetensors", "trainer.safetensors", "json")


def take_a_step(trainer):
    generator = np.random.default_rng(trainer.step_count)
    mask = np.ones((4, 5), bool)
    arrays = generator.normal(size=(3, 4, 5, 3)).astype(np.float32)
    actions, returns = np.tanh(arrays[1, ..., :2]), arrays[2, ..., 0]
    timesteps = np.tile(np.arange(5), (4, 1))
    trainer.step(Batch(arrays[0], actions, returns, timesteps, mask, mask))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder of the checkpoints of two steps of a real, small training."""
    torch.manual_seed(0)
    model = TrajectoryModel(3, 2, ModelConfig(width=8, num_layers=1, max_timestep=10))
    config = OptimizationConfig(ema_decay=0.5)
    trainer = Trainer(model, config, total_steps=10)
    folder = CheckpointFolder(tmp_path_factory.mktemp("original"))
    for step in (1, 2):
        take_a_step(trainer)
        agent = DecisionAgent(trainer.acting_model, target_return=1.0, info={"step": step})
        weights = agent.model.state_dict()
        folder.save(step, weights, agent.header(), {"trainer": trainer.state_dict()})
    return folder


@pytest.fixture
def damaged(original, tmp_path):
    """A copy to damage."""
    shutil.copytree(original.path, tmp_path / "copy")
    return CheckpointFolder(tmp_path / "copy")


def read(folder, step):
    tensors, header = load_weights(folder.weights(step))
    return [tensors, header, folder.header(step), folder.trainer_state(step)]


def survives(original, damaged, step, assert_equal):
    """Tell whether the newest checkpoint is still the newest; it must then be as it was."""
    try:
        found = read(damaged, step)
    except CheckpointError:
        with pytest.warns(UserWarning, match="trying the checkpoint before it"):
            assert damaged.last() == step - 1
        return False
    assert damaged.last() == step
    assert_equal(found, read(original, step))
    return True


@pytest.mark.parametrize("flips", FLIPS)
def test_no_flipped_bit_changes_what_is_loaded(original, damaged, flips, assert_equal):
    generator, harmless = np.random.default_rng(0), 0
    for number in range(flips):
        path = damaged.path / f"step-00000002.{SUFFIXES[number % 3]}"
        sound = path.read_bytes()
        position = generator.integers(8 * len(sound))
        content = bytearray(sound)
        content[position // 8] ^= 1 << (position % 8)
        path.write_bytes(content)
        harmless += survives(original, damaged, 2, assert_equal)
        path.write_bytes(sound)
    assert harmless < flips / 10  # in the spaces of the JSON


@pytest.mark.parametrize("flips", FLIPS)
def test_no_flipped_bit_of_an_agents_file_is_loaded(original, tmp_path, flips, assert_equal):
    """An agent's file may be on its own, without the JSON that knows its SHA-256."""
    sound, path = original.weights(2).read_bytes(), tmp_path / "agent.safetensors"
    generator, refused = np.random.default_rng(1), 0
    for position in generator.integers(8 * len(sound), size=flips):
        content = bytearray(sound)
        content[position // 8] ^= 1 << (position % 8)
        path.write_bytes(content)
        try:
            found = load_weights(path)
        except CheckpointError:
            refused += 1
        else:
            assert_equal(list(found), list(load_weights(original.weights(2))))
    assert refused > 0.9 * flips


def test_no_truncated_file_is_loaded(original, damaged, assert_equal):
    for suffix in SUFFIXES:
        path = damaged.path / f"step-00000002.{suffix}"
        sound = path.read_bytes()
        for keep in np.linspace(0, len(sound) - 1, TRUNCATIONS, dtype=int):
            path.write_bytes(sound[:keep])
            assert not survives(original, damaged, 2, assert_equal)
            if suffix == "safetensors":
                with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
                    DecisionAgent.load(path)
        path.write_bytes(sound)


def reseal(record, **changes):
    """Change a checkpoint's JSON as somebody would who can count."""
    content = {**json.loads(record.read_text()), **changes}
    del content["sha256"]
    digest = digest_of(json.dumps(content, sort_keys=True).encode())
    record.write_text(json.dumps({**content, "sha256": digest}))


def test_another_file_in_its_place_is_refused(original, damaged, assert_equal):
    record = damaged.path / "step-00000002.json"
    path = damaged.path / "step-00000002.trainer.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch owned'\ntR.")
    assert not survives(original, damaged, 2, assert_equal)
    digests = {name: digest_of((damaged.path / name).read_bytes()) for name in names_of(damaged)}
    reseal(record, files=digests)
    with pytest.raises(CheckpointError, match="cannot be read as trainer state"):
        damaged.trainer_state(2)
    path.write_bytes(pack_weights({}, {"tree": [1, 2]}))
    digests[path.name] = digest_of(path.read_bytes())
    reseal(record, files=digests)
    with pytest.raises(CheckpointError, match="it is no dict"):
        damaged.trainer_state(2)
    reseal(record, files={})
    assert not survives(original, damaged, 2, assert_equal)


def names_of(folder):
    return [f"step-00000002.{suffix}" for suffix in SUFFIXES[:2]]


@pytest.mark.parametrize("number", [0, 99, "1", None, [1]])
def test_another_format_is_named(original, damaged, number):
    reseal(damaged.path / "step-00000002.json", format=number)
    with pytest.raises(CheckpointError, match="this version of minrl reads up to 2"):
        damaged.header(2)
    with pytest.warns(UserWarning, match=r"has format .*trying the checkpoint before it"):
        assert damaged.last() == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "[1]", "1", "null", '"x"', "[" * 10**5, "\\xff"])
def test_a_record_that_is_no_object_is_damaged(damaged, text):
    (damaged.path / "step-00000002.json").write_text(text)
    with pytest.raises(CheckpointError, match="its JSON cannot be read"):
        damaged.header(2)


def test_what_is_saved_after_falling_back_is_kept(damaged, original):
    """Damaged checkpoints of later steps take no place among the newest three."""
    state = {"trainer": {}}
    damaged.note_evaluation(2, 1.0)  # the best is kept
    for step in (20, 30, 40):
        damaged.save(step, {"w": torch.ones(1)}, {}, state)
        damaged.weights(step).write_bytes(b"")
    with pytest.warns(UserWarning, match="trying the checkpoint before it"):
        assert damaged.last() == 2
    for step in (3, 4):
        damaged.save(step, {"w": torch.ones(1)}, {}, state)
        with pytest.warns(UserWarning, match="trying the checkpoint before it"):
            assert damaged.last() == step
    assert damaged.steps() == [2, 3, 4, 20, 30, 40]
    damaged.save(50, {"w": torch.ones(1)}, {}, state)
    assert damaged.last() == 50
