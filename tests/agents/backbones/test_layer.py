import itertools

import pytest
import torch
from torch.nn import functional

from minrl.agents.backbones import layer
from minrl.agents.backbones.layer import gated_layer
from minrl.agents.backbones.scan import gated_scan_reference
from minrl.agents.backbones.scan_torch import PARTS

GATES = sorted(PARTS)
FEATURES, WIDTH = 6, 5


@pytest.fixture(params=[1, 7, 1000], ids=lambda size: f"chunk {size}")
def chunk(request, monkeypatch):
    """Split the sequences into chunks of a step or a sequence, of some, or not at all."""
    monkeypatch.setattr(layer, "CHUNK", request.param)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def make_inputs(sizes=(3, 8), *, gates="mingru", bias=True, flags=True, batch_first=True):
    """Return tensors that take gradients, and the other arguments."""
    batch, length = sizes
    generator = torch.Generator().manual_seed(0)
    shape = sizes if batch_first else (length, batch)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {
        "x": draw(*shape, FEATURES),
        "weight": draw(PARTS[gates] * WIDTH, FEATURES),
        "bias": draw(PARTS[gates] * WIDTH) if bias else None,
        "initial_state": draw(batch, WIDTH),
        "reset_state": draw(WIDTH) if flags else None,
    }
    options = {
        "gates": gates,
        "activation": "g",
        "batch_first": batch_first,
        "resets": torch.rand(shape, generator=generator) < 0.3 if flags else None,
        "mask": torch.rand(shape, generator=generator) < 0.8 if flags else None,
    }
    return tensors, options


def run_with_gradients(function, tensors, options, dtype=torch.float32):
    """Return both outputs and the gradients of a loss that weighs every one of their elements."""
    leaves = {
        name: None if x is None else x.to(dtype, copy=True).requires_grad_()
        for name, x in tensors.items()
    }
    states, last = function(**leaves, **options)
    weights = torch.linspace(-1, 1, states.numel()).view_as(states).to(states.dtype)
    ((states * weights).sum() + (last * last.detach().cos()).sum()).backward()
    grads = {f"grad {name}": x.grad for name, x in leaves.items() if x is not None}
    return {"states": states.detach(), "last": last.detach(), **grads}


def reference(x, weight, bias, initial_state, **options):
    return gated_scan_reference(functional.linear(x, weight, bias), initial_state, **options)


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("gates", GATES)
def test_equals_float64_loop_with_all_gradients(
    gates, batch_first, bias, flags, chunk, implementation
):
    tensors, options = make_inputs(gates=gates, bias=bias, flags=flags, batch_first=batch_first)
    got = run_with_gradients(gated_layer, tensors, options)
    expected = run_with_gradients(reference, tensors, options, torch.float64)
    for name, right in expected.items():
        torch.testing.assert_close(got[name].double(), right, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_acting_gives_the_same_bits_as_learning(batch_first, chunk):
    tensors, options = make_inputs(batch_first=batch_first)
    learnt = run_with_gradients(gated_layer, tensors, options)
    with torch.no_grad():
        states, last = gated_layer(**tensors, **options)
    assert torch.equal(states, learnt["states"])
    assert torch.equal(last, learnt["last"])


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "initial_state", "reset_state"])
def test_gradients_do_not_depend_on_what_else_is_learnt(frozen):
    tensors, options = make_inputs()
    learnt = {name: x for name, x in tensors.items() if name != frozen}

    def with_frozen(**leaves):
        return gated_layer(**leaves, **{frozen: tensors[frozen]}, **options)

    expected = run_with_gradients(gated_layer, tensors, options)
    for name, value in run_with_gradients(with_frozen, learnt, {}).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("output", [0, 1], ids=["states", "last"])
def test_either_output_alone_has_its_gradient(output):
    tensors, options = make_inputs()
    grads = []
    for function, dtype in ((gated_layer, torch.float32), (reference, torch.float64)):
        others = {name: x.to(dtype) for name, x in tensors.items()}
        x = others.pop("x").clone().requires_grad_()
        function(x, **others, **options)[output].sum().backward()
        grads.append(x.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_operator_passes_pytorchs_own_checks():
    for bias, flags, batch_first in itertools.product([False, True], repeat=3):
        tensors, options = make_inputs(bias=bias, flags=flags, batch_first=batch_first)
        leaves = {name: x if x is None else x.requires_grad_() for name, x in tensors.items()}
        if flags:
            leaves["reset_state"] = tensors["reset_state"].detach().repeat(3, 1).requires_grad_()
        arguments = (
            *(leaves[name] for name in ("x", "weight", "bias", "initial_state")),
            options["resets"],
            leaves["reset_state"],
            options["mask"],
            *("mingru", "g", batch_first, True),
        )
        torch.library.opcheck(torch.ops.minrl.gated_layer.default, arguments)


def test_a_weight_may_lie_in_memory_in_any_order():
    def gradients(function, order):
        tensors, options = make_inputs()
        tensors["weight"] = order(tensors["weight"])
        leaves = {name: x if x is None else x.requires_grad_() for name, x in tensors.items()}
        output, _ = function(**leaves, **options)
        return torch.autograd.grad(output.square().sum(), leaves["weight"])[0]

    expected = gradients(gated_layer, lambda weight: weight)
    compiled = torch.compile(gated_layer, fullgraph=True, backend="aot_eager")
    for function in (gated_layer, compiled):
        got = gradients(function, lambda weight: weight.t().contiguous().t())
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_on_another_device_are_refused(name):
    tensors, options = make_inputs()
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, x on cpu"):
        gated_layer(**tensors, **options)


def test_no_channels_give_no_states():
    states, last = gated_layer(
        torch.zeros(2, 5, 3), torch.zeros(0, 3), torch.zeros(0), torch.zeros(2, 0), gates="mingru",
        activation="g", resets=None, reset_state=None, mask=None, batch_first=True,
    )  # fmt: skip
    assert (states.shape, last.shape) == ((2, 5, 0), (2, 0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_was_traced_without_gradients_says_so_when_it_is_trained():
    tensors, options = make_inputs()
    x = tensors.pop("x")
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: gated_layer(x, **tensors, **options)[0], (x,))
    with pytest.raises(RuntimeError, match="was traced without gradients"):
        traced(x.requires_grad_()).sum().backward()


def test_learning_holds_no_gradient_of_all_pre_activations(monkeypatch):
    monkeypatch.setattr(layer, "CHUNK", 2048)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    tensors, options = make_inputs((64, 256), flags=False)
    leaves = {name: x if x is None else x.requires_grad_() for name, x in tensors.items()}
    packed = 64 * 256 * 2 * WIDTH * 4
    states, _ = gated_layer(**leaves, **options)
    loss = states.sum()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss.backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < packed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": "gru"}, "gates must be one of"),
        ({"weight": torch.zeros(8, FEATURES)}, "needs a state of"),
        ({"weight": torch.zeros(11, FEATURES)}, "needs a state of"),
        ({"initial_state": torch.zeros(1, WIDTH)}, "needs a state of"),
        ({"initial_state": torch.zeros(5, WIDTH)}, "needs a state of"),
        ({"resets": torch.zeros(8, 3, dtype=torch.bool)}, "resets must be bool"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    tensors, options = make_inputs(flags=False)
    with pytest.raises(ValueError, match=message):
        gated_layer(**tensors | options | change)


def test_one_long_sequence_is_cut_along_time(monkeypatch):
    monkeypatch.setattr(layer, "CHUNK", 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    tensors, options = make_inputs((1, 30))
    got = run_with_gradients(gated_layer, tensors, options)
    expected = run_with_gradients(reference, tensors, options, torch.float64)
    for name, right in expected.items():
        torch.testing.assert_close(got[name].double(), right, rtol=1e-5, atol=1e-5, msg=name)
    chunks = layer._chunks(tensors["x"].transpose(0, 1), batch_first=False)
    assert len(chunks) == 5
