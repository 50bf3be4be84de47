"""The compiled step is the plain one to rounding, whatever the model, batch, resets, weights."""

import copy
import pickle

import numpy as np
import pytest
import torch

from minrl import DecisionAgent, TrajectoryModel
from minrl.agents.backbones.native import load_kernels
from minrl.agents.model_config import ModelConfig
from minrl.agents.native_step import LOOK_EVERY, NativeStep, native_step
from minrl.agents.plain_step import plain_step
from minrl.agents.step_policy import StepPolicy

KINDS = {
    "joint": {},
    "interleaved": {"tokens": "interleaved", "width": 40, "mlp_ratio": 2},
    "timeless": {"max_timestep": 0},
    "minlstm-convolution": {"tokens": "interleaved", "backbone": "minlstm", "convolution": 4},
}
# Each needs code of its own, some ten seconds of compiling.
SLOW_KINDS = {
    "convolution-of-one-identity": {"convolution": 1, "candidate": "identity"},
    "unnormalised-tanh-expanded-no-mlp": {
        "backbone": "minlstm",
        "normalize": False,
        "candidate": "tanh",
        "mlp_ratio": 0,
        "expansion": 2,
    },
    "minlstm": {"backbone": "minlstm", "tokens": "interleaved"},
    "gilr-zero-initial-state": {"backbone": "gilr", "learn_initial_state": False},
}


def make_model(kind="joint", **options):
    torch.manual_seed(0)
    config = {"width": 24, "num_layers": 2, "condition": "return-to-go", "max_timestep": 30}
    config |= (KINDS | SLOW_KINDS)[kind]
    model = TrajectoryModel(5, 2, ModelConfig(**config | options)).eval()
    for name, parameter in model.named_parameters():
        if "bias_h0" in name or "norm" in name:
            torch.nn.init.normal_(parameter)
    model.observation_mean.normal_()
    model.observation_std.uniform_(0.5, 2)
    model.action_low.copy_(torch.tensor([-2.0, 0.1]))
    model.action_high.copy_(torch.tensor([1.0, 4.0]))
    return model


def make_inputs(batch, steps):
    generator = np.random.default_rng(batch)
    for step in range(steps):
        scale = 1e30 if step == 5 else 1  # an outlier, to be cut down
        yield (
            (generator.normal(size=(batch, 5)) * scale).astype(np.float32),
            generator.normal(size=batch) * 2000,
            generator.integers(0, 40, batch),
            (generator.random(batch) < 0.05) | (step == 0),
        )


def difference(step, policy, batch, steps):
    """Run both steps on their own states; return the largest difference of actions or states."""
    state = other = policy.initial_state(batch).detach()
    differences = []
    for inputs in make_inputs(batch, steps):
        expected, state = plain_step(policy, *inputs, state)
        actions, other = step(*inputs, other)
        assert actions.dtype == np.float32
        differences += [np.abs(actions - expected).max(), (other - state).abs().max()]
    return max(differences)


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW_KINDS)]
)
def test_a_thousand_steps_equal_the_plain_ones(kind):
    policy = StepPolicy(make_model(kind))
    step = native_step(policy)
    assert isinstance(step, NativeStep)
    for batch, steps in ((1, 1000), (3, 100), (7, 50), (100, 20), (300, 3)):
        assert difference(step, policy, batch, steps) <= 1e-5


@pytest.mark.parametrize(
    ("observed", "acted", "options"),
    [(3, 129, {"mlp_ratio": 0}), (3, 65, {"width": 8}), (3, 257, {}), (300, 2, {"width": 8})],
)
def test_nothing_is_written_beyond_the_buffer(observed, acted, options):
    model = TrajectoryModel(observed, acted, ModelConfig(num_layers=1, **{"width": 64, **options}))
    step = native_step(StepPolicy(model.eval()))
    step._allocate(1)
    size = step._buffers[-1].size
    guarded = np.full(size + 4096, 7.0, np.float32)
    step._arguments = (*step._arguments[:7], guarded.ctypes.data, *step._arguments[8:])
    assert step._arguments[6].value == step._buffers[6].ctypes.data  # the actions, before it
    inputs = np.zeros((1, observed), np.float32), np.zeros(1), np.zeros(1), np.ones(1, bool)
    step(*inputs, step.policy.initial_state(1).detach())
    assert not (guarded[:size] == 7.0).all()
    assert (guarded[size:] == 7.0).all()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    policy = StepPolicy(make_model("interleaved"))
    step = native_step(policy)
    inputs = next(make_inputs(100, 1))
    state = torch.randn(100, sum(policy.sizes))
    together, after = step(*inputs, state)
    for first, stop in ((0, 1), (1, 7), (40, 56), (99, 100)):
        rows = slice(first, stop)
        alone, alone_after = step(*(x[rows] for x in inputs), state[rows].clone())
        assert np.array_equal(together[rows], alone)
        assert torch.equal(after[rows], alone_after)


def make_agent(**options):
    return DecisionAgent(make_model(**options), target_return=50.0)


def assert_acts_as_plain(agent, batch=3, steps=4):
    """Check that an agent goes on as the plain step would, with the weights it has now."""
    for observations, rewards, *_ in make_inputs(batch, steps):
        before, timesteps = agent._state, agent._state.timesteps + 1
        returns, starts = before.asked_for - rewards, np.zeros(batch, bool)
        expected, _ = plain_step(
            agent._policy, observations, returns, timesteps, starts, before.model
        )
        assert np.abs(agent.act(observations, rewards) - expected).max() <= 1e-5
    assert isinstance(agent._step, NativeStep)


def started(agent):
    agent.reset(num_envs=3)
    agent.act(np.zeros((3, 5), np.float32))
    return agent


def train_a_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.train()
    actions, _ = model(
        torch.ones(2, 4, 5), torch.ones(2, 4, 2), torch.ones(2, 4), torch.zeros(2, 4).long()
    )
    actions.square().mean().backward()
    optimizer.step()
    model.eval()


def test_weights_that_change_in_the_middle_of_an_episode_are_noticed():
    agent = started(make_agent())
    assert_acts_as_plain(agent)
    train_a_step(agent.model)
    assert_acts_as_plain(agent)
    torch.manual_seed(7)
    other = {name: torch.rand_like(x) + 0.1 for name, x in agent.model.state_dict().items()}
    agent.model.load_state_dict(other)
    assert_acts_as_plain(agent)


def train_a_fused_step(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    versions = [parameter._version for parameter in model.parameters()]
    optimizer.step()
    return versions == [parameter._version for parameter in model.parameters()]


def test_fused_optimizers_that_count_no_change_are_noticed_in_the_middle_of_an_episode():
    agent = started(make_agent())
    assert train_a_fused_step(agent.model)
    assert_acts_as_plain(agent)


def test_weights_written_past_pytorchs_count_are_noticed_when_one_environment_starts():
    agent = started(make_agent())
    for _ in range(LOOK_EVERY):
        agent.act(np.zeros((3, 5), np.float32), 0.0)
    for parameter in agent.model.parameters():
        parameter.detach().numpy()[...] *= 1.5
    agent.reset(np.array([False, True, False]))
    agent.act(np.zeros((3, 5), np.float32), 0.0)
    assert_acts_as_plain(agent)


def replace_relu(model):
    model.backbone.blocks[1].mlp[1] = torch.nn.ReLU()


def shrink_head(model):
    model.head = torch.nn.Linear(24, 1)


def hook_head(model):
    model.head.register_forward_hook(lambda _module, _inputs, output: output + 1)


def other_epsilon(model):
    model.output_norm.eps = 0.5


def other_forward(model):
    forward = model.head.forward
    model.head.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("change", [replace_relu, hook_head, other_epsilon, other_forward])
def test_a_model_that_is_not_what_its_description_builds_acts_plainly(change):
    changed = make_model()
    change(changed)
    assert native_step(StepPolicy(changed)) is None
    agent = started(make_agent())
    change(agent.model)
    assert_acts_as_plain(started(agent))


def test_smaller_modules_are_not_read_beyond_their_end():
    agent = started(make_agent())
    shrink_head(agent.model)
    agent.reset()
    actions = agent.act(np.ones((3, 5), np.float32))
    policy = StepPolicy(agent.model)
    inputs = np.full(3, 50.0), np.zeros(3, int), np.ones(3, bool), policy.initial_state(3)
    expected, _ = plain_step(policy, np.ones((3, 5), np.float32), *inputs)
    assert np.array_equal(actions, expected)


def test_another_return_scale_is_noticed_at_the_start_of_episodes():
    agent = started(make_agent())
    agent.model.return_scale = 7.0
    assert_acts_as_plain(started(agent))


def test_a_state_that_is_not_this_models_is_refused_and_a_strided_one_taken():
    policy = StepPolicy(make_model())
    step, inputs = native_step(policy), next(make_inputs(3, 1))
    state = torch.randn(3, sum(policy.sizes))
    for bad in (state[:, :-1], state[:2], state.double(), state.to("meta")):
        with pytest.raises(ValueError, match="this state is of another model"):
            step(*inputs, bad)
    expected, after = step(*inputs, state)
    actions, strided = step(*inputs, state.t().contiguous().t())
    assert np.array_equal(actions, expected)
    assert torch.equal(after, strided)
    other = DecisionAgent(make_model(width=48), target_return=1.0)
    _, foreign = other.predict(inputs[0])
    with pytest.raises(ValueError, match="this state is of another model"):
        make_agent().predict(inputs[0], foreign, np.zeros(3, bool))


def test_weights_given_other_memory_are_noticed_at_the_start_of_episodes():
    agent = started(make_agent())
    for change in (
        lambda p: p.data.copy_(p.data * 1.5),
        lambda p: setattr(p, "data", p.data * 0.5),
    ):
        for parameter in agent.model.parameters():
            change(parameter)
        assert_acts_as_plain(started(agent))
    agent.model.load_state_dict(make_model().state_dict(), assign=True)
    assert_acts_as_plain(started(agent))


def test_a_model_in_training_has_its_dropout():
    agent = started(make_agent(dropout=0.5))
    observations = np.ones((3, 5), np.float32)
    _, state = agent.predict(observations)

    def act_again():
        return agent.predict(observations, state, np.zeros(3, bool))[0]

    assert np.array_equal(act_again(), act_again())
    agent.model.train()
    assert np.abs(act_again() - act_again()).max() > 1e-2
    agent.model.eval()
    assert_acts_as_plain(agent)


def test_earlier_states_stay_usable():
    agent = make_agent()
    inputs = [observations for observations, *_ in make_inputs(3, 12)]
    actions, states = [], [None]
    for observations in inputs:
        action, state = agent.predict(observations, states[-1], np.zeros(3, bool))
        actions.append(action)
        states.append(state)
    for t in (5, 2, 11):
        again, _ = agent.predict(inputs[t], states[t], np.zeros(3, bool))
        assert np.array_equal(again, actions[t])
    actions[-1][:] = 9  # what is handed out is the caller's
    assert states[-1].model[:, -2:].abs().max() <= 4


def through_pickle(agent):
    return pickle.loads(pickle.dumps(agent))  # noqa: S301


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_an_agent_that_has_acted_can_be_copied(duplicate):
    agent = started(make_agent())
    other = duplicate(agent)
    train_a_step(other.model)
    assert_acts_as_plain(other)
    assert_acts_as_plain(agent)


def test_without_compiled_kernels_the_agent_acts_the_same(monkeypatch):
    actions = {}
    for native in ("1", "0"):
        monkeypatch.setenv("MINRL_NATIVE", native)
        load_kernels.cache_clear()
        agent = started(make_agent())
        assert isinstance(agent._step, NativeStep) == (native == "1")
        actions[native] = [agent.act(o, r) for o, r, *_ in make_inputs(3, 20)]
    load_kernels.cache_clear()
    np.testing.assert_allclose(actions["0"], actions["1"], atol=1e-5)


def test_models_that_do_not_fit_act_plainly():
    with torch.inference_mode():  # such tensors do not count their changes
        uncounted = make_model()
    assert native_step(StepPolicy(uncounted)) is None
    started(DecisionAgent(uncounted, target_return=1.0))

    class Shifted(TrajectoryModel):
        def step(self, *inputs):
            action, state = super().step(*inputs)
            return action + 0.5, state

    assert native_step(StepPolicy(Shifted(5, 2).eval())) is None
