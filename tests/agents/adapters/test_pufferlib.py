"""Against PufferLib's protocol, read in its source, with plain policies: not run with PufferLib.

Its 3.0 builds from source alone, and needs the network to.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minrl.agents.adapters.pufferlib import (
    MinGRUNetwork,
    MinGRUWrapper,
    MinLSTMNetwork,
    MinLSTMWrapper,
)

B, T, F, H, ACTIONS = 3, 7, (2, 3), 5, 4
WRAPPERS, NETWORKS = (MinGRUWrapper, MinLSTMWrapper), (MinGRUNetwork, MinLSTMNetwork)


class Policy(nn.Module):
    """Written as PufferLib 3's own policies are."""

    is_continuous = False

    def __init__(self, input_size=6, hidden_size=H):
        super().__init__()
        self.encoder = nn.Linear(6, input_size)
        self.decoder, self.value = nn.Linear(hidden_size, ACTIONS), nn.Linear(hidden_size, 1)

    def encode_observations(self, observations, state=None):
        return torch.tanh(self.encoder(observations.flatten(1).float()))

    def decode_actions(self, hidden):
        return self.decoder(hidden), self.value(hidden)


def make_wrapper(wrapper, **options):
    torch.manual_seed(0)
    environment = SimpleNamespace(single_observation_space=SimpleNamespace(shape=F))
    return wrapper(environment, Policy(), input_size=6, hidden_size=H, **options)


def act(policy, observations):
    """Go through a segment as PufferLib 3's trainer does: room for states made once, zeroed."""
    h, c = (torch.zeros(len(observations), policy.hidden_size) for _ in range(2))
    logits, values = [], []
    for step in range(observations.shape[1]):
        state = {"done": torch.zeros(len(observations)), "lstm_h": h, "lstm_c": c}
        with torch.no_grad():
            logit, value = policy.forward_eval(observations[:, step], state)
        h, c = state["lstm_h"], state["lstm_c"]
        logits.append(logit)
        values.append(value.squeeze(1))
    return torch.stack(logits, 1), torch.stack(values, 1), h


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_acting_step_by_step_equals_training_on_the_segment(wrapper, layers):
    policy, observations = make_wrapper(wrapper, num_layers=layers), torch.randn(B, T, *F)
    logits, values, h = act(policy, observations)
    state = {"action": None, "lstm_h": None, "lstm_c": None}
    trained_logits, trained_values = policy(observations, state)
    assert trained_logits.shape == (B * T, ACTIONS)
    torch.testing.assert_close(trained_logits.view(B, T, ACTIONS), logits)
    torch.testing.assert_close(trained_values, values)
    assert state["hidden"].shape == (B, T, H)
    assert state["lstm_h"].shape == (1, B, policy.hidden_size)
    torch.testing.assert_close(state["lstm_h"][0], h)
    torch.testing.assert_close(state["lstm_c"][0], h)
    assert not state["lstm_h"].requires_grad


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_segment_in_two_parts_equals_the_whole(wrapper, layers):
    policy, observations = make_wrapper(wrapper, num_layers=layers), torch.randn(B, T, *F)
    _, whole = policy(observations, {})
    state = {}
    parts = [policy(part, state)[1] for part in (observations[:, :3], observations[:, 3:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_wrapper_computes_the_formula_of_mingru():
    policy, observations = make_wrapper(MinGRUWrapper), torch.randn(B, T, *F)
    encoded = policy.policy.encode_observations(observations.flatten(0, 1)).view(B, T, 6)
    h, values = torch.zeros(B, H), []
    for step in range(T):
        gate, candidate = nn.functional.linear(
            encoded[:, step], policy.core.weight_ih_l0, policy.core.bias_ih_l0
        ).chunk(2, 1)
        candidate = torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
        h = h + torch.sigmoid(gate) * (candidate - h)
        values.append(policy.policy.value(h).squeeze(1))
    torch.testing.assert_close(policy(observations, {})[1], torch.stack(values, 1))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_training_reaches_every_parameter_and_every_earlier_step(wrapper):
    policy = make_wrapper(wrapper, num_layers=2)
    observations = torch.randn(B, T, *F, requires_grad=True)
    logits, values = policy(observations, {})
    (logits.view(B, T, -1)[:, -1].sum() + values[:, -1].sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in policy.parameters())
    assert (observations.grad.flatten(2).abs().sum(2) > 0).all()


def test_observations_without_time_are_one_step():
    policy, observations = make_wrapper(MinGRUWrapper), torch.randn(B, *F)
    logits, values = policy(observations, {})
    acted, _ = policy.forward_eval(observations, {})
    torch.testing.assert_close(logits, acted)
    assert values.shape == (B, 1)


@pytest.mark.parametrize("shape", [(B, T, 3, 2), (2, 3), (B, T, 1, *F)])
def test_other_observations_are_refused(shape):
    with pytest.raises(ValueError, match="expected"):
        make_wrapper(MinGRUWrapper)(torch.zeros(shape), {})


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("network", NETWORKS)
def test_network_acting_equals_training(network, layers):
    torch.manual_seed(0)
    core = network(hidden_size=H, num_layers=layers, expansion_factor=1)
    h = torch.randn(B, T, H)
    state, outputs = core.initial_state(B, torch.device("cpu")), []
    for step in range(T):
        output, state = core.forward_eval(h[:, step], state)
        assert [part.shape for part in state] == [(layers, B, H)]
        outputs.append(output)
    torch.testing.assert_close(core.forward_train(h), torch.stack(outputs, 1))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_passes_on_what_its_cell_begins_with(network):
    core = network(H, 2, memory=100, candidate="tanh", dropout=0.1, horizon=64).core
    assert (core.memory, core.candidate, core.dropout) == (100, "tanh", 0.1)
    assert not network(H, bias=False).core.bias


def test_a_minlstm_network_is_given_its_gates_too():
    core = MinLSTMNetwork(H, normalize=False, forget_bias=0.0, expansion_factor=1).core
    assert (core.normalize, core.forget_bias) == (False, 0.0)


@pytest.mark.parametrize("name", ["learn_initial_state", "return_cell"])
def test_what_its_trainers_cannot_have_is_refused(name):
    for wrapper in WRAPPERS:
        with pytest.raises(ValueError, match=f"no {name}"):
            make_wrapper(wrapper, **{name: True})
    for network in NETWORKS:
        with pytest.raises(ValueError, match=f"no {name}"):
            network(H, **{name: True})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_saved_policy_acts_the_same(wrapper):
    policy, observations = make_wrapper(wrapper, num_layers=2), torch.randn(B, T, *F)
    restored = make_wrapper(wrapper, num_layers=2, memory=9)
    restored.load_state_dict(policy.state_dict())
    for before, after in zip(act(policy, observations), act(restored, observations), strict=True):
        assert torch.equal(before, after)
