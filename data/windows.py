"""Training windows cut from episodes, a whole batch at once, as a pure function of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from minrl.data.episodes import Episodes
from minrl.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """B windows of T steps, right-padded with zeros.

    Attributes:
        observations: (B, T, O) float32, not normalised.
        actions: (B, T, A) float32.
        returns: (B, T) float32, what each step is told of the return, in reward units: of the whole
            episode, or with the condition "return-to-go" from this step on, its reward included.
        timesteps: (B, T) int64, index of the step in its episode.
        mask: (B, T) bool, False where the window is padding.
        loss_mask: (B, T) bool, True where the step counts in the loss: ``mask`` without the
            burn-in.
    """

    observations: np.ndarray
    actions: np.ndarray
    returns: np.ndarray
    timesteps: np.ndarray
    mask: np.ndarray
    loss_mask: np.ndarray

    def rows(self, index: slice | np.ndarray) -> Batch:
        """Return the windows with this index, for example ``slice(rank, None, world_size)``."""
        return Batch(*(getattr(self, field.name)[index] for field in fields(self)))


class WindowSampler:
    """Draws windows: the trajectory in proportion to its length, the start uniform in it.

    That is one uniform draw among all steps of the data. A window covers the ``burn_in`` steps
    before its start (as far as the episode has them), then ``context`` steps, cut at the episode's
    end and padded on the right. Padding on the left would feed a recurrent state with steps that
    never happened. Recipe: Decision Transformer, https://github.com/kzl/decision-transformer, gym/.

    Args:
        episodes: Where to draw from; held in memory, not copied.
        context: Steps of a window that count in the loss, at least 1.
        batch_size: Windows in a batch, B.
        seed: With the step it fixes every batch.
        burn_in: Steps before the start that only warm up the recurrent state.
        condition: What a step is told, the episode's "return" or the "return-to-go".

    Attributes:
        batch_size: As given.

    Raises:
        ConfigError: If a size is out of range, or context is longer than the longest episode.
    """

    def __init__(
        self,
        episodes: Episodes,
        *,
        context: int,
        batch_size: int,
        seed: int,
        burn_in: int = 0,
        condition: str = "return",
    ) -> None:
        longest = int(episodes.lengths.max())
        if not 1 <= context <= longest:
            raise ConfigError(
                f"context must be from 1 to {longest}, the longest episode of "
                f"{episodes.info.dataset_id}, got {context}"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if burn_in < 0:
            raise ConfigError(f"burn_in must be at least 0, got {burn_in}")
        if seed < 0:
            raise ConfigError(f"seed must be at least 0, got {seed}")
        self._episodes = episodes
        self._context = context
        self.batch_size = batch_size
        self._burn_in = burn_in
        self._seed = seed
        self._returns = episodes.returns_of_steps(condition)
        self._offsets_in_window = np.arange(min(context + burn_in, longest))

    @property
    def length(self) -> int:
        """Steps of every window, T, padding included."""
        return len(self._offsets_in_window)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What :meth:`windows` counts the rows of: observations, actions and returns."""
        return self._episodes.observations, self._episodes.actions, self._returns

    def windows(self, step: int) -> np.ndarray:
        """Return where the windows of this training step lie; the same for the same (seed, step).

        Returns:
            (4, B) int64, rows of the flat arrays: where the window's episode starts, the window's
            first step, its first one that counts in the loss, and the row after its last one.
        """
        offsets = self._episodes.offsets
        generator = np.random.default_rng((self._seed, step))
        drawn = generator.integers(self._episodes.num_steps, size=self.batch_size)  # (B,)
        episode = np.searchsorted(offsets, drawn, side="right") - 1  # (B,)
        first = np.maximum(drawn - self._burn_in, offsets[episode])
        stop = np.minimum(drawn + self._context, offsets[episode + 1])
        return np.stack([offsets[episode], first, drawn, stop])

    def batch(self, step: int) -> Batch:
        """Return the windows of this training step, gathered."""
        episodes = self._episodes
        episode_start, first, drawn, stop = self.windows(step)
        rows = first[:, None] + self._offsets_in_window  # (B, T)
        mask = rows < stop[:, None]
        loss_mask = mask & (rows >= drawn[:, None])
        timesteps = np.where(mask, rows - episode_start[:, None], 0)
        # Padding reads a row of some other episode and is then zeroed by the mask.
        rows = np.minimum(rows, episodes.num_steps - 1)
        observations = episodes.observations.take(rows, axis=0)
        actions = episodes.actions.take(rows, axis=0)
        returns = self._returns.take(rows)
        observations *= mask[:, :, None]
        actions *= mask[:, :, None]
        returns *= mask
        return Batch(observations, actions, returns, timesteps, mask, loss_mask)
