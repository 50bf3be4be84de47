"""The Triton kernels against the float64 oracle, in Triton's interpreter or on a GPU.

Not collected by name: test_scan_cuda.py runs this file in a process of its own, because the
interpreter can only be chosen before Triton is imported, and for the whole process.
"""

import dataclasses
import math
import os

import pytest
import torch

from minrl.agents.backbones import scan_operator
from minrl.agents.backbones.scan import gated_scan, gated_scan_reference
from minrl.agents.backbones.scan_cuda import (
    FEW,
    MANY,
    SOME,
    Plan,
    Tiles,
    checkpoint_shape,
    scan_backward,
    scan_forward,
)
from minrl.agents.backbones.scan_torch import PARTS

# The interpreter computes in NumPy, which warns of the infinity that closes a gate.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# The interpreter takes milliseconds for every instruction: small tiles and few programs there.
# Forward and backward differ in segments and steps, so that checkpoints fall inside of chunks.
if INTERPRETED:
    PLANS = {
        "serial": Plan(Tiles(4, 1, 2, 1, 1), Tiles(4, 1, 4, 1, 1)),
        "segments": Plan(Tiles(4, 4, 2, 1, 1), Tiles(4, 2, 2, 1, 1)),
        "splits": Plan(Tiles(4, 2, 2, 1, 1), Tiles(4, 2, 2, 1, 1), 3),
    }
    BATCH, LENGTH, WIDTH = 1, 9, 3
else:
    PLANS = {
        "serial": dataclasses.replace(MANY, backward=Tiles(64, 1, 16, 1, 1)),
        "many": MANY,
        "segments": SOME,
        "few": FEW,
        "splits": dataclasses.replace(SOME, splits=5),
    }
    BATCH, LENGTH, WIDTH = 3, 1111, 72
TOLERANCE = {
    torch.float32: 3e-6,
    torch.float64: 1e-12,
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,  # the interpreter cuts off
    torch.float16: 2**-11,
}


def make_case(flags, gates, dtype, batch_first, size, *, draw=torch.randn):
    """Return inputs in the order of ``scan_forward``, and random gradients of its two results."""
    batch, length, width = size
    torch.manual_seed(0)
    state = torch.promote_types(dtype, torch.float32)
    axes = (batch, length) if batch_first else (length, batch)
    projected = draw(*axes, PARTS[gates] * width).to(dtype)
    initial = torch.randn(batch, width, dtype=state) if flags in ("h0", "all") else None
    resets = torch.rand(axes) < 0.3 if flags in ("resets", "zeros", "all") else None
    fresh = torch.randn(batch, width, dtype=state) if flags in ("resets", "all") else None
    mask = torch.rand(axes) < 0.7 if flags in ("mask", "all") else None
    inputs = projected, initial, resets, fresh, mask
    grads = torch.randn(*axes, width).to(dtype), torch.randn(batch, width, dtype=state)
    move = [None if x is None else x.to(DEVICE) for x in (*inputs, *grads)]
    return move[:5], move[5:]


def run(inputs, grads, gates, activation, batch_first, plan):
    options = gates, activation, batch_first, plan
    states, last, checkpoints = scan_forward(*inputs, *options)
    projected = inputs[0]
    batch, length = projected.shape[:2] if batch_first else projected.shape[1::-1]
    shape = checkpoint_shape(batch, length, states.shape[2], plan)
    assert checkpoints.shape == shape
    results = scan_backward(*grads, projected, checkpoints, *inputs[1:], *options)
    assert last.dtype == torch.promote_types(projected.dtype, torch.float32)
    assert states.dtype == projected.dtype
    names = ("states", "last", "projected", "initial", "reset")
    return dict(zip(names, (states, last, *results), strict=True))


def expect(inputs, grads, gates, activation, batch_first):
    projected, initial, resets, fresh, mask = inputs
    batch, width = grads[1].shape
    leaves = [projected.double()]
    leaves += [grads[1].new_zeros(batch, width, dtype=torch.float64) for _ in range(2)]
    for leaf, given in zip(leaves[1:], (initial, fresh), strict=True):
        leaf += 0 if given is None else given
    for leaf in leaves:
        leaf.requires_grad_()
    states, last = gated_scan_reference(
        leaves[0],
        leaves[1],
        gates=gates,
        activation=activation,
        resets=resets,
        reset_state=leaves[2],
        mask=mask,
        batch_first=batch_first,
    )
    ((states * grads[0]).sum() + (last * grads[1]).sum()).backward()
    results = (states.detach(), last.detach(), *(leaf.grad for leaf in leaves))
    names = ("states", "last", "projected", "initial", "reset")
    zeros = torch.zeros_like(last)
    return {n: zeros if x is None else x for n, x in zip(names, results, strict=True)}


def check(flags, gates, activation, dtype, batch_first, plan, size=(BATCH, LENGTH, WIDTH)):
    inputs, grads = make_case(flags, gates, dtype, batch_first, size)
    got = run(inputs, grads, gates, activation, batch_first, plan)
    for name, expected in expect(inputs, grads, gates, activation, batch_first).items():
        # States and gradients by them stay in float32 whatever the inputs.
        exact = name in ("last", "initial", "reset") and dtype is not torch.float64
        tolerance = TOLERANCE[torch.float32 if exact else dtype]
        if name == "reset":  # a sum over the steps
            tolerance *= math.sqrt(size[1])
        scale = expected.abs().clamp(min=1.0)
        assert ((got[name] - expected).abs() <= tolerance * scale).all(), name


@pytest.mark.parametrize("activation", ["g", "identity", "tanh"])
@pytest.mark.parametrize("gates", PARTS)
def test_equals_float64_loop(gates, activation):
    check("all", gates, activation, torch.float32, True, PLANS["segments"])


@pytest.mark.parametrize("flags", ["plain", "h0", "resets", "zeros", "mask"])
def test_equals_float64_loop_with_flags(flags):
    check(flags, "mingru", "g", torch.float32, False, PLANS["segments"])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("gates", PARTS)
def test_equals_float64_loop_with_plan(gates, plan):
    check("all", gates, "g", torch.float32, False, PLANS[plan])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rounds_once_to_the_inputs_type(dtype):
    check("all", "mingru", "tanh", dtype, True, PLANS["serial"])


@pytest.mark.parametrize("gates", PARTS)
def test_rounds_once_to_bfloat16(gates):
    check("all", gates, "g", torch.bfloat16, True, PLANS["segments"])


@pytest.mark.parametrize("length", [1, 2, 8], ids=lambda length: f"T{length}")
def test_equals_float64_loop_at_any_length(length):
    check("all", "mingru", "g", torch.float32, True, PLANS["segments"], (BATCH, length, WIDTH))


@pytest.mark.parametrize("width", [1, 4, 5], ids=lambda width: f"H{width}")
def test_equals_float64_loop_at_any_width(width):
    check("all", "minlstm", "g", torch.float32, True, PLANS["serial"], (2, 3, width))


def test_the_plan_of_the_sizes_is_used_by_default():
    check("all", "mingru", "g", torch.float32, True, None, (1, 20, 2))


@pytest.mark.parametrize("plan", ["serial", "segments"])
@pytest.mark.parametrize("gates", PARTS)
def test_extreme_logits_close_gates_exactly_and_stay_finite(gates, plan):
    logits = torch.tensor([0.0, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4])

    def draw(*size):
        return logits[torch.randint(len(logits), size)]

    inputs, grads = make_case("h0", gates, torch.float32, True, (1, 16, WIDTH), draw=draw)
    inputs[0][:, :, -WIDTH:] = torch.randn(1, 16, WIDTH)
    got = run(inputs, grads, gates, "g", True, PLANS[plan])
    expected = expect(inputs, grads, gates, "g", True)
    for name, value in got.items():
        assert value.isfinite().all(), name
        scale = expected[name].abs().clamp(min=1.0)
        assert ((value - expected[name]).abs() <= 3e-6 * scale).all(), name


@pytest.mark.parametrize("gates", PARTS)
def test_masked_steps_may_hold_anything_and_get_no_gradient(gates):
    plan = "splits"
    inputs, grads = make_case("all", gates, torch.float32, True, (BATCH, LENGTH, WIDTH))
    clean = run(inputs, grads, gates, "g", True, PLANS[plan])
    inputs[0][~inputs[4]] = float("nan")
    got = run(inputs, grads, gates, "g", True, PLANS[plan])
    assert not got["projected"][~inputs[4]].any()
    for name, value in got.items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_survives_a_reset(plan):
    inputs, grads = make_case("resets", "mingru", torch.float32, True, (1, LENGTH, WIDTH))
    inputs[2].zero_()
    inputs[2][:, 6] = True
    clean = run(inputs, grads, "mingru", "g", True, PLANS[plan])
    for poison in (1e6, float("nan")):
        inputs[0][:, :6] = poison
        got = run(inputs, grads, "mingru", "g", True, PLANS[plan])
        assert torch.equal(got["states"][:, 6:], clean["states"][:, 6:])
        assert torch.equal(got["last"], clean["last"])
        assert torch.equal(got["projected"][:, 6:], clean["projected"][:, 6:])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("gates", PARTS)
def test_a_diverged_state_is_seen_behind_saturated_gates_until_a_reset(gates, plan):
    inputs, grads = make_case("resets", gates, torch.float32, True, (1, LENGTH, WIDTH))
    inputs[0][..., :WIDTH] = -40.0
    inputs[0][..., WIDTH:-WIDTH] = 40.0
    if gates == "mingru":
        inputs[0][..., :WIDTH] = 40.0
    inputs[0][:, 0, -WIDTH:] = float("nan")
    inputs[2].zero_()
    inputs[2][:, 8] = True
    states = run(inputs, grads, gates, "g", True, PLANS[plan])["states"]
    assert states[:, :8].isnan().all()
    assert states[:, 8:].isfinite().all()
    grads[0][:, 7] = float("nan")  # and backwards, to the reset before it
    inputs[0][:, 0, -WIDTH:] = 0.0
    inputs[2][:, 1] = True
    got = run(inputs, grads, gates, "g", True, PLANS[plan])
    assert got["projected"][:, 1:8].isnan().all()
    assert got["projected"][:, 8:].isfinite().all()
    assert got["projected"][:, :1].isfinite().all()


@pytest.mark.parametrize("plan", ["serial", "segments", "splits"])
@pytest.mark.parametrize("gates", PARTS)
def test_infinite_logits_equal_the_float64_loop(gates, plan):
    inputs, grads = make_case("h0", gates, torch.float16, True, (1, LENGTH, WIDTH))
    inputs[0][:, 1::3, :WIDTH] = -float("inf")
    inputs[0][:, 2::3, WIDTH:-WIDTH] = -float("inf")
    inputs[0][:, 6, :WIDTH] = float("inf")
    expected = expect(inputs, grads, gates, "g", True)["last"]
    got = run(inputs, grads, gates, "g", True, PLANS[plan])
    assert ((got["last"] - expected).abs() <= 3e-6 * expected.abs().clamp(min=1.0)).all()
    assert all(value.isfinite().all() for value in got.values())
    inputs[0][:, -2, 0] = float("nan")
    assert run(inputs, grads, gates, "g", True, PLANS[plan])["last"][:, 0].isnan().all()


def test_an_unknown_activation_is_refused():
    inputs, _ = make_case("plain", "mingru", torch.float32, True, (1, 2, 2))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of a kind of the compiler's
        scan_forward(*inputs, "mingru", "relu", True)
    reasons, error = [], caught.value
    while error is not None:  # the compiler names the line, and its cause what is wrong there
        reasons.append(str(error))
        error = error.__cause__
    assert "unknown activation" in "".join(reasons)


@pytest.mark.skipif(INTERPRETED, reason="nothing runs side by side in the interpreter")
@pytest.mark.parametrize("plan", PLANS)
def test_the_same_bits_on_every_run(plan):
    inputs, grads = make_case("all", "mingru", torch.float32, True, (BATCH, LENGTH, WIDTH))
    first, second = (run(inputs, grads, "mingru", "g", True, PLANS[plan]) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("gates", PARTS)
@pytest.mark.parametrize("length", [1, 5, 40], ids=lambda length: f"T{length}")
def test_the_operator_differentiates_through_the_kernels(length, gates, monkeypatch):
    monkeypatch.setattr(scan_operator, "_on_triton", lambda _: True)
    width, generator = 6, torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, length, PARTS[gates] * width, generator=generator),
        torch.randn(2, width, generator=generator),
        torch.randn(width, generator=generator),
    ]
    resets = torch.rand(2, length, generator=generator) < 0.2
    weight = torch.randn(2, length, width, generator=generator)
    results = []
    for function, dtype in (
        (gated_scan, torch.float32),
        (gated_scan_reference, torch.float64),
    ):
        projected, initial, reset = (
            x.detach().to(DEVICE, dtype, copy=True).requires_grad_() for x in leaves
        )
        states, last = function(
            projected, initial, gates=gates, resets=resets.to(DEVICE), reset_state=reset
        )
        ((states * weight.to(DEVICE)).sum() + last.sum()).backward()
        results.append([states, last, projected.grad, initial.grad, reset.grad])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= 3e-6 * expected.norm()
