import time

import numpy as np
import pytest

from minrl.data.episodes import Episode, Episodes
from minrl.data.windows import Batch, WindowSampler
from minrl.errors import ConfigError

FIELDS = ("observations", "actions", "returns", "timesteps", "mask", "loss_mask")


@pytest.fixture
def numbered(info):
    """Episodes whose first observation is the number of the flat row, lengths 1 to 30."""
    lengths, row, episodes = [1, 30, 7, 12], 0, []
    for steps in lengths:
        observations = np.zeros((steps + 1, 11))
        observations[:, 0] = np.arange(row, row + steps + 1)
        actions = observations[:-1, :3] / 100
        episodes.append(Episode(observations, actions, np.ones(steps), True, False))
        row += steps
    return Episodes.from_episodes(episodes, info)


def test_batch_depends_on_seed_and_step_alone(numbered):
    sampler = WindowSampler(numbered, context=5, batch_size=8, seed=3)
    later = WindowSampler(numbered, context=5, batch_size=8, seed=3)
    sampler.batch(0), sampler.batch(9)
    for step in (7, 0):
        for name in FIELDS:
            one, two = getattr(sampler.batch(step), name), getattr(later.batch(step), name)
            assert np.array_equal(one, two)
    other_seed = WindowSampler(numbered, context=5, batch_size=8, seed=4).batch(7)
    assert not np.array_equal(sampler.batch(7).observations, other_seed.observations)
    assert not np.array_equal(sampler.batch(7).observations, sampler.batch(8).observations)


@pytest.mark.parametrize(("context", "burn_in"), [(1, 0), (5, 0), (5, 3), (30, 0), (30, 30)])
def test_window_is_a_right_padded_stretch_of_one_episode(numbered, context, burn_in):
    sizes = {"context": context, "burn_in": burn_in, "batch_size": 50}
    sampler = WindowSampler(numbered, **sizes, seed=0, condition="return-to-go")
    offsets = numbered.offsets
    for step in range(20):
        batch = sampler.batch(step)
        steps = min(context + burn_in, 30)
        assert batch.observations.shape == (50, steps, 11)
        assert batch.actions.shape == (50, steps, 3)
        assert [getattr(batch, name).dtype for name in FIELDS[:4]] == [np.float32] * 3 + [np.int64]
        for window in range(50):
            length = int(batch.mask[window].sum())
            assert batch.mask[window, :length].all()
            rows = batch.observations[window, :length, 0].astype(int)
            assert np.array_equal(rows, np.arange(rows[0], rows[0] + length))
            episode = np.searchsorted(offsets, rows[0], side="right") - 1
            start, stop = offsets[episode], offsets[episode + 1]
            assert rows[-1] < stop
            assert np.array_equal(batch.timesteps[window, :length], rows - start)
            assert np.array_equal(batch.returns[window, :length], stop - rows)
            counted = batch.loss_mask[window]
            first = int(counted.argmax())
            assert counted[first:length].all()
            assert counted.sum() == length - first
            assert first == min(burn_in, rows[0] + first - start)
            assert counted.sum() == min(context, stop - (rows[0] + first))
            for name in FIELDS:
                assert not getattr(batch, name)[window, length:].any()


def test_windows_may_tell_the_return_of_the_whole_episode(numbered):
    sizes = {"context": 5, "batch_size": 50, "seed": 0}
    batch = WindowSampler(numbered, **sizes).batch(3)
    to_go = WindowSampler(numbered, **sizes, condition="return-to-go").batch(3)
    whole = to_go.returns[:, 0] + to_go.timesteps[:, 0]  # every reward is 1
    assert np.array_equal(batch.returns, whole[:, None] * batch.mask)
    assert np.array_equal(batch.observations, to_go.observations)


def test_every_step_is_drawn_about_equally_often(numbered):
    sampler = WindowSampler(numbered, context=1, batch_size=500, seed=0)
    rows = np.concatenate([sampler.batch(step).observations[:, 0, 0] for step in range(100)])
    counts = np.bincount(rows.astype(int), minlength=50)
    expected = 50_000 / 50
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 49 + 6 * np.sqrt(2 * 49)  # mean and spread of 49 degrees of freedom


def test_rows_of_a_batch_are_shared_out_without_loss(numbered):
    batch = WindowSampler(numbered, context=4, batch_size=10, seed=0).batch(0)
    parts = [batch.rows(slice(rank, None, 3)) for rank in range(3)]
    assert all(isinstance(part, Batch) for part in parts)
    for name in FIELDS:
        together = np.concatenate([getattr(part, name) for part in parts])
        order = np.concatenate([np.arange(10)[rank::3] for rank in range(3)])
        assert np.array_equal(together, getattr(batch, name)[order])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 31}, "context must be from 1 to 30, the longest episode of .*, got 31"),
        ({"context": 0}, "context must be from 1 to 30, .*got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"burn_in": -1}, "burn_in must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_impossible_sizes_name_the_field_and_the_range(numbered, settings, message):
    with pytest.raises(ConfigError, match=message):
        WindowSampler(numbered, **({"context": 5, "batch_size": 8, "seed": 0} | settings))


@pytest.mark.slow
def test_a_batch_of_64_windows_of_20_takes_under_a_millisecond(make_episodes, info):
    episodes = Episodes.from_episodes(make_episodes([500] * 400), info)
    sampler = WindowSampler(episodes, context=20, batch_size=64, seed=0)
    best = float("inf")
    for attempt in range(10):  # the best of ten: other processes may hold the cores
        begin = time.perf_counter()
        for step in range(20):
            sampler.batch(20 * attempt + step)
        best = min(best, (time.perf_counter() - begin) / 20)
    assert best < 1e-3  # measured 0.15 ms on an idle core
