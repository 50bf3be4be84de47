"""Episodes made up of noise: as large as the real ones, and there without a simulator."""

import numpy as np

from minrl.data.episodes import DatasetInfo, Episodes

OBSERVATION_SIZE, ACTION_SIZE, EPISODE_STEPS = 11, 3, 1000  # Hopper's


def make_episodes(num_steps: int) -> Episodes:
    """Return episodes of 1,000 steps, ``num_steps`` in all."""
    generator = np.random.default_rng(0)
    count = num_steps // EPISODE_STEPS
    steps = count * EPISODE_STEPS

    def noise(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    bounds = (1.0,) * ACTION_SIZE
    return Episodes(
        observations=noise(steps, OBSERVATION_SIZE),
        actions=np.tanh(noise(steps, ACTION_SIZE)),
        rewards=noise(steps),
        offsets=np.arange(count + 1, dtype=np.int64) * EPISODE_STEPS,
        terminated=np.zeros(count, bool),
        truncated=np.ones(count, bool),
        final_observations=noise(count, OBSERVATION_SIZE),
        info=DatasetInfo(
            dataset_id="synthetic/noise-v0",
            environment_id="Hopper-v5",
            observation_size=OBSERVATION_SIZE,
            action_low=tuple(-bound for bound in bounds),
            action_high=bounds,
        ),
    )
