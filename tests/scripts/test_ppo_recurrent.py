import csv

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Discrete

from minrl.scripts.examples import ppo_recurrent
from minrl.scripts.examples.ppo_recurrent import (
    Collector,
    Config,
    advantages_of,
    loss_of,
    make_agent,
    make_environments,
    train,
    update,
)

CORES = ["gru", "lstm", "mingru", "minlstm", "backbone"]


def pieces(core, **options):
    options = {"environment_options": {"length": 3}, "num_envs": 4, "num_steps": 17} | options
    config = Config(core=core, hidden_size=16, num_layers=2, **options)
    torch.manual_seed(0)
    environments = make_environments(config)
    agent = make_agent(environments, config)
    return agent, Collector(environments, agent, config), config


def first_pass(agent, rollout):
    """What the update computes before the first change of a weight, environment by environment."""
    passes = []
    for row in range(rollout.dones.shape[1]):
        rows = torch.tensor([row])
        state = agent.rows(rollout.first_state, rows)
        policy, values, _ = agent(rollout.observations[:, rows], state, rollout.dones[:, rows])
        passes.append((policy.log_prob(rollout.actions[:, rows]), values))
    return (torch.cat(column, dim=1) for column in zip(*passes, strict=True))


PENDULUM = {"environment": "Pendulum-v1", "environment_options": {"max_episode_steps": 7}}


@pytest.mark.parametrize("task", [{}, PENDULUM], ids=["discrete", "continuous"])
@pytest.mark.parametrize("core", CORES)
def test_the_first_update_pass_gives_the_probabilities_of_the_rollout(core, task):
    agent, collector, _ = pieces(core, **task)
    collector.collect()
    rollout = collector.collect()  # begins inside the episodes, with a state that was carried
    assert rollout.dones[1:].any()
    assert not rollout.dones[0].all()
    log_probabilities, values = first_pass(agent, rollout)
    ratio = (log_probabilities - rollout.log_probabilities).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
    torch.testing.assert_close(values, rollout.values[:-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("core", CORES)
def test_less_memory_than_two_steps_is_refused_for_all_alike(core):
    with pytest.raises(ValueError, match="a number of steps, at least two"):
        pieces(core, memory=1)


@pytest.mark.parametrize("core", CORES)
def test_what_lies_before_a_reset_changes_nothing_after_it(core):
    agent, collector, _ = pieces(core)
    rollout = collector.collect()
    changed = rollout.observations.clone()
    last_reset = max(step for step in range(17) if rollout.dones[step, 0])
    changed[:last_reset, 0] += torch.arange(1.0, 1 + changed.shape[-1])
    with torch.no_grad():
        _, values, _ = agent(rollout.observations, rollout.first_state, rollout.dones)
        _, after_change, _ = agent(changed, rollout.first_state, rollout.dones)
    torch.testing.assert_close(values[last_reset:], after_change[last_reset:], rtol=0, atol=1e-6)
    assert (values[:last_reset, 0] - after_change[:last_reset, 0]).abs().min() > 1e-4


def test_a_done_stands_beside_the_first_observation_of_an_episode():
    _, collector, _ = pieces("mingru")
    for _ in range(3):
        rollout = collector.collect()
        shows_a_cue = rollout.observations[..., :-1].any(-1)
        torch.testing.assert_close(rollout.dones, shows_a_cue)
        asks = rollout.observations[..., -1].bool()
        assert not rollout.rewards[~asks].any()
        torch.testing.assert_close(asks[:-1], rollout.dones[1:])
        torch.testing.assert_close(asks[-1], rollout.done_after)


def test_returns_are_those_of_whole_episodes():
    _, collector, _ = pieces("mingru", environment="CartPole-v1", environment_options={})
    rollout = collector.collect()
    starts = torch.cat([rollout.dones, rollout.done_after[None]])
    lengths = [
        length for row in range(4) for length in starts[:, row].nonzero().squeeze(1).diff().tolist()
    ]
    assert sorted(collector.returns) == sorted(lengths)


def test_all_environments_are_normalised_by_the_statistics_of_all():
    options = {"environment": "CartPole-v1", "environment_options": {}}
    plain = make_environments(Config(num_envs=3, **options))
    normalised = make_environments(Config(num_envs=3, normalize=True, **options))
    seen, rewards = [plain.reset(seed=0)[0]], []
    normalised.reset(seed=0)
    for _ in range(40):
        actions = np.array([0, 1, 1])  # two go one way, and one the other
        seen.append(plain.step(actions)[0])
        shown, reward, *_ = normalised.step(actions)
        rewards.append(reward)
    seen = np.concatenate(seen)  # near enough: last observations of episodes are left out
    expected = (seen[-3:] - seen.mean(0)) / seen.std(0)
    np.testing.assert_allclose(shown, expected, atol=0.3)
    # One scale of rewards: those of one step differ only by what came between them.
    np.testing.assert_allclose(rewards[-1], rewards[-1].mean(), rtol=0.02)


class EndsAtTheLimit(gymnasium.Env):
    """Terminates at the fourth step, where its time is up too."""

    observation_space, action_space = Box(-1.0, 1.0, (2,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 4, False, {}


@pytest.mark.parametrize(("environment", "goes_on"), [("CartPole-v1", 1.0), ("Ends-v0", 0.0)])
def test_an_episode_that_is_cut_off_goes_on_in_the_value_and_one_that_is_over_does_not(
    environment, goes_on, monkeypatch
):
    monkeypatch.setitem(gymnasium.registry, "Ends-v0", EnvSpec("Ends-v0", EndsAtTheLimit))
    agent, collector, config = pieces(
        "gru", environment=environment, environment_options={"max_episode_steps": 4}
    )
    with torch.no_grad():
        agent.value[-1].weight.zero_()
        agent.value[-1].bias.fill_(10.0)
    rollout = collector.collect()
    over = rollout.dones.roll(-1, 0)[:-1]
    assert over.any()
    expected = 1.0 + over.float() * goes_on * config.gamma * 10.0
    torch.testing.assert_close(rollout.rewards[:-1], expected, rtol=0, atol=1e-4)


class TakesOnlyWhatItSays(gymnasium.Env):
    observation_space = Box(-1.0, 1.0, (3,))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        assert action in self.action_space, action
        return np.zeros(3, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize("space", [Box(-1.0, 1.0, (2, 2)), Discrete(3, start=5)], ids=str)
def test_actions_are_those_of_the_space(space, monkeypatch):
    made = EnvSpec("Strict-v0", lambda: TakesOnlyWhatItSays(space), max_episode_steps=5)
    monkeypatch.setitem(gymnasium.registry, "Strict-v0", made)
    agent, collector, _ = pieces("mingru", environment="Strict-v0", environment_options={})
    rollout = collector.collect()
    log_probabilities, _ = first_pass(agent, rollout)
    torch.testing.assert_close(log_probabilities, rollout.log_probabilities)


def test_rewards_are_scaled_by_the_return_that_is_estimated():
    config = Config(environment="Pendulum-v1", normalize=True, gamma=0.5, num_envs=2)
    environments = make_environments(config)
    assert [environment.gamma for environment in environments.envs] == [0.5, 0.5]


def test_advantages_equal_the_sum_of_discounted_errors_within_an_episode():
    _, collector, _ = pieces("mingru")
    rollout = collector.collect()
    gamma, gae_lambda = 0.9, 0.7
    ends = torch.cat([rollout.dones[1:], rollout.done_after[None]])
    rewards, values = rollout.rewards.double(), rollout.values.double()
    expected = torch.zeros(17, 4, dtype=torch.double)
    for row in range(4):
        for start in range(17):
            for step in range(start, 17):
                following = 0.0 if ends[step, row] else values[step + 1, row]
                error = rewards[step, row] + gamma * following - values[step, row]
                expected[start, row] += (gamma * gae_lambda) ** (step - start) * error
                if ends[step, row]:
                    break
    actual = advantages_of(rollout, gamma, gae_lambda)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_loss_after_a_change_of_weights_is_that_of_the_papers():
    agent, collector, config = pieces(
        "mingru", clip=0.1, entropy_coefficient=0.3, value_coefficient=0.7
    )
    rollout = collector.collect()
    given = advantages_of(rollout, 0.9, 0.7)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    rows = torch.tensor([2, 0])
    loss = loss_of(agent, rollout, given, rows, config)
    state = agent.rows(rollout.first_state, rows)
    policy, values, _ = agent(rollout.observations[:, rows], state, rollout.dones[:, rows])
    chances = policy.probs.detach().double().numpy()
    targets = (given + rollout.values[:-1]).double().numpy()
    middle, spread = given[:, rows].double().mean(), given[:, rows].double().std()
    expected, ratios = 0.0, []
    for t in range(17):
        for column, row in enumerate(rows.tolist()):
            now = chances[t, column]
            before = rollout.log_probabilities[t, row].double().exp().item()
            ratio = now[rollout.actions[t, row]] / before
            advantage = ((given[t, row] - middle) / spread).item()
            surrogate = min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage)
            error = values[t, column].item() - targets[t, row]
            entropy = -(now * np.log(now)).sum()
            expected += -surrogate + 0.7 * 0.5 * error**2 - 0.3 * entropy
            ratios.append((ratio, advantage > 0))
    assert loss.item() == pytest.approx(expected / (17 * 2), rel=1e-5)
    for is_good in (False, True):  # all four ways to be clipped or not
        assert any(ratio < 0.9 and good == is_good for ratio, good in ratios)
        assert any(ratio > 1.1 and good == is_good for ratio, good in ratios)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_envs": 6, "num_minibatches": 4}, "num_envs must be a multiple"),
        ({"num_envs": 2, "num_minibatches": 4}, "num_envs must be a multiple"),
        ({"num_envs": 4, "num_minibatches": 4, "num_steps": 1}, "two steps at least"),
    ],
)
def test_minibatches_of_unequal_or_too_few_steps_are_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(Config(output=tmp_path / "curve.csv", **wrong))
    assert not list(tmp_path.iterdir())


def test_gradients_are_clipped_to_the_norm_asked_for():
    agent, collector, config = pieces(
        "mingru", update_epochs=1, num_minibatches=1, max_grad_norm=0.01
    )
    before = torch.nn.utils.parameters_to_vector(agent.parameters())
    update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), collector.collect(), config)
    change = torch.nn.utils.parameters_to_vector(agent.parameters()) - before
    assert change.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("core", CORES)
def test_an_update_changes_every_parameter(core):
    agent, collector, config = pieces(core, update_epochs=2)
    before = {name: value.clone() for name, value in agent.named_parameters()}
    optimizer = torch.optim.Adam(agent.parameters())
    update(agent, optimizer, collector.collect(), config)
    same = [name for name, value in agent.named_parameters() if torch.equal(value, before[name])]
    assert same == []


def test_an_annealed_learning_rate_falls_to_zero_in_equal_steps(tmp_path, monkeypatch):
    rates = []

    def note(agent, optimizer, rollout, config):
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(ppo_recurrent, "update", note)
    options = {"total_steps": 4 * 16, "num_envs": 4, "num_steps": 4, "learning_rate": 0.01}
    train(Config(output=tmp_path / "curve.csv", anneal=True, **options))
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    rates.clear()
    train(Config(output=tmp_path / "curve.csv", **options))
    assert rates == [0.01] * 4


def test_a_short_run_learns_to_recall_and_writes_its_curve(tmp_path):
    config = Config(
        core="mingru",
        environment_options={"length": 2, "cues": 4},
        output=tmp_path / "curve.csv",
        total_steps=15_000,
        num_steps=32,
        hidden_size=32,
    )
    rows = train(config)
    assert max(row["episodic_return"] for row in rows[-5:]) > 0.6  # chance is 0.25
    with config.output.open() as file:
        written = [
            {name: float(text) for name, text in row.items()} for row in csv.DictReader(file)
        ]
    assert written == rows
    assert [row["steps"] for row in rows] == [512 * (index + 1) for index in range(30)]
    last = rows[-1]
    assert last["seconds"] == pytest.approx(last["rollout_seconds"] + last["update_seconds"])
