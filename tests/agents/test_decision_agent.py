from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from acting import ROWS, act_through, every_kind, make_agent, make_episode

from minrl.errors import ConfigError


def forward_over(agent, observations, actions, rewards, target, first=0):
    """One parallel forward of the model over what an agent saw: (T, B, A)."""
    before = np.concatenate([np.zeros((1, rewards.shape[1])), np.cumsum(rewards, 0)[:-1]])
    if agent.model.config.condition == "return":
        before = np.zeros_like(before)
    sequence = [
        torch.from_numpy(np.swapaxes(x, 0, 1).astype(np.float32))
        for x in (observations, actions, target - before)
    ]
    timesteps = torch.arange(len(observations)).expand(observations.shape[1], -1)
    inputs = [x[:, first:] for x in (*sequence, timesteps)]
    with torch.no_grad():
        return agent.model(*inputs)[0].transpose(0, 1).numpy()


@every_kind
def test_a_thousand_steps_equal_one_forward_over_the_recorded_sequence(kind):
    agent = make_agent(kind)
    observations, rewards = make_episode(1000)
    agent.reset(target_return=50.0, num_envs=ROWS)
    actions = act_through(agent, observations, rewards)
    expected = forward_over(agent, observations, actions, rewards, 50.0)
    assert np.abs(actions - expected).max() <= 1e-5


@every_kind
def test_refreshing_at_every_step_equals_a_forward_over_the_window(kind):
    agent = make_agent(kind, refresh_every=1, context=6)
    observations, rewards = make_episode(20)
    agent.reset(num_envs=ROWS)
    actions = act_through(agent, observations, rewards)
    for t in (0, 3, 5, 6, 19):
        seen = slice(None, t + 1)
        expected = forward_over(
            agent, observations[seen], actions[seen], rewards[seen], 100.0, max(0, t - 5)
        )
        np.testing.assert_allclose(actions[t], expected[-1], atol=1e-6)


@every_kind
@pytest.mark.parametrize(
    ("refresh_every", "context"), [(2, 6), (2, 5), (4, 5), (5, 5), (7, 3), (3, 10), (3, 1), (1, 1)]
)
def test_a_state_in_its_turn_has_seen_the_window_before_it_and_no_more(
    kind, refresh_every, context
):
    agent = make_agent(kind, refresh_every=refresh_every, context=context)
    observations, rewards = make_episode(30)
    agent.reset(num_envs=ROWS)
    actions = act_through(agent, observations, rewards)
    for t in range(30):
        turn = t // refresh_every * refresh_every
        seen = slice(None, t + 1)
        first = max(0, turn - context + 1)
        expected = forward_over(
            agent, observations[seen], actions[seen], rewards[seen], 100.0, first
        )
        np.testing.assert_allclose(actions[t], expected[-1], atol=1e-6)


@every_kind
@pytest.mark.parametrize("refresh_every", [0, 1, 4])
def test_resetting_rows_makes_fresh_agents_of_them_and_leaves_the_others_alone(kind, refresh_every):
    options = {"refresh_every": refresh_every, "context": 5}
    observations, rewards = make_episode(16)
    resets = np.random.default_rng(1).random((16, ROWS)) < 0.15  # any rows, at any steps
    assert resets.any(axis=1).sum() > 3
    agent, actions = make_agent(kind, **options), []
    for t in range(16):
        if resets[t].any():
            agent.reset(resets[t])
        before = np.where(resets[t], np.nan, rewards[t - 1])  # not looked at where it is reset
        actions.append(agent.act(observations[t], before if t else None))
    actions = np.stack(actions)

    for start in {0, *np.flatnonzero(resets.any(axis=1)).tolist()}:
        fresh = make_agent(kind, **options)
        expected = act_through(fresh, observations[start:], rewards[start:])
        for row in range(ROWS):
            if start and not resets[start, row]:
                continue
            later = np.flatnonzero(resets[start + 1 :, row])
            end = start + 1 + later[0] if len(later) else 16
            assert np.array_equal(actions[start:end, row], expected[: end - start, row])


def test_another_way_to_act_is_checked_and_begins_with_the_next_episodes():
    observations, rewards = make_episode(8)
    windowed = act_through(make_agent(refresh_every=1, context=3), observations, rewards)
    agent = make_agent(refresh_every=1, context=3)
    for t in range(8):
        if t == 4:
            agent.refresh_every = 0
        actions = agent.act(observations[t], rewards[t - 1] if t else None)
        assert np.array_equal(actions, windowed[t])
    agent.reset()
    recurrent = act_through(make_agent(), observations, rewards)
    assert np.array_equal(act_through(agent, observations, rewards), recurrent)
    with pytest.raises(ConfigError, match="refresh_every must be a whole number from 0, not -3"):
        agent.refresh_every = -3


def test_a_reset_of_all_counts_for_any_number_of_environments():
    observations, rewards = make_episode(4)
    expected_agent = make_agent()
    expected_agent.reset(num_envs=ROWS, target_return=2000.0)
    expected = act_through(expected_agent, observations, rewards)
    agent = make_agent()
    agent.reset(num_envs=ROWS + 2, target_return=10.0)
    agent.act(np.zeros((ROWS + 2, 5), np.float32))
    agent.reset(target_return=2000.0)
    np.testing.assert_allclose(act_through(agent, observations, rewards), expected, atol=1e-6)


def test_environments_do_not_come_or_go_in_the_middle_of_episodes():
    observations, _ = make_episode(2)
    agent = make_agent()
    agent.reset(num_envs=ROWS)
    agent.act(observations[0])
    message = f"{ROWS} environments are in the middle of episodes, and now there are 1"
    with pytest.raises(ValueError, match=message):
        agent.act(observations[1, :1])
    with pytest.raises(ValueError, match="and now there are 5"):
        agent.reset(np.array([True, False, False, False, False]))
    agent.reset(num_envs=1)
    assert agent.act(observations[1, :1]).shape == (1, 2)
    for told in ({"num_envs": 5}, {"mask": np.ones(5, bool)}, {"target_return": [1.0] * 5}):
        agent.reset(**told)
        with pytest.raises(ValueError, match="reset was told of 5 environments, and now there"):
            agent.act(observations[0])
    agent.reset()  # tells nothing
    assert agent.act(observations[0]).shape == (ROWS, 2)


def test_each_environment_asks_for_its_own_return():
    agent = make_agent()
    observations, rewards = make_episode(10)
    agent.reset(np.array([True, True, True]), target_return=10.0)
    agent.reset(np.array([False, False, True]), target_return=2000.0)
    mixed = act_through(agent, observations, rewards)
    for target, rows in ((10.0, [0, 1]), (2000.0, [2])):
        agent.reset(num_envs=ROWS, target_return=target)
        alone = act_through(agent, observations, rewards)
        np.testing.assert_allclose(mixed[:, rows], alone[:, rows], atol=1e-6)
    assert np.abs(mixed[0, 2] - alone[0, 0]).max() > 1e-4


def test_each_environment_may_be_given_a_target_of_its_own():
    agent, targets = make_agent(), [10.0, 500.0, 2000.0]
    observations, rewards = make_episode(10)
    agent.reset(target_return=targets)
    together = act_through(agent, observations, rewards)
    expected = []
    for row, target in enumerate(targets):
        agent.reset(num_envs=ROWS, target_return=target)
        expected.append(act_through(agent, observations, rewards)[:, row])
    np.testing.assert_allclose(together, np.stack(expected, 1), atol=1e-6)
    agent.reset(target_return=10.0)
    agent.reset(np.array([False, False, True]), target_return=np.array([7.0, 7.0, 2000.0]))
    some = act_through(agent, observations, rewards)
    np.testing.assert_allclose(some[:, 2], together[:, 2], atol=1e-6)
    assert np.array_equal(some[:, 0], together[:, 0])
    agent.reset(target_return=targets)  # and as many environments must then act
    with pytest.raises(ValueError, match="reset was told of 3 environments, and now there are 2"):
        agent.act(observations[0, :2])
    with pytest.raises(ValueError, match="there are 3 targets for 2 environments"):
        agent.reset(num_envs=2, target_return=targets)
    with pytest.raises(ConfigError, match="target_return must be a finite number, not nan"):
        agent.reset(target_return=[1.0, float("nan"), 2.0])
    agent.reset(num_envs=2)
    assert agent.act(observations[0, :2]).shape == (2, 2)


def test_what_is_asked_for_before_the_number_of_environments_is_known_is_asked_of_all():
    observations, rewards = make_episode(5)
    agent = make_agent()
    agent.reset(target_return=2000.0)
    actions = act_through(agent, observations, rewards)
    agent.reset(num_envs=ROWS, target_return=2000.0)
    assert np.array_equal(actions, act_through(agent, observations, rewards))
    agent.reset(num_envs=ROWS)
    assert not np.array_equal(actions, act_through(agent, observations, rewards))


def test_who_is_told_the_whole_return_needs_no_rewards():
    observations, rewards = make_episode(12)
    agent, states = make_agent("by-default"), []
    expected = act_through(agent, observations, rewards)
    agent.reset(num_envs=ROWS)
    assert np.array_equal([agent.act(observation) for observation in observations], expected)
    state = None
    for observation, action in zip(observations, expected, strict=True):
        predicted, state = agent.predict(observation, state, np.zeros(ROWS, bool))
        assert np.array_equal(predicted, action)
        states.append(state.asked_for)
    assert (np.stack(states) == 100.0).all()

    agent.reset(np.array([False, True, False]), target_return=7.0)
    agent.act(observations[0])
    assert agent._state.asked_for.tolist() == [100.0, 7.0, 100.0]


def test_one_environment_needs_no_batch_axis():
    observations, rewards = make_episode(10, rows=1)
    batched = act_through(make_agent(), observations, rewards)
    agent = make_agent()
    agent.reset()
    for t in range(10):
        reward = [rewards[t - 1, 0], rewards[t - 1]][t % 2]  # a number, or an array of one
        action = agent.act(observations[t, 0], reward if t else None)
        assert action.shape == (2,)
        assert np.array_equal(action, batched[t, 0])


def test_the_state_does_not_grow():
    agent = make_agent()
    observations, rewards = make_episode(50)
    sizes = []
    for t in range(50):
        agent.act(observations[t], rewards[t - 1])
        sizes.append([tensor.shape for tensor in agent._state.model])
    assert sizes[0] == sizes[-1]


def test_a_compiled_step_needs_no_default_device():
    observation = np.zeros(5, np.float32)
    expected = make_agent().act(observation)
    agent = make_agent()
    with torch.device("meta"):  # stands for "cuda"
        assert np.array_equal(agent.act(observation), expected)


def test_agents_in_several_threads_leave_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    agents = [make_agent("transformer") for _ in range(4)]

    def act(agent):
        for _ in range(20):
            agent.act(np.zeros(5, np.float32), 0.0)

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(act, agents))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rewards_watched_in_one_evaluation_are_forgotten_in_the_next():
    agent, steps = make_agent(), np.ones((2, 4, 5), np.float32)

    def second_action():
        _, state = agent.predict(steps[0])
        return agent.predict(steps[1], state, np.zeros(4, bool))[0]

    expected = second_action()
    agent.watch_rewards({"rewards": np.full(ROWS, 5000.0)}, {})  # of other environments
    assert np.array_equal(second_action(), expected)
    _, state = agent.predict(steps[0])
    agent.watch_rewards({"rewards": np.full(4, 5000.0)}, {})
    assert not np.array_equal(agent.predict(steps[1], state, np.zeros(4, bool))[0], expected)
