"""Checks on recorded episodes, made once when a dataset is loaded.

Minari and D4RL files are not checked by those who write them; a wrong flag or a NaN would train
without a word.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from minrl.errors import ConfigError, DatasetError

OnBadEpisode = Literal["raise", "drop"]

EPISODE_ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")
"""What an episode is made of."""

LARGEST_ACTION = 1e30
"""Bounds beyond it count as none, and actions as bad: the distance of two is soon no float32."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_BOUND_TOLERANCE = 1e-6  # relative to the bound where that is above 1; float32 rounds there


def check_on_bad_episode(on_bad_episode: str) -> None:
    """Do nothing, if it is one of ``OnBadEpisode``.

    Raises:
        ConfigError: If it is not.
    """
    if on_bad_episode not in get_args(OnBadEpisode):
        raise ConfigError(f'on_bad_episode must be "raise" or "drop", got {on_bad_episode!r}')


@dataclass(frozen=True)
class ActionBounds:
    """Lower and upper action bounds, (A,) float64 each; infinite where there is none."""

    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Violation:
    """A rule that an episode breaks.

    Attributes:
        rule: Short name of the rule.
        episode: Index of the episode in its file.
        step: First bad step; None when it is the episode as a whole.
        detail: What was found, and what should be there.
    """

    rule: str
    episode: int
    step: int | None
    detail: str

    def __str__(self) -> str:
        place = f"episode {self.episode}" + ("" if self.step is None else f", step {self.step}")
        return f"rule {self.rule}, {place}: {self.detail}"


def find_violation(
    episode: Mapping[str, Any],
    index: int,
    *,
    observation_size: int,
    bounds: ActionBounds,
    is_last: bool,
) -> Violation | None:
    """Return the first rule that this episode breaks, None if it is sound.

    Rules: ``arrays`` (all five are there), ``dtype`` (numbers), ``empty``, ``shape``, ``lengths``
    (T actions, rewards and flags, T+1 observations), ``finite`` (as float32, sums of rewards too),
    ``bounds`` (actions in their Box, and none beyond 1e30), ``flags`` (an end only at the last
    step), ``end`` (only the file's last episode may be unfinished).

    Terminated and truncated together is sound: Gymnasium gives both when an episode ends by itself
    on the last step of its time limit.

    Args:
        episode: Arrays as read: observations (T+1, O), actions (T, A), rewards, terminations,
            truncations (T,).
        index: Index of the episode in its file.
        observation_size: O.
        bounds: Of the action space.
        is_last: True for the last episode of the file.
    """
    missing = [name for name in EPISODE_ARRAYS if not isinstance(episode.get(name), np.ndarray)]
    if missing:
        return Violation("arrays", index, None, f"{', '.join(missing)} missing or no plain arrays")
    return (
        _check_dtypes(episode, index)
        or _check_shapes(episode, index, observation_size, len(bounds.low))
        or _check_finite(episode, index)
        or _check_bounds(episode["actions"], index, bounds)
        or _check_flags(episode, index, is_last)
    )


def _check_dtypes(episode: Mapping[str, np.ndarray], index: int) -> Violation | None:
    for name in EPISODE_ARRAYS:
        if episode[name].dtype.kind not in "fiub":
            return Violation(
                "dtype", index, None, f"{name} are {episode[name].dtype}, not real numbers"
            )
    return None


def _check_shapes(
    episode: Mapping[str, np.ndarray], index: int, observation_size: int, action_size: int
) -> Violation | None:
    steps = len(episode["rewards"]) if episode["rewards"].ndim else 0
    if steps == 0:
        return Violation("empty", index, None, "no steps")
    wanted = {
        "observations": (steps + 1, observation_size),
        "actions": (steps, action_size),
        "rewards": (steps,),
        "terminations": (steps,),
        "truncations": (steps,),
    }
    for name, shape in wanted.items():
        found = episode[name].shape
        if found != shape:
            rule = "lengths" if found[1:] == shape[1:] else "shape"
            detail = f"{name} have shape {found}; {steps} rewards need {shape}"
            return Violation(rule, index, None, detail)
    return None


def _check_finite(episode: Mapping[str, np.ndarray], index: int) -> Violation | None:
    for name in ("observations", "actions", "rewards"):
        values = episode[name]
        # In float64, since float16 takes the limit for infinity, and the least int64 has no
        # absolute value; a NaN makes the comparison false too.
        bad = ~(np.abs(values.astype(np.float64)) <= _FLOAT32_MAX)
        if bad.any():
            step, *column = np.argwhere(bad)[0].tolist()
            where = f" [{column[0]}]" if column else ""
            value = values[(step, *column)]
            detail = f"{name}{where} = {value}, which is not a finite float32"
            return Violation("finite", index, step, detail)
    returns_to_go = np.cumsum(episode["rewards"][::-1].astype(np.float64))[::-1]
    too_large = np.flatnonzero(~(np.abs(returns_to_go) <= _FLOAT32_MAX))
    if too_large.size:
        step = int(too_large[-1])
        detail = f"rewards add up to {returns_to_go[step]:g}, which is not a finite float32"
        return Violation("finite", index, step, detail)
    return None


def _check_bounds(actions: np.ndarray, index: int, bounds: ActionBounds) -> Violation | None:
    low = np.maximum(bounds.low, -LARGEST_ACTION)
    high = np.minimum(bounds.high, LARGEST_ACTION)
    outside = actions < low - _BOUND_TOLERANCE * np.maximum(1, np.abs(low))
    outside |= actions > high + _BOUND_TOLERANCE * np.maximum(1, np.abs(high))
    if not outside.any():
        return None
    step, column = np.argwhere(outside)[0].tolist()
    box = f"[{low[column]:g}, {high[column]:g}]"
    detail = f"actions [{column}] = {actions[step, column]:g}, outside {box}"
    return Violation("bounds", index, step, detail)


def _check_flags(episode: Mapping[str, np.ndarray], index: int, is_last: bool) -> Violation | None:
    for name in ("terminations", "truncations"):
        early = np.flatnonzero(episode[name][:-1])
        if early.size:
            steps = len(episode[name])
            detail = f"{name} set before the last of {steps} steps"
            return Violation("flags", index, int(early[0]), detail)
    ended = episode["terminations"][-1] or episode["truncations"][-1]
    if not ended and not is_last:
        step = len(episode["rewards"]) - 1
        detail = "neither terminated nor truncated; only the file's last episode may be unfinished"
        return Violation("end", index, step, detail)
    return None


def settle_violations(
    dataset_id: str, violations: list[Violation], num_episodes: int, on_bad_episode: OnBadEpisode
) -> None:
    """Refuse a dataset with bad episodes, or say which ones are dropped.

    Raises:
        DatasetError: If there are bad episodes and they are not to be dropped, or none is left.
    """
    if not violations:
        return
    count = f"{len(violations)} of {num_episodes} episodes are bad"
    if on_bad_episode == "raise":
        raise DatasetError(
            f"dataset {dataset_id}: {violations[0]} ({count}). Fix the data, or leave them out "
            "by --on-bad-episode drop"
        )
    rules = ", ".join(f"{rule} {n}" for rule, n in Counter(v.rule for v in violations).items())
    if len(violations) == num_episodes:
        raise DatasetError(f"dataset {dataset_id}: all {num_episodes} episodes are bad ({rules})")
    warnings.warn(
        f"dataset {dataset_id}: {count} and dropped ({rules}); first: {violations[0]}",
        UserWarning,
        stacklevel=3,
    )
