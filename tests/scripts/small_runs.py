"""Runs that take a second, and what is left of one."""

import dataclasses
import time

from minrl.agents.checkpoint import CheckpointFolder, load_weights
from minrl.agents.model_config import ModelConfig
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train_config import TrainConfig

SMALL = ModelConfig(width=16, num_layers=1)


def make_config(dataset, run_dir, **options):
    base = TrainConfig(
        dataset=(dataset,) if isinstance(dataset, str) else dataset,
        model=SMALL,
        steps=12,
        batch_size=8,
        eval_every=4,
        eval_episodes=2,
        final_episodes=2,
        log_every=5,
        device="cpu",
        run_dir=run_dir,
    )
    return dataclasses.replace(base, **options)


def wait_until(condition, seconds=120):
    """Wait for something that happens elsewhere; the machine may be busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def step_of(path):
    rows = RunFolder(path).read_metrics()
    return rows[-1]["step"] if rows else 0


def weights_of(path):
    folder = CheckpointFolder(path / "checkpoints")
    return load_weights(folder.weights(folder.last()))[0]


def losses_of(path):
    rows = RunFolder(path).read_metrics()
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
