"""The normalisation of observations that hardly differ, are far from zero, or are only one."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from minrl import DecisionAgent
from minrl.agents.model_config import ModelConfig
from minrl.data.episodes import DatasetInfo, Episode, Episodes
from minrl.scripts import train as train_module
from minrl.scripts.train_config import TrainConfig
from minrl.scripts.train_setup import build_model

CONFIG = TrainConfig(model=ModelConfig(width=8, num_layers=1))
KINDS = {
    "ordinary": lambda values: values,
    "constant": lambda values: np.full_like(values, 3.3),
    "far-from-zero": lambda values: 1e8 + 100 * values,
    "tiny": lambda values: 1e-8 * values,
    "denormal": lambda values: 1e-40 * values,
    "huge": lambda values: 1e15 * values,
}


def make_episodes(observations, lengths, low=(-1.0, -2.0), high=(1.0, 2.0)):
    info = DatasetInfo("test/toy-v0", None, observations.shape[1], low, high)
    starts = np.cumsum([0, *lengths[:-1]])
    episodes = [
        Episode(observations[i : i + n + 1], np.zeros((n, 2)), np.ones(n), False, True)
        for i, n in zip(starts, lengths, strict=True)
    ]
    return Episodes.from_episodes(episodes, info)


def two_passes(column):
    """Mean and standard deviation in the order of the textbook, exactly summed."""
    values = [float(value) for value in column]
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def test_bounds_that_the_data_hardly_uses_become_the_data_s():
    episodes = make_episodes(np.zeros((101, 3), np.float32), [100], (-1e6, -2.0), (1e6, 2.0))
    episodes.actions[:, 0] = np.linspace(-0.5, 0.25, 100)
    with pytest.warns(UserWarning, match="less than a hundredth of the bounds of action 0: "):
        model = build_model(CONFIG, episodes)
    assert model.action_low.tolist() == [-0.5, -2.0]  # constant at 0 is no range to stay within
    assert model.action_high.tolist() == [0.25, 2.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[400, 300, 299], [1]], ids=["many", "one-sample"])
def test_normalisation_is_finite_and_that_of_two_passes(kind, lengths):
    values = np.random.default_rng(0).normal(size=(sum(lengths) + 1, 3))
    episodes = make_episodes(KINDS[kind](values).astype(np.float32), lengths)
    model = build_model(CONFIG, episodes)
    for column in range(3):
        mean, deviation = two_passes(episodes.observations[:, column])
        got = model.observation_mean[column].item(), model.observation_std[column].item()
        # The buffers are float32: a deviation can be told from zero only as far as those go.
        assert got[0] == pytest.approx(mean, rel=1e-6, abs=1e-12)
        is_constant = deviation <= max(1e-7 * abs(mean), 1e-30)
        wanted = 1.0 if is_constant else deviation
        assert got[1] == pytest.approx(wanted + 1e-6 * (wanted > 1e-3), rel=1e-6, abs=1e-20)
    observations = torch.from_numpy(episodes.observations)
    normalised = (observations - model.observation_mean) / model.observation_std
    assert normalised.isfinite().all()
    agent = DecisionAgent(model, target_return=1.0)
    assert np.isfinite(agent.act(episodes.observations[:1])).all()


def test_action_bounds_are_those_of_the_data():
    model = build_model(CONFIG, make_episodes(np.zeros((5, 3)), [4]))
    assert (model.action_low.tolist(), model.action_high.tolist()) == ([-1, -2], [1, 2])


def test_bounds_that_single_precision_lacks_are_rounded_inwards():
    low, high = (-0.1, 0.7, -5.0), (0.1, 0.9, 0.3)
    episodes = make_episodes(np.zeros((5, 3)), [4], low, high)
    episodes = dataclasses.replace(episodes, actions=np.zeros((4, 3), np.float32))
    model = build_model(CONFIG, episodes)
    for exact, rounded in ((low, model.action_low), (high, model.action_high)):
        np.testing.assert_allclose(rounded.numpy(), exact, rtol=2**-23)
    assert all(np.float64(model.action_low.numpy()) >= low)
    assert all(np.float64(model.action_high.numpy()) <= high)
    # Some bounds' nearest number lies outside of them.
    assert any(np.float64(np.float32(low)) < low)
    assert any(np.float64(np.float32(high)) > high)


def test_only_what_is_trained_on_is_looked_at(monkeypatch, tmp_path):
    """Through the whole of ``train``, with a task whose held-out episodes are all poison."""
    values = np.random.default_rng(0).normal(size=(1001, 3)).astype(np.float32)
    episodes = make_episodes(values, [100] * 10)
    training, held_out = episodes.split(0.3, seed=0)
    expected = training.observations.mean(0, dtype=np.float64)
    poisoned = held_out.observations[:, 0]
    for row in np.flatnonzero(np.isin(episodes.observations[:, 0], poisoned)):
        episodes.observations[row] = 1e6
    monkeypatch.setattr(train_module, "load_first_on_rank_zero", lambda *_: episodes)
    config = dataclasses.replace(
        CONFIG,
        dataset=("test/toy-v0",),
        run_dir=tmp_path / "run",
        held_out=0.3,
        context=10,
        batch_size=4,
        steps=1,
        eval_every=1,
        log_every=1,
        targets=(1.0,),
        device="cpu",
    )
    path = train_module.train(config)
    model = DecisionAgent.load(path).model
    assert np.abs(model.observation_mean.numpy()).max() < 1
    np.testing.assert_allclose(model.observation_mean.numpy(), expected, rtol=1e-6)
    assert model.observation_std.numpy().max() < 2


def test_normalisation_comes_back_bit_for_bit(tmp_path):
    values = 1e8 + np.random.default_rng(0).normal(size=(101, 3))
    model = build_model(CONFIG, make_episodes(values.astype(np.float32), [100]))
    DecisionAgent(model, target_return=1.0).save(tmp_path / "agent.safetensors")
    loaded = DecisionAgent.load(tmp_path / "agent.safetensors").model
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(model.config)
