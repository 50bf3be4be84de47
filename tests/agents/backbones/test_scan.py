import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import GATES, make_inputs, run_with_gradients, time_first

from minrl.agents.backbones import scan_cpu, scan_torch
from minrl.agents.backbones.scan import gated_scan, gated_scan_reference
from minrl.agents.backbones.scan_torch import CANDIDATES, PARTS

# One step; whole and broken cache lines of channels; fewer sequences than threads.
SIZES = [(3, 1, 5), (2, 2, 16), (1, 21, 17), (5, 13, 3)]
FLAGS = ["plain", "h0", "resets", "mask", "all"]


def assert_equal_to_oracle(tensors, options, *, dtype=torch.float32, tolerance=3e-6):
    got = run_with_gradients(gated_scan, tensors, options, dtype)
    expected = run_with_gradients(gated_scan_reference, tensors, options, torch.float64)
    for name, right in expected.items():
        error = (got[name].double() - right).norm() / right.norm().clamp(min=1e-9)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("layout", ["batch_first", "time_first"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("activation", sorted(CANDIDATES))
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "B{}-T{}-H{}".format(*sizes))
def test_equals_float64_loop_with_all_gradients(
    sizes, gates, activation, flags, layout, implementation
):
    tensors, options = make_inputs(*sizes, gates=gates, flags=flags)
    if layout == "time_first":
        tensors, options = time_first(tensors, options)
    assert_equal_to_oracle(tensors, options | {"activation": activation})


@pytest.mark.parametrize("length", [1000, pytest.param(4096, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gates", GATES)
def test_long_sequences_equal_float64_loop_with_all_gradients(gates, length, implementation):
    assert_equal_to_oracle(*make_inputs(2, length, 33, gates=gates), tolerance=1e-5)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_types_equal_float64_loop(dtype, gates):
    tensors, options = make_inputs(2, 50, 20, gates=gates)
    tensors["projected"] = tensors["projected"].to(dtype)
    tolerance = {torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    states, last = gated_scan(**tensors, **options)
    expected, expected_last = gated_scan_reference(**tensors, **options)
    assert states.dtype is dtype
    assert ((states.double() - expected).norm() / expected.norm()) <= tolerance
    assert last.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert (last - expected_last).norm() / expected_last.norm() <= 1e-6


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("length", [1, 5, 13])
def test_gradients_match_finite_differences(length, gates, monkeypatch):
    monkeypatch.setattr(scan_torch, "SEQUENTIAL_LENGTH", 8)  # both algorithms, at cheap lengths
    tensors, options = make_inputs(2, length, 2, gates=gates)
    leaves = [x.double().requires_grad_() for x in tensors.values()]

    def run(projected, initial_state, reset_state):
        return gated_scan(projected, initial_state, reset_state=reset_state, **options)

    assert torch.autograd.gradcheck(run, leaves)


@given(
    cuts=st.lists(st.integers(1, 29), max_size=5).map(lambda cuts: sorted(set(cuts))),
    gates=st.sampled_from(GATES),
    seed=st.integers(0, 10**6),
)
def test_split_anywhere_equals_whole(cuts, gates, seed):
    tensors, options = make_inputs(2, 30, 3, gates=gates, seed=seed)
    whole, last = gated_scan(**tensors, **options)
    resets, mask = options.pop("resets"), options.pop("mask")
    state, parts = tensors["initial_state"], []
    for start, stop in itertools.pairwise([0, *cuts, 30]):
        part = slice(start, stop)
        states, state = gated_scan(
            tensors["projected"][:, part],
            state,
            reset_state=tensors["reset_state"],
            resets=resets[:, part],
            mask=mask[:, part],
            **options,
        )
        parts.append(states)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(state, last, atol=1e-6, rtol=1e-6)


@given(starts=st.sets(st.sampled_from(range(2, 39, 2)), max_size=6), gates=st.sampled_from(GATES))
def test_packed_episodes_equal_episodes_alone_bit_for_bit(starts, gates):
    """In the kernels; plain PyTorch rounds as the sizes of what it works on suit it.

    Episodes of one step alone are not the kernels' business either, so none is that short.
    """
    assert scan_cpu.is_available(torch.float32, gates, "g")
    tensors, options = make_inputs(2, 40, 5, gates=gates, flags="plain")
    bounds = [0, *sorted(starts), 40]
    resets = torch.zeros(2, 40, dtype=torch.bool)
    resets[:, sorted(starts)] = True
    together, last = gated_scan(**tensors, resets=resets, **options)
    parts = [tensors["projected"][:, start:stop] for start, stop in itertools.pairwise(bounds)]
    alone = [gated_scan(part, **options) for part in parts]
    assert torch.equal(together, torch.cat([states for states, _ in alone], 1))
    assert torch.equal(last, alone[-1][1])


@pytest.mark.parametrize("gates", GATES)
def test_packed_episodes_equal_episodes_alone_without_kernels(gates, monkeypatch):
    monkeypatch.setattr(scan_cpu, "is_available", lambda *_: False)
    for length in (40, 300):  # in order, and in chunks
        tensors, options = make_inputs(2, length, 5, gates=gates, flags="plain")
        bounds = [0, length // 4, length // 4 + 1, length]
        resets = torch.zeros(2, length, dtype=torch.bool)
        resets[:, bounds[1:-1]] = True
        together, _ = gated_scan(**tensors, resets=resets, **options)
        parts = [tensors["projected"][:, start:stop] for start, stop in itertools.pairwise(bounds)]
        alone = torch.cat([gated_scan(part, **options)[0] for part in parts], 1)
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)


# By their bits: NaNs can carry a payload, which must not be taken for a number.
NOT_FINITE = [0x7FC00000, 0x7FC00001, 0x7F800001, -1, 0x7F800000, -0x800000]


@pytest.mark.parametrize("bits", NOT_FINITE, ids=hex)
@pytest.mark.parametrize("gates", GATES)
def test_what_is_not_a_number_stays_so_until_a_reset(gates, bits, implementation):
    tensors, options = make_inputs(1, 40, 4, gates=gates, flags="plain")
    resets = torch.zeros(1, 40, dtype=torch.bool)
    resets[:, 25] = True
    for part in range(PARTS[gates]):
        projected = tensors["projected"].clone()
        projected.view(torch.int32)[0, 10, part * 4] = bits
        got, _ = gated_scan(projected, resets=resets, **options)
        expected, _ = gated_scan_reference(projected, resets=resets, **options)
        nan = expected.isnan()
        if bits in NOT_FINITE[:4]:
            assert nan[0, 10:25, 0].all()
        assert (got.isnan() | ~nan).all()
        assert torch.isfinite(got[0, 25:]).all()
        assert torch.isfinite(got[..., 1:]).all()


@pytest.mark.parametrize("length", [30, 300], ids=["in order", "chunks"])
def test_nothing_of_what_was_before_survives_a_reset(length, implementation):
    tensors, options = make_inputs(1, length, 4, flags="plain")
    clean, _ = gated_scan(**tensors, **options)
    resets = torch.zeros(1, length, dtype=torch.bool)
    resets[:, 0] = True
    for state in (1e6, float("inf"), float("nan")):
        start = torch.full((1, 4), state, requires_grad=True)
        states, _ = gated_scan(**tensors, initial_state=start, resets=resets, **options)
        assert torch.equal(states, clean)
        (gradient,) = torch.autograd.grad(states.sum() * state, start)
        assert (gradient == 0).all()


def test_gradient_is_cut_at_a_reset(implementation):
    tensors, options = make_inputs(1, 20, 2, flags="plain")
    projected = tensors["projected"].requires_grad_()
    resets = torch.zeros(1, 20, dtype=torch.bool)
    resets[:, 12] = True
    states, _ = gated_scan(projected, resets=resets, **options)
    states[:, 12:].sum().backward()
    assert (projected.grad[:, :12] == 0).all()
    assert (projected.grad[:, 12:, 2:] != 0).all()


@pytest.mark.parametrize("gates", GATES)
def test_where_the_candidates_branches_meet_the_slope_is_that_of_the_upper(gates, implementation):
    tensors, options = make_inputs(2, 20, 3, gates=gates)
    tensors["projected"].chunk(PARTS[gates], -1)[-1].zero_()
    assert_equal_to_oracle(tensors, options)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("sizes", [(1, 3000, 100), (7, 500, 64)], ids=str)
def test_same_bits_on_every_run_and_any_number_of_threads(sizes, threads, implementation):
    tensors, options = make_inputs(*sizes)
    before = torch.get_num_threads()
    alone = run_with_gradients(gated_scan, tensors, options, torch.float32)
    try:
        torch.set_num_threads(threads)
        for _ in range(3):
            again = run_with_gradients(gated_scan, tensors, options, torch.float32)
            assert all(torch.equal(alone[name], again[name]) for name in alone)
    finally:
        torch.set_num_threads(before)


def test_invalid_single_steps_have_no_gradient():
    projected = torch.full((2, 1, 10), float("nan"), requires_grad=True)
    state = torch.ones(2, 5, requires_grad=True)
    states, _ = gated_scan(projected, state, mask=torch.zeros(2, 1, dtype=torch.bool))
    states.sum().backward()
    assert (projected.grad == 0).all()
    assert (state.grad == 1).all()
