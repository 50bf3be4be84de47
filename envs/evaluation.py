"""What an evaluation found: returns of a fixed set of episodes, and honest summaries of them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from minrl.envs.scores import percent_of, reference_scores
from minrl.errors import EnvError


@functools.cache
def student_t_quantile(confidence: float, degrees_of_freedom: float) -> float:
    """Return the t with ``P(|T| < t) = confidence`` for Student's distribution.

    With ``t = sqrt(n) tan(angle)`` the density becomes ``cos(angle)^(n-1)`` on a bounded interval,
    which is integrated on a fine grid and inverted; no table and no scipy.
    """
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees_of_freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp(confidence, mass / mass[-1], angles)
    return math.sqrt(degrees_of_freedom) * math.tan(angle)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Returns of one agent, asked for one target, over a fixed set of episodes.

    Attributes:
        environment_id: Where the agent acted.
        target_return: The return it was asked for, in reward units; None when it takes none.
        returns: (E,) float64 undiscounted returns, by episode index.
        lengths: (E,) int64 steps, by episode index.
        seed: Together with the number of episodes it fixes the seed of every episode.
        references: Returns that score 0 and 100 percent; None takes D4RL's where there are any.
    """

    environment_id: str
    target_return: float | None
    returns: np.ndarray
    lengths: np.ndarray
    seed: int
    references: tuple[float, float] | None = None

    @property
    def return_mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def return_std(self) -> float:
        """Sample standard deviation of the returns (divisor E - 1); NaN for one episode."""
        return float(self.returns.std(ddof=1)) if len(self.returns) > 1 else math.nan

    @property
    def length_mean(self) -> float:
        """Mean episode length in steps."""
        return float(self.lengths.mean())

    @property
    def interval_95(self) -> tuple[float, float]:
        """95 % confidence interval of the mean return (Student's t); NaN for one episode.

        It covers the chance of the start states, not that of training: for that, compare seeds.
        """
        count = len(self.returns)
        if count < 2:
            return math.nan, math.nan
        half_width = student_t_quantile(0.95, count - 1) * self.return_std / math.sqrt(count)
        return self.return_mean - half_width, self.return_mean + half_width

    @property
    def normalized(self) -> dict[str, Any] | None:
        """``mean``, ``std`` and ``interval_95`` in percent of the references, None without any.

        See ``minrl.envs.scores.reference_scores`` for what such figures may be compared with.
        """
        try:
            references = self.references or reference_scores(self.environment_id)
        except EnvError:
            return None
        low, high = self.interval_95
        return {
            "mean": percent_of(self.return_mean, references),
            "std": percent_of(self.return_std, (0.0, references[1] - references[0])),  # a width
            "interval_95": (percent_of(low, references), percent_of(high, references)),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings and lists; NaN becomes None, as in JSON."""
        return _jsonable(
            {
                "environment_id": self.environment_id,
                "target_return": self.target_return,
                "seed": self.seed,
                "episodes": len(self.returns),
                "return_mean": self.return_mean,
                "return_std": self.return_std,
                "return_interval_95": self.interval_95,
                "length_mean": self.length_mean,
                "normalized": self.normalized,
                "returns": self.returns.tolist(),
                "lengths": self.lengths.tolist(),
            }
        )


def format_return(value: float) -> str:
    """Return a return as text: whole if that says enough, else three digits."""
    return f"{value:.0f}" if abs(value) >= 100 or value == 0 else f"{value:.3g}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
