"""Batches of made-up windows, the same for the same step."""

import numpy as np

from minrl.data.windows import Batch


def make_batch(step, rows=8, length=6, observation_size=4, action_size=2):
    generator = np.random.default_rng((7, step))
    mask = np.arange(length) < generator.integers(1, length + 1, size=rows)[:, None]
    return Batch(
        observations=generator.normal(size=(rows, length, observation_size)).astype(np.float32),
        actions=np.tanh(generator.normal(size=(rows, length, action_size))).astype(np.float32),
        returns=generator.normal(size=(rows, length)).astype(np.float32),
        timesteps=np.tile(np.arange(length), (rows, 1)),
        mask=mask,
        loss_mask=mask,
    )
