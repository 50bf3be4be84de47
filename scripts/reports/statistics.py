"""Statistics over few seeds and several tasks, with stratified bootstrap intervals.

After "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (Agarwal et al.,
NeurIPS 2021, arXiv 2108.13264). Scores are a sequence of arrays, one for each task, whose last axis
is the runs; leading axes, if there are any, are worked through at once. Tasks may have different
numbers of runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
REPETITIONS = 5000
BOOTSTRAP_SEED = 0

Scores = Sequence[np.ndarray]


def mean_over_tasks(scores: Scores) -> np.ndarray:
    """Return the mean over tasks of the mean over their runs."""
    return np.mean([task.mean(axis=-1) for task in scores], axis=0)


def interquartile_mean(scores: Scores) -> np.ndarray:
    """Return the mean of the middle half of all runs of all tasks (section 4.3 of the paper).

    A quarter of the runs, rounded down, is left out at either end, as by SciPy's ``trim_mean``.
    """
    runs = np.concatenate(scores, axis=-1)
    count = runs.shape[-1]
    cut = count // 4
    return np.partition(runs, (cut, count - cut - 1), axis=-1)[..., cut : count - cut].mean(-1)


def performance_profile(scores: Scores, thresholds: np.ndarray) -> np.ndarray:
    """Return the share of runs that score more than each threshold, averaged over tasks.

    Args:
        scores: By task, (..., runs).
        thresholds: (K,).

    Returns:
        (..., K), from 1 to 0.
    """
    return np.mean([(task[..., None] > thresholds).mean(axis=-2) for task in scores], axis=0)


def probability_of_improvement(ours: Scores, rival: Scores) -> np.ndarray:
    """Return the chance that a run of ours beats one of the rival's on the same task.

    The Mann-Whitney statistic as a share, a tie counting one half, averaged over tasks.
    """
    chances = []
    for own, other in zip(ours, rival, strict=True):
        difference = own[..., :, None] - other[..., None, :]
        chances.append(((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-2, -1)))
    return np.mean(chances, axis=0)


def bootstrap_interval(
    statistic: Callable[..., np.ndarray],
    *groups: Scores,
    repetitions: int = REPETITIONS,
    seed: int = BOOTSTRAP_SEED,
) -> tuple[Any, Any] | None:
    """Return the ends of the 95 % interval of a statistic: percentiles of a stratified bootstrap.

    Runs are drawn with replacement within each task and each group on its own; tasks are not drawn.

    Args:
        statistic: Of the groups, each a sequence of (repetitions, runs) arrays.
        groups: Scores of one or more methods.
        repetitions: Of the bootstrap.
        seed: Of the draws.

    Returns:
        Lower and upper end, each of the statistic's shape; None if some task has a single run,
        whose spread nobody knows.
    """
    if any(len(task) < 2 for group in groups for task in group):
        return None
    random = np.random.default_rng(seed)
    drawn = [
        [task[random.integers(len(task), size=(repetitions, len(task)))] for task in group]
        for group in groups
    ]
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(*drawn), (outside, 1 - outside), axis=0)
    return low, high
