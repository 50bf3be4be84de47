import importlib
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("tianshou")

from tianshou.algorithm import DQN, PPO
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Batch, Collector, CollectStats, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OffPolicyTrainerParams, OnPolicyTrainerParams
from tianshou.utils.net.common import Recurrent
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

from minrl.agents.adapters import tianshou as adapter
from minrl.agents.adapters.tianshou import MinimalRecurrent
from minrl.envs.partial import HideVelocities
from minrl.errors import AdapterError

LAYERS, HIDDEN, FEATURES, ACTIONS = 2, 8, 2, 2
TWO_ACTIONS = gym.spaces.Discrete(ACTIONS)
CORES = pytest.mark.parametrize("core", ["mingru", "minlstm"])


def make_network(core="mingru", **options):
    torch.manual_seed(0)
    sizes = {"layer_num": LAYERS, "hidden_layer_size": HIDDEN}
    shapes = {"state_shape": (FEATURES,), "action_shape": ACTIONS}
    return MinimalRecurrent(**{**sizes, **shapes, "core": core, **options})


def make_environments(number):
    environments = DummyVectorEnv([lambda: HideVelocities(gym.make("CartPole-v1"))] * number)
    environments.seed(0)
    return environments


def make_dqn(network, **options):
    policy = DiscreteQLearningPolicy(model=network, action_space=TWO_ACTIONS, eps_training=0.1)
    return DQN(policy=policy, optim=AdamOptimizerFactory(lr=1e-3), **options)


def test_a_core_is_given_what_it_begins_with():
    assert make_network("minlstm", memory=200).core.memory == 200
    with pytest.raises(TypeError, match="no_such_option"):
        make_network(no_such_option=1)


@pytest.mark.parametrize("option", ["batch_first", "learn_initial_state", "return_cell"])
def test_options_that_mean_nothing_to_its_collectors_are_refused(option):
    with pytest.raises(ValueError, match=f"no {option}"):
        make_network("minlstm", **{option: True})


@CORES
def test_shapes_are_those_of_the_librarys_lstm(core):
    theirs = Recurrent(
        layer_num=LAYERS, state_shape=(FEATURES,), action_shape=ACTIONS, hidden_layer_size=HIDDEN
    )
    ours = make_network(core)
    assert ours.get_output_dim() == theirs.get_output_dim() == ACTIONS
    for shape in ((3, FEATURES), (3, 5, FEATURES)):
        observation = np.random.default_rng(0).normal(size=shape)  # float64, as CartPole's are not
        expected, expected_state = theirs(observation)
        output, state = ours(observation)
        assert output.shape == expected.shape == (3, ACTIONS)
        assert state["hidden"].shape == expected_state["hidden"].shape == (3, LAYERS, HIDDEN)
        assert not state["hidden"].requires_grad


@CORES
@pytest.mark.parametrize("kind", [Batch, dict])
def test_stepwise_equals_sequence(core, kind):
    network = make_network(core)
    observations = torch.randn(3, 7, FEATURES)
    output, last = network(observations)
    state = None
    for t in range(7):
        stepped, state = network(observations[:, t], state)
        state = kind(hidden=state["hidden"])
    torch.testing.assert_close(stepped, output)
    torch.testing.assert_close(state["hidden"], last["hidden"])
    # In two parts, the state between them as a buffer gives it back: an array.
    _, state = network(observations[:, :4])
    output_of_parts, _ = network(observations[:, 4:], kind(hidden=state["hidden"].numpy()))
    torch.testing.assert_close(output_of_parts, output)


@CORES
def test_a_network_is_pickled_and_restored_with_its_algorithm(core):
    network, observations = make_network(core), torch.randn(3, 7, FEATURES)
    expected, _ = network(observations)
    other = make_dqn(pickle.loads(pickle.dumps(make_network(core, memory=9))))  # noqa: S301 - ours
    other.load_state_dict(make_dqn(network).state_dict())
    assert torch.equal(other.policy.model(observations)[0], expected)


def test_observations_of_more_axes_are_flattened():
    observations = torch.randn(3, 5, 2, 4)
    network = make_network(state_shape=(2, 4))
    expected, _ = make_network(state_shape=8)(observations.flatten(2))
    torch.testing.assert_close(network(observations)[0], expected)
    one_step, _ = network(observations[:, 0])
    torch.testing.assert_close(one_step, network(observations[:, :1])[0])


def test_a_state_of_another_network_is_refused():
    with pytest.raises(KeyError, match=r"with 'hidden', got one with \['h'\]"):
        make_network()(np.zeros((3, FEATURES)), {"h": np.zeros((3, LAYERS, HIDDEN))})


@CORES
def test_collector_starts_episodes_anew_where_our_resets_do(core):
    network = make_network(core)
    buffer = VectorReplayBuffer(200, 2)
    collector = Collector[CollectStats](make_dqn(network), make_environments(2), buffer)
    collector.reset()
    collector.collect(n_step=80)
    collector.collect(n_step=40)  # goes on with the state where the first one stopped
    for part in buffer.buffers:
        data = part[:]
        assert 2 <= data.done.sum() < len(data) == 60
        resets = torch.as_tensor(np.concatenate([[False], data.done[:-1]]))
        observations = network.encoder(torch.as_tensor(data.obs))
        output, last = network.core(observations[None], resets=resets[None])
        recorded = torch.as_tensor(data.policy.hidden_state.hidden)  # T L H
        torch.testing.assert_close(recorded[:, -1], output[0].detach())
        torch.testing.assert_close(recorded[-1], last[:, 0].detach())
        np.testing.assert_array_equal(data.act, network.head(output[0]).argmax(-1).numpy())


@CORES
def test_one_round_of_dqn_changes_every_parameter(core):
    network = make_network(core)
    algorithm = make_dqn(network, target_update_freq=10)
    buffer = VectorReplayBuffer(400, 2, stack_num=4, ignore_obs_next=True)
    collector = Collector[CollectStats](algorithm, make_environments(2), buffer)
    assert_round_changes(
        network,
        algorithm,
        OffPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=64,
            collection_step_num_env_steps=32,
            update_step_num_gradient_steps_per_sample=0.125,
            batch_size=16,
            show_progress=False,
            verbose=False,
        ),
    )


@CORES
def test_one_round_of_ppo_changes_every_parameter(core):
    """The network as the shared first part of an actor and a critic."""
    network = make_network(core, action_shape=16)
    actor = DiscreteActor(preprocess_net=network, action_shape=ACTIONS)
    algorithm = PPO(
        policy=DiscreteActorPolicy(actor=actor, action_space=TWO_ACTIONS),
        critic=DiscreteCritic(preprocess_net=network),
        optim=AdamOptimizerFactory(lr=1e-3),
    )
    buffer = VectorReplayBuffer(400, 2, stack_num=4, ignore_obs_next=True)
    assert_round_changes(
        network,
        algorithm,
        OnPolicyTrainerParams(
            training_collector=Collector[CollectStats](algorithm, make_environments(2), buffer),
            max_epochs=1,
            epoch_num_steps=64,
            collection_step_num_env_steps=64,
            update_step_num_repetitions=2,
            batch_size=16,
            show_progress=False,
            verbose=False,
        ),
    )


def assert_round_changes(network, algorithm, params):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    algorithm.run_training(params)
    assert all((network.state_dict()[name] != before[name]).any() for name in before)


def make_scaled_environment():
    """CartPole without velocities, its angle in tenths of a radian, so that a network sees it."""
    environment = HideVelocities(gym.make("CartPole-v1"))
    bounds, scale = environment.observation_space, np.array([1.0, 10.0], np.float32)
    space = gym.spaces.Box(bounds.low * scale, bounds.high * scale, dtype=np.float32)
    return gym.wrappers.TransformObservation(environment, lambda values: values * scale, space)


@pytest.mark.slow
@CORES
def test_ppo_balances_cartpole_without_velocities(core):
    """Without memory an episode lasts some 60 of 500 steps."""
    np.random.seed(0)  # Tianshou draws its batches from the global state
    network = make_network(core, action_shape=64, layer_num=1, hidden_layer_size=64)
    actor = DiscreteActor(preprocess_net=network, action_shape=ACTIONS, softmax_output=False)
    policy = DiscreteActorPolicy(actor=actor, action_space=TWO_ACTIONS, deterministic_eval=True)
    algorithm = PPO(
        policy=policy,
        critic=DiscreteCritic(preprocess_net=network),
        optim=AdamOptimizerFactory(lr=1e-3),
        gamma=0.99,
        gae_lambda=0.9,
        ent_coef=0.0,
        max_grad_norm=0.5,
        return_scaling=True,
        advantage_normalization=True,
    )
    training, testing = (DummyVectorEnv([make_scaled_environment] * number) for number in (16, 10))
    training.seed(0)
    testing.seed(1000)
    buffer = VectorReplayBuffer(2048, 16, stack_num=16, ignore_obs_next=True)
    result = algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=Collector[CollectStats](algorithm, training, buffer),
            test_collector=Collector[CollectStats](algorithm, testing),
            max_epochs=12,
            epoch_num_steps=10_240,
            collection_step_num_env_steps=1024,
            update_step_num_repetitions=8,
            batch_size=256,
            test_step_num_episodes=10,
            stop_fn=lambda mean_return: mean_return >= 400,
            show_progress=False,
            verbose=False,
        )
    )
    assert result.best_reward >= 400


def test_unknown_core_is_refused():
    with pytest.raises(ValueError, match="core must be one of"):
        make_network("gru")


def test_a_changed_interface_is_named(monkeypatch):
    def without_width(self, *, layer_num, state_shape, action_shape):
        """Lack an argument."""

    monkeypatch.setattr(Recurrent, "__init__", without_width)
    message = r"tianshou .*unexpected keyword argument 'hidden_layer_size'.*known to work: 2\.0"
    with pytest.raises(AdapterError, match=message):
        importlib.reload(adapter)
