import copy
import importlib

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("sb3_contrib")

from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy

from minrl.agents.adapters import sb3_contrib as adapter
from minrl.agents.adapters.sb3_contrib import MinGruPolicy, MinLstmPolicy
from minrl.envs.recall import RECALL_ID
from minrl.errors import AdapterError

HIDDEN, ENVIRONMENTS = 12, 3
POLICIES = [MinGruPolicy, MinLstmPolicy]
OPTIONS = {
    "two cores": {},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "critic without": {"enable_critic_lstm": False},
    "two layers": {"n_lstm_layers": 2},
    "learned start": {"lstm_kwargs": {"learn_initial_state": True}},
}
every_policy = pytest.mark.parametrize("policy", POLICIES)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make_model(policy, options=None, environment="CartPole-v1", **arguments):
    environments = make_vec_env(environment, ENVIRONMENTS, seed=0)
    arguments = {"n_steps": 48, "batch_size": 50, "n_epochs": 2, "seed": 0} | arguments
    sizes = {"lstm_hidden_size": HIDDEN, "net_arch": [8]}
    model = RecurrentPPO(
        policy, environments, device="cpu", policy_kwargs=sizes | (options or {}), **arguments
    )
    for name, parameter in model.policy.named_parameters():
        if "bias_h0" in name:
            torch.nn.init.normal_(parameter)
    return model


def cores_of(policy):
    return [core for core in (policy.lstm_actor, policy.lstm_critic) if core is not None]


def make_sequences(layers=1, steps=9, features=4, seed=0):
    """Observations (B*T, F), episode starts (B*T,) and a state that is not zero, (L, B, H)."""
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(ENVIRONMENTS * steps, features, generator=generator)
    starts = (torch.rand(ENVIRONMENTS * steps, generator=generator) < 0.3).float()
    state = torch.randn(layers, ENVIRONMENTS, HIDDEN, generator=generator).abs()
    return observations, starts, (state, state)


class AsAnLSTM:
    """A core as the library's own loop calls an LSTM: steps first, states (h, c), no resets."""

    def __init__(self, core):
        self.core, self.input_size, self.calls = core, core.input_size, 0

    def __call__(self, features, states):
        self.calls += 1
        output, state = self.core(features.transpose(0, 1), states[0])
        return output.transpose(0, 1), (state, state)


@every_policy
@pytest.mark.parametrize("layers", [1, 2])
def test_one_pass_equals_the_librarys_loop_over_steps(policy, layers):
    core = make_model(policy, {"n_lstm_layers": layers}).policy.lstm_actor
    observations, starts, states = make_sequences(layers)
    runs = []
    loop = AsAnLSTM(core)
    for process, lstm in (
        (policy._process_sequence, core),
        (RecurrentActorCriticPolicy._process_sequence, loop),
    ):
        features = observations.clone().requires_grad_()
        output, (h, c) = process(features, states, starts, lstm)
        (output.square().sum() + h.sum()).backward()
        gradients = [parameter.grad.clone() for parameter in core.parameters()]
        core.zero_grad()
        runs.append([output, h, c, features.grad, *gradients])
    assert loop.calls == 9
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@every_policy
@every_option
def test_stepwise_equals_sequence_with_resets_inside(policy, options):
    policy = make_model(policy, options).policy
    layers, steps = policy.lstm_actor.num_layers, 9
    observations, starts, states = make_sequences(layers, steps)
    by_step = observations.reshape(ENVIRONMENTS, steps, -1).transpose(0, 1)
    starts_by_step = starts.reshape(ENVIRONMENTS, steps).T
    carried, predicted = RNNStates(states, states), tuple(state.numpy() for state in states)
    actions, values, log_probabilities, modes = [], [], [], []
    with torch.no_grad():
        for observation, start in zip(by_step, starts_by_step, strict=True):
            action, value, log_probability, carried = policy(observation, carried, start)
            mode, predicted = policy.predict(
                observation.numpy(), predicted, start.bool().numpy(), deterministic=True
            )
            actions.append(action), values.append(value), modes.append(torch.from_numpy(mode))
            log_probabilities.append(log_probability)
        in_order = [
            torch.stack(x).transpose(0, 1).flatten()
            for x in (actions, values, log_probabilities, modes)
        ]
        evaluated = policy.evaluate_actions(
            observations, in_order[0], RNNStates(states, states), starts
        )
        distribution, last = policy.get_distribution(observations, states, starts)
    torch.testing.assert_close(in_order[1], evaluated[0].flatten())
    torch.testing.assert_close(in_order[2], evaluated[1])
    assert torch.equal(in_order[3], distribution.get_actions(deterministic=True))
    torch.testing.assert_close(carried.pi[0], last[0])
    np.testing.assert_allclose(predicted[0], last[0], atol=1e-6)


@every_policy
@every_option
def test_the_update_sees_the_rollouts_probabilities_and_values(policy, options):
    model = make_model(policy, options)
    _, callback = model._setup_learn(1000)
    for _ in range(2):  # the second rollout starts within episodes
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    np.random.seed(1)
    batches = list(model.rollout_buffer.get(model.batch_size))
    padded = started = carried = False
    for batch in batches:
        valid = batch.mask > 0
        values, log_probabilities, _ = model.policy.evaluate_actions(
            batch.observations, batch.actions.long().flatten(), batch.lstm_states,
            batch.episode_starts,
        )  # fmt: skip
        ratio = torch.exp(log_probabilities - batch.old_log_prob)[valid]
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
        expected = batch.old_values[valid]
        torch.testing.assert_close(values.flatten()[valid], expected, rtol=0, atol=1e-5)
        firsts = batch.episode_starts.reshape(batch.lstm_states.pi[0].shape[1], -1)[:, 0] > 0
        padded, started = padded or not valid.all(), started or firsts.any()
        carried = carried or batch.lstm_states.pi[0][:, ~firsts].any()
    assert padded
    assert started  # with the last state of the episode before, which a reset must remove
    assert carried


@every_policy
@pytest.mark.parametrize("options", [{}, OPTIONS["two layers"], OPTIONS["learned start"]])
def test_learning_changes_every_parameter(policy, options):
    model = make_model(policy, options)
    before = {name: value.detach().clone() for name, value in model.policy.named_parameters()}
    model.learn(2 * model.n_steps * ENVIRONMENTS)
    unchanged = [
        name for name, value in model.policy.named_parameters() if torch.equal(value, before[name])
    ]
    assert unchanged == []


@every_policy
@every_option
def test_the_optimizer_holds_exactly_the_parameters_there_are(policy, options):
    options = options | {"optimizer_kwargs": {"weight_decay": 0.01}}
    policy = make_model(policy, options, learning_rate=2e-3).policy
    (group,) = policy.optimizer.param_groups
    assert [id(x) for x in group["params"]] == [id(x) for x in policy.parameters()]
    assert (group["lr"], group["weight_decay"]) == (2e-3, 0.01)
    assert not any(isinstance(module, torch.nn.LSTM) for module in policy.modules())


def test_initialising_the_policy_leaves_the_cores_as_they_initialise_themselves():
    policy = make_model(MinLstmPolicy, {"ortho_init": True}).policy
    bound = 1 / np.sqrt(4)
    for core in cores_of(policy):
        assert (core.bias_ih_l0[:HIDDEN] - core.forget_bias).abs().max() <= bound
        assert core.bias_ih_l0[HIDDEN:].abs().max() <= bound
        assert core.weight_ih_l0.abs().max() <= bound


def test_options_reach_the_cores():
    options = {"candidate": "tanh", "dropout": 0.1}
    policy = make_model(MinGruPolicy, {"n_lstm_layers": 2, "lstm_kwargs": options}).policy
    for core in cores_of(policy):
        assert (core.candidate, core.dropout, core.num_layers) == ("tanh", 0.1, 2)
        assert (core.input_size, core.hidden_size) == (4, HIDDEN)
    with pytest.raises(ValueError, match="MinGRU acts online, step by step: no bidirectional"):
        make_model(MinGruPolicy, {"lstm_kwargs": {"bidirectional": True}})
    with pytest.raises(ValueError, match="no return_cell"):
        make_model(MinLstmPolicy, {"lstm_kwargs": {"return_cell": True}})


@every_policy
def test_a_saved_model_acts_the_same_and_goes_on_learning(policy, tmp_path):
    model = make_model(policy, OPTIONS["two layers"] | OPTIONS["learned start"])
    model.learn(model.n_steps * ENVIRONMENTS)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    loaded = RecurrentPPO.load(tmp_path / "model", env=model.env, device="cpu")
    alone = policy.load(tmp_path / "policy", device="cpu")
    assert type(loaded.policy) is policy
    generator, states = np.random.default_rng(0), [None] * 3
    for step in range(20):
        observation = generator.normal(size=(5, 4))
        start = np.zeros(5, bool) if step else np.ones(5, bool)
        start[step % 5] = True
        actions = []
        for index, actor in enumerate((model, loaded, alone)):
            action, states[index] = actor.predict(observation, states[index], start, True)
            actions.append(action)
        assert np.array_equal(actions[0], actions[1])
        assert np.array_equal(actions[0], actions[2])
    for state in states[1:]:
        assert np.array_equal(state[0], states[0][0])
    loaded.learn(model.n_steps * ENVIRONMENTS, reset_num_timesteps=False)


@pytest.mark.parametrize("policy", ["CnnMinGruPolicy", "CnnMinLstmPolicy"])
def test_a_saved_policy_keeps_two_feature_extractors_apart(policy, tmp_path):
    apart = {"share_features_extractor": False}
    policy = make_model(
        policy, apart, lambda: FakeImageEnv(screen_height=36, screen_width=36)
    ).policy
    policy.save(tmp_path / "policy")
    loaded = type(policy).load(tmp_path / "policy", device="cpu")
    assert loaded.pi_features_extractor is not loaded.vf_features_extractor
    expected = policy.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@every_policy
def test_a_copy_acts_the_same_and_shares_nothing(policy):
    policy = make_model(policy).policy
    twin = copy.deepcopy(policy)
    observations = np.random.default_rng(0).normal(size=(5, 4))
    (action, state), (twin_action, twin_state) = (
        actor.predict(observations, deterministic=True) for actor in (policy, twin)
    )
    assert np.array_equal(action, twin_action)
    assert np.array_equal(state[0], twin_state[0])
    assert not {id(x) for x in policy.parameters()} & {id(x) for x in twin.parameters()}
    held = [id(x) for x in twin.optimizer.param_groups[0]["params"]]
    assert held == [id(x) for x in twin.parameters()]


@every_policy
def test_evaluate_policy_plays_like_one_that_reads_each_episode_from_its_start(policy):
    remembering = {"learn_initial_state": True, "memory": 50, "candidate": "tanh"}
    model = make_model(policy, {"lstm_kwargs": remembering, "net_arch": []})
    for core in cores_of(model.policy):
        core.weight_ih_l0.data *= 10  # so that actions depend on what was seen
    environments = make_vec_env("CartPole-v1", 1, seed=7)
    returns, _ = evaluate_policy(model, environments, 5, return_episode_rewards=True)
    environment, seed, expected = gym.make("CartPole-v1"), 7, []
    start = (model.policy.lstm_actor.initial_state(1),) * 2
    for _ in range(5):
        observation, _ = environment.reset(seed=seed)
        seen, total, done, seed = [observation], 0.0, False, None
        while not done:
            with torch.no_grad():
                distribution, _ = model.policy.get_distribution(
                    torch.from_numpy(np.stack(seen)), start, torch.zeros(len(seen))
                )
            action = distribution.get_actions(deterministic=True)[-1].item()
            observation, reward, terminated, truncated, _ = environment.step(action)
            seen.append(observation)
            total, done = total + reward, terminated or truncated
        expected.append(total)
    assert returns == expected


@every_policy
def test_acting_without_a_state_starts_an_episode(policy):
    policy = make_model(policy, OPTIONS["learned start"]).policy
    observation = np.random.default_rng(0).normal(size=(5, 4))
    _, (state, _) = policy.predict(observation)
    _, expected = policy.lstm_actor.step(torch.from_numpy(observation).float())
    np.testing.assert_allclose(state, expected.detach(), atol=1e-6)
    _, (state, _) = policy.predict(observation[0])
    np.testing.assert_allclose(state, expected[:, :1].detach(), atol=1e-6)


@pytest.mark.parametrize("core", ["MinGru", "MinLstm"])
@pytest.mark.parametrize(
    ("kind", "environment"),
    [("Cnn", lambda: FakeImageEnv(screen_height=40, screen_width=40)),
     ("MultiInput", lambda: SimpleMultiObsEnv(random_start=False))],
)  # fmt: skip
def test_images_and_dictionaries_of_observations_are_learned_from(kind, core, environment):
    model = make_model(f"{kind}{core}Policy", None, environment, n_steps=16, n_epochs=1)
    before = model.policy.lstm_actor.weight_ih_l0.detach().clone()
    model.learn(model.n_steps * ENVIRONMENTS)
    assert not torch.equal(before, model.policy.lstm_actor.weight_ih_l0)
    assert model.predict(model.env.reset())[0].shape == (ENVIRONMENTS,)


def test_recurrent_ppo_knows_the_policies_by_name():
    for name in adapter.__all__:
        assert RecurrentPPO.policy_aliases[name] is getattr(adapter, name)


def test_a_changed_interface_is_named(monkeypatch):
    def _process_sequence(features):
        """Lack three arguments."""

    monkeypatch.setattr(RecurrentActorCriticPolicy, "_process_sequence", _process_sequence)
    message = r"sb3-contrib .*_process_sequence: too many positional arguments.*known to work: 2\.9"
    with pytest.raises(AdapterError, match=message):
        importlib.reload(adapter)


@pytest.mark.slow
def test_recurrent_ppo_learns_to_recall():
    def make_environment():
        return gym.make(RECALL_ID, length=10, cues=4)

    environments = make_vec_env(make_environment, 16, seed=0)
    options = {"learning_rate": 3e-3, "n_steps": 64, "n_epochs": 5, "gamma": 0.95}
    sizes = {"lstm_hidden_size": 64, "net_arch": [], "lstm_kwargs": {"memory": 100}}
    model = RecurrentPPO(
        "MinGruPolicy", environments, seed=0, device="cpu", policy_kwargs=sizes, **options
    )
    unseen = make_vec_env(make_environment, 16, seed=1000)
    for _ in range(16):
        model.learn(8192, reset_num_timesteps=False)
        reached, _ = evaluate_policy(model, unseen, 200, warn=False)
        if reached >= 0.95:
            break
    assert reached >= 0.9
