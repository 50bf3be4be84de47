"""The last steps of running episodes, for a Transformer to go through."""

import numpy as np
import torch
from torch import Tensor

from minrl.agents.trajectory import TrajectoryModel


class RecentSteps:
    """The last ``context`` steps of each of B episodes."""

    def __init__(self, model: TrajectoryModel, batch: int, context: int):
        zeros = model.action_low.new_zeros
        self.observations = zeros(batch, context, model.observation_size)
        self.actions = zeros(batch, context, model.action_size)
        self.returns = zeros(batch, context)
        self.timesteps = zeros(batch, context, dtype=torch.long)
        self.lengths = zeros(batch, dtype=torch.long)
        self.rows = torch.arange(batch, device=self.lengths.device)

    def append(
        self,
        observations: Tensor,
        returns: Tensor,
        timesteps: Tensor,
        previous_actions: Tensor,
        starts: np.ndarray,
    ) -> None:
        """Add one step; ``previous_actions`` (B, A) belong to the step before it."""
        context = self.observations.shape[1]
        going_on = torch.from_numpy(~starts).to(self.lengths.device)
        before = self.rows[going_on]
        self.actions[before, self.lengths[before] - 1] = previous_actions[before]
        self.lengths = torch.where(going_on, self.lengths, 0)
        full = self.lengths == context
        for kept in (self.observations, self.actions, self.returns, self.timesteps):
            kept[full, :-1] = kept[full, 1:].clone()
        self.lengths = self.lengths.clamp(max=context - 1) + 1
        last = self.lengths - 1
        self.observations[self.rows, last] = observations
        self.returns[self.rows, last] = returns
        self.timesteps[self.rows, last] = timesteps

    def predict(self, model: TrajectoryModel) -> Tensor:
        """Return the actions, (B, A), that a model predicts from these steps alone.

        Rows shorter than the others end early, and no step looks ahead: there is no mask.
        """
        every, _ = model(self.observations, self.actions, self.returns, self.timesteps)
        return every[self.rows, self.lengths - 1]
