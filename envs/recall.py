"""Recall: a cue at the first step, nothing for N steps, then the question which cue it was.

Importing this module registers ``minrl/Recall-v0``:

    import minrl.envs.recall
    environment = gymnasium.make("minrl/Recall-v0", length=50, cues=4)

No MuJoCo, no image, two numpy writes a step: what a run measures is the memory of the policy.
The task is the T-maze without the corridor (Bakker 2001, "Reinforcement Learning with Long
Short-Term Memory"): one bit of the past decides the reward, and only at the end.
"""

from typing import Any

import gymnasium as gym
import numpy as np

RECALL_ID = "minrl/Recall-v0"


class Recall(gym.Env[np.ndarray, np.int64]):
    """Remember which of ``cues`` signals was shown at the first step.

    An episode has ``length + 2`` observations: the cue, ``length`` blank ones, and the question.

    * observation: ``Box(0, 1, (cues + 1,), float32)``. At step 0 the one-hot cue; then zeros; at
      the last step the last entry is 1, which means "answer now".
    * action: ``Discrete(cues)``. Only the answer to the question counts; earlier ones are ignored.
    * reward: 1 for the right answer, else 0. The episode terminates with the answer, and is never
      truncated.
    * optimum: a return of 1.0. Chance, and the best that a policy without memory can do:
      ``1 / cues``.

    Args:
        length: Blank steps between the cue and the question, at least 0; 200 and more are fine.
        cues: How many signals there are, at least 2; drawn evenly.

    Raises:
        ValueError: If the length is negative, or there are fewer than two cues.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own declaration

    def __init__(self, length: int = 50, cues: int = 4):
        if length < 0 or cues < 2:
            raise ValueError(f"need length >= 0 and cues >= 2, got length={length}, cues={cues}")
        self.length = length
        self.cues = cues
        self.observation_space = gym.spaces.Box(0.0, 1.0, (cues + 1,), np.float32)
        self.action_space = gym.spaces.Discrete(cues)
        self._cue = 0
        self._time = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw a new cue and show it."""
        super().reset(seed=seed)
        self._cue = int(self.np_random.integers(self.cues))
        self._time = 0
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Go on one step; the action counts if the current observation asks the question."""
        terminated = self._time == self.length + 1
        reward = float(terminated and int(action) == self._cue)
        self._time += 1
        return self._observation(), reward, terminated, False, {}

    def _observation(self) -> np.ndarray:
        observation = np.zeros(self.cues + 1, np.float32)
        if self._time == 0:
            observation[self._cue] = 1.0
        elif self._time == self.length + 1:
            observation[-1] = 1.0
        return observation


gym.register(RECALL_ID, entry_point=f"{__name__}:Recall", order_enforce=True)
