import gymnasium as gym
import numpy as np
import pytest

from minrl.envs.make import make_env
from minrl.envs.partial import HideVelocities


def positions_of(environment):
    """The simulator's own positions, read from its state and not from the observation."""
    simulator = environment.unwrapped
    if hasattr(simulator, "data"):
        return simulator.data.qpos[1:]  # the hopper's observation has no x position
    return np.array(simulator.state)[[0, 2]]


@pytest.mark.parametrize("environment_id", ["CartPole-v1", "Hopper-v5"])
def test_what_is_left_are_the_positions_of_the_simulator(environment_id):
    environment = HideVelocities(make_env(environment_id))
    observation, _ = environment.reset(seed=0)
    environment.action_space.seed(0)
    for _ in range(8):
        np.testing.assert_allclose(observation, positions_of(environment), rtol=1e-6)
        assert observation in environment.observation_space
        observation, *_ = environment.step(environment.action_space.sample())
    environment.close()


def test_chosen_entries_are_hidden_and_their_bounds_with_them():
    whole = gym.make("MountainCar-v0")
    environment = HideVelocities(whole, indices=[1])
    observation, _ = environment.reset(seed=4)
    np.testing.assert_array_equal(observation, whole.unwrapped.state[:1].astype(np.float32))
    space = environment.observation_space
    assert (space.shape, space.dtype) == ((1,), np.float32)
    assert space.low[0] == pytest.approx(-1.2)
    assert space.high[0] == pytest.approx(0.6)


def test_it_wraps_vectorised_environments_by_name():
    environments = gym.make_vec(
        "CartPole-v1", num_envs=3, vectorization_mode="sync", wrappers=[HideVelocities]
    )
    assert environments.reset(seed=0)[0].shape == (3, 2)


def test_it_is_part_of_the_specification_of_the_environment():
    again = gym.make(HideVelocities(gym.make("MountainCar-v0"), indices=[1]).spec)
    assert again.observation_space.shape == (1,)


def test_an_observation_of_another_length_is_not_cut_by_guesswork():
    whole = make_env("Hopper-v5", exclude_current_positions_from_observation=False)
    with pytest.raises(ValueError, match=r"Hopper-v5 with 12 entries.*Hopper-v5 with 11\); pass"):
        HideVelocities(whole)
    shown = HideVelocities(whole, indices=range(6, 12))
    np.testing.assert_array_equal(shown.reset(seed=0)[0], whole.unwrapped.data.qpos)


@pytest.mark.parametrize(
    ("environment_id", "indices", "message"),
    [
        ("MountainCar-v0", None, r"MountainCar-v0 with 2 entries has its velocities is not"),
        ("CartPole-v1", [4], r"cannot hide entries \[4\] of 4"),
        ("CartPole-v1", [-1], r"cannot hide entries \[-1\] of 4"),
        ("CartPole-v1", [0, 1, 2, 3], r"cannot hide entries"),
        ("FrozenLake-v1", [0], r"no one-dimensional Box"),
    ],
)
def test_what_cannot_be_hidden_is_refused(environment_id, indices, message):
    with pytest.raises(ValueError, match=message):
        HideVelocities(gym.make(environment_id), indices=indices)
