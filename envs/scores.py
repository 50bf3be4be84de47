"""D4RL's reference scores, and returns expressed in percent of them.

Values: Farama-Foundation/D4RL, ``d4rl/infos.py``; the same for v0, v1, v2 and for every level.
"""

from __future__ import annotations

import re
from typing import overload

import numpy as np

from minrl.errors import EnvError

REFERENCE_SCORES: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
}
"""Undiscounted return over at most 1,000 steps of a (random, expert) policy, by task."""
_TASKS = "|".join(REFERENCE_SCORES)
_LEVELS = "random|simple|medium|expert|medium-replay|medium-expert|full-replay"
_OF_D4RL = re.compile(
    rf"(?:minrl|mujoco|d4rl)/({_TASKS})/.*|({_TASKS})(?:-(?:{_LEVELS}))?(?:-v\d+)?", re.IGNORECASE
)


def d4rl_task(name: str) -> str | None:
    """Return the task of D4RL that an environment or dataset id speaks of, as "hopper"; or None.

    Others may have hoppers too, with other rewards: ``dm_control/hopper-hop-v0`` is none of these.
    """
    found = _OF_D4RL.fullmatch(name)
    return found and (found[1] or found[2]).lower()


def reference_scores(name: str) -> tuple[float, float]:
    """Return the (random, expert) returns of the task that a name speaks of.

    They belong to D4RL's v2 physics. On v5 environments, or on data made in them, they are a common
    yardstick only: say so beside such scores.

    Args:
        name: An environment id (``Hopper-v5``) or dataset id (``minrl/hopper/medium-v0``,
            ``d4rl/hopper/medium-v2``, ``hopper-medium-v2``).

    Raises:
        EnvError: If it is not of such a form, as ``dm_control/hopper-hop-v0``, whose returns are
            other ones, or not of a task with known scores.
    """
    if not isinstance(name, str):
        raise EnvError(
            f"reference scores are known by a name such as 'Hopper-v5', not {name!r:.50}"
        )
    if task := d4rl_task(name):
        return REFERENCE_SCORES[task]
    raise EnvError(
        f"no reference scores are known for {name!r}, so its returns cannot be normalised; "
        f"they are known for {', '.join(sorted(REFERENCE_SCORES))}"
    )


@overload
def normalized_score(returns: float, name: str) -> float: ...
@overload
def normalized_score(returns: np.ndarray, name: str) -> np.ndarray: ...
def normalized_score(returns: float | np.ndarray, name: str) -> float | np.ndarray:
    """Express returns in percent: 0 is D4RL's random policy, 100 its expert.

    Args:
        returns: Undiscounted return(s) in reward units, any shape.
        name: Environment or dataset id, see ``reference_scores``.

    Raises:
        EnvError: If the task has no known reference scores.
    """
    return percent_of(returns, reference_scores(name))


@overload
def percent_of(returns: float, references: tuple[float, float]) -> float: ...
@overload
def percent_of(returns: np.ndarray, references: tuple[float, float]) -> np.ndarray: ...
def percent_of(returns: float | np.ndarray, references: tuple[float, float]) -> float | np.ndarray:
    """Express returns in percent of the way from the lower reference to the higher."""
    lowest, highest = references
    return 100.0 * (returns - lowest) / (highest - lowest)
