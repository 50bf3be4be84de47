"""Behaviour policies as files say the same as the models they came from."""

import json
from importlib.resources import files

import numpy as np
import pytest

from minrl.data.behaviours import BehaviourPolicy
from minrl.scripts import train_behaviours as script
from minrl.scripts.train_behaviours import (
    BehaviourConfig,
    export_ppo,
    export_sac,
    make_ppo,
    make_sac,
)


@pytest.fixture(scope="module")
def ppo():
    model = make_ppo("Hopper-v5", seed=1)
    model.learn(4096)  # one rollout and one update, so that no weight is as initialised
    return model


@pytest.fixture(scope="module")
def sac():
    pytest.importorskip("sbx", reason="needs pip install -e '.[behaviours]'")
    model = make_sac("HalfCheetah-v5", seed=1)
    model.learning_starts = 100  # so that updates begin: biases start at zero
    model.learn(150)
    return model


def test_exported_ppo_acts_at_the_mean_as_the_model_does(ppo):
    observations = np.random.default_rng(0).normal(0, 3, (200, 11))
    policy = BehaviourPolicy(export_ppo(ppo), noise_scale=0.0)
    actions = policy.act(observations, np.random.default_rng(0))
    expected, _ = ppo.predict(
        ppo.get_vec_normalize_env().normalize_obs(observations), deterministic=True
    )
    assert (np.abs(expected) < 1).mean() > 0.5  # else clipping would hide a difference
    np.testing.assert_allclose(actions, expected, atol=2e-5)


def test_exported_ppo_has_the_model_s_noise(ppo):
    observations = np.zeros((20_000, 11))
    weights = export_ppo(ppo)
    actions = BehaviourPolicy(weights, noise_scale=0.1).act(observations, np.random.default_rng(0))
    expected = 0.1 * np.exp(ppo.policy.log_std.detach().numpy())
    np.testing.assert_allclose(actions.std(axis=0), expected, rtol=0.03)


def test_exported_sac_acts_at_the_mean_as_the_model_does(sac):
    observations = np.random.default_rng(0).normal(0, 3, (200, 17))
    weights = export_sac(sac)
    assert all(np.abs(weights[name]).max() > 0 for name in ("b0", "b1", "b_mean", "b_log_std"))
    actions = BehaviourPolicy(weights, noise_scale=0.0).act(observations, np.random.default_rng(0))
    expected, _ = sac.predict(observations, deterministic=True)
    assert 0.1 < np.abs(expected).max() < 1
    np.testing.assert_allclose(actions, expected, atol=2e-5)


def test_exported_sac_has_the_model_s_noise(sac):
    observations = np.tile(np.random.default_rng(0).normal(0, 1, 17), (20_000, 1))
    policy = BehaviourPolicy(export_sac(sac), noise_scale=1.0)
    actions = policy.act(observations, np.random.default_rng(0))
    expected, _ = sac.predict(observations, deterministic=False)
    before_squashing = np.arctanh(np.clip((actions, expected), -0.999999, 0.999999))
    ours, model_s = before_squashing
    np.testing.assert_allclose(ours.mean(axis=0), model_s.mean(axis=0), atol=0.05)
    np.testing.assert_allclose(ours.std(axis=0), model_s.std(axis=0), rtol=0.05)


def test_a_short_training_writes_policies_and_a_manifest_like_the_shipped_ones(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "MEASURE_EPISODES", 2)
    config = BehaviourConfig("hopper", out=tmp_path, steps=4096, snapshot_every=2000)
    snapshots = script.train_behaviours(config)
    assert [shot["training_steps"] for shot in snapshots] == [16, 2000, 4000, 4096]
    levels = json.loads((tmp_path / "manifest.json").read_text())["hopper"]["levels"]
    assert set(levels) == {"medium", "expert", "replay"}
    shipped = np.load(files("minrl.data") / "policies" / "hopper-medium.npz", allow_pickle=False)
    for entries in levels.values():
        for entry in entries:
            with np.load(tmp_path / entry["file"], allow_pickle=False) as file:
                assert {name: file[name].shape for name in file} == {
                    name: shipped[name].shape for name in shipped
                }
                assert file["steps"] == entry["training_steps"]
            assert entry["episodes"] == 2
            assert np.isfinite(entry["return_mean"])
    shipped.close()


def test_a_policy_at_the_last_step_is_listed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MEASURE_EPISODES", 1)
    config = BehaviourConfig("hopper", out=tmp_path, steps=4096, snapshot_every=1024)
    steps = [shot["training_steps"] for shot in script.train_behaviours(config)]
    assert steps == [16, 1024, 2048, 3072, 4096]


def test_interrupted_training_writes_the_manifest_of_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MEASURE_EPISODES", 1)
    calls = []

    def interrupt_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    measure = script.measure
    monkeypatch.setattr(script, "measure", interrupt_the_second)
    config = BehaviourConfig("walker2d", out=tmp_path, steps=4096, snapshot_every=1008)
    steps = [shot["training_steps"] for shot in script.train_behaviours(config)]
    assert steps == [16, 1008]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["walker2d"]["levels"]["expert"][0]["training_steps"] == 1008
