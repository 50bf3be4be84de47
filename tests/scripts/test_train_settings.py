"""Settings decide what is trained, on what, and how it acts: none is ignored."""

import dataclasses
import itertools

import gymnasium
import numpy as np
import pytest
import torch
from small_runs import SMALL, losses_of, make_config, weights_of

from minrl import DecisionAgent
from minrl.agents.backbones.blocks import MIXERS
from minrl.agents.model_config import ModelConfig
from minrl.agents.training import OptimizationConfig, Trainer
from minrl.data.episodes import DatasetInfo, Episode, Episodes
from minrl.data.minari_source import load_dataset
from minrl.data.minari_writer import DatasetCard, write_dataset
from minrl.errors import ConfigError, EnvError
from minrl.scripts import train as train_module
from minrl.scripts import train_setup
from minrl.scripts.evaluate import EvaluateConfig, evaluate_run
from minrl.scripts.match_parameters import count_parameters, match_width
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train import train
from minrl.scripts.train_config import PRESETS, TrainConfig, quick
from minrl.scripts.train_setup import (
    build_model,
    choose_targets,
    complete,
    held_out_batches,
    make_sampler,
)

UNUSUAL = {
    "seed": 3,
    "steps": 4,
    "context": 7,
    "refresh_every": 3,
    "burn_in": 5,
    "held_out": 0.3,
    "best_fraction": 0.4,
    "eval_episodes": 0,
    "final_episodes": 0,
    "model": dataclasses.replace(SMALL, condition="return-to-go"),
    "optimization": OptimizationConfig(ema_decay=0.9),
}


def toy_episodes(rewards):
    info = DatasetInfo("test/toy-v0", None, 1, (-1.0,), (1.0,))
    return Episodes.from_episodes(
        [
            Episode(np.zeros((len(r) + 1, 1)), np.zeros((len(r), 1)), np.array(r), True, False)
            for r in rewards
        ],
        info,
    )


@pytest.fixture(scope="module")
def unusual(hopper_id, tmp_path_factory):
    """A run with settings other than the defaults, and the (first) arguments of what it made."""
    made = {}

    def noting(name, make):
        def note(*arguments, **options):
            made.setdefault(name, (*arguments, options))
            return make(*arguments, **options)

        return note

    path = tmp_path_factory.mktemp("unusual") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((train_setup, "WindowSampler"), (train_module, "Trainer")):
            patch.setattr(module, name, noting(name, getattr(module, name)))
        train(make_config(hopper_id, path, **UNUSUAL))
    return path, made


def test_trained_on_are_the_best_of_the_episodes_that_are_not_held_out(unusual, hopper_id):
    _, made = unusual
    episodes, options = made["WindowSampler"]
    kept, _ = load_dataset(hopper_id).split(0.3, seed=3)
    assert np.array_equal(episodes.observations, kept.best(0.4).observations)
    assert episodes.num_steps < kept.num_steps
    sizes = {"context": 7, "batch_size": 8, "seed": 3, "burn_in": 5}
    assert options == sizes | {"condition": "return-to-go"}


def test_the_averaged_weights_are_those_that_are_saved(unusual):
    path, _ = unusual
    state, saved = RunFolder(path).checkpoints.trainer_state(4)["trainer"], weights_of(path)
    assert all(torch.equal(saved[name], value) for name, value in state["average"].items())
    assert not torch.equal(saved["head.weight"], state["model"]["head.weight"])


def test_a_run_acts_as_it_is_told(unusual):
    agent = DecisionAgent.load(unusual[0])
    assert (agent.refresh_every, agent.context) == (3, 7 + 5)  # window and burn-in


def test_the_action_error_is_that_of_the_held_out_episodes(unusual, hopper_id):
    run = RunFolder(unusual[0])
    _, held_out = load_dataset(hopper_id).split(0.3, seed=3)
    judge = Trainer(DecisionAgent.load(run.path).model, OptimizationConfig(), total_steps=1)
    expected = judge.action_error(held_out_batches(run.read_config(), held_out))
    (found,) = (
        row["eval/action_error"] for row in run.read_metrics() if "eval/action_error" in row
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_all_episodes_are_trained_on_if_none_is_held_out(hopper_id, tmp_path, monkeypatch):
    trained_on = []
    monkeypatch.setattr(
        train_module,
        "make_sampler",
        lambda config, episodes: trained_on.append(episodes) or make_sampler(config, episodes),
    )
    options = {"held_out": 0.0, "eval_episodes": 0, "final_episodes": 0, "steps": 2}
    run = train(make_config(hopper_id, tmp_path / "run", **options))
    (episodes,) = trained_on
    assert episodes.num_episodes == load_dataset(hopper_id).num_episodes
    assert not any("eval/action_error" in row for row in RunFolder(run).read_metrics())
    assert (run / "learning_curve.png").exists()


def test_the_seed_decides_weights_windows_and_dropout(unusual, hopper_id):
    _, made = unusual
    assert made["Trainer"][-1]["seed"] == 3
    episodes = load_dataset(hopper_id)
    configs = [make_config(hopper_id, None, seed=seed) for seed in (0, 1, 1)]
    weights = [build_model(config, episodes).head.weight for config in configs]
    windows = [make_sampler(config, episodes).windows(0) for config in configs]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert not np.array_equal(windows[0], windows[1])
    assert np.array_equal(windows[1], windows[2])


def test_a_line_of_metrics_has_the_mean_loss_since_the_line_before(finished, hopper_id, tmp_path):
    options = {"log_every": 1, "eval_episodes": 0, "final_episodes": 0}
    every = losses_of(train(make_config(hopper_id, tmp_path / "run", **options)))
    assert list(every) == list(range(1, 13))
    parts = {5: range(1, 6), 10: range(6, 11), 12: range(11, 13)}
    expected = {step: np.mean([every[one] for one in part]) for step, part in parts.items()}
    assert losses_of(finished) == pytest.approx(expected)


def test_asked_for_is_what_the_best_tenth_and_all_of_the_data_came_to():
    rewards = [[2.0] * 5] * 18 + [[12.5] * 8, [45.0] * 2]  # 100 steps; returns of 10, 100, 90
    best_tenth, everything = (8 * 100 + 2 * 90) / 10, (8 * 100 + 2 * 90 + 90 * 10) / 100
    assert choose_targets(toy_episodes(rewards)) == pytest.approx((best_tenth, everything))
    assert choose_targets(toy_episodes([[1.0, 2.0]])) == (3.0,)


def test_a_transformer_looks_back_as_far_as_a_window_with_its_burn_in():
    episodes = toy_episodes([[1.0] * 30])
    transformer = ModelConfig("transformer", width=8)
    config = TrainConfig(model=transformer, context=7, burn_in=4)
    assert complete(config, episodes).model.attention_context == 11
    told = dataclasses.replace(transformer, attention_context=3)
    config = dataclasses.replace(config, model=told)
    assert complete(config, episodes).model.attention_context == 3
    assert complete(TrainConfig(context=7), episodes).model.attention_context is None


def test_returns_of_tasks_that_are_not_the_papers_are_divided_by_the_largest():
    config = TrainConfig(context=1)
    episodes = toy_episodes([[5.0, -30.0], [7.0]])
    assert complete(config, episodes).model.return_scale == 25.0
    to_go = dataclasses.replace(config, model=ModelConfig(condition="return-to-go"))
    assert complete(to_go, episodes).model.return_scale == 30.0
    assert complete(config, toy_episodes([[0.0]])).model.return_scale == 1e-6
    told = dataclasses.replace(config, model=ModelConfig(return_scale=2.0))
    assert complete(told, toy_episodes([[5.0]])).model.return_scale == 2.0


def test_the_width_is_that_of_a_model_with_the_parameters_asked_for(hopper_id):
    config = make_config(hopper_id, None, match_parameters=60_000)
    completed = complete(config, load_dataset(hopper_id))
    assert count_parameters(completed.model, 11, 3) == pytest.approx(60_000, rel=0.1)
    assert completed.model.return_scale == 1000.0


@pytest.mark.parametrize("parameters", [10, 10**9])
def test_a_number_of_parameters_that_no_width_has_is_refused(parameters):
    with pytest.raises(
        ConfigError, match=f"from 783 to 553906179 for mingru here, not {parameters}"
    ):
        match_width(ModelConfig(), 11, 3, parameters)


def test_flags_without_effect_are_named(hopper_id, tmp_path):
    model = ModelConfig("gru", candidate="tanh", attention_context=3, width=8, num_layers=1)
    unplayed = {"eval_episodes": 0, "final_episodes": 0}
    config = make_config(hopper_id, tmp_path / "run", model=model, steps=1, **unplayed)
    with pytest.warns(UserWarning, match="of no effect with gru: attention-context, candidate$"):
        train(config)


def test_a_transformer_that_is_not_told_the_time_is_warned_of(hopper_id, tmp_path):
    model = ModelConfig("transformer", width=8, num_layers=1)
    unplayed = {"eval_episodes": 0, "final_episodes": 0}
    config = make_config(hopper_id, tmp_path / "run", model=model, steps=1, **unplayed)
    with pytest.warns(UserWarning, match="without timesteps .* cannot tell the order"):
        train(config)
    looking_back = dataclasses.replace(model, convolution=4)
    train(dataclasses.replace(config, run_dir=tmp_path / "convolution", model=looking_back))


def test_flags_that_a_model_without_memory_does_not_look_at_are_named():
    model = ModelConfig("mlp", tokens="observation", max_timestep=1000)
    forgetful = dataclasses.replace(quick(backbone="mlp"), model=model, burn_in=3, refresh_every=1)
    assert forgetful.without_effect() == ["burn-in", "max-timestep", "refresh-every"]
    for looking_back in ({"convolution": 4}, {"tokens": "joint"}):
        changed = dataclasses.replace(model, max_timestep=0, **looking_back)
        assert dataclasses.replace(forgetful, model=changed).without_effect() == []
    apart = dataclasses.replace(
        forgetful,
        model=dataclasses.replace(model, tokens="interleaved"),
        optimization=OptimizationConfig(return_noise=0.2),
    )
    assert apart.without_effect() == ["burn-in", "refresh-every", "return-noise"]


def test_every_preset_says_nothing_without_effect():
    for preset, backbone in itertools.product(PRESETS.values(), MIXERS):
        assert preset(backbone=backbone).without_effect() == []


def test_without_playing_no_environment_is_needed(hopper_id, monkeypatch, tmp_path):
    monkeypatch.delitem(gymnasium.registry, "Hopper-v5")
    config = make_config(hopper_id, tmp_path / "run")
    with pytest.raises(EnvError, match="to train without playing, --eval-episodes 0 --final-"):
        train(config)
    train(dataclasses.replace(config, eval_episodes=0, final_episodes=0))
    assert RunFolder(config.run_dir).is_finished()


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """A run on data with a bad episode and reference scores of its own, in a task of its own."""
    environment = gymnasium.make("Pendulum-v1")
    card = DatasetCard(
        dataset_id="test/settings/random-v0",
        environment_id="Pendulum-v1",
        observation_space=environment.observation_space,
        action_space=environment.action_space,
        algorithm_name="random",
        description="made by a test",
        reference_scores=(-1200.0, -150.0),
    )
    environment.close()
    observations, actions = np.zeros((13, 3), np.float32), np.zeros((12, 1), np.float32)
    rewards = [np.full(12, value) for value in (-1.0, np.nan, -2.0)]
    write_dataset(card, [Episode(observations, actions, r, False, True) for r in rewards])
    path = tmp_path_factory.mktemp("pendulum") / "run"
    options = {"steps": 2, "context": 10, "eval_episodes": 1, "final_episodes": 0}
    config = make_config(card.dataset_id, path, on_bad_episode="drop", **options)
    with pytest.warns(UserWarning, match="1 of 3 episodes are bad and dropped"):
        train(config)
    return path


def test_bad_episodes_are_dropped_if_that_is_asked_for(pendulum):
    assert RunFolder(pendulum).is_finished()
    assert RunFolder(pendulum).read_config().targets == (-12.0, -18.0)


def test_the_model_has_bounds_and_scale_of_the_data(pendulum):
    model = DecisionAgent.load(pendulum).model
    assert (model.action_low.tolist(), model.action_high.tolist()) == ([-2.0], [2.0])
    assert model.return_scale == 24.0


def test_scores_are_those_of_the_references_that_the_data_has(pendulum, capsys):
    def score(value):
        return pytest.approx((value + 1200) / 10.5)

    evaluations = evaluate_run(pendulum, EvaluateConfig(episodes=2))
    assert "score in percent" in capsys.readouterr().out
    for evaluation in evaluations:
        assert evaluation.references == (-1200.0, -150.0)
        assert evaluation.normalized["mean"] == score(evaluation.return_mean)
    rows = [row for row in RunFolder(pendulum).read_metrics() if "eval/-12/return_mean" in row]
    assert rows
    for row in rows:
        assert row["eval/-12/normalized_score_mean"] == score(row["eval/-12/return_mean"])
