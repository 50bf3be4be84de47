"""Which environments start an episode at the next step, and the return that each is asked for."""

import numbers
from collections.abc import Sequence

import numpy as np

from minrl.agents.checkpoint import is_finite_number
from minrl.errors import ConfigError


class Starts:
    """The starts that ``DecisionAgent.reset`` announces and ``act`` carries out.

    Attributes:
        flags: (B,) bool, True where an episode starts.
        targets: (B,) float64, what is asked for, in reward units.
    """

    def __init__(self) -> None:
        self.flags = np.ones(0, dtype=bool)
        self.targets = np.zeros(0)
        self._asked: float | np.ndarray | None = None  # by the last reset of all
        self._counted = False  # whether the last reset said how many there are

    def announce(
        self,
        mask: np.ndarray | None,
        target_return: float | Sequence[float] | np.ndarray | None,
        num_envs: int | None,
        default: float,
    ) -> None:
        """Do what ``DecisionAgent.reset`` says; ``default`` is the agent's own target."""
        asked = None if target_return is None else _checked_targets(target_return)
        several = isinstance(asked, np.ndarray)
        counted = mask is not None or num_envs is not None or several
        if mask is None:
            if num_envs is None:
                num_envs = len(asked) if several else max(len(self.flags), 1)
            if num_envs < 1:
                raise ValueError(f"num_envs must be at least 1, not {num_envs}")
            mask = np.ones(num_envs, dtype=bool)
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.ndim != 1:
            hint = "; a return is asked for by target_return=" if mask.ndim == 0 else ""
            raise ValueError(
                "mask must be (B,) bool, True for the environments that start anew, not "
                f"{mask.shape} {mask.dtype}{hint}"
            )
        if several and len(asked) != len(mask):
            raise ValueError(f"there are {len(asked)} targets for {len(mask)} environments")
        if mask.all():
            self._asked = asked
            self.flags[:] = True
            self._counted = False
        self.resize(len(mask), default)
        self._counted = counted
        self.flags = self.flags | mask
        if asked is None:
            asked = default
        self.targets[mask] = asked[mask] if several else asked

    def resize(self, batch: int, default: float) -> bool:
        """Take another number of environments, if none of those of before is in an episode.

        Returns:
            Whether it is another.

        Raises:
            ValueError: If one is, or if the last reset said how many there are.
        """
        before = len(self.flags)
        if batch == before:
            return False
        if not self.flags.all():
            raise ValueError(
                f"{before} environments are in the middle of episodes, and now there are {batch}: "
                f"call reset(num_envs={batch}) if all start anew"
            )
        if self._counted:
            raise ValueError(
                f"reset was told of {before} environments, and now there are {batch}: "
                f"call reset(num_envs={batch}) if all start anew"
            )
        asked = default if self._asked is None else self._asked
        self.flags, self.targets = np.ones(batch, dtype=bool), np.full(batch, asked)
        return True

    def clear(self) -> None:
        """Note that what was announced has happened."""
        self.flags = np.zeros(len(self.flags), dtype=bool)
        self._counted = False


def checked_target(value: float) -> float:
    """Return a target return as a plain float, which JSON can hold.

    Raises:
        ConfigError: If it is no finite number.
    """
    if not isinstance(value, numbers.Real) or not is_finite_number(float(value)):
        raise ConfigError(f"target_return must be a finite number, not {value!r:.50}")
    return float(value)


def _checked_targets(value: float | Sequence[float] | np.ndarray) -> float | np.ndarray:
    """Return one target, or one for each environment, (B,) float64."""
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1):
        return np.array([checked_target(item) for item in value], dtype=np.float64)
    return checked_target(value)
