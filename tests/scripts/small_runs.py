"""Configurations of runs that take a second."""

import dataclasses

from minrl.agents.trajectory import ModelConfig
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
