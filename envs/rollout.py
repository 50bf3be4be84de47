"""Acting in environments: many episodes stepped together, one batched action per step."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import Protocol, SupportsIndex

import numpy as np

from minrl.envs.evaluation import Evaluation
from minrl.envs.lanes import Lanes, place, to_numbers
from minrl.envs.make import make_limited_envs
from minrl.envs.workers import WorkerLanes
from minrl.errors import ConfigError, EnvError, EvaluationError

__all__ = ["Evaluation", "Policy", "evaluate", "play_episodes", "whole_number"]

_LONGEST_TIMEOUT = 1e9  # seconds; what a socket takes is not much more
_HURRY_SECONDS = 1.0  # for the sound environments to close when another one has failed


class Policy(Protocol):
    """What ``evaluate`` needs of an agent."""

    def reset(
        self,
        mask: np.ndarray | None = None,
        *,
        target_return: float | None = None,
        num_envs: int | None = None,
    ) -> None:
        """Start new episodes.

        Args:
            mask: (B,) bool, True for rows that start an episode; None for all of them.
            target_return: Return to aim at, in reward units; None leaves it to the policy.
            num_envs: Number of rows B; given on the first call, which has no mask.
        """

    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """Choose the next action of every row.

        Args:
            observations: (B, O), in the environment's units and type.
            rewards: (B,) float64, reward of each row's previous step; 0 when it has just started.

        Returns:
            (B, A) actions in the environment's units, inside its bounds.
        """


class _AnyLanes(Protocol):
    """Rows of environments and the episodes that each plays: ``Lanes`` or ``WorkerLanes``."""

    table: np.ndarray
    name: str

    def start(self) -> None: ...

    def step(self) -> None: ...

    def close(self, patience: float | None = None) -> list[str]: ...


def _check_actions(actions: np.ndarray, lanes: _AnyLanes) -> np.ndarray:
    """Return the actions, or say what is wrong with them."""
    table, expected = lanes.table, lanes.table["action"]
    playing = np.flatnonzero(table["episode"] >= 0)
    try:
        array, finite = to_numbers(actions, expected.dtype)
    except EnvError as error:
        where = place(lanes.name, table[playing[0]])
        raise EnvError(f"what the agent gave as actions in {where} is {error}") from error
    if array.shape != expected.shape:
        raise EnvError(
            f"the agent's actions have shape {array.shape}, but {expected.shape} is needed in "
            f"{place(lanes.name, table[playing[0]])}; was the agent trained for another "
            "environment?"
        )
    for row in playing[~finite[playing].all(axis=1)]:
        where = place(lanes.name, table[row])
        raise EnvError(f"the agent's action {array[row]} is not finite in {where}")
    return array


def whole_number(name: str, value: SupportsIndex, lowest: int) -> int:
    """Return a whole number, NumPy's too, as Python's, which JSON takes.

    Raises:
        ConfigError: If it is none, or below the lowest allowed.
    """
    try:
        value = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be a whole number, not {value!r}") from None
    if value < lowest:
        raise ConfigError(f"{name} must be at least {lowest}, not {value}")
    return value


def play_episodes(
    agent: Policy,
    lanes: _AnyLanes,
    *,
    episodes: int,
    target_return: float | None = None,
    seed: int = 0,
    references: tuple[float, float] | None = None,
    on_episode: Callable[[int, float, int], None] | None = None,
) -> Evaluation:
    """Play the episodes of lanes that are made for as many and this seed; see ``evaluate``."""
    target_return = None if target_return is None else float(target_return)  # not NumPy's
    table = lanes.table
    observations, rewards = table["observation"], table["reward"]
    ended_episodes = table["ended_episode"]
    finished: dict[int, tuple[float, int]] = {}

    def collect_ended() -> np.ndarray:
        """Take the episodes that ended; return which rows have started another."""
        ended = np.flatnonzero(ended_episodes >= 0)
        for row in ended:
            episode = int(ended_episodes[row])
            result = float(table["ended_return"][row]), int(table["ended_length"][row])
            finished[episode] = result
            if on_episode is not None:
                on_episode(episode, *result)
        ended_episodes[ended] = -1
        started = np.zeros(len(table), dtype=bool)
        started[ended] = table["episode"][ended] >= 0
        return started

    ended_episodes[:] = -1
    try:
        lanes.start()
        agent.reset(target_return=target_return, num_envs=len(table))
        while len(finished) < episodes:
            # Copies, because a policy may keep what it is given.
            actions = agent.act(observations.copy(), rewards.copy())
            table["action"] = _check_actions(actions, lanes)
            try:
                lanes.step()
            finally:  # of the other rows, if one failed
                started = collect_ended()
            if started.any():
                agent.reset(started, target_return=target_return)
    except EnvError as error:
        raise EvaluationError(
            f"{error} (after {len(finished)} of {episodes} episodes)", finished
        ) from error
    returns, lengths = zip(*(finished[episode] for episode in range(episodes)), strict=True)
    return Evaluation(
        lanes.name, target_return, np.array(returns), np.array(lengths), seed, references
    )


def evaluate(
    agent: Policy,
    environment_id: str,
    *,
    episodes: int = 100,
    target_return: float | None = None,
    seed: int = 0,
    num_envs: int | None = None,
    num_workers: int = 0,
    timeout: float | None = 60.0,
    max_episode_steps: int | None = None,
    references: tuple[float, float] | None = None,
    on_episode: Callable[[int, float, int], None] | None = None,
) -> Evaluation:
    """Let an agent act for a fixed number of episodes and return what it earned.

    The seed of episode e depends on ``(seed, e)`` alone, so ``num_envs`` changes the speed but not
    the start states, and ``num_workers`` changes no number at all; a deterministic agent gets the
    same numbers every time.

    In this process (``num_workers=0``) an environment that hangs or crashes takes the process with
    it; in worker processes it costs the evaluation alone, which ends with an error.

    Args:
        agent: See ``Policy``; it must keep its actions inside the environment's bounds.
        environment_id: Id such as ``Hopper-v5``.
        episodes: Number of episodes, at least 1.
        target_return: Return to ask the agent for, in reward units.
        seed: Non-negative seed of the set of episodes.
        num_envs: Environments stepped together; by default as many as episodes, at most 32.
        num_workers: Processes to hold the environments; 0 for this one.
        timeout: Seconds that a worker may take for a step of all its environments, None for ever;
            it has a minute at least to make them. Nothing can be timed out in this process.
        max_episode_steps: Truncate episodes here; None keeps the environment's own limit.
        references: Returns that score 0 and 100 percent; None takes D4RL's where there are any.
        on_episode: Called as ``on_episode(episode, episode_return, length)`` when one ends.

    Raises:
        ConfigError: If a number is out of range.
        EnvError: If the environment is unknown or has unsupported spaces, has no step limit, or
            cannot be made, or not in another process.
        EvaluationError: If the environment fails, gives (or is given) something non-finite or
            misshapen, or its process dies or gives no answer; the message names environment,
            episode and step, and the episodes finished until then come with it.
    """
    episodes, seed = whole_number("episodes", episodes, 1), whole_number("seed", seed, 0)
    num_workers = whole_number("num_workers", num_workers, 0)
    if max_episode_steps is not None:
        max_episode_steps = whole_number("max_episode_steps", max_episode_steps, 1)
    if references is not None and not 0 < references[1] - references[0] < math.inf:
        raise ConfigError(f"references must be finite, the lower first, not {references}")
    if timeout is not None and not 0 < timeout < _LONGEST_TIMEOUT:
        raise ConfigError(f"timeout must be above 0 s, or None for ever, not {timeout}")
    batch = min(episodes, whole_number("num_envs", 32 if num_envs is None else num_envs, 1))
    plan = {"episodes": episodes, "seed": seed}
    lanes: _AnyLanes
    if num_workers:
        sizes = {"num_workers": num_workers, "batch": batch, "max_episode_steps": max_episode_steps}
        lanes = WorkerLanes(environment_id, **sizes, **plan, timeout=timeout)
    else:
        environments = make_limited_envs(environment_id, batch, max_episode_steps)
        lanes = Lanes(environments, environment_id, **plan)
    try:
        result = play_episodes(
            agent,
            lanes,
            episodes=episodes,
            target_return=target_return,
            seed=seed,
            references=references,
            on_episode=on_episode,
        )
    except BaseException:
        lanes.close(_HURRY_SECONDS)
        raise
    for problem in lanes.close():
        warnings.warn(
            f"environment {environment_id!r} was not closed properly, after its last episode: "
            f"{problem}",
            RuntimeWarning,
            stacklevel=2,
        )
    return result
