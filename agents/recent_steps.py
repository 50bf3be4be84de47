"""The last steps of running episodes, from which a recurrent state can be rebuilt."""

import numpy as np
import torch
from torch import Tensor

from minrl.agents.backbones.blocks import State
from minrl.agents.trajectory import TrajectoryModel


class RecentSteps:
    """The last ``context`` steps of each of B episodes, to rebuild recurrent states from."""

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

    def refresh(
        self, model: TrajectoryModel, due: np.ndarray, predicted: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """Return ``predicted`` and ``state`` with the rows that are ``due`` rebuilt from here.

        All rows and steps are computed whichever are due, because the shape of a matrix product
        decides its rounding: so no row's actions depend on when another was reset.
        """
        if not due.any():
            return predicted, state
        steps = torch.arange(self.observations.shape[1], device=self.rows.device)
        every, rebuilt = model(
            self.observations,
            self.actions,
            self.returns,
            self.timesteps,
            mask=steps < self.lengths.unsqueeze(1),
        )
        chosen = torch.from_numpy(due).to(self.rows.device)
        pairs = [
            (every[self.rows, self.lengths - 1], predicted),
            *zip(rebuilt, state, strict=True),
        ]
        predicted, *state = (
            torch.where(chosen.view(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old)
            for new, old in pairs
        )
        return predicted, tuple(state)
