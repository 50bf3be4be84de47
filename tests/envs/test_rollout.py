"""Evaluation against single episodes played by hand."""

import json
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from minrl.envs.make import make_env
from minrl.envs.rollout import evaluate
from minrl.errors import ConfigError, EnvError, EvaluationError


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


def test_references_that_are_given_are_those_of_the_scores():
    result = evaluate(CountingController(), "Hopper-v5", episodes=2, references=(0.0, 200.0))
    assert result.references == (0.0, 200.0)
    assert result.normalized["mean"] == pytest.approx(result.return_mean / 2)


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
        if self.length == 50 and self.fault == "reset":
            raise OSError("simulator crashed")
        return np.array([self.length, 0.0]), {}

    def step(self, action):
        self.left -= 1
        answer = np.array([self.length, self.left], float), 1.0, self.left == 0, False, {}
        return FAULTS[self.fault](*answer) if self.left == 25 and self.fault in FAULTS else answer


def crash(*_):
    raise OSError("simulator crashed")


FAULTS = {  # what a step answers instead
    "raise": crash,
    "exit": lambda *_: sys.exit(3),
    "observation": lambda observation, *rest: (observation * [1, np.nan], *rest),
    "nothing": lambda _, *rest: (None, *rest),
    "words": lambda _, *rest: (["left", "right"], *rest),
    "tensor": lambda observation, *rest: (torch.tensor(observation).requires_grad_(), *rest),
    "shape": lambda observation, *rest: (observation[:1], *rest),
    "reward": lambda observation, _, *rest: (observation, np.inf, *rest),
    "no reward": lambda observation, _, *rest: (observation, None, *rest),
    "old interface": lambda observation, reward, ended, *_: (observation, reward, ended, {}),
}


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
        ("exit", r"cannot take action.*SystemExit\(3\)"),
        ("observation", r"observation that is not finite at index \[1\]"),
        ("nothing", "observation that is not an array of numbers"),
        ("words", "observation that is not an array of numbers"),
        ("tensor", "observation that is not an array of numbers: Can't call numpy"),
        ("reward", "gave the reward inf"),
        ("no reward", "cannot take action.*TypeError.*NoneType"),
        ("shape", r"observation of shape \(1,\), but its space says \(2,\)"),
        ("old interface", "cannot take action.*not enough values to unpack"),
        ("reset", "cannot be started.*simulator crashed"),
    ],
)
def test_faults_of_the_environment_name_its_place_and_keep_what_is_finished(
    countdown, fault, message
):
    settings = {"episodes": 20, "num_envs": 2, "seed": 1}
    lengths = evaluate(CountingController(1), countdown, **settings).lengths
    gymnasium.registry[countdown].kwargs = {"fault": fault}
    # The first long episode of a row fails, and the rows step together, row 0 first.
    short = [int(np.argmax(lengths[row::2] == 50)) for row in (0, 1)]
    row = int(short[1] < short[0])
    in_step = fault != "reset"
    if in_step:  # the other row has time to come to its own long episode
        finished = {0: short[0], 1: short[1]}
    else:  # in the step that the last short episode ends with, row 1 comes later
        finished = {0: short[row], 1: short[row] - (row == 0)}
    pattern = (
        rf"environment 'Countdown-v0', episode {row + 2 * short[row]}, "
        rf"step {24 if in_step else 0} .*{message}"
    )
    with pytest.raises(EvaluationError, match=pattern) as caught:
        evaluate(CountingController(1), countdown, **settings)
    expected = {e: (1.0, 1) for e in range(20) if e // 2 < finished[e % 2]}
    assert caught.value.finished == expected
    assert expected


def test_observations_come_in_the_type_of_their_space_and_are_finite_in_it(countdown):
    class Doubles(Countdown):
        observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    class Looks(CountingController):
        def act(self, observations, rewards=None):
            assert observations.dtype == np.float32
            return super().act(observations, rewards)

    gymnasium.registry[countdown].entry_point = Doubles
    evaluate(Looks(1), countdown, episodes=3)

    class Huge(Doubles):
        def step(self, action):
            return np.array([1.0, 1e300]), 0.0, False, False, {}

    gymnasium.registry[countdown].entry_point = Huge
    with pytest.raises(EvaluationError, match=r"not finite at index \[1\]"):
        evaluate(CountingController(1), countdown, episodes=3)


def test_an_environment_that_cannot_close_costs_a_warning_and_no_result(countdown):
    class Sticks(Countdown):
        def close(self):
            raise OSError("port is busy")

    sound = evaluate(CountingController(1), countdown, episodes=3)
    gymnasium.registry[countdown].entry_point = Sticks
    with pytest.warns(RuntimeWarning, match=f"'{countdown}' was not closed properly.*port is busy"):
        result = evaluate(CountingController(1), countdown, episodes=3)
    assert np.array_equal(result.returns, sound.returns)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.full((4, 1), np.nan), "is not finite in environment 'Countdown-v0', episode 0, step 0"),
        (np.zeros((4, 2)), r"shape \(4, 2\), but \(4, 1\) is needed"),
        (np.zeros(4), r"shape \(4,\), but \(4, 1\) is needed"),
        (np.full((4, 1), 1e300), r"action \[inf\] is not finite in environment 'Countdown-v0'"),
        (torch.zeros(4, 1, requires_grad=True), "gave as actions in .* step 0 is not an array of"),
        (np.full((4, 1), "left"), "is not an array of numbers: ufunc 'isfinite' not supported"),
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
    with pytest.raises(ConfigError, match=f"{setting} must be at least [01], not -1"):
        evaluate(CountingController(), "Hopper-v5", **{setting: -1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 2.0}, "episodes must be a whole number, not 2.0"),
        ({"seed": "0"}, "seed must be a whole number, not '0'"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1, not 0"),
        ({"references": (1.0, 1.0)}, r"references must be finite, .*, not \(1.0, 1.0\)"),
        ({"references": (0.0, np.inf)}, "references must be finite"),
    ],
)
def test_settings_that_are_none_are_refused_before_anything_is_played(options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(None, "Hopper-v5", **options)


@pytest.mark.parametrize("num_workers", [0, np.int64(1)])
def test_numbers_may_be_numpys(num_workers):
    result = evaluate(
        CountingController(),
        "Hopper-v5",
        episodes=np.int64(2),
        seed=np.int64(3),
        num_envs=np.int32(2),
        num_workers=num_workers,
        max_episode_steps=np.int64(3),
        target_return=np.float32(1800),
    )
    json.dumps(result.to_dict())
    plain = evaluate(CountingController(), "Hopper-v5", episodes=2, seed=3, max_episode_steps=3)
    np.testing.assert_array_equal(result.returns, plain.returns)


def test_discrete_actions_are_refused():
    with pytest.raises(EnvError, match="action space of kind Discrete"):
        evaluate(CountingController(), "CartPole-v1", episodes=1)
