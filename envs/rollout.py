"""Acting in environments: many episodes stepped together, one batched action per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from minrl.envs.evaluation import Evaluation
from minrl.envs.make import check_spaces, make_env
from minrl.errors import EnvError

__all__ = ["Evaluation", "Policy", "evaluate", "play_episodes"]


class Policy(Protocol):
    """What `evaluate` needs of an agent."""

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
            target_return: return to aim at, in reward units; None leaves it to the policy.
            num_envs: number of rows B; given on the first call, which has no mask.
        """

    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """Choose the next action of every row.

        Args:
            observations: (B, O), in the environment's units and type.
            rewards: (B,) float64, reward of each row's previous step; 0 when it has just started.

        Returns:
            (B, A) actions in the environment's units, inside its bounds.
        """


class _Lane:
    """One row of the batch: an environment and the episodes it still has to play."""

    def __init__(self, environment: Any, name: str, episodes: range, seed: int) -> None:
        self.environment = environment
        self.name = name
        self.episodes = iter(episodes)
        self.seed = seed
        self.observation_shape = environment.observation_space.shape
        self.episode, self.episode_return, self.length = -1, 0.0, 0

    def start(self) -> np.ndarray | None:
        """Reset to the next episode and return its first observation; None when none is left."""
        episode = next(self.episodes, None)
        if episode is None:
            return None
        self.episode, self.episode_return, self.length = episode, 0.0, 0
        episode_seed = int(np.random.SeedSequence([self.seed, episode]).generate_state(1)[0])
        try:
            observation, _ = self.environment.reset(seed=episode_seed)
        except Exception as error:
            raise EnvError(f"{self} cannot be started: {error!r}") from error
        return self._checked(observation)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Play one step; return the observation, the reward and whether the episode has ended."""
        try:
            observation, reward, terminated, truncated, _ = self.environment.step(action)
        except Exception as error:
            raise EnvError(f"{self} cannot take action {action}: {error!r}") from error
        reward = float(reward)
        if not math.isfinite(reward):
            raise EnvError(f"{self} gave the reward {reward}; every reward must be finite")
        self.episode_return += reward
        self.length += 1
        return self._checked(observation), reward, bool(terminated or truncated)

    def _checked(self, observation: np.ndarray) -> np.ndarray:
        if np.shape(observation) != self.observation_shape:
            raise EnvError(
                f"{self} gave an observation of shape {np.shape(observation)}, but its space says "
                f"{self.observation_shape}"
            )
        if not np.isfinite(observation).all():
            place = np.flatnonzero(~np.isfinite(observation)).tolist()
            raise EnvError(f"{self} gave an observation that is not finite at index {place}")
        return observation

    def __str__(self) -> str:
        return f"environment {self.name!r}, episode {self.episode}, step {self.length}"


def _check_actions(actions: np.ndarray, playing: dict[int, _Lane], batch: int) -> np.ndarray:
    """Return the actions in the environment's type, or say what is wrong with them."""
    first = next(iter(playing.values()))
    space = first.environment.action_space
    expected = (batch, *space.shape)
    actions = np.asarray(actions)
    if actions.shape != expected:
        raise EnvError(
            f"the agent's actions have shape {actions.shape}, but {expected} is needed in "
            f"{first}; was the agent trained for another environment?"
        )
    if not np.isfinite(actions).all():
        for row, lane in playing.items():
            if not np.isfinite(actions[row]).all():
                raise EnvError(f"the agent's action {actions[row]} is not finite in {lane}")
    return actions.astype(space.dtype, copy=False)


def make_limited_env(
    environment_id: str, max_episode_steps: int | None = None, *, render: bool = False
) -> Any:
    """Make an environment that agents can act in and whose episodes surely end.

    Raises:
        EnvError: as `make_env` and `check_spaces`, or neither the environment nor the caller limits
            the length of an episode.
    """
    limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
    environment = make_env(environment_id, render=render, **limit)
    try:
        check_spaces(environment)
        if environment.spec is None or environment.spec.max_episode_steps is None:
            raise EnvError(
                f"environment {environment_id!r} has no limit on the length of an episode; give "
                "max_episode_steps"
            )
    except EnvError:
        environment.close()
        raise
    return environment


def play_episodes(
    agent: Policy,
    environments: Sequence[Any],
    environment_id: str,
    *,
    episodes: int,
    target_return: float | None = None,
    seed: int = 0,
    references: tuple[float, float] | None = None,
    on_episode: Callable[[int, float, int], None] | None = None,
) -> Evaluation:
    """Play a fixed number of episodes in environments that are already made.

    Environment i of B plays episodes i, i + B, i + 2B, ...: a quota fixed beforehand, because
    keeping whichever episodes finish first would favour short ones
    (DLR-RM/stable-baselines3#402, #447). See `evaluate` for the rest.
    """
    batch = len(environments)
    lanes = [
        _Lane(environment, environment_id, range(row, episodes, batch), seed)
        for row, environment in enumerate(environments)
    ]
    observations = np.stack([lane.start() for lane in lanes])  # (B, O)
    rewards = np.zeros(batch)  # (B,)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)  # (E,)
    playing = dict(enumerate(lanes))
    agent.reset(target_return=target_return, num_envs=batch)
    while playing:
        # Copies, because a policy may keep what it is given.
        actions = agent.act(observations.copy(), rewards.copy())
        actions = _check_actions(actions, playing, batch)
        started = np.zeros(batch, dtype=bool)
        for row, lane in list(playing.items()):
            observations[row], rewards[row], ended = lane.step(actions[row])
            if not ended:
                continue
            returns[lane.episode], lengths[lane.episode] = lane.episode_return, lane.length
            if on_episode is not None:
                on_episode(lane.episode, lane.episode_return, lane.length)
            rewards[row] = 0.0
            first_observation = lane.start()
            if first_observation is None:
                del playing[row]  # its last observation stays in the batch, unused
            else:
                observations[row], started[row] = first_observation, True
        if started.any():
            agent.reset(started, target_return=target_return)
    return Evaluation(environment_id, target_return, returns, lengths, seed, references)


def evaluate(
    agent: Policy,
    environment_id: str,
    *,
    episodes: int = 100,
    target_return: float | None = None,
    seed: int = 0,
    num_envs: int | None = None,
    max_episode_steps: int | None = None,
    references: tuple[float, float] | None = None,
    on_episode: Callable[[int, float, int], None] | None = None,
) -> Evaluation:
    """Let an agent act for a fixed number of episodes and return what it earned.

    The seed of episode e depends on ``(seed, e)`` alone, so ``num_envs`` changes the speed but not
    the start states; a deterministic agent gets the same numbers every time.

    Args:
        agent: see `Policy`; it must keep its actions inside the environment's bounds.
        environment_id: id such as ``Hopper-v5``.
        episodes: number of episodes, at least 1.
        target_return: return to ask the agent for, in reward units.
        seed: non-negative seed of the set of episodes.
        num_envs: environments stepped together; by default as many as episodes, at most 32.
        max_episode_steps: truncate episodes here; None keeps the environment's own limit.
        references: returns that score 0 and 100 percent; None takes D4RL's where there are any.
        on_episode: called as ``on_episode(episode, episode_return, length)`` when one ends.

    Raises:
        EnvError: the environment is unknown or has unsupported spaces, has no step limit, fails
            while stepping, or gives (or is given) something non-finite or misshapen; the message
            names environment, episode and step.
    """
    for name, value, lowest in (("episodes", episodes, 1), ("seed", seed, 0)):
        if value < lowest:
            raise EnvError(f"{name} is {value}; at least {lowest} is needed")
    batch = min(episodes, 32 if num_envs is None else num_envs)
    if batch < 1:
        raise EnvError(f"num_envs is {num_envs}; at least 1 is needed")
    environments: list[Any] = []
    try:
        for _ in range(batch):
            environments.append(make_limited_env(environment_id, max_episode_steps))
        return play_episodes(
            agent,
            environments,
            environment_id,
            episodes=episodes,
            target_return=target_return,
            seed=seed,
            references=references,
            on_episode=on_episode,
        )
    finally:
        for environment in environments:
            environment.close()
