import dataclasses
import json

import gymnasium
import numpy as np
import pytest

d3rlpy = pytest.importorskip("d3rlpy")

from minrl.data.episodes import DatasetInfo, Episode, Episodes
from minrl.data.minari_source import load_dataset
from minrl.errors import ConfigError
from minrl.scripts.examples import peers
from minrl.scripts.examples.d3rlpy_agents import (
    MemorylessPolicy,
    TransformerPolicy,
    make_replay_buffer,
)
from minrl.scripts.examples.peers import PEERS, Settings
from minrl.scripts.train_config import TrainConfig
from minrl.scripts.train_setup import choose_targets

INFO = DatasetInfo("test/toy-v0", "Hopper-v5", 4, (-1.0,) * 2, (1.0,) * 2)
# Lengths and how each ends: terminated, truncated, both, neither (unfinished).
ENDS = [(5, True, False), (3, False, True), (7, True, True), (4, False, False)]


@pytest.fixture
def source():
    """Episodes as Minari stores them, T+1 observations, every number another one."""
    generator = np.random.default_rng(0)
    return [
        Episode(
            generator.normal(size=(steps + 1, 4)).astype(np.float32),
            generator.uniform(-1, 1, (steps, 2)).astype(np.float32),
            generator.normal(size=steps).astype(np.float32),
            terminated,
            truncated,
        )
        for steps, terminated, truncated in ENDS
    ]


@pytest.fixture
def buffer(source):
    return make_replay_buffer(Episodes.from_episodes(source, INFO))


@pytest.fixture
def train(buffer):
    """Return a function that trains a configuration on the toy episodes for a step."""

    def train(config):
        d3rlpy.seed(0)
        algorithm = config.create("cpu:0")
        silent = {"logger_adapter": peers.NoopAdapterFactory(), "show_progress": False}
        algorithm.fit(buffer, n_steps=1, n_steps_per_epoch=1, **silent)
        return algorithm

    return train


def test_every_episode_comes_over_with_its_own_rows(source, buffer):
    assert len(buffer.episodes) == len(source)
    for ours, theirs in zip(source, buffer.episodes, strict=True):
        np.testing.assert_array_equal(theirs.observations, ours.observations[:-1])
        np.testing.assert_array_equal(theirs.actions, ours.actions)
        np.testing.assert_array_equal(theirs.rewards, ours.rewards[:, None])


def test_only_a_terminated_episode_is_terminal(buffer):
    assert [episode.terminated for episode in buffer.episodes] == [True, False, True, False]


def test_transitions_lead_to_what_was_seen_next(source, buffer):
    expected = [
        (number, step)
        for number, episode in enumerate(source)
        for step in range(len(episode.actions) - (not episode.terminated))
    ]
    assert buffer.transition_count == len(expected)
    for index, (number, step) in enumerate(expected):
        ours, theirs = source[number], buffer.transition_picker(*buffer.buffer[index])
        is_last = ours.terminated and step == len(ours.actions) - 1
        np.testing.assert_array_equal(theirs.observation, ours.observations[step])
        np.testing.assert_array_equal(theirs.action, ours.actions[step])
        np.testing.assert_array_equal(theirs.reward, ours.rewards[step : step + 1])
        assert theirs.terminal == is_last
        if not is_last:  # after the end there is nothing to look at
            np.testing.assert_array_equal(theirs.next_observation, ours.observations[step + 1])


@pytest.mark.parametrize("number", range(len(ENDS)))
def test_windows_hold_the_return_from_each_step_to_the_end(number, source, buffer):
    length = ENDS[number][0]
    window = buffer.trajectory_slicer(buffer.episodes[number], length - 1, length)
    expected = [sum(source[number].rewards[step:].tolist()) for step in range(length)]
    np.testing.assert_allclose(window.returns_to_go[:, 0], expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(window.observations, source[number].observations[:-1])


def test_the_batched_transformer_acts_as_their_own_wrapper_does_in_each_row(train):
    config = PEERS["dt"].configure(100)
    algorithm = train(dataclasses.replace(config, batch_size=2, context_size=4, max_timestep=6))
    policy, generator = TransformerPolicy(algorithm), np.random.default_rng(1)
    wrappers = [algorithm.as_stateful_wrapper(900.0) for _ in range(3)]
    policy.reset(target_return=900.0, num_envs=3)
    rewards = np.zeros(3)
    for step in range(12):
        if started := {3: [1], 9: [0, 1]}.get(step):
            policy.reset(np.isin(np.arange(3), started), target_return=100.0 * step)
            rewards[started] = 0.0
            for row in started:
                wrappers[row] = algorithm.as_stateful_wrapper(100.0 * step)
        observations = generator.normal(size=(3, 4))
        rows = zip(wrappers, observations, rewards, strict=True)
        expected = [wrapper.predict(seen, reward) for wrapper, seen, reward in rows]
        np.testing.assert_allclose(policy.act(observations, rewards), expected, rtol=0, atol=1e-5)
        rewards = generator.normal(size=3) * 100


@pytest.mark.parametrize("name", ["bc", "iql", "td3bc"])
def test_memoryless_agents_act_in_each_row_as_alone(name, train):
    algorithm = train(PEERS[name].configure(100))
    policy, generator = MemorylessPolicy(algorithm), np.random.default_rng(1)
    policy.reset(num_envs=5)
    observations = generator.normal(size=(5, 4))
    actions = policy.act(observations, np.zeros(5))
    expected = [algorithm.predict(row[None])[0] for row in observations]
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-6)
    assert (np.abs(actions) <= 1).all()


def test_schedules_are_their_own_at_their_budget_and_end_with_a_shorter_one():
    warmups = [PEERS["dt"].configure(n).optim_factory.lr_scheduler_factory for n in (100_000, 50)]
    assert [warmup.warmup_steps for warmup in warmups] == [10_000, 5]
    decays = [
        PEERS["iql"].configure(n).actor_optim_factory.lr_scheduler_factory for n in (500_000, 50)
    ]
    assert [decay.T_max for decay in decays] == [500_000, 50]


def test_a_peer_is_trained_on_what_minrl_trains_on_and_plays_its_final_episodes(
    hopper_id, tmp_path
):
    settings = Settings("bc", (hopper_id,), seed=3, steps=20, episodes=3, output=tmp_path)
    result = peers.main(settings)
    assert json.loads((tmp_path / "peer.json").read_text()) == result
    with pytest.raises(ConfigError, match=r"has a peer\.json already"):
        peers.main(settings)

    training, _ = load_dataset(hopper_id).split(TrainConfig().held_out, seed=3)
    d3rlpy.seed(3)
    algorithm = d3rlpy.algos.BCConfig().create("cpu:0")
    silent = {"logger_adapter": peers.NoopAdapterFactory(), "show_progress": False}
    algorithm.fit(make_replay_buffer(training), n_steps=20, n_steps_per_epoch=20, **silent)
    environment, returns = gymnasium.make("Hopper-v5"), []
    for episode in range(3):
        seed = int(np.random.SeedSequence([20_003, episode]).generate_state(1)[0])
        observation, _ = environment.reset(seed=seed)
        total, ended = 0.0, False
        while not ended:
            action = algorithm.predict(observation[None])[0]
            observation, reward, terminated, truncated, _ = environment.step(action)
            total, ended = total + reward, terminated or truncated
        returns.append(total)
    (evaluation,) = result["evaluations"]
    np.testing.assert_allclose(evaluation["returns"], returns, rtol=1e-3)
    assert evaluation["target_return"] is None
    saved = d3rlpy.load_learnable(str(tmp_path / "model.d3"))
    np.testing.assert_allclose(
        saved.predict(observation[None]), algorithm.predict(observation[None])
    )
    assert result["parameters"] == sum(p.numel() for p in algorithm.impl.policy.parameters())


def test_a_transformer_is_asked_for_the_targets_of_minrl_train(hopper_id, tmp_path):
    settings = Settings("dt", (hopper_id,), steps=1, episodes=1, output=tmp_path)
    result = peers.main(settings)
    asked = tuple(line["target_return"] for line in result["evaluations"])
    assert asked == choose_targets(load_dataset(hopper_id))
    assert {(line["checkpoint"], line["step"]) for line in result["evaluations"]} == {("last", 1)}
    assert "1 steps, 100,000 asked for" in result["note"]


def test_a_peer_is_treated_as_the_runs_that_it_is_compared_with(hopper_id):
    episodes = load_dataset(hopper_id)
    paper = peers.complete_settings(Settings("dt", (hopper_id,), preset="paper"), episodes)
    assert (paper.held_out, paper.targets) == (0.0, (3600.0, 1800.0))
    told = Settings("dt", (hopper_id,), held_out=0.5, targets=(3.0,))
    config = peers.complete_settings(told, episodes)
    assert (config.held_out, config.targets) == (0.5, (3.0,))
    assert "trained on 50% of the episodes" in peers.describe(PEERS["dt"], config)


@pytest.mark.parametrize("steps", [0, 1500])
def test_steps_that_are_no_whole_epochs_are_refused(steps, source):
    with pytest.raises(ConfigError, match=f"multiple of it, not {steps}"):
        peers.complete_settings(Settings(steps=steps), Episodes.from_episodes(source, INFO))


def test_no_episodes_are_refused_before_the_training(source):
    with pytest.raises(ConfigError, match="episodes must be at least 1, not 0"):
        peers.complete_settings(Settings(episodes=0), Episodes.from_episodes(source, INFO))


def test_actions_out_of_their_reach_are_refused(source):
    info = dataclasses.replace(INFO, action_high=(1.0, 0.4))
    with pytest.raises(ConfigError, match="not from -1 to 1"):
        peers.complete_settings(Settings(), Episodes.from_episodes(source, info))


def test_data_without_an_environment_is_refused():
    episode = Episode(np.zeros((31, 4)), np.zeros((30, 2)), np.ones(30), True, False)
    info = dataclasses.replace(INFO, environment_id=None)
    with pytest.raises(ConfigError, match="names no environment"):
        peers.complete_settings(Settings(), Episodes.from_episodes([episode], info))
