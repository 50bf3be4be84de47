"""Episodes for d3rlpy to train on, and its agents as policies that `evaluate` can run."""

import itertools
from typing import Any

import numpy as np
import torch

from minrl.agents.adapters.libraries import interface_of
from minrl.data.episodes import Episodes

INSTALL = "pip install --no-deps d3rlpy==2.8.1, after what the README says"

with interface_of("d3rlpy", install=INSTALL, known="2.8.1"):
    from d3rlpy.dataset import Episode, InfiniteBuffer, ReplayBuffer


def make_replay_buffer(episodes: Episodes) -> ReplayBuffer:
    """Return the same episodes as d3rlpy's, one by one.

    Its MDPDataset would drop a last episode that is unfinished and refuse one that both terminated
    and was truncated; its get_minari sets episode k off by k rows. Of an episode that did not
    terminate d3rlpy does not sample the last step, as it does not know what was seen after it.
    """
    return ReplayBuffer(
        InfiniteBuffer(),
        episodes=[
            Episode(
                observations=episodes.observations[start:stop],
                actions=episodes.actions[start:stop],
                rewards=episodes.rewards[start:stop, None],
                terminated=bool(terminated),
            )
            for (start, stop), terminated in zip(
                itertools.pairwise(episodes.offsets), episodes.terminated, strict=True
            )
        ],
    )


class MemorylessPolicy:
    """Acts on the observation alone, with whatever algorithm of d3rlpy predicts from it.

    Args:
        algorithm: Trained.
    """

    def __init__(self, algorithm: Any):
        self.algorithm = algorithm

    def reset(self, mask=None, *, target_return=None, num_envs=None) -> None:
        """Start new episodes; there is nothing to forget, and no return is asked for."""

    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """Return actions (B, A) for observations (B, O)."""
        return self.algorithm.predict(observations)


class TransformerPolicy:
    """Acts with d3rlpy's Decision Transformer in B environments at once.

    d3rlpy's own StatefulTransformerWrapper serves one environment at a time; this gives the same
    actions from one forward pass over the windows of all of them.

    Args:
        algorithm: Trained, without a scaler of actions.
    """

    def __init__(self, algorithm: Any):
        self.config, self.modules = algorithm.config, algorithm.impl.modules
        self.observation_size = algorithm.impl.observation_shape[0]
        self.action_size = algorithm.impl.action_size
        self.device = next(self.modules.transformer.parameters()).device

    def reset(
        self,
        mask: np.ndarray | None = None,
        *,
        target_return: float | None = None,
        num_envs: int | None = None,
    ) -> None:
        """Start new episodes in the rows of ``mask``, all ``num_envs`` of them if it is None."""
        if mask is None:
            mask = np.ones(num_envs, bool)
            window = (num_envs, self.config.context_size)
            self.observations = torch.zeros(*window, self.observation_size)  # B K O
            self.actions = torch.zeros(*window, self.action_size)  # B K A
            self.returns_to_go = torch.zeros(*window, 1)  # B K 1
            self.timesteps = torch.zeros(window, dtype=torch.long)  # B K
            self.is_padding = torch.ones(window)  # B K
            self.remaining = np.zeros(num_envs)  # B
        self.remaining[mask] = target_return
        rows = torch.from_numpy(mask)
        for values in (self.observations, self.actions, self.returns_to_go, self.timesteps):
            values[rows] = 0
        self.is_padding[rows] = 1

    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """Return actions (B, A) for observations (B, O) and the rewards of the step before."""
        self.remaining -= 0 if rewards is None else rewards
        timesteps = (self.timesteps[:, -1] + 1).clamp(max=self.config.max_timestep)  # from 1 on
        self._append(self.observations, torch.from_numpy(observations))
        self._append(self.returns_to_go, torch.from_numpy(self.remaining[:, None]))
        self._append(self.timesteps, timesteps)
        self._append(self.is_padding, torch.zeros(()))
        self._append(self.actions, torch.zeros(()))  # in place of the one to be chosen
        self.modules.set_eval()
        with torch.no_grad():
            actions = self.modules.transformer(
                self.config.observation_scaler.transform(self.observations.to(self.device)),
                self.actions.to(self.device),
                self.config.reward_scaler.transform(self.returns_to_go.to(self.device)),
                self.timesteps.to(self.device),
                self.is_padding.to(self.device),
            )
        self.actions[:, -1] = actions[:, -1].cpu()
        return self.actions[:, -1].numpy().copy()

    @staticmethod
    def _append(window: torch.Tensor, values: torch.Tensor) -> None:
        """Shift the window by one step and write the new one at its end."""
        window[:, :-1] = window[:, 1:].clone()
        window[:, -1] = values
