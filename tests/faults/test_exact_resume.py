"""A new process goes on from a checkpoint as the process that wrote it would have, bit for bit."""

import numpy as np
import pytest
import torch
from children import ask
from random_batches import make_batch

from minrl.agents.checkpoint import CheckpointFolder
from minrl.agents.model_config import ModelConfig
from minrl.agents.training import OptimizationConfig, Trainer
from minrl.agents.trajectory import TrajectoryModel

OPTIONS = {
    "plain": ({"tokens": "interleaved"}, {"schedule": "constant"}),
    "ema": ({"tokens": "interleaved"}, {"schedule": "constant", "ema_decay": 0.9}),
    "cosine-joint": (
        {"tokens": "joint"},
        {"schedule": "cosine", "action_dropout": 0.1, "return_noise": 0.1},
    ),
}
CUTS = [(30, 3), pytest.param((200, 20), marks=pytest.mark.slow)]


def make_trainer(name, total_steps, seed=0):
    torch.manual_seed(seed)
    shape, options = OPTIONS[name]
    model = TrajectoryModel(4, 2, ModelConfig(width=16, num_layers=2, dropout=0.1, **shape))
    config = OptimizationConfig(warmup_steps=5, **options)
    return Trainer(model, config, total_steps=total_steps)


def run(trainer, steps):
    return [trainer.step(make_batch(trainer.step_count)).loss for _ in range(steps)]


def save(trainer, path):
    folder = CheckpointFolder(path, keep=1000)
    weights = trainer.acting_model.state_dict()
    folder.save(trainer.step_count, weights, {}, {"trainer": trainer.state_dict()})


def go_on(name, path, cut, steps):
    """Go on from a cut to the end, save that, and return the losses on the way."""
    trainer = make_trainer(name, steps, seed=1)  # other weights, which loading must replace
    trainer.load_state_dict(CheckpointFolder(path).trainer_state(cut)["trainer"])
    losses = run(trainer, steps - cut)
    save(trainer, path / f"from-{cut}")
    return losses


@pytest.mark.integration
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", CUTS, ids=str)
def test_a_new_process_goes_on_bit_for_bit_from_any_cut(name, lengths, tmp_path, assert_equal):
    steps, number = lengths
    cuts = np.random.default_rng(0).choice(np.arange(1, steps), number, replace=False).tolist()
    whole, losses = make_trainer(name, steps), []
    for step in range(steps):
        losses += run(whole, 1)
        if step + 1 in cuts:
            save(whole, tmp_path)
    save(whole, tmp_path / "whole")
    expected = CheckpointFolder(tmp_path / "whole").trainer_state(steps)
    for cut in cuts:
        assert ask(go_on, name, tmp_path, cut, steps) == losses[cut:]
        assert_equal(CheckpointFolder(tmp_path / f"from-{cut}").trainer_state(steps), expected)
    assert len(set(losses)) == steps
