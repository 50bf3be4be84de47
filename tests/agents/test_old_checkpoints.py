"""Checkpoints written by earlier versions: one tiny folder for each format, kept in the tree.

A change of format adds a folder beside these, written by a small training of the version that comes
with it; none is ever written again. No released version wrote format 1, whose trainer state is a
pickle: its weights act, and training does not go on from it.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minrl import DecisionAgent
from minrl.agents import checkpoint
from minrl.agents.checkpoint import CheckpointFolder
from minrl.agents.training import OptimizationConfig, Trainer
from minrl.agents.trajectory import TrajectoryModel

ASSETS = Path(__file__).parents[1] / "assets" / "checkpoints"
# Two actions of each, worked out from its weights with NumPy and the formulas of the model alone.
ACTIONS = {
    "format-1": [[0.76159, -0.24717], [0.63147, -0.17404]],
    "format-2": [[0.76159, -0.24722], [0.63148, -0.17403]],
}


def test_there_is_one_for_every_format():
    names = [f"format-{number}" for number in range(1, checkpoint.FORMAT + 1)]
    assert sorted(path.name for path in ASSETS.iterdir()) == sorted(names)
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 50_000 * len(names)


@pytest.mark.parametrize("path", sorted(ASSETS.iterdir()), ids=lambda path: path.name)
def test_an_old_checkpoint_acts_as_it_did(path, tmp_path):
    shutil.copytree(path, tmp_path / "checkpoints")
    observation = np.array([1.0, -1.0, 0.5], np.float32)
    for name in ("last", "best"):
        agent = DecisionAgent.load(tmp_path, checkpoint=name)
        assert agent.model.return_scale == 1000.0
        for is_training in (False, True):  # that is, compiled and plain
            agent.model.train(is_training)
            agent.reset(target_return=500.0)
            actions = agent.act(observation), agent.act(-observation, 100.0)
            np.testing.assert_allclose(actions, ACTIONS[path.name], rtol=0, atol=1e-5)


def test_a_checkpoint_of_this_format_is_trained_on():
    folder = CheckpointFolder(ASSETS / f"format-{checkpoint.FORMAT}")
    step = folder.last()
    model = TrajectoryModel.from_description(folder.header(step)["model"])
    trainer = Trainer(model, OptimizationConfig(ema_decay=0.5), total_steps=10)
    trainer.load_state_dict(folder.trainer_state(step)["trainer"])
    assert trainer.step_count == step
    weights = trainer.acting_model.state_dict()
    for name, tensor in checkpoint.load_weights(folder.weights(step))[0].items():
        assert torch.equal(tensor, weights[name])


def test_training_does_not_go_on_from_format_1_and_says_what_can_be_done():
    folder = CheckpointFolder(ASSETS / "format-1")
    message = "has format 1, from which training cannot go on: train anew; minrl evaluate and"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        folder.trainer_state(folder.last())


@pytest.mark.parametrize("path", sorted(ASSETS.iterdir()), ids=lambda path: path.name)
def test_a_version_that_is_too_old_says_so(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 0)
    weights = next(path.glob("step-00000001.safetensors"))
    with pytest.raises(checkpoint.CheckpointError, match=r"has format \d; this version of minrl"):
        checkpoint.load_weights(weights)
