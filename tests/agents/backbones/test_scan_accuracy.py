"""The scan against a loop in float64: long, in half precision, at extremes."""

import itertools

import numpy as np
import pytest
import torch
from scan_cases import GATES, make_inputs

from minrl.agents.backbones import scan_cpu
from minrl.agents.backbones.scan import gated_scan, gated_scan_reference
from minrl.agents.backbones.scan_torch import CANDIDATES, PARTS

# Gates of 0.0003 (bias -8) remember 3,000 steps, and must not add up 3,000 roundings.
BIASES = torch.tensor([-8.0, -6, 0, 8])
SHORT, LONG = (1, 2, 3, 63, 64, 65, 1000), (1000, 100_000, 1_000_000)


def loop_over_states(projected, initial_state, gates, activation):
    """As `gated_scan_reference`, with all that needs no state done at once, for a million steps."""
    *logits, v = projected.double().chunk(PARTS[gates], -1)
    keep, enter = torch.sigmoid(-logits[0]), torch.sigmoid(logits[0])
    if gates != "mingru":
        keep, enter = torch.sigmoid(logits[0]), torch.sigmoid(logits[1])
    if gates == "minlstm":
        keep, enter = keep / (keep + enter), enter / (keep + enter)
    value = {"g": torch.where(v >= 0, v + 0.5, torch.sigmoid(v)), "tanh": v.tanh(), "identity": v}
    added, state, states = (enter * value[activation]).numpy(), initial_state.double().numpy(), []
    for kept, new in zip(keep.transpose(0, 1).numpy(), added.swapaxes(0, 1), strict=True):
        state = kept * state + new
        states.append(state)
    return torch.from_numpy(np.stack(states, 1))


def worst_by_bias(errors):
    return errors.amax((0, 1)).view(len(BIASES), -1).amax(1)


@pytest.mark.parametrize("lengths", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=max)
@pytest.mark.parametrize("activation", sorted(CANDIDATES))
@pytest.mark.parametrize("gates", GATES)
def test_float32_error_does_not_grow_with_length(gates, activation, lengths, monkeypatch):
    """Two channels of each bias, in two rows that begin with zeros and with random states."""
    bias = BIASES.repeat_interleave(2)
    tensors, _ = make_inputs(2, lengths[-1], 8, gates=gates, flags="h0", bias=bias)
    state = tensors["initial_state"].abs()
    state[0] = 0.0
    expected = loop_over_states(tensors["projected"], state, gates, activation)
    # What a step lets go of leaves its rounding behind: gates that forget nearly all at once lose
    # as many digits as the state may fall, in a million steps by a factor of hundreds.
    forgetful = {"mingru": BIASES > 0, "minlstm": BIASES < 0}.get(gates, BIASES <= 0)
    allowed = torch.where(forgetful, 1e-4, 3e-6)
    for native, length in itertools.product((True, False), lengths):
        monkeypatch.setattr(scan_cpu, "is_available", lambda *_, native=native: native)
        projected = tensors["projected"][:, :length].contiguous()
        got, _ = gated_scan(projected, state, gates=gates, activation=activation)
        without, _ = gated_scan(projected, gates=gates, activation=activation)
        assert torch.equal(without[0], got[0])  # no state is one of zeros
        right = expected[:, :length].abs()
        errors = (got - expected[:, :length]).abs()
        to_largest = worst_by_bias(errors / right.amax(1, keepdim=True))
        to_state = worst_by_bias(errors / right)
        print(native, length, to_largest.tolist(), to_state.tolist())  # for pytest -rP
        if length > 1:  # relative to the largest of its channel; of one, that is itself
            assert (to_largest <= 3e-6).all(), (native, length, to_largest)
        if activation == "g":  # signed ones cancel: near zero they have no relative accuracy
            assert (to_state <= allowed).all(), (native, length, to_state)
            first, last = errors[:, :1000] / right[:, :1000], errors[:, -1000:] / right[:, -1000:]
            flat = worst_by_bias(last) <= 3 * worst_by_bias(first).clamp(min=1e-6)
            assert (flat | forgetful).all(), (native, length)


@pytest.mark.parametrize("length", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gates", ["mingru", "minlstm"])
def test_half_precision_inputs_lose_only_the_rounding_of_the_output(gates, dtype, length):
    bias = torch.tensor([-7.0, 0]).repeat_interleave(4)
    tensors, options = make_inputs(2, length, 8, gates=gates, flags="plain", bias=bias)
    projected = tensors["projected"].to(dtype)
    expected, expected_last = gated_scan_reference(projected, **options)
    got, last = gated_scan(projected, **options)
    assert (got.dtype, last.dtype) == (dtype, torch.float32)
    # Half a unit in the last place, and below the smallest normal number half of that of zero.
    unit = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((got - expected).abs() <= 0.51 * unit).all()
    assert ((last - expected_last).abs() / expected_last.abs()).max() <= 3e-6


@pytest.mark.parametrize("gates", GATES)
def test_extreme_pre_activations_stay_exact_with_finite_gradients(gates, implementation):
    logits = [0.0, 1e-40, 20.0, -20.0, 50.0, -50.0, 1e3, -1e3, 1e4, -1e4]
    columns = list(itertools.product(logits, repeat=PARTS[gates]))
    projected = torch.tensor(columns).t().reshape(1, 1, -1).repeat(1, 20, 1).requires_grad_()
    state = torch.linspace(-2, 2, len(columns)).unsqueeze(0).requires_grad_()
    states, last = gated_scan(projected, state, gates=gates)
    (states.sum() + last.sum()).backward()
    expected, _ = gated_scan_reference(projected, state, gates=gates)
    assert ((states - expected).abs() / expected.abs().clamp(min=1)).max() <= 3e-6
    for tensor in (states, projected.grad, state.grad):
        assert tensor.isfinite().all()
