import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minrl.agents.backbones import scan
from minrl.agents.backbones.scan import (
    CANDIDATES,
    gated_scan,
    gated_scan_reference,
    normalised_gate,
    positive,
)

LENGTHS = (1, 2, 3, 63, 64, 65, scan.SEQUENTIAL_LENGTH, scan.SEQUENTIAL_LENGTH + 1, 1000)


def make_inputs(batch, length, width, *, seed=0, bias=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, width)
    update = (torch.randn(shape, generator=generator) + bias).to(dtype)
    candidate = torch.randn(shape, generator=generator).to(dtype)
    forget = (torch.randn(shape, generator=generator) + 3).to(dtype)
    state = torch.randn(batch, width, generator=generator)
    resets = torch.rand(batch, length, generator=generator) < 0.1
    mask = torch.rand(batch, length, generator=generator) < 0.8
    return update, candidate, forget, state, resets, mask


@pytest.mark.parametrize("length", LENGTHS, ids=lambda length: f"T{length}")
@pytest.mark.parametrize("flags", ["plain", "h0", "resets", "mask", "forget", "all"])
def test_equals_float64_loop_with_all_gradients(length, flags):
    update, candidate, forget, state, resets, mask = make_inputs(2, length, 3)
    fresh = torch.full((3,), 0.7)
    tensors = {"update": update, "candidate": candidate}
    options = {}
    if flags in ("h0", "all"):
        tensors["initial_state"] = state
    if flags in ("forget", "all"):
        tensors["forget"] = forget
    if flags in ("resets", "all"):
        options["resets"], tensors["reset_state"] = resets, fresh
    if flags in ("mask", "all"):
        options["mask"] = mask

    results = {}
    for function, dtype in ((gated_scan, torch.float32), (gated_scan_reference, torch.float64)):
        leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in tensors.items()}
        states, last = function(**leaves, **options)
        weight = torch.linspace(-1, 1, states.numel(), dtype=dtype).view_as(states)
        ((states * weight).sum() + 2 * last.sum()).backward()
        grads = {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for name, leaf in leaves.items()
        }
        results[function.__name__] = {"states": states, "last": last, **grads}
    for name, expected in results["gated_scan_reference"].items():
        got = results["gated_scan"][name].double()
        scale = expected.abs().max().clamp(min=1.0)
        assert (got - expected).abs().max() <= 1e-5 * scale, name


# With gates of 0.0003 (bias -8) the rounding of a, 3e-8, adds up over 3,000 steps of memory.
TOLERANCE = {-8: 1e-5, -6: 3e-6, 0: 1e-6, 8: 1e-6}


@pytest.mark.parametrize("bias", TOLERANCE)
@pytest.mark.parametrize("length", [64, 1000, 8_000])
def test_float32_error_does_not_grow_with_length(bias, length):
    update, candidate, *_ = make_inputs(1, length, 4, bias=bias)
    expected, _ = gated_scan_reference(update, candidate)
    got, _ = gated_scan(update, candidate)
    assert ((got - expected).abs() / expected.abs()).max() <= TOLERANCE[bias]


@pytest.mark.slow
@pytest.mark.parametrize("bias", TOLERANCE)
def test_float32_error_at_a_million_steps(bias):
    update, candidate, *_ = make_inputs(1, 1_000_000, 4, bias=bias)
    expected, _ = gated_scan_reference(update, candidate)
    got, _ = gated_scan(update, candidate)
    assert ((got - expected).abs() / expected.abs()).max() <= TOLERANCE[bias]


@pytest.mark.parametrize("bias", [-7, 0])
def test_bfloat16_inputs_lose_only_the_rounding_of_the_output(bias):
    update, candidate, *_ = make_inputs(2, 3000, 4, bias=bias, dtype=torch.bfloat16)
    expected, expected_last = gated_scan_reference(update, candidate)
    got, last = gated_scan(update, candidate)
    assert got.dtype is torch.bfloat16
    assert last.dtype is torch.float32
    assert ((got - expected).abs() / expected.abs()).max() <= 2**-8
    assert ((last - expected_last).abs() / expected_last.abs()).max() <= 3e-6


@pytest.mark.parametrize("logit", [0.0, 20.0, -20.0, 1e3, -1e3, 1e4, -1e4])
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e4, -1e4])
def test_extreme_gates_stay_finite_with_their_gradients(logit, value):
    update = torch.full((1, 80, 2), logit, requires_grad=True)
    candidate = torch.full((1, 80, 2), value, requires_grad=True)
    state = torch.full((1, 2), -value, requires_grad=True)
    states, last = gated_scan(update, candidate, state)
    (states.sum() + last.sum()).backward()
    expected, _ = gated_scan_reference(update, candidate, state)
    for tensor in (states, update.grad, candidate.grad, state.grad):
        assert tensor.isfinite().all()
    assert (states - expected).abs().max() <= 3e-6 * max(1.0, abs(value))


@pytest.mark.parametrize("activation", sorted(CANDIDATES))
@pytest.mark.parametrize("length", [5, 13])
def test_gradients_match_finite_differences(activation, length, monkeypatch):
    monkeypatch.setattr(scan, "SEQUENTIAL_LENGTH", 8)  # both algorithms at lengths that are cheap
    update, candidate, forget, state, resets, mask = make_inputs(2, length, 2, dtype=torch.float64)
    inputs = [update, candidate, state.double(), forget, torch.ones(2, dtype=torch.float64)]

    def run(update, candidate, state, forget, fresh):
        return gated_scan(
            update,
            candidate,
            state,
            forget=forget,
            activation=activation,
            resets=resets,
            reset_state=fresh,
            mask=mask,
        )

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


@given(
    cuts=st.lists(st.integers(1, 29), max_size=5).map(lambda cuts: sorted(set(cuts))),
    seed=st.integers(0, 10**6),
)
def test_split_anywhere_equals_whole(cuts, seed):
    update, candidate, forget, state, resets, mask = make_inputs(2, 30, 3, seed=seed)
    options = {"reset_state": torch.ones(3)}
    whole, last = gated_scan(
        update, candidate, state, forget=forget, resets=resets, mask=mask, **options
    )
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, 30], strict=True):
        part = slice(start, stop)
        states, state = gated_scan(
            update[:, part],
            candidate[:, part],
            state,
            forget=forget[:, part],
            resets=resets[:, part],
            mask=mask[:, part],
            **options,
        )
        parts.append(states)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(state, last, atol=1e-6, rtol=1e-6)


def test_gradient_is_cut_at_a_reset():
    update, candidate, *_ = make_inputs(1, 20, 2)
    candidate.requires_grad_()
    resets = torch.zeros(1, 20, dtype=torch.bool)
    resets[:, 12] = True
    states, _ = gated_scan(update, candidate, resets=resets)
    states[:, 12:].sum().backward()
    assert (candidate.grad[:, :12] == 0).all()
    assert (candidate.grad[:, 12:] != 0).all()


def test_two_runs_give_the_same_bits():
    update, candidate, *_ = make_inputs(3, 500, 8)
    first, _ = gated_scan(update, candidate)
    second, _ = gated_scan(update, candidate)
    assert torch.equal(first, second)


def test_normalised_gate_is_the_share_of_the_input_gate():
    forget, input_gate = torch.randn(2, 1000, dtype=torch.float64) * 5
    f, i = torch.sigmoid(forget), torch.sigmoid(input_gate)
    got = torch.sigmoid(normalised_gate(forget, input_gate))
    torch.testing.assert_close(got, i / (f + i), atol=1e-14, rtol=1e-13)


def test_positive_is_continuous_and_positive():
    x = torch.tensor([-30.0, -1.0, -1e-6, 0.0, 1e-6, 2.0], dtype=torch.float64)
    expected = torch.where(x >= 0, x + 0.5, 1 / (1 + torch.exp(-x)))
    torch.testing.assert_close(positive(x), expected)
    assert (positive(x) > 0).all()
    assert abs(positive(torch.tensor(-1e-7)) - 0.5) < 1e-6
