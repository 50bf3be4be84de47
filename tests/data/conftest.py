import itertools

import numpy as np
import pytest

from minrl.data.episodes import DatasetInfo, Episode
from minrl.data.minari_writer import DatasetCard, write_dataset


@pytest.fixture
def fresh_root(tmp_path, monkeypatch):
    """Return a function that makes a new, empty datasets folder and makes it the current one."""
    counter = itertools.count()

    def make():
        root = tmp_path / f"datasets-{next(counter)}"
        root.mkdir()
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
        return root

    return make


@pytest.fixture
def root(fresh_root):
    return fresh_root()


@pytest.fixture
def make_episodes():
    """Return a function that draws random episodes of given lengths, T+1 observations each."""

    def make(lengths, seed=0, observation_size=11, action_size=3):
        generator = np.random.default_rng(seed)
        episodes = []
        for steps in lengths:
            kind = generator.integers(2)
            episodes.append(
                Episode(
                    observations=generator.normal(size=(steps + 1, observation_size)),
                    actions=generator.uniform(-1, 1, (steps, action_size)).astype(np.float32),
                    rewards=generator.normal(size=steps),
                    terminated=bool(kind == 0),
                    truncated=bool(kind == 1),
                )
            )
        return episodes

    return make


@pytest.fixture
def info():
    return DatasetInfo(
        dataset_id="test/toy/random-v0",
        environment_id="Hopper-v5",
        observation_size=11,
        action_low=(-1.0,) * 3,
        action_high=(1.0,) * 3,
    )


@pytest.fixture
def write():
    """Return a function that writes episodes as a Minari dataset in the current folder."""

    def write(dataset_id, episodes, observation_space=None, action_space=None, **changes):
        from gymnasium.spaces import Box

        first = episodes[0]
        wide = (np.shape(first.observations)[1],)
        card = DatasetCard(
            dataset_id=dataset_id,
            environment_id="Hopper-v5",
            observation_space=observation_space or Box(-np.inf, np.inf, wide, np.float64),
            action_space=action_space or Box(-1, 1, np.shape(first.actions)[1:], np.float32),
            algorithm_name="random",
            description="made by a test",
            **changes,
        )
        write_dataset(card, episodes)

    return write
