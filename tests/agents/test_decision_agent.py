import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from minrl import DecisionAgent, TrajectoryModel
from minrl.agents.model_config import ModelConfig
from minrl.agents.step_policy import LARGEST
from minrl.envs.make import make_env
from minrl.errors import CheckpointError, ConfigError

KINDS = {
    "joint": {"tokens": "joint"},
    "interleaved": {"tokens": "interleaved"},
    "minlstm-convolution": {"tokens": "interleaved", "backbone": "minlstm", "convolution": 4},
    "transformer": {"backbone": "transformer", "attention_context": 1000},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
ROWS = 3


def make_agent(kind="joint", observation_size=5, action_size=2, **options):
    torch.manual_seed(0)
    config = ModelConfig(width=24, num_layers=2, max_timestep=1200, **KINDS[kind])
    model = TrajectoryModel(observation_size, action_size, config)
    for name, parameter in model.named_parameters():
        if "bias_h0" in name:
            torch.nn.init.normal_(parameter)
    return DecisionAgent(model, **{"target_return": 100.0, **options})


def make_episode(steps, rows=ROWS, seed=0):
    generator = np.random.default_rng(seed)
    observations = generator.normal(size=(steps, rows, 5)).astype(np.float32)
    return observations, generator.normal(size=(steps, rows))


def act_through(agent, observations, rewards):
    return np.stack(
        [
            agent.act(observations[t], rewards[t - 1] if t else None)
            for t in range(len(observations))
        ]
    )


def forward_over(agent, observations, actions, rewards, target, first=0):
    """One parallel forward of the model over what an agent saw: (T, B, A)."""
    before = np.concatenate([np.zeros((1, rewards.shape[1])), np.cumsum(rewards, 0)[:-1]])
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


def observations_of_all_kinds(generator, model):
    """Batches of 1,000 observations: ordinary, extreme, and at every boundary there is."""
    mean, std = model.observation_mean.numpy(), model.observation_std.numpy()
    most = np.finfo(np.float32).max
    while True:
        scale = 10.0 ** generator.uniform(-45, 38.5, size=(1000, 5))
        yield generator.normal(size=(1000, 5))
        yield generator.uniform(-1, 1, size=(1000, 5)) * scale
        yield generator.choice([0, -0.0, 1, 1e-45, 1e-38, LARGEST, most, -most], size=(1000, 5))
        edge = mean + np.float32(LARGEST) * std * generator.choice([-1, 1], size=(1000, 5))
        yield np.nextafter(edge, generator.choice([-np.inf, np.inf], size=(1000, 5)))
        yield np.where(generator.random((1000, 5)) < 0.2, most, mean)  # one huge among ordinary
        yield generator.integers(-(2**62), 2**62, size=(1000, 5))  # of another type


@pytest.mark.parametrize(
    ("kind", "refresh_every", "count"),
    [
        ("joint", 0, 100_000),
        ("minlstm-convolution", 0, 6_000),
        ("joint", 1, 6_000),
        pytest.param("minlstm-convolution", 0, 100_000, marks=pytest.mark.slow),
        pytest.param("interleaved", 3, 100_000, marks=pytest.mark.slow),
        pytest.param("joint", 1, 100_000, marks=pytest.mark.slow),
    ],
)
def test_actions_are_inside_the_box_whatever_is_seen(kind, refresh_every, count):
    agent = make_agent(kind, refresh_every=refresh_every, context=3)
    low, high = np.array([-0.3, 0.1], np.float32), np.array([0.7, 5.0], np.float32)
    agent.model.action_low.copy_(torch.from_numpy(low))
    agent.model.action_high.copy_(torch.from_numpy(high))
    agent.model.observation_mean.copy_(torch.linspace(-3, 3, 5))
    agent.model.observation_std.copy_(torch.tensor([1e-6, 0.1, 1.0, 7.0, 1e4]))
    generator = np.random.default_rng(0)
    agent.reset(num_envs=1000)
    seen = 0
    for observations in observations_of_all_kinds(generator, agent.model):
        agent.reset(generator.random(1000) < 0.05)
        rewards = generator.normal(size=1000) * 10.0 ** generator.uniform(-6, 36, size=1000)
        actions = agent.act(observations, rewards)
        assert (actions.shape, actions.dtype) == ((1000, 2), np.float32)
        inside = (actions >= low) & (actions <= high)  # false for a NaN
        assert inside.all()
        seen += 1000
        if seen >= count:
            break
    assert np.ptp(actions, axis=0).min() > 0  # else the model has no say


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_observation_is_refused_by_row_and_changes_nothing(bad):
    agent = make_agent()
    observations, rewards = make_episode(3)
    agent.reset(num_envs=ROWS)
    agent.act(observations[0])
    poisoned = observations[1].copy()
    poisoned[2, 4] = bad
    with pytest.raises(ValueError, match="observation of environment 2 is not finite"):
        agent.act(poisoned, rewards[0])
    with pytest.raises(ValueError, match="reward of environment 1 is not finite"):
        agent.act(observations[1], np.array([0, bad, 0]))
    after = agent.act(observations[1], rewards[0])
    expected = act_through(make_agent(), observations[:2], rewards[:2])[1]
    assert np.array_equal(after, expected)


@every_kind
def test_any_array_of_observations_is_taken_as_it_is(kind):
    agent = make_agent(kind)
    observations = make_episode(1)[0][0]
    expected = agent.act(observations)
    read_only = observations.copy()
    read_only.flags.writeable = False
    for same in (observations[::-1].copy()[::-1], read_only, observations.T.copy().T):
        agent.reset()
        assert np.array_equal(agent.act(same), expected)


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


def test_wrong_shapes_and_a_missing_reward_are_named():
    agent = make_agent()
    with pytest.raises(ValueError, match=r"trained on 5 observations, not \(4,\)"):
        agent.act(np.zeros((2, 4), np.float32))
    agent.act(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="act needs the reward of the step before"):
        agent.act(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match=r"a number or of shape \(2,\), not \(2, 1\)"):
        agent.act(np.zeros((2, 5), np.float32), np.zeros((2, 1)))
    for bad in (5.0, np.zeros((1, 2, 5))):
        with pytest.raises(ValueError, match="trained on 5 observations, not"):
            agent.act(bad)
    for bad in ([0, 2], True, np.ones((2, 1), bool)):
        with pytest.raises(ValueError, match=r"mask must be \(B,\) bool"):
            agent.reset(bad)
    with pytest.raises(
        ValueError, match=r"not \(\) int64; a return is asked for by target_return="
    ):
        agent.reset(3400)
    with pytest.raises(ValueError, match="num_envs must be at least 1, not 0"):
        agent.reset(num_envs=0)
    _, state = agent.predict(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="state is of 2 environments, the observation of 3"):
        agent.predict(np.zeros((3, 5), np.float32), state, np.zeros(3, bool))


def test_a_refused_call_leaves_the_episodes_as_they_are():
    agent = make_agent()
    observations, rewards = make_episode(2)
    agent.act(observations[0])
    for bad in (np.zeros((ROWS + 1, 4)), 5.0):
        with pytest.raises(ValueError, match="trained on 5 observations"):
            agent.act(bad, rewards[0])
    with pytest.raises(ValueError, match="rewards must be"):
        agent.act(observations[1][:2], np.zeros((2, 1)))
    after = agent.act(observations[1], rewards[0])
    assert np.array_equal(after, act_through(make_agent(), observations, rewards)[1])


@pytest.mark.parametrize("refresh_every", [0, 1])
def test_no_environments_take_no_actions(refresh_every):
    agent = make_agent(refresh_every=refresh_every)
    for _ in range(2):
        assert agent.act(np.zeros((0, 5), np.float32)).shape == (0, 2)
    assert agent.act(np.zeros((3, 5), np.float32)).shape == (3, 2)


def test_an_agent_with_numpys_numbers_can_be_saved(tmp_path):
    numbers = {"target_return": np.float32(100), "refresh_every": np.int64(2)}
    make_agent(**numbers, context=np.int64(3)).save(tmp_path / "agent.safetensors")
    assert DecisionAgent.load(tmp_path / "agent.safetensors").target_return == 100.0


@pytest.mark.parametrize("n_envs", [1, 2])
def test_sb3_evaluate_policy_gives_the_returns_of_our_own_loop(n_envs):
    agent = make_agent(observation_size=11, action_size=3)
    venv = make_vec_env("Hopper-v5", n_envs=n_envs, seed=3)
    returns, lengths = evaluate_policy(
        agent,
        venv,
        n_eval_episodes=4,
        return_episode_rewards=True,
        callback=agent.watch_rewards,
    )

    expected = []
    for row in range(n_envs):
        env = make_env("Hopper-v5")
        seed = 3 + row
        for _ in range(4 // n_envs):
            observation, _ = env.reset(seed=seed)
            seed = None  # SB3 seeds the first reset only
            agent.reset()
            total, count, reward, done = 0.0, 0, None, False
            while not done:
                observation, reward, ended, cut, _ = env.step(agent.act(observation, reward))
                total, count, done = total + reward, count + 1, ended or cut
            expected.append((round(total, 3), count))
    assert sorted(zip(np.round(returns, 3), lengths, strict=True)) == sorted(expected)


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


@every_kind
def test_a_saved_agent_acts_the_same(kind, tmp_path):
    agent = make_agent(kind, refresh_every=3, context=7)
    agent.info = {"step": 5, "dataset": {"dataset_id": "x"}}
    agent.save(tmp_path / "agent.safetensors")
    loaded = DecisionAgent.load(tmp_path / "agent.safetensors")
    observations, rewards = make_episode(20)
    expected = act_through(agent, observations, rewards)
    assert np.array_equal(act_through(loaded, observations, rewards), expected)
    assert loaded.info["step"] == 5
    assert (loaded.refresh_every, loaded.context, loaded.target_return) == (3, 7, 100.0)


def test_loading_an_agent_imports_no_environment_and_no_dataset_library(tmp_path):
    make_agent().save(tmp_path / "agent.safetensors")
    program = (
        "import sys; from minrl import DecisionAgent;"
        "import numpy as np;"
        "agent = DecisionAgent.load(sys.argv[1]); agent.act(np.zeros(5, np.float32));"
        "print([m for m in ('gymnasium', 'minari', 'mujoco', 'h5py', 'tensorboard', 'matplotlib')"
        " if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "agent.safetensors")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_checkpoint_or_device_is_refused(tmp_path):
    make_agent().save(tmp_path / "agent.safetensors")
    with pytest.raises(ConfigError, match="device 'gpu0' cannot be used"):
        DecisionAgent.load(tmp_path / "agent.safetensors", device="gpu0")
    assert DecisionAgent.load(tmp_path / "agent.safetensors", device="auto").device.type in (
        "cpu",
        "cuda",
    )
    with pytest.raises(ConfigError, match="checkpoint must be last or best, not 'bset'"):
        DecisionAgent.load(tmp_path, checkpoint="bset")


def test_an_action_with_equal_bounds_is_always_that_value():
    agent = make_agent()
    agent.model.action_low.copy_(torch.tensor([-1.0, 0.25]))
    agent.model.action_high.copy_(torch.tensor([1.0, 0.25]))
    observations, rewards = make_episode(5)
    actions = act_through(agent, observations, rewards)
    assert (actions[..., 1] == 0.25).all()
    assert np.isfinite(actions).all()


def test_a_missing_file_and_another_models_file_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nothing\.safetensors"):
        DecisionAgent.load(tmp_path / "nothing.safetensors")
    agent = make_agent()
    header = agent.header()
    agent.header = lambda: {**header, "model": {**header["model"], "action_size": 9}}
    agent.save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit.*the model's action_low is \(2,\)"):
        DecisionAgent.load(tmp_path / "other.safetensors")
