"""Environments made partially observable: velocities hidden, so that a policy must remember."""

from collections.abc import Sequence

import gymnasium as gym
import numpy as np

# How long each environment's observation is, and where it holds velocities (its documentation's
# table of entries).
VELOCITIES = {
    "CartPole-v1": (4, (1, 3)),
    "Hopper-v5": (11, tuple(range(5, 11))),
}


class HideVelocities(
    gym.ObservationWrapper[np.ndarray, np.ndarray, np.ndarray], gym.utils.RecordConstructorArgs
):
    """Leave entries out of the observation, by default an environment's velocities.

    What remains tells where things are, not where they go: a policy has to compare observations
    over time. The observation gets shorter; its type and the other bounds stay.

        gymnasium.make_vec("CartPole-v1", num_envs=8, wrappers=[HideVelocities])

    Args:
        env: An environment with a one-dimensional Box observation.
        indices: Entries to hide; if not given, those that :data:`VELOCITIES` has for the
            environment's id.

    Raises:
        ValueError: The observation is not one-dimensional, or the indices are unknown, not in it,
            or all of it.
    """

    def __init__(self, env: gym.Env, indices: Sequence[int] | None = None):
        gym.utils.RecordConstructorArgs.__init__(self, indices=indices)
        super().__init__(env)
        name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
        space = env.observation_space
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"{name} has no one-dimensional Box observation, but {space}")
        size = space.shape[0]
        usual, velocities = VELOCITIES.get(name, (None, ()))
        if indices is None and size != usual:  # an option or a wrapper may have changed it
            raise ValueError(
                f"where {name} with {size} entries has its velocities is not known here (known: "
                f"{', '.join(f'{one} with {n}' for one, (n, _) in VELOCITIES.items())}); pass "
                "indices"
            )
        hidden = velocities if indices is None else tuple(indices)
        if not all(0 <= index < size for index in hidden) or len(set(hidden)) == size:
            raise ValueError(f"cannot hide entries {list(hidden)} of {size} of {name}")
        self._shown = np.setdiff1d(np.arange(size), hidden)
        self.observation_space = gym.spaces.Box(
            space.low[self._shown], space.high[self._shown], dtype=space.dtype
        )

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Return the entries that are shown."""
        return observation[self._shown]
