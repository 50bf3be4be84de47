import importlib

import gymnasium as gym
import numpy as np
import pytest
import torch

ray = pytest.importorskip("ray")
pytest.importorskip("ray.rllib")

from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.learner import AddOneTsToEpisodesAndTruncate, GeneralAdvantageEstimation
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

import minrl.envs.recall  # noqa: F401 - registers the environment
from minrl.agents.adapters import rllib as adapter
from minrl.agents.adapters.rllib import MinimalRecurrentModule
from minrl.errors import AdapterError

FEATURES, ACTIONS, HIDDEN, LAYERS, ROW = 3, 4, 8, 2, 5
BOX = gym.spaces.Box(-1.0, 1.0, (FEATURES,), np.float32)
CORES = pytest.mark.parametrize("core", ["mingru", "minlstm"])


def make_module(core="mingru", observation_space=BOX, action_space=None, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_layers": LAYERS, "max_seq_len": ROW}
    return MinimalRecurrentModule(
        observation_space=observation_space,
        action_space=action_space or gym.spaces.Discrete(ACTIONS),
        model_config={"core": core, **sizes, **options},
    )


def batch_of(module, observations, state=None):
    """A batch as RLlib makes it; without a state, from the beginning of an episode."""
    if state is None:
        state = torch.as_tensor(module.get_initial_state()["h"]).expand(len(observations), -1, -1)
    return {Columns.OBS: observations, Columns.STATE_IN: {"h": state}}


def steps_of(module, observations):
    """Act step by step: logits, values and states after each step, (B, T, .)."""
    state, logits, values, states = None, [], [], []
    for t in range(observations.shape[1]):
        batch = batch_of(module, observations[:, t : t + 1], state)
        output = module.forward_inference(batch)
        logits.append(output[Columns.ACTION_DIST_INPUTS][:, 0])
        with torch.no_grad():
            values.append(module.compute_values(batch)[:, 0])
        state = output[Columns.STATE_OUT]["h"]
        states.append(state)
    return torch.stack(logits, 1), torch.stack(values, 1), torch.stack(states, 1)


@CORES
def test_stepwise_equals_sequence(core):
    module = make_module(core)
    observations = torch.randn(3, 7, FEATURES)
    logits, values, states = steps_of(module, observations)
    output = module.forward_train(batch_of(module, observations))
    torch.testing.assert_close(output[Columns.ACTION_DIST_INPUTS], logits)
    torch.testing.assert_close(output[Columns.STATE_OUT]["h"], states[:, -1])
    embeddings = output[Columns.EMBEDDINGS]
    torch.testing.assert_close(module.compute_values({}, embeddings=embeddings), values)


@CORES
def test_state_is_batch_then_layers(core):
    module = make_module(core)
    assert module.is_stateful()
    assert module.get_initial_state()["h"].shape == (LAYERS, HIDDEN)
    observations, state = torch.randn(3, 6, FEATURES), torch.rand(3, LAYERS, HIDDEN)
    output = module.forward_inference(batch_of(module, observations, state))[Columns.STATE_OUT]["h"]
    # Each layer on its own, by the core's step over one environment at a time.
    for row in range(3):
        h = state[row].unsqueeze(1)  # L 1 H
        for t in range(6):
            _, h = module.core.step(module.encoder(observations[row, t].unsqueeze(0)), h)
        torch.testing.assert_close(output[row], h.squeeze(1).detach())


@pytest.mark.parametrize("length", [ROW - 2, ROW - 1, ROW, 2 * ROW + 3])
@pytest.mark.parametrize("first", [0, 4])
def test_rows_that_the_library_cuts_and_pads_equal_acting(length, first):
    """An episode of which `length` steps from step `first` on are learned from, as PPO does it."""
    module = make_module()
    observations = torch.randn(1, first + length + 1, FEATURES)
    logits, values, states = (tensor[0].numpy() for tensor in steps_of(module, observations))
    batch = learner_batch(module, observations[0].numpy(), states, first)
    lengths = batch[Columns.SEQ_LENS]
    assert lengths.sum() == length + 1  # with the last observation, which was not acted on
    shown = torch.arange(ROW) < lengths.unsqueeze(1)
    assert batch[Columns.LOSS_MASK].sum() == length  # without it: so not the mask of the state
    output = module.forward_train(batch)[Columns.ACTION_DIST_INPUTS]
    np.testing.assert_allclose(output[shown].detach(), logits[first:], atol=1e-6)
    # No rewards, lambda 0, gamma 1: the target is the value of the next observation.
    targets = batch["value_targets"][shown][:length]
    np.testing.assert_allclose(targets, values[first + 1 :], atol=1e-6)


def learner_batch(module, observations, states, first):
    """What the library's learner makes of an episode that is recorded from step `first` on."""
    steps = len(observations) - 1
    episode = SingleAgentEpisode(
        observations=list(observations),
        actions=[0] * steps,
        rewards=[0.0] * steps,
        extra_model_outputs={Columns.STATE_OUT: [{"h": state} for state in states[:-1]]},
        observation_space=BOX,
        action_space=module.action_space,
        t_started=first,
        len_lookback_buffer=first,
    )
    pipeline = PPOConfig().build_learner_connector(BOX, module.action_space)
    pipeline.prepend(AddOneTsToEpisodesAndTruncate())
    pipeline.append(GeneralAdvantageEstimation(gamma=1.0, lambda_=0.0))
    modules = MultiRLModule()
    modules.add_module(DEFAULT_MODULE_ID, module)
    data = {"episodes": [episode.to_numpy()], "rl_module": modules, "shared_data": {}}
    return pipeline(batch={}, metrics=None, **data)[DEFAULT_MODULE_ID]


def test_continuous_actions_get_a_mean_and_a_deviation():
    module = make_module(action_space=gym.spaces.Box(-1.0, 1.0, (2,), np.float32))
    output = module.forward_inference(batch_of(module, torch.randn(3, 6, FEATURES)))
    assert output[Columns.ACTION_DIST_INPUTS].shape == (3, 6, 4)
    distribution = module.get_inference_action_dist_cls()
    sample = distribution.from_logits(output[Columns.ACTION_DIST_INPUTS]).sample()
    assert sample.shape == (3, 6, 2)


def test_a_core_is_given_what_it_begins_with():
    assert make_module("minlstm", core_options={"memory": 200}).core.memory == 200
    with pytest.raises(TypeError, match="no_such_option"):
        make_module(core_options={"no_such_option": 1})


@pytest.mark.parametrize("option", ["learn_initial_state", "return_cell"])
def test_options_that_mean_nothing_to_its_states_are_refused(option):
    with pytest.raises(ValueError, match=f"no {option}"):
        make_module("minlstm", core_options={option: True})


@pytest.mark.parametrize("options", [{"memory": 200}, {"dropout": 0.1, "use_lstm": True}])
def test_options_of_the_core_are_not_looked_for_elsewhere(options):
    with pytest.raises(ValueError, match=f"{min(options)} belong in core_options"):
        make_module(**options)
    with pytest.raises(ValueError, match="no use_lstm"):
        make_module(use_lstm=True)
    with pytest.raises(ValueError, match="no batch_first"):
        make_module(core_options={"batch_first": False})


@CORES
def test_a_saved_module_acts_the_same(core, tmp_path):
    module, observations = make_module(core), torch.randn(3, 6, FEATURES)
    module.save_to_path(tmp_path)
    torch.manual_seed(1)
    restored = MinimalRecurrentModule.from_checkpoint(tmp_path)
    for before, after in zip(
        steps_of(module, observations), steps_of(restored, observations), strict=True
    ):
        assert torch.equal(before, after)


def test_unknown_core_and_image_observations_are_refused():
    with pytest.raises(ValueError, match="core must be one of"):
        make_module("gru")
    with pytest.raises(ValueError, match=r"one-dimensional Box.*FlattenObservations"):
        make_module(observation_space=gym.spaces.Box(0.0, 1.0, (8, 8, 3), np.float32))


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    """One small Ray, which leaves its files (a token, results) in a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(home))
        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def build_algorithm(core, **training):
    """PPO on the recall task, all in this process."""
    spec = RLModuleSpec(
        module_class=MinimalRecurrentModule,
        model_config={"core": core, "hidden_size": 32, "max_seq_len": 16},
    )
    config = PPOConfig().environment("minrl/Recall-v0", env_config={"length": 5, "cues": 2})
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=16)
    config.learners(num_learners=0)
    config.rl_module(rl_module_spec=spec)
    config.training(lr=3e-3, entropy_coeff=0.01, grad_clip=1.0, **training)
    return config.debugging(seed=0).build_algo()


def play(module, episodes):
    """Act greedily in a loop of the user's, carrying the state; return the mean return."""
    environment = gym.make("minrl/Recall-v0", length=5, cues=2)
    total = 0.0
    for seed in range(episodes):
        state, done = torch.as_tensor(module.get_initial_state()["h"])[None], False
        observation, _ = environment.reset(seed=seed)
        while not done:
            observations = torch.as_tensor(observation)[None, None]  # B T F
            output = module.forward_inference(batch_of(module, observations, state))
            state = output[Columns.STATE_OUT]["h"]
            action = int(output[Columns.ACTION_DIST_INPUTS][0, -1].argmax())
            observation, reward, done, _, _ = environment.step(action)
            total += reward
    return total / episodes


@CORES
def test_one_iteration_of_ppo_changes_every_parameter(local_ray, core):
    # One minibatch, once: what it measures of the new policy is still that of the old one.
    algorithm = build_algorithm(
        core, train_batch_size_per_learner=256, minibatch_size=None, num_epochs=1
    )
    module = algorithm.get_module()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = algorithm.train()
    # The states that the rows start from are those that were acted with.
    assert abs(result["learners"][DEFAULT_MODULE_ID]["mean_kl_loss"]) < 1e-6
    after = algorithm.get_module().state_dict()
    assert all((after[name] != before[name]).any() for name in before)
    assert 0.0 <= play(algorithm.get_module(), 4) <= 1.0
    algorithm.stop()


@pytest.mark.slow
def test_ppo_learns_to_remember(local_ray):
    algorithm = build_algorithm(
        "mingru", train_batch_size_per_learner=1024, minibatch_size=256, num_epochs=8
    )
    for _ in range(30):
        algorithm.train()
    # Without memory 0.5; while exploring, from iteration 12 on, 0.98 to 1.0 was seen (seed 0).
    assert play(algorithm.get_module(), 50) >= 0.9
    algorithm.stop()


def test_a_changed_interface_is_named(monkeypatch):
    def _forward_train(self):
        """Lack the batch."""

    monkeypatch.setattr(TorchRLModule, "_forward_train", _forward_train)
    message = r"ray .*_forward_train: too many positional arguments.*known to work: 2\.60"
    with pytest.raises(AdapterError, match=message):
        importlib.reload(adapter)
