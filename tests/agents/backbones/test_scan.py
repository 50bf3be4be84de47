import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from minrl.agents.backbones import scan_cpu, scan_torch
from minrl.agents.backbones.scan import gated_scan, gated_scan_reference
from minrl.agents.backbones.scan_torch import CANDIDATES, PARTS

GATES = sorted(PARTS)
# One step; whole and broken cache lines of channels; fewer sequences than threads.
SIZES = [(3, 1, 5), (2, 2, 16), (1, 21, 17), (5, 13, 3)]
FLAGS = ["plain", "h0", "resets", "mask", "all"]


@pytest.fixture(params=["native", "torch"])
def implementation(request, monkeypatch):
    """Run a test on the compiled kernels, and on plain torch as where they are not available."""
    if request.param == "torch":
        monkeypatch.setattr(scan_cpu, "is_available", lambda *_: False)
    else:
        assert scan_cpu.is_available(torch.float32, "mingru", "g")
    return request.param


def make_inputs(batch, length, width, *, gates="mingru", flags="all", seed=0, bias=0.0):
    """Return float32 tensors that take gradients, and the other arguments."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(batch, length, width, generator=generator) for _ in range(PARTS[gates])]
    parts[0] += bias
    tensors = {"projected": torch.cat(parts, -1)}
    options = {"gates": gates}
    if flags in ("h0", "all"):
        tensors["initial_state"] = torch.randn(batch, width, generator=generator)
    if flags in ("resets", "all"):
        options["resets"] = torch.rand(batch, length, generator=generator) < 0.1
        tensors["reset_state"] = torch.randn(width, generator=generator)
    if flags in ("mask", "all"):
        options["mask"] = torch.rand(batch, length, generator=generator) < 0.8
    return tensors, options


def time_first(tensors, options):
    """Return the same sequences with the time axis in front."""
    tensors = tensors | {"projected": tensors["projected"].transpose(0, 1).contiguous()}
    flags = {name: options[name].t() for name in ("resets", "mask") if name in options}
    return tensors, options | flags | {"batch_first": False}


def run_with_gradients(function, tensors, options, dtype):
    """Return both outputs and the gradients of a loss that weighs every one of their elements."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in tensors.items()}
    states, last = function(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in (states, last))
    sum((x * weight).sum() for x, weight in zip((states, last), weights, strict=True)).backward()
    return {
        "states": states.detach(),
        "last": last.detach(),
        **{f"grad {name}": leaf.grad for name, leaf in leaves.items()},
    }


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("flags", ["plain", "all"])
def test_operator_passes_pytorchs_own_checks(flags, dtype):
    tensors, options = make_inputs(2, 7, 4, flags=flags)
    if "reset_state" in tensors:
        tensors["reset_state"] = tensors["reset_state"].repeat(2, 1)
    leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    arguments = (
        leaves["projected"],
        leaves.get("initial_state"),
        options.get("resets"),
        leaves.get("reset_state"),
        options.get("mask"),
        "mingru",
        "g",
        True,
    )
    torch.library.opcheck(torch.ops.minrl.gated_scan.default, arguments)


def test_compiles_into_one_graph_with_its_gradient():
    tensors, options = make_inputs(2, 40, 8)

    def loss(projected, initial_state, reset_state):
        states, last = gated_scan(projected, initial_state, reset_state=reset_state, **options)
        return states.square().sum() + last.sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        function(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_activation_checkpointing_gives_the_same_gradients():
    tensors, options = make_inputs(2, 40, 8)
    direct = run_with_gradients(gated_scan, tensors, options, torch.float32)

    def recomputed(**arguments):
        return checkpoint(gated_scan, use_reentrant=False, **arguments)

    again = run_with_gradients(recomputed, tensors, options, torch.float32)
    assert all(torch.equal(direct[name], again[name]) for name in direct)


def test_a_second_derivative_is_refused_not_wrong():
    projected = make_inputs(1, 5, 2, flags="plain")[0]["projected"].requires_grad_()
    states, _ = gated_scan(projected)
    (grad,) = torch.autograd.grad(states.square().sum(), projected, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resets": torch.zeros(4, 2, dtype=torch.bool)}, "resets must be bool"),
        ({"mask": torch.ones(2, 4)}, "mask must be bool"),
        ({"gates": "minlstm"}, "3 parts"),
        ({"gates": "gru"}, "gates must be one of"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"initial_state": torch.zeros(2, 5, device="meta")}, "initial_state is on meta"),
    ],
    ids=["transposed resets", "float mask", "wrong parts", "gates", "activation", "device"],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gated_scan(torch.zeros(2, 4, 10), **change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_sequence_gives_no_states_and_no_step_is_refused(dtype):
    states, last = gated_scan(torch.zeros(0, 4, 10, dtype=dtype))
    assert (states.shape, last.shape) == ((0, 4, 5), (0, 5))
    with pytest.raises(RuntimeError, match="larger than 0"):
        gated_scan(torch.zeros(2, 0, 10, dtype=dtype))


def test_invalid_single_steps_have_no_gradient():
    projected = torch.full((2, 1, 10), float("nan"), requires_grad=True)
    state = torch.ones(2, 5, requires_grad=True)
    states, _ = gated_scan(projected, state, mask=torch.zeros(2, 1, dtype=torch.bool))
    states.sum().backward()
    assert (projected.grad == 0).all()
    assert (state.grad == 1).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_forward_mode_derivative_is_refused_not_zero():
    projected = make_inputs(1, 5, 2, flags="plain")[0]["projected"]
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: gated_scan(x)[0], (projected,), (projected,))
