"""Small untrained agents, episodes for them, and the loop that acts through one."""

import numpy as np
import pytest
import torch

from minrl import DecisionAgent, TrajectoryModel
from minrl.agents.model_config import ModelConfig

KINDS = {
    "joint": {"tokens": "joint"},
    "interleaved": {"tokens": "interleaved"},
    "minlstm-convolution": {"tokens": "interleaved", "backbone": "minlstm", "convolution": 4},
    "transformer": {"backbone": "transformer", "attention_context": 1000},
    "by-default": {"condition": "return", "max_timestep": 0},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
ROWS = 3


def make_agent(kind="joint", observation_size=5, action_size=2, **options):
    torch.manual_seed(0)
    config = {"width": 24, "num_layers": 2, "condition": "return-to-go", "max_timestep": 1200}
    config = ModelConfig(**config | KINDS[kind])
    model = TrajectoryModel(observation_size, action_size, config)
    for name, parameter in model.named_parameters():
        if "bias_h0" in name:
            torch.nn.init.normal_(parameter)
    return DecisionAgent(model, **{"target_return": 100.0, **options})


def make_episode(steps, rows=ROWS, seed=0):
    generator = np.random.default_rng(seed)
    observations = generator.normal(size=(steps, rows, 5)).astype(np.float32)
    return observations, generator.normal(size=(steps, rows))


def act_through(agent, observations, rewards):
    return np.stack(
        [
            agent.act(observations[t], rewards[t - 1] if t else None)
            for t in range(len(observations))
        ]
    )
