"""Evaluation against single episodes played by hand."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from minrl.envs.make import make_env
from minrl.envs.rollout import evaluate
from minrl.errors import EnvError


class CountingController:
    """A linear controller with memory: its action depends on how long its row has been playing."""

    def __init__(self, action_size=3, scale=0.5):
        self.action_size, self.scale = action_size, scale
        self.resets = []

    def reset(self, mask=None, *, target_return=None, num_envs=None):
        self.resets.append((None if mask is None else mask.copy(), target_return, num_envs))
        if num_envs is not None:
            self.counts = np.zeros(num_envs)
            self.reward_sums = np.zeros(num_envs)
        rows = slice(None) if mask is None else mask
        self.counts[rows] = 0
        self.reward_sums[rows] = 0.0

    def act(self, observations, rewards=None):
        self.reward_sums += rewards
        waves = np.sin(self.counts[:, None] / 5 + np.arange(self.action_size))
        self.counts += 1
        # The last term makes the action depend on the rewards and the observation seen so far.
        memory = 0.01 * self.reward_sums[:, None] + 20 * observations[:, 1:2]
        return np.clip(self.scale * waves + memory, -1, 1)


def play_by_hand(environment_id, episodes, seed, action_size=3, scale=0.5, limit=None):
    """One environment, one episode after the other, with a fresh controller each time."""
    limits = {} if limit is None else {"max_episode_steps": limit}
    returns, lengths = [], []
    for episode in range(episodes):
        environment = make_env(environment_id, **limits)
        controller = CountingController(action_size, scale)
        controller.reset(num_envs=1)
        episode_seed = int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])
        observation, _ = environment.reset(seed=episode_seed)
        reward, total, length, ended = 0.0, 0.0, 0, False
        while not ended:
            action = controller.act(observation[None], np.array([reward]))[0].astype(np.float32)
            observation, reward, terminated, truncated, _ = environment.step(action)
            total, length, ended = total + reward, length + 1, terminated or truncated
        environment.close()
        returns.append(total)
        lengths.append(length)
    return np.array(returns), np.array(lengths)


@pytest.mark.parametrize("num_envs", [1, 3, 7, None])
def test_returns_equal_episodes_played_by_hand_whatever_the_number_of_environments(num_envs):
    returns, lengths = play_by_hand("Hopper-v5", 7, seed=5)
    result = evaluate(CountingController(), "Hopper-v5", episodes=7, seed=5, num_envs=num_envs)
    np.testing.assert_array_equal(result.lengths, lengths)
    np.testing.assert_allclose(result.returns, returns, rtol=1e-12)
    assert len(set(lengths)) > 1  # else rows would all be reset at the same time


def test_truncated_episodes_have_the_length_of_the_limit():
    returns, _ = play_by_hand("HalfCheetah-v5", 3, 0, action_size=6, limit=20)
    result = evaluate(
        CountingController(6), "HalfCheetah-v5", episodes=3, num_envs=2, max_episode_steps=20
    )
    assert result.lengths.tolist() == [20, 20, 20]
    np.testing.assert_allclose(result.returns, returns, rtol=1e-12)


def test_same_seed_same_numbers_and_another_seed_others():
    first, second, other = (
        evaluate(CountingController(), "Hopper-v5", episodes=4, seed=seed).returns
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).all()


def test_more_episodes_begin_with_the_same_ones():
    few = evaluate(CountingController(), "Hopper-v5", episodes=3, seed=1).returns
    many = evaluate(CountingController(), "Hopper-v5", episodes=8, seed=1).returns
    np.testing.assert_array_equal(many[:3], few)


def test_resets_give_the_target_each_time_and_the_size_once():
    agent = CountingController()
    evaluate(agent, "Hopper-v5", episodes=5, num_envs=2, target_return=1500.0)
    (mask, target, size), *others = agent.resets
    assert (mask, target, size) == (None, 1500.0, 2)
    assert all(target == 1500.0 and size is None for _, target, size in others)
    assert sum(mask.sum() for mask, _, _ in others) == 3  # the two first episodes start unmasked
    assert all(mask.dtype == bool and mask.shape == (2,) for mask, _, _ in others)


def test_a_policy_may_keep_what_it_is_given():
    kept = []

    class Keeper(CountingController):
        def act(self, observations, rewards=None):
            kept.append((observations, observations.copy(), rewards, rewards.copy()))
            return super().act(observations, rewards)

    evaluate(Keeper(), "Hopper-v5", episodes=2, max_episode_steps=10)
    for observations, observations_then, rewards, rewards_then in kept:
        np.testing.assert_array_equal(observations, observations_then)
        np.testing.assert_array_equal(rewards, rewards_then)


def test_each_episode_is_reported_once_as_it_ends():
    heard = {}
    result = evaluate(
        CountingController(),
        "Hopper-v5",
        episodes=5,
        num_envs=2,
        on_episode=lambda *report: heard.setdefault(report[0], report[1:]),
    )
    expected = dict(enumerate(zip(result.returns, result.lengths, strict=True)))
    assert heard == expected


class Countdown(gymnasium.Env):
    """Episode length and return are drawn at reset: 1 step for the short half, 50 for the long."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, fault=None):
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.length = 50 if self.np_random.random() < 0.5 else 1
        return np.array([self.length, 0.0]), {}

    def step(self, action):
        self.left -= 1
        observation, reward = np.array([self.length, self.left], float), 1.0
        if self.left == 25:
            if self.fault == "raise":
                raise OSError("simulator crashed")
            if self.fault == "observation":
                observation[1] = np.nan
            if self.fault == "reward":
                reward = np.inf
            if self.fault == "shape":
                observation = observation[:1]
        return observation, reward, self.left == 0, False, {}


@pytest.fixture
def countdown():
    gymnasium.register("Countdown-v0", entry_point=Countdown, max_episode_steps=100)
    gymnasium.register("Endless-v0", entry_point=Countdown)
    yield "Countdown-v0"
    del gymnasium.registry["Countdown-v0"], gymnasium.registry["Endless-v0"]


def test_short_episodes_are_not_favoured(countdown):
    # Taking the first 200 episodes to finish would give a mean length near 10, not 25.5.
    result = evaluate(CountingController(1), countdown, episodes=200, num_envs=16)
    np.testing.assert_array_equal(result.returns, result.lengths)
    assert 21 < result.length_mean < 30


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "cannot take action.*simulator crashed"),
        ("observation", r"observation that is not finite at index \[1\]"),
        ("reward", "gave the reward inf"),
        ("shape", r"observation of shape \(1,\), but its space says \(2,\)"),
    ],
)
def test_faults_of_the_environment_name_it_with_episode_and_step(countdown, fault, message):
    gymnasium.registry[countdown].kwargs = {"fault": fault}
    pattern = rf"environment 'Countdown-v0', episode \d+, step 2[45] .*{message}"
    with pytest.raises(EnvError, match=pattern):
        evaluate(CountingController(1), countdown, episodes=8)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.full((4, 1), np.nan), "is not finite in environment 'Countdown-v0', episode 0, step 0"),
        (np.zeros((4, 2)), r"shape \(4, 2\), but \(4, 1\) is needed"),
        (np.zeros(4), r"shape \(4,\), but \(4, 1\) is needed"),
    ],
)
def test_wrong_actions_are_refused(countdown, action, message):
    agent = CountingController(1)
    agent.act = lambda observations, rewards: action
    with pytest.raises(EnvError, match=message):
        evaluate(agent, countdown, episodes=4)


def test_episodes_without_an_end_are_refused(countdown):
    with pytest.raises(EnvError, match=r"no limit on the length.*max_episode_steps"):
        evaluate(CountingController(1), "Endless-v0", episodes=1)
    limited = evaluate(CountingController(1), "Endless-v0", episodes=4, max_episode_steps=60)
    assert limited.length_mean > 0


@pytest.mark.parametrize("setting", ["episodes", "num_envs", "seed"])
def test_impossible_settings_are_named(setting):
    with pytest.raises(EnvError, match=f"{setting} is -1; at least"):
        evaluate(CountingController(), "Hopper-v5", **{setting: -1})


def test_discrete_actions_are_refused():
    with pytest.raises(EnvError, match="action space of kind Discrete"):
        evaluate(CountingController(), "CartPole-v1", episodes=1)
