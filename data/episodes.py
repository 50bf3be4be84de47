"""Offline episodes as flat float32 arrays with offsets: the one in-memory form of every dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from minrl.errors import ConfigError, DatasetError


@dataclass(frozen=True)
class DatasetInfo:
    """What a model must remember of the data it was trained on; plain JSON values only.

    Attributes:
        dataset_id: The id, or several ids joined with "+" for a union.
        environment_id: The Gymnasium id the data came from, None when it is not known.
        observation_size: O, the length of an observation.
        action_low: Lower action bounds, A finite numbers; the least action seen in the data where
            the action space has no bound.
        action_high: Upper action bounds, in the same way.
        reference_min: Return that scores 0 percent, in reward units; None when not known.
        reference_max: Return that scores 100 percent.
        score_note: What a score on this data may be compared with, in words.
        sha256: Digest of the data's content.
        max_episode_steps: The time limit of the environment, None when not known.
    """

    dataset_id: str
    environment_id: str | None
    observation_size: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    reference_min: float | None = None
    reference_max: float | None = None
    score_note: str = ""
    sha256: str = ""
    max_episode_steps: int | None = None

    @property
    def references(self) -> tuple[float, float] | None:
        """Returns that score 0 and 100 percent; None when not known."""
        if self.reference_min is None or self.reference_max is None:
            return None
        return self.reference_min, self.reference_max


class Episode(NamedTuple):
    """One episode of T steps; the last of the T+1 observations was seen after the last action."""

    observations: np.ndarray  # (T+1, O)
    actions: np.ndarray  # (T, A)
    rewards: np.ndarray  # (T,)
    terminated: bool
    truncated: bool

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what a file holds of it by name, the two flags for every step, (T,) bool."""
        terminations, truncations = np.zeros((2, len(self.actions)), bool)
        terminations[-1:], truncations[-1:] = self.terminated, self.truncated
        return {
            "observations": self.observations,
            "actions": self.actions,
            "rewards": self.rewards,
            "terminations": terminations,
            "truncations": truncations,
        }


@dataclass(frozen=True)
class Episodes:
    """A dataset in memory: step n of episode e is row ``offsets[e] + n`` of the flat arrays.

    Row t holds the observation seen before action t. The observation after an episode's last action
    is kept apart in ``final_observations``, so that sources with T+1 observations (Minari) and with
    T (D4RL) come out alike.

    An episode that neither terminated nor was truncated is unfinished: the recording stopped there.
    """

    observations: np.ndarray  # (N, O) float32
    actions: np.ndarray  # (N, A) float32
    rewards: np.ndarray  # (N,) float32
    offsets: np.ndarray  # (E+1,) int64, from 0 to N
    terminated: np.ndarray  # (E,) bool
    truncated: np.ndarray  # (E,) bool
    final_observations: np.ndarray  # (E, O) float32
    info: DatasetInfo

    @classmethod
    def from_episodes(cls, episodes: Iterable[Episode], info: DatasetInfo) -> Episodes:
        """Flatten single episodes (each with T+1 observations).

        Raises:
            DatasetError: If there is no episode, or one whose arrays disagree in length.
        """
        episodes = list(episodes)
        if not episodes:
            raise DatasetError(f"{info.dataset_id}: no episodes")
        for index, episode in enumerate(episodes):
            steps = len(episode.actions)
            if not (len(episode.observations) == steps + 1 and len(episode.rewards) == steps >= 1):
                raise DatasetError(
                    f"{info.dataset_id}: rule lengths, episode {index}: {steps} actions need "
                    f"{steps + 1} observations and {steps} rewards, got "
                    f"{len(episode.observations)} and {len(episode.rewards)}"
                )
        return cls(
            observations=_join([episode.observations[:-1] for episode in episodes]),
            actions=_join([episode.actions for episode in episodes]),
            rewards=_join([episode.rewards for episode in episodes]),
            offsets=offsets_from_lengths([len(episode.actions) for episode in episodes]),
            terminated=np.array([episode.terminated for episode in episodes], bool),
            truncated=np.array([episode.truncated for episode in episodes], bool),
            final_observations=_join([episode.observations[-1:] for episode in episodes]),
            info=info,
        )

    @property
    def num_episodes(self) -> int:
        """Number of episodes, E."""
        return len(self.offsets) - 1

    @property
    def num_steps(self) -> int:
        """Number of transitions over all episodes, N."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode, (E,) int64."""
        return np.diff(self.offsets)

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted return of each episode in reward units, (E,) float64."""
        return np.add.reduceat(self.rewards, self.offsets[:-1], dtype=np.float64)

    def returns_of_steps(self, condition: str) -> np.ndarray:
        """Return what each step is told of the return, (N,) float32, in reward units.

        Args:
            condition: "return", that of the episode, or "return-to-go", see :meth:`returns_to_go`.

        Raises:
            ConfigError: If the condition is another one.
        """
        if condition == "return":
            return np.repeat(self.returns.astype(np.float32), self.lengths)
        if condition == "return-to-go":
            return self.returns_to_go()
        raise ConfigError(f"condition must be return or return-to-go, not {condition!r}")

    def returns_to_go(self) -> np.ndarray:
        """Sum of the rewards from each step to its episode's end, that step's included.

        Undiscounted and in reward units, (N,) float32; summed in float64, each episode on its own
        so that no rounding error passes from one to the next.
        """
        rewards = self.rewards.astype(np.float64)
        returns_to_go = np.empty(self.num_steps, np.float32)
        for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            returns_to_go[start:stop] = np.cumsum(rewards[start:stop][::-1])[::-1]
        return returns_to_go

    def select(self, indices: Sequence[int] | np.ndarray) -> Episodes:
        """Return the episodes with these indices, in the order given."""
        indices = np.asarray(indices, np.int64)
        lengths = self.lengths[indices]
        offsets = offsets_from_lengths(lengths)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[indices] - offsets[:-1], lengths)
        return replace(
            self,
            observations=self.observations[rows],
            actions=self.actions[rows],
            rewards=self.rewards[rows],
            offsets=offsets,
            terminated=self.terminated[indices],
            truncated=self.truncated[indices],
            final_observations=self.final_observations[indices],
        )

    def split(self, fraction: float, seed: int) -> tuple[Episodes, Episodes | None]:
        """Hold out whole episodes at random.

        Args:
            fraction: Share of the episodes to hold out: 0, for none, or between 0 and 1. Then, with
                two episodes or more, each side gets at least one.
            seed: Fixes which episodes are held out.

        Returns:
            The episodes to train on and the held-out ones, if any, each in their original order. A
            single episode goes to both sides, since neither may be empty.
        """
        if fraction == 0:
            return self, None
        if self.num_episodes == 1:
            return self, self
        order = np.random.default_rng(seed).permutation(self.num_episodes)
        count = int(np.clip(round(fraction * self.num_episodes), 1, self.num_episodes - 1))
        return self.select(np.sort(order[count:])), self.select(np.sort(order[:count]))

    def best(self, fraction: float) -> Episodes:
        """Return the episodes with the highest returns, in their original order.

        Args:
            fraction: Share of the steps that they hold, at most, but for one episode at least.
        """
        if fraction == 1:
            return self
        order = np.argsort(-self.returns, kind="stable")
        steps = np.cumsum(self.lengths[order])
        count = int(np.searchsorted(steps, fraction * self.num_steps, side="right"))
        return self.select(np.sort(order[: max(count, 1)]))


def offsets_from_lengths(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the (E+1,) int64 start rows of consecutive episodes of these lengths, and the end."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def concatenate(parts: Sequence[Episodes]) -> Episodes:
    """Join datasets of one environment into a union, in the order given.

    Action bounds become the widest of all, reference scores those of the parts that have any; the
    digest is that of the joined digests.

    Raises:
        DatasetError: If sizes, environments or reference scores differ.
    """
    infos = [part.info for part in parts]
    references = {info.references: info.dataset_id for info in infos if info.references}
    if len(references) > 1:
        found = ", ".join(f"{name}: {low:g} {high:g}" for (low, high), name in references.items())
        raise DatasetError(
            f"datasets of a union must have the same reference scores, got {found}; import your "
            "own again with those of the other (--reference-scores)"
        )
    for field in ("environment_id", "observation_size"):
        values = {getattr(info, field) for info in infos}
        if len(values) > 1:
            found = ", ".join(f"{info.dataset_id}: {getattr(info, field)}" for info in infos)
            raise DatasetError(f"datasets of a union must have the same {field}, got {found}")
    sizes = {len(info.action_low) for info in infos}
    if len(sizes) > 1:
        raise DatasetError(f"datasets of a union must have the same action size, got {sizes}")
    if len(parts) == 1:
        return parts[0]
    lowest, highest = next(iter(references), (None, None))
    info = replace(
        infos[0],
        dataset_id="+".join(info.dataset_id for info in infos),
        action_low=tuple(np.min([info.action_low for info in infos], axis=0).tolist()),
        action_high=tuple(np.max([info.action_high for info in infos], axis=0).tolist()),
        reference_min=lowest,
        reference_max=highest,
        score_note="; ".join(dict.fromkeys(info.score_note for info in infos)),
        sha256=hashlib.sha256("".join(info.sha256 for info in infos).encode()).hexdigest(),
    )
    return Episodes(
        observations=_join([part.observations for part in parts]),
        actions=_join([part.actions for part in parts]),
        rewards=_join([part.rewards for part in parts]),
        offsets=offsets_from_lengths(np.concatenate([part.lengths for part in parts])),
        terminated=np.concatenate([part.terminated for part in parts]),
        truncated=np.concatenate([part.truncated for part in parts]),
        final_observations=_join([part.final_observations for part in parts]),
        info=info,
    )


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate along the first axis as float32."""
    return np.concatenate(arrays, axis=0, dtype=np.float32, casting="same_kind")
