"""Flat arrays of steps, one episode after the other, as D4RL and most replay buffers have them."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minrl.data.dataset_ids import dataset_folder
from minrl.data.episodes import Episode
from minrl.data.minari_writer import DatasetCard, dataset_lock, time_limit, write_dataset
from minrl.data.validate import (
    ActionBounds,
    OnBadEpisode,
    check_on_bad_episode,
    find_violation,
    settle_violations,
)
from minrl.errors import DatasetError


class Columns(NamedTuple):
    """The steps of all episodes, N rows each. An episode ends at a terminal or a timeout."""

    observations: np.ndarray  # (N, O)
    actions: np.ndarray  # (N, A)
    rewards: np.ndarray  # (N,)
    terminals: np.ndarray  # (N,), bool
    timeouts: np.ndarray  # (N,), bool
    next_observations: np.ndarray | None  # (N, O)

    def split(self, max_episode_steps: int | None = None) -> Iterator[Episode]:
        """Cut the rows into episodes.

        A terminal that is a timeout too counts as terminated. Rows after the last end become a last
        episode, marked truncated.

        Args:
            max_episode_steps: Where an episode ends anyway; None for no such limit.
        """
        rows = len(self.rewards)
        ends = np.flatnonzero(self.terminals | self.timeouts) + 1
        limit = max_episode_steps or rows
        start = 0
        for end in [*ends.tolist(), rows]:
            for stop in [*range(start + limit, end, limit), end]:
                if stop > start:
                    yield self._cut(start, stop)
                start = stop

    def _cut(self, start: int, stop: int) -> Episode:
        """Return rows start to stop as an episode with T+1 observations.

        Where there are no next observations, the last one is repeated: dropping the last step
        instead would lose its reward from every return-to-go.
        """
        following = self.next_observations
        last = self.observations if following is None else following
        terminated = bool(self.terminals[stop - 1])
        return Episode(
            observations=np.concatenate([self.observations[start:stop], last[stop - 1 : stop]]),
            actions=self.actions[start:stop],
            rewards=self.rewards[start:stop],
            terminated=terminated,
            truncated=not terminated,
        )


def write_columns(
    columns: Columns,
    card: DatasetCard,
    max_episode_steps: int | None = None,
    on_bad_episode: OnBadEpisode = "raise",
) -> None:
    """Write a Minari dataset of these steps, cut into episodes as by ``Columns.split``.

    Raises:
        ConfigError: If ``on_bad_episode`` is neither of the two.
        DatasetError: If the id is taken or of an embedded dataset, an episode breaks a rule of
            ``find_violation`` and is not to be dropped, or the folder cannot be written.
    """
    check_on_bad_episode(on_bad_episode)
    if card.dataset_id.startswith("minrl/"):
        raise DatasetError(
            f"{card.dataset_id}: ids that begin with minrl/ are those of embedded datasets"
        )
    folder = dataset_folder(card.dataset_id)
    with dataset_lock(card.dataset_id):
        if folder.exists():
            raise DatasetError(
                f"dataset {card.dataset_id} exists already in {folder}; remove it, or give "
                "another --id"
            )
        episodes = list(columns.split(max_episode_steps))
        _warn_of_long_episodes(card, episodes)
        write_dataset(card, sound_episodes(card, episodes, on_bad_episode))


def _warn_of_long_episodes(card: DatasetCard, episodes: list[Episode]) -> None:
    """Say if there is one that the environment would have ended: its end may not be marked."""
    limit = time_limit(card.environment_id)
    longest = max(range(len(episodes)), key=lambda index: len(episodes[index].actions))
    steps = len(episodes[longest].actions)
    if limit is not None and steps > limit:
        warnings.warn(
            f"dataset {card.dataset_id}: episode {longest} has {steps:,} steps, where "
            f"{card.environment_id} ends after {limit:,}: are all terminals and timeouts marked?",
            stacklevel=4,
        )


def sound_episodes(
    card: DatasetCard, episodes: list[Episode], on_bad_episode: OnBadEpisode
) -> list[Episode]:
    """Return the episodes that break no rule.

    Raises:
        DatasetError: If one does and is not to be dropped, or all do.
    """
    space = card.action_space
    bounds = ActionBounds(space.low.astype(np.float64), space.high.astype(np.float64))
    bad = {}
    for index, episode in enumerate(episodes):
        violation = find_violation(
            episode.arrays(),
            index,
            observation_size=card.observation_space.shape[0],
            bounds=bounds,
            is_last=index == len(episodes) - 1,
        )
        if violation is not None:
            bad[index] = violation
    settle_violations(card.dataset_id, list(bad.values()), len(episodes), on_bad_episode)
    return [episode for index, episode in enumerate(episodes) if index not in bad]


def count_rows(columns: Iterable[np.ndarray], path: Path) -> int:
    """Return N, the number of steps: what most columns have, so that the odd one is blamed.

    Raises:
        DatasetError: If there are none.
    """
    rows = statistics.mode(len(values) if values.ndim else 0 for values in columns)
    if rows == 0:
        raise DatasetError(f"{path}: no rows")
    return rows


def fit(values: np.ndarray, name: str, path: Path, shape: tuple[int, ...] | None) -> np.ndarray:
    """Return a column of numbers in its shape; (N, 1) counts as (N,).

    Raises:
        DatasetError: If it is of another shape, or no numbers.
    """
    if values.dtype.kind not in "fiub":
        raise DatasetError(f"{path}: {name} are {values.dtype}, not real numbers")
    if shape is not None and len(shape) == 1 and values.shape == (*shape, 1):
        values = values[:, 0]
    if shape is not None and values.shape != shape:
        raise DatasetError(f"{path}: {name} have shape {values.shape}, expected {shape}")
    return values


def fit_flags(values: np.ndarray, name: str, path: Path, rows: int) -> np.ndarray:
    """Return a column of flags as bool.

    Raises:
        DatasetError: If it is of another shape, or a value is neither 0 nor 1, such as NaN.
    """
    values = fit(values, name, path, (rows,))
    other = np.flatnonzero((values != 0) & (values != 1))
    if other.size:
        raise DatasetError(
            f"{path}: {name} must be 0 or 1 each, not {values[other[0]]} as at step {other[0]}"
        )
    return values.astype(bool)
