import hashlib
from dataclasses import asdict, replace
from json import dumps

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minrl.data.episodes import DatasetInfo, Episode, Episodes, concatenate
from minrl.errors import DatasetError

INFO = DatasetInfo("test/toy/random-v0", None, 1, (-1.0,), (1.0,))


def with_rewards(rewards_of_episodes):
    return Episodes.from_episodes(
        [
            Episode(np.zeros((len(r) + 1, 1)), np.zeros((len(r), 1)), np.array(r), True, False)
            for r in rewards_of_episodes
        ],
        INFO,
    )


def brute_force_returns_to_go(episodes):
    expected = []
    for start, stop in zip(episodes.offsets[:-1], episodes.offsets[1:], strict=True):
        rewards = [float(reward) for reward in episodes.rewards[start:stop]]
        total, backwards = 0.0, []
        for reward in reversed(rewards):
            total += reward
            backwards.append(total)
        expected += backwards[::-1]
    return np.array(expected)


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-1e8, 1e8, width=32), min_size=1, max_size=20), min_size=1, max_size=6
    )
)
def test_return_to_go_is_the_sum_from_each_step_to_its_episodes_end(rewards):
    episodes = with_rewards(rewards)
    expected = brute_force_returns_to_go(episodes)
    error = np.abs(episodes.returns_to_go() - expected).max()
    assert error <= 1e-6 * np.abs(expected).max()
    assert np.allclose(episodes.returns, expected[episodes.offsets[:-1]], rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_return_to_go_stays_accurate_over_a_million_steps(scale):
    generator = np.random.default_rng(0)
    rewards = [generator.normal(size=1_000_000) * scale, generator.normal(size=3) * 1e-8]
    episodes = with_rewards(rewards)
    expected = brute_force_returns_to_go(episodes)
    found = episodes.returns_to_go()
    for part in (slice(0, 1_000_000), slice(1_000_000, None)):  # none spoils the next
        error = np.abs(found[part] - expected[part]).max()
        assert error <= 1e-6 * np.abs(expected[part]).max()


def test_rows_hold_the_observation_before_each_action(make_episodes, info):
    originals = make_episodes([3, 1, 5])
    episodes = Episodes.from_episodes(originals, info)
    assert episodes.lengths.tolist() == [3, 1, 5]
    assert (episodes.num_episodes, episodes.num_steps) == (3, 9)
    for index, original in enumerate(originals):
        rows = slice(episodes.offsets[index], episodes.offsets[index + 1])
        before, last = original.observations[:-1], original.observations[-1]
        assert np.array_equal(episodes.observations[rows], before.astype(np.float32))
        assert np.array_equal(episodes.final_observations[index], last.astype(np.float32))
        assert np.array_equal(episodes.actions[rows], original.actions)
        assert np.array_equal(episodes.rewards[rows], original.rewards.astype(np.float32))
        assert episodes.terminated[index] == original.terminated
        assert episodes.truncated[index] == original.truncated


def test_episode_without_its_last_observation_is_refused(info):
    episode = Episode(np.zeros((2, 11)), np.zeros((2, 3)), np.zeros(2), True, False)
    with pytest.raises(DatasetError, match="episode 0: 2 actions need 3 observations"):
        Episodes.from_episodes([episode], info)
    with pytest.raises(DatasetError, match="no episodes"):
        Episodes.from_episodes([], info)


def test_the_best_episodes_hold_at_most_the_share_of_the_steps():
    rewards = [[1.0, 0, 0, 0], [9.0, 0], [2.0, 2, 1], [5.0]]
    episodes = with_rewards(rewards)
    assert list(episodes.best(0.5).lengths) == [2, 3]
    assert list(episodes.best(0.6).lengths) == [2, 3, 1]
    assert list(episodes.best(0.01).lengths) == [2]
    assert episodes.best(1.0) is episodes


def test_split_parts_are_whole_disjoint_and_complete(make_episodes, info):
    episodes = Episodes.from_episodes(make_episodes([4, 2, 7, 1, 3, 5]), info)
    for fraction in (1e-6, 0.3, 0.99):
        train, held_out = episodes.split(fraction, seed=3)
        assert train.num_episodes >= 1
        assert held_out.num_episodes >= 1
        firsts = [*train.observations[train.offsets[:-1], 0]]
        firsts += [*held_out.observations[held_out.offsets[:-1], 0]]
        assert sorted(firsts) == sorted(episodes.observations[episodes.offsets[:-1], 0])
        assert train.num_steps + held_out.num_steps == episodes.num_steps
    again = episodes.split(0.3, seed=3)[1]
    assert np.array_equal(again.rewards, episodes.split(0.3, seed=3)[1].rewards)
    single = episodes.select([2])
    assert single.split(0.5, seed=0) == (single, single)
    assert episodes.split(0.0, seed=0) == (episodes, None)


def test_the_share_is_held_out_and_the_seed_says_which():
    episodes = with_rewards([[float(number)] for number in range(20)])
    train, held_out = episodes.split(0.3, seed=3)
    assert (train.num_episodes, held_out.num_episodes) == (14, 6)
    assert not np.array_equal(held_out.rewards, episodes.split(0.3, seed=4)[1].rewards)


def test_select_takes_episodes_in_the_order_given(make_episodes, info):
    originals = make_episodes([4, 2, 7])
    chosen = Episodes.from_episodes(originals, info).select([2, 0])
    expected = Episodes.from_episodes([originals[2], originals[0]], info)
    for name in ("observations", "actions", "rewards", "offsets", "terminated", "truncated"):
        assert np.array_equal(getattr(chosen, name), getattr(expected, name))
    assert np.array_equal(chosen.final_observations, expected.final_observations)


def test_union_equals_all_episodes_in_a_row(make_episodes, info):
    originals = make_episodes([4, 2, 7])
    one = replace(info, sha256="a", action_low=(-2.0,) * 3, score_note="one")
    two = replace(info, sha256="b", action_high=(3.0,) * 3, score_note="two", dataset_id="b-v0")
    first = Episodes.from_episodes(originals[:1], one)
    second = Episodes.from_episodes(originals[1:], two)
    union, whole = concatenate([first, second]), Episodes.from_episodes(originals, info)
    for name in ("observations", "actions", "rewards", "offsets", "final_observations"):
        assert np.array_equal(getattr(union, name), getattr(whole, name))
    assert union.info.dataset_id == "test/toy/random-v0+b-v0"
    assert union.info.sha256 == hashlib.sha256(b"ab").hexdigest()
    assert (union.info.action_low, union.info.action_high) == ((-2.0,) * 3, (3.0,) * 3)
    assert union.info.score_note == "one; two"
    assert concatenate([first, first]).info.score_note == "one"
    assert dumps(asdict(union.info))
    assert concatenate([first]) is first


@pytest.mark.parametrize(
    ("field", "value"),
    [("environment_id", "Walker2d-v5"), ("observation_size", 17)],
)
def test_union_of_unlike_datasets_is_refused(make_episodes, info, field, value):
    part = Episodes.from_episodes(make_episodes([2]), info)
    other = replace(part, info=replace(info, dataset_id="other-v0", **{field: value}))
    with pytest.raises(DatasetError, match=f"same {field}.*other-v0: {value}"):
        concatenate([part, other])


def test_a_union_has_the_reference_scores_that_any_part_has(make_episodes, info):
    parts = [
        Episodes.from_episodes(
            make_episodes([2]),
            replace(info, dataset_id=name, reference_min=low, reference_max=high),
        )
        for name, low, high in (("a-v0", None, None), ("b-v0", -1.0, 5.0), ("c-v0", -1.0, 6.0))
    ]
    assert concatenate(parts[:2]).info.references == (-1.0, 5.0)
    assert concatenate([parts[0], parts[0]]).info.references is None
    refused = r"same reference scores, got b-v0: -1 5, c-v0: -1 6; .*\(--reference-scores\)"
    with pytest.raises(DatasetError, match=refused):
        concatenate(parts)
