import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from minrl import DecisionAgent, TrajectoryModel, evaluate
from minrl.agents.model_config import ModelConfig


class StartsOf(gym.Wrapper):
    """Starts its episodes where ``evaluate`` starts every ``stride``-th one, whoever resets it."""

    def __init__(self, environment, seed, first, stride):
        super().__init__(environment)
        self.seed, self.episode, self.stride = seed, first, stride

    def reset(self, **_):
        sequence = np.random.SeedSequence([self.seed, self.episode])
        self.episode += self.stride
        return self.env.reset(seed=int(sequence.generate_state(1)[0]))


@pytest.mark.parametrize("num_envs", [1, 3])
def test_evaluate_policy_gives_the_returns_of_evaluate(num_envs):
    torch.manual_seed(0)
    model = TrajectoryModel(11, 3, ModelConfig(width=24, num_layers=2, condition="return-to-go"))
    agent = DecisionAgent(model, target_return=3000.0)
    ours = evaluate(agent, "Hopper-v5", episodes=6, seed=5, num_envs=num_envs)

    rows = iter(range(num_envs))
    environments = make_vec_env(
        lambda: StartsOf(gym.make("Hopper-v5"), 5, next(rows), num_envs), num_envs
    )
    returns, lengths = evaluate_policy(
        agent, environments, 6, return_episode_rewards=True, callback=agent.watch_rewards
    )
    assert len(set(ours.returns)) == 6  # or the order of the rewards would not matter
    assert sorted(lengths) == sorted(ours.lengths)
    np.testing.assert_allclose(sorted(returns), sorted(ours.returns), rtol=1e-5)
