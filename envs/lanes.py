"""The rows of a batch: each an environment, the episodes it plays, and how it stands in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minrl.errors import EnvError

_NOTHING, _STARTING, _STEPPING = 0, 1, 2
_DOING = {_NOTHING: "waiting", _STARTING: "starting an episode", _STEPPING: "taking a step"}


def new_row_type(observation: tuple[int, str], action: tuple[int, str]) -> np.dtype:
    """Return the type of one row of a table of lanes, given size and type of the two Boxes.

    A table is all that who acts and who steps tell each other; it may lie in shared memory.
    ``episode`` is -1 in a row that has no episode left; ``ended_episode`` is -1 unless one ended
    in the last step, and whoever has read it sets it back to -1.
    """
    return np.dtype(
        [
            ("observation", np.dtype(observation[1]), (observation[0],)),
            ("action", np.dtype(action[1]), (action[0],)),  # to take next
            ("reward", np.float64),  # of the last step; 0 where an episode has just started
            ("episode", np.int64),
            ("length", np.int64),  # steps of it so far
            ("ended_episode", np.int64),
            ("ended_return", np.float64),
            ("ended_length", np.int64),
            ("doing", np.uint8),  # for an environment that gives no answer
        ],
        align=True,
    )


def sizes_and_types(environment: Any) -> tuple[tuple[int, str], tuple[int, str]]:
    """Return what ``new_row_type`` takes."""
    observation, action = environment.observation_space, environment.action_space
    return (
        (observation.shape[0], observation.dtype.str),
        (action.shape[0], action.dtype.str),
    )


def place(name: str, row: np.void) -> str:
    """Name the environment, episode and step of a row, for messages."""
    return f"environment {name!r}, episode {row['episode']}, step {row['length']}"


def activity(row: np.void) -> str:
    """Say what a row's environment was last seen doing."""
    return _DOING[int(row["doing"])]


def to_numbers(value: Any, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return an array in a type, and which of its elements are finite before and after.

    Raises:
        EnvError: If it is not an array of numbers.
    """
    try:
        array = np.asarray(value)
        finite = np.isfinite(array)
        if array.dtype != dtype:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found here
                array = array.astype(dtype)
            finite &= np.isfinite(array)
    except Exception as error:  # whatever it raises when it is looked at
        raise EnvError(f"not an array of numbers: {error}") from error
    return array, finite


def close_all(environments: Sequence[Any]) -> list[str]:
    """Close every environment, whatever the others do; return what went wrong."""
    problems = []
    for environment in environments:
        try:
            environment.close()
        except (Exception, SystemExit) as error:
            problems.append(repr(error))
    return problems


class Lanes:
    """Environments of this process, each playing the episodes of one row of a table.

    Row i of B plays episodes i, i + B, i + 2B, ...: a quota fixed beforehand, because keeping
    whichever episodes finish first would favour short ones
    (DLR-RM/stable-baselines3#402, #447).

    Args:
        environments: One for each row; no one else may step them.
        name: Their id, for messages.
        episodes: Number of episodes of all rows together.
        seed: The seed of episode e depends on (seed, e) alone.
        table: (B,) of ``new_row_type``; a new one with as many rows as environments if not given.
        first_row: Row of the first environment; the others follow.
    """

    def __init__(
        self,
        environments: Sequence[Any],
        name: str,
        *,
        episodes: int,
        seed: int,
        table: np.ndarray | None = None,
        first_row: int = 0,
    ) -> None:
        if table is None:
            table = np.zeros(len(environments), new_row_type(*sizes_and_types(environments[0])))
        self.table, self.name, self._seed = table, name, seed
        self._columns = {name: table[name] for name in table.dtype.names}  # found once, for speed
        self._environments = dict(enumerate(environments, first_row))
        self._quotas = {row: iter(range(row, episodes, len(table))) for row in self._environments}
        self._returns = dict.fromkeys(self._environments, 0.0)

    def start(self) -> None:
        """Start every row's first episode.

        Raises:
            EnvError: If an environment fails; the message names it, the episode and the step.
        """
        for row in self._environments:
            self._start(row)

    def step(self) -> None:
        """Take the actions of the table, and start the next episode where one ends.

        Raises:
            EnvError: As ``start``; the rows before it are done.
        """
        for row in self._environments:
            if self._columns["episode"][row] >= 0:
                self._step(row)

    def close(self, patience: float | None = None) -> list[str]:
        """Close the environments; return what went wrong. Takes as long as it takes."""
        return close_all(list(self._environments.values()))

    def _start(self, row: int) -> None:
        columns, episode = self._columns, next(self._quotas[row], -1)
        columns["episode"][row], columns["length"][row], columns["reward"][row] = episode, 0, 0.0
        self._returns[row] = 0.0
        if episode < 0:
            return  # its last observation stays in the batch, unused
        seed = int(np.random.SeedSequence([self._seed, episode]).generate_state(1)[0])
        columns["doing"][row] = _STARTING
        try:
            observation, _ = self._environments[row].reset(seed=seed)
        except (Exception, SystemExit) as error:
            raise EnvError(f"{self._place(row)} cannot be started: {error!r}") from error
        self._keep(row, observation)

    def _step(self, row: int) -> None:
        columns, action = self._columns, self._columns["action"][row].copy()
        columns["doing"][row] = _STEPPING
        try:
            observation, reward, terminated, truncated, _ = self._environments[row].step(action)
            reward, ended = float(reward), bool(terminated or truncated)
        except (Exception, SystemExit) as error:
            raise EnvError(f"{self._place(row)} cannot take action {action}: {error!r}") from error
        if not math.isfinite(reward):
            raise EnvError(
                f"{self._place(row)} gave the reward {reward}; every reward must be finite"
            )
        self._returns[row] += reward
        self._keep(row, observation)
        columns["reward"][row] = reward
        columns["length"][row] += 1
        if ended:
            columns["ended_return"][row] = self._returns[row]
            columns["ended_length"][row] = columns["length"][row]
            columns["ended_episode"][row] = columns["episode"][row]
            self._start(row)

    def _keep(self, row: int, observation: Any) -> None:
        """Check an observation and put it into the table, in the type of its space."""
        kept = self._columns["observation"]
        try:
            array, finite = to_numbers(observation, kept.dtype)
        except EnvError as error:
            raise EnvError(f"{self._place(row)} gave an observation that is {error}") from error
        if array.shape != kept.shape[1:]:
            raise EnvError(
                f"{self._place(row)} gave an observation of shape {array.shape}, but its space "
                f"says {kept.shape[1:]}"
            )
        if not finite.all():
            raise EnvError(
                f"{self._place(row)} gave an observation that is not finite at index "
                f"{np.flatnonzero(~finite).tolist()}"
            )
        kept[row] = array
        self._columns["doing"][row] = _NOTHING

    def _place(self, row: int) -> str:
        return place(self.name, self.table[row])
