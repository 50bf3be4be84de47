"""One step of acting as a function of tensors alone."""

import torch
from torch import Tensor, nn

from minrl.agents.backbones.blocks import State
from minrl.agents.trajectory import TrajectoryModel

# Of a normalised observation or return: no real one comes near, and beyond it float32 squares
# overflow.
LARGEST = 1e4


class StepPolicy(nn.Module):
    """One step of a model for B environments, with one flat state and actions inside the bounds.

    Args:
        model: The trained model.
    """

    def __init__(self, model: TrajectoryModel):
        super().__init__()
        self.model = model
        self.shapes = [tensor.shape[1:] for tensor in model.initial_state(1)]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.state_size = sum(self.sizes)  # S

    def initial_state(self, batch: int) -> Tensor:
        """Return the state before an episode, (B, S)."""
        return self.join(self.model.initial_state(batch))

    def split(self, state: Tensor) -> State:
        """Return the model's state, views of the flat one, (B, S)."""
        return tuple(
            part.unflatten(1, shape)
            for part, shape in zip(state.split(self.sizes, dim=1), self.shapes, strict=True)
        )

    def join(self, state: State) -> Tensor:
        """Return a model's state as one tensor, (B, S); the last action comes last."""
        return torch.cat([part.flatten(1) for part in state], dim=1)

    def forward(
        self,
        observation: Tensor,
        target_return: Tensor,
        timestep: Tensor,
        reset: Tensor | None,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the actions, (B, A), and the next state, (B, S).

        Args:
            observation: (B, O) float32; what no environment shows is cut down to ``LARGEST``.
            target_return: (B,) float32, in reward units; cut down likewise.
            timestep: (B,) int64.
            reset: (B,) bool, True where an episode starts, whatever the state there.
            state: (B, S) float32.
        """
        model = self.model
        seen = without_outliers(model, observation, target_return)
        predicted, after = model.step(*seen, timestep, self.split(state), reset)
        action = inside_bounds(model, predicted)
        return action, self.join((*after[:-1], action))


def without_outliers(
    model: TrajectoryModel, observations: Tensor, returns: Tensor
) -> tuple[Tensor, Tensor]:
    """Return observations, (B, O), and returns, (B,), cut down to where float32 can follow.

    Observations to ``LARGEST`` standard deviations from the mean, returns to ``LARGEST`` times
    their scale.
    """
    room, most = LARGEST * model.observation_std, LARGEST * model.return_scale
    low, high = model.observation_mean - room, model.observation_mean + room
    return observations.clamp(low, high), returns.clamp(-most, most)


def inside_bounds(model: TrajectoryModel, actions: Tensor) -> Tensor:
    """Return actions, (B, A), inside the box: rounding can leave it by a bit."""
    return torch.clamp(actions, model.action_low, model.action_high)
