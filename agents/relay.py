"""Recurrent states that take turns, so that none that acts is older than it should be."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Relay:
    """Which of an environment's states acts at a step, and which of them begin anew there.

    To rebuild a state from the last C steps every k steps is to begin one C steps before its turn
    and take it along until then: the same numbers, up to rounding, but no step is gone through
    again. An environment has as many states as are on their way at once, and all of them take each
    of its steps as one batch.

    Args:
        refresh_every: Steps of a turn, k, at least 1.
        context: Steps that a state has seen when its turn begins, C, fewer only in an episode's
            first C steps.
    """

    refresh_every: int
    context: int

    @property
    def size(self) -> int:
        """States of an environment, M."""
        return -(-(self.context + self.refresh_every - 1) // self.refresh_every)

    def begins(self, timesteps: np.ndarray) -> np.ndarray:
        """Return which states begin at these steps of episodes, (B,), as (B, M) bool."""
        # Turn j begins at step jk, and its state C - 1 steps before; at an episode's start all do.
        turns, rest = np.divmod(timesteps + self.context - 1, self.refresh_every)
        is_its_own = turns[:, None] % self.size == np.arange(self.size)
        return (timesteps == 0)[:, None] | ((rest == 0)[:, None] & is_its_own)

    def acting(self, timesteps: np.ndarray) -> np.ndarray:
        """Return which state's turn it is at these steps of episodes, (B,)."""
        return timesteps // self.refresh_every % self.size
