import math

import numpy as np
import pytest
import torch
from acting import ROWS, act_through, every_kind, make_agent, make_episode

from minrl import DecisionAgent
from minrl.agents.step_policy import LARGEST
from minrl.errors import ConfigError


def observations_of_all_kinds(generator, model):
    """Batches of 1,000 observations: ordinary, extreme, and at every boundary there is."""
    mean, std = model.observation_mean.numpy(), model.observation_std.numpy()
    most = np.finfo(np.float32).max
    while True:
        scale = 10.0 ** generator.uniform(-45, 38.5, size=(1000, 5))
        yield generator.normal(size=(1000, 5))
        yield generator.uniform(-1, 1, size=(1000, 5)) * scale
        yield generator.choice([0, -0.0, 1, 1e-45, 1e-38, LARGEST, most, -most], size=(1000, 5))
        edge = mean + np.float32(LARGEST) * std * generator.choice([-1, 1], size=(1000, 5))
        yield np.nextafter(edge, generator.choice([-np.inf, np.inf], size=(1000, 5)))
        yield np.where(generator.random((1000, 5)) < 0.2, most, mean)  # one huge among ordinary
        yield generator.integers(-(2**62), 2**62, size=(1000, 5))  # of another type


@pytest.mark.parametrize(
    ("kind", "refresh_every", "count"),
    [
        ("joint", 0, 100_000),
        ("minlstm-convolution", 0, 6_000),
        ("joint", 1, 6_000),
        pytest.param("minlstm-convolution", 0, 100_000, marks=pytest.mark.slow),
        pytest.param("interleaved", 3, 100_000, marks=pytest.mark.slow),
        pytest.param("joint", 1, 100_000, marks=pytest.mark.slow),
    ],
)
def test_actions_are_inside_the_box_whatever_is_seen(kind, refresh_every, count):
    agent = make_agent(kind, refresh_every=refresh_every, context=3)
    low, high = np.array([-0.3, 0.1], np.float32), np.array([0.7, 5.0], np.float32)
    agent.model.action_low.copy_(torch.from_numpy(low))
    agent.model.action_high.copy_(torch.from_numpy(high))
    agent.model.observation_mean.copy_(torch.linspace(-3, 3, 5))
    agent.model.observation_std.copy_(torch.tensor([1e-6, 0.1, 1.0, 7.0, 1e4]))
    generator = np.random.default_rng(0)
    agent.reset(num_envs=1000)
    seen = 0
    for observations in observations_of_all_kinds(generator, agent.model):
        agent.reset(generator.random(1000) < 0.05)
        rewards = generator.normal(size=1000) * 10.0 ** generator.uniform(-6, 36, size=1000)
        actions = agent.act(observations, rewards)
        assert (actions.shape, actions.dtype) == ((1000, 2), np.float32)
        inside = (actions >= low) & (actions <= high)  # false for a NaN
        assert inside.all()
        seen += 1000
        if seen >= count:
            break
    assert np.ptp(actions, axis=0).min() > 0  # else the model has no say


@pytest.mark.parametrize(
    ("observation", "reward"),
    [(np.nan, np.nan), (np.inf, np.inf), (-np.inf, -np.inf), (-1e300, np.nan)],
)
def test_a_bad_observation_is_refused_by_row_and_changes_nothing(observation, reward):
    agent = make_agent()
    observations, rewards = make_episode(3)
    agent.reset(num_envs=ROWS)
    agent.act(observations[0])
    poisoned = observations[1].astype(np.float64)
    poisoned[2, 4] = observation
    refused = pytest.raises(ValueError, match="observation of environment 2 is not finite in fl")
    with refused, np.errstate(over="ignore"):
        agent.act(poisoned, rewards[0])
    with pytest.raises(ValueError, match="reward of environment 1 is not finite"):
        agent.act(observations[1], np.array([0, reward, 0]))
    after = agent.act(observations[1], rewards[0])
    expected = act_through(make_agent(), observations[:2], rewards[:2])[1]
    assert np.array_equal(after, expected)


@every_kind
def test_any_array_of_observations_is_taken_as_it_is(kind):
    agent = make_agent(kind)
    observations = make_episode(1)[0][0]
    expected = agent.act(observations)
    read_only = observations.copy()
    read_only.flags.writeable = False
    for same in (observations[::-1].copy()[::-1], read_only, observations.T.copy().T):
        agent.reset()
        assert np.array_equal(agent.act(same), expected)


def test_wrong_shapes_and_a_missing_reward_are_named():
    agent = make_agent()
    with pytest.raises(ValueError, match=r"trained on 5 observations, not \(4,\)"):
        agent.act(np.zeros((2, 4), np.float32))
    agent.act(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="act needs the reward of the step before"):
        agent.act(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match=r"a number or of shape \(2,\), not \(2, 1\)"):
        agent.act(np.zeros((2, 5), np.float32), np.zeros((2, 1)))
    for bad in (5.0, np.zeros((1, 2, 5))):
        with pytest.raises(ValueError, match="trained on 5 observations, not"):
            agent.act(bad)
    for bad in ([0, 2], True, np.ones((2, 1), bool)):
        with pytest.raises(ValueError, match=r"mask must be \(B,\) bool"):
            agent.reset(bad)
    with pytest.raises(
        ValueError, match=r"not \(\) int64; a return is asked for by target_return="
    ):
        agent.reset(3400)
    with pytest.raises(ValueError, match="num_envs must be at least 1, not 0"):
        agent.reset(num_envs=0)
    _, state = agent.predict(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="state is of 2 environments, the observation of 3"):
        agent.predict(np.zeros((3, 5), np.float32), state, np.zeros(3, bool))


@pytest.mark.parametrize("target", [math.nan, math.inf, "3400", [1.0, 2.0], None])
def test_a_target_return_set_later_is_checked_too(target):
    agent = make_agent()
    with pytest.raises(ConfigError, match="target_return must be a finite number, not"):
        agent.target_return = target
    assert agent.target_return == 100.0


def test_a_target_return_of_numpy_can_be_saved(tmp_path):
    agent = make_agent()
    agent.target_return = np.float32(3400.5)
    agent.save(tmp_path / "agent.safetensors")
    assert DecisionAgent.load(tmp_path / "agent.safetensors").target_return == 3400.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_of_another_type_is_refused(dtype):
    with pytest.raises(ConfigError, match=f"must be of float32, not {dtype}"):
        DecisionAgent(make_agent().model.to(dtype), target_return=1.0)


def test_a_refused_call_leaves_the_episodes_as_they_are():
    agent = make_agent()
    observations, rewards = make_episode(2)
    agent.act(observations[0])
    for bad in (np.zeros((ROWS + 1, 4)), 5.0):
        with pytest.raises(ValueError, match="trained on 5 observations"):
            agent.act(bad, rewards[0])
    with pytest.raises(ValueError, match="rewards must be"):
        agent.act(observations[1][:2], np.zeros((2, 1)))
    after = agent.act(observations[1], rewards[0])
    assert np.array_equal(after, act_through(make_agent(), observations, rewards)[1])


@pytest.mark.parametrize("refresh_every", [0, 1])
def test_no_environments_take_no_actions(refresh_every):
    agent = make_agent(refresh_every=refresh_every)
    for _ in range(2):
        assert agent.act(np.zeros((0, 5), np.float32)).shape == (0, 2)
    assert agent.act(np.zeros((3, 5), np.float32)).shape == (3, 2)


def test_an_action_with_equal_bounds_is_always_that_value():
    agent = make_agent()
    agent.model.action_low.copy_(torch.tensor([-1.0, 0.25]))
    agent.model.action_high.copy_(torch.tensor([1.0, 0.25]))
    observations, rewards = make_episode(5)
    actions = act_through(agent, observations, rewards)
    assert (actions[..., 1] == 0.25).all()
    assert np.isfinite(actions).all()
