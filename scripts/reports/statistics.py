"""Statistics over few seeds and several tasks, with their 95 % intervals.

After "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (Agarwal et al.,
NeurIPS 2021, arXiv 2108.13264). Scores are a sequence of arrays, one for each task, whose last axis
is the runs; leading axes, if there are any, are worked through at once. Tasks may have different
numbers of runs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minrl.envs.evaluation import student_t_quantile

CONFIDENCE = 0.95
ROUNDING = 1e-9  # of a mean: what differs by less is equal
REPETITIONS = 5000
BOOTSTRAP_SEED = 0

# How many of 2,000 simulated studies of so many seeds and tasks have an interval of the bootstrap
# that misses what is true: for interquartile means, and for probabilities of improvement. Scores
# were normal and equally spread on all tasks, whose means range over four standard deviations;
# where they spread on a few tasks only, as on the embedded ones, about twice as many miss.
MISSES = {
    (3, 1): (0.25, 0.19),
    (3, 3): (0.19, 0.11),
    (3, 9): (0.12, 0.09),
    (5, 1): (0.11, 0.10),
    (5, 9): (0.09, 0.06),
}

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


def student_interval(scores: Scores) -> tuple[float, float] | None:
    """Return the 95 % interval of :func:`mean_over_tasks`, by Student's t.

    With a variance for each task, and the degrees of freedom of Satterthwaite (Biometrics Bulletin
    2, 1946) and Welch (Biometrika 34, 1947); with one task it is the usual interval of a mean.

    Args:
        scores: By task, (runs,).

    Returns:
        Lower and upper end; None if some task has a single run, whose spread nobody knows, or all
        runs of each task are equal, which says as little.
    """
    if any(len(task) < 2 for task in scores):
        return None
    mean = float(mean_over_tasks(scores))
    squares = [task.var(ddof=1) / len(task) for task in scores]
    error = math.sqrt(sum(squares)) / len(scores)
    if error <= ROUNDING * abs(mean):
        return None
    shares = (
        (square / sum(squares)) ** 2 / (len(task) - 1)
        for square, task in zip(squares, scores, strict=True)
    )
    degrees = round(1 / sum(shares), 3)  # quantiles are kept, by their arguments
    half = student_t_quantile(CONFIDENCE, degrees) * error
    return mean - half, mean + half


def bootstrap_interval(
    statistic: Callable[..., np.ndarray],
    *groups: Scores,
    repetitions: int = REPETITIONS,
) -> tuple[Any, Any] | None:
    """Return the ends of the 95 % interval of a statistic: percentiles of a stratified bootstrap.

    Runs are drawn with replacement within each task and each group on its own; tasks are not drawn.

    Args:
        statistic: Of the groups, each a sequence of (repetitions, runs) arrays.
        groups: Scores of one or more methods.
        repetitions: Of the bootstrap.

    Returns:
        Lower and upper end, each of the statistic's shape; None if some task has a single run,
        whose spread nobody knows.
    """
    if any(len(task) < 2 for group in groups for task in group):
        return None
    random = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = [
        [task[random.integers(len(task), size=(repetitions, len(task)))] for task in group]
        for group in groups
    ]
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(*drawn), (outside, 1 - outside), axis=0)
    return low, high
