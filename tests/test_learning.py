"""The main promise, end to end: trained on mixed data, the agent returns what it is asked for."""

import numpy as np
import pytest
import torch
from torch import nn

from minrl import DecisionAgent, evaluate, load_dataset
from minrl.data.behaviours import make_embedded_dataset
from minrl.data.windows import WindowSampler
from minrl.scripts.train import train
from minrl.scripts.train_config import TrainConfig

pytestmark = pytest.mark.integration

DATASET = "minrl/hopper/medium-replay-v0"


class BehaviourCloning:
    """A two-layer MLP trained on the same data to do what was done, whatever its return."""

    def __init__(self, episodes, steps):
        torch.manual_seed(0)
        sizes = episodes.observations.shape[1], 256, 256, episodes.actions.shape[1]
        self.network = nn.Sequential(
            nn.Linear(sizes[0], sizes[1]),
            nn.ReLU(),
            nn.Linear(sizes[1], sizes[2]),
            nn.ReLU(),
            nn.Linear(sizes[2], sizes[3]),
            nn.Tanh(),
        )
        self.mean = episodes.observations.mean(0)
        self.std = episodes.observations.std(0) + 1e-6
        optimizer = torch.optim.Adam(self.network.parameters(), 1e-3)
        sampler = WindowSampler(episodes, context=1, batch_size=256, seed=0)
        for step in range(steps):
            batch = sampler.batch(step)
            error = self.predict(batch.observations[:, 0]) - torch.from_numpy(batch.actions[:, 0])
            optimizer.zero_grad()
            error.square().mean().backward()
            optimizer.step()

    def predict(self, observations):
        normalised = (observations - self.mean) / self.std
        return self.network(torch.from_numpy(normalised.astype(np.float32)))

    def reset(self, mask=None, **_):
        pass

    def act(self, observations, rewards=None):
        return self.predict(observations).detach().numpy()


def test_the_agent_beats_behaviour_cloning_and_returns_what_it_is_asked_for(tmp_path):
    make_embedded_dataset(DATASET, steps=40_000, progress=False)
    config = TrainConfig(
        dataset=(DATASET,),
        steps=400,
        batch_size=64,
        eval_every=400,
        eval_episodes=0,
        final_episodes=0,
        device="cpu",
        run_dir=tmp_path / "run",
    )
    agent = DecisionAgent.load(train(config))
    asked, episodes = 1500.0, load_dataset(DATASET)
    ours = evaluate(agent, "Hopper-v5", episodes=8, target_return=asked, seed=1)
    cloned = evaluate(BehaviourCloning(episodes, 1000), "Hopper-v5", episodes=8, seed=1)
    assert episodes.returns.mean() < 500
    assert ours.return_mean > 1.2 * cloned.return_mean
    assert abs(ours.return_mean - asked) < 0.3 * asked
