"""``torch.func``, forward mode, and gradients of gradients, which the operators do not have."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.nn import functional

from minrl.agents.backbones.blocks import MIXERS, Backbone
from minrl.agents.backbones.cells import MinGRU, MinLSTM
from minrl.agents.backbones.layer import gated_layer
from minrl.agents.backbones.scan import gated_scan, gated_scan_reference
from minrl.agents.backbones.scan_torch import PARTS

BATCH, LENGTH, FEATURES, WIDTH = 2, 6, 3, 4

pytestmark = [
    # PyTorch warns of itself.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # attention
]


def scan_by_layer(x, weight, bias, initial_state, reset_state, **options):
    return gated_layer(
        x, weight, bias, initial_state, reset_state=reset_state, batch_first=True, **options
    )


def scan(x, weight, bias, initial_state, reset_state, **options):
    projected = functional.linear(x, weight, bias)
    return gated_scan(projected, initial_state, reset_state=reset_state, **options)


def scan_reference(x, weight, bias, initial_state, reset_state, **options):
    projected = functional.linear(x, weight, bias)
    return gated_scan_reference(projected, initial_state, reset_state=reset_state, **options)


def make_inputs(gates):
    generator = torch.Generator().manual_seed(0)
    columns = PARTS[gates] * WIDTH
    sizes = [
        (BATCH, LENGTH, FEATURES),
        (columns, FEATURES),
        (columns,),
        (BATCH, WIDTH),
        (BATCH, WIDTH),
    ]
    options = {
        "gates": gates,
        "activation": "g",
        "resets": torch.rand(BATCH, LENGTH, generator=generator) < 0.3,
        "mask": torch.rand(BATCH, LENGTH, generator=generator) < 0.8,
    }
    return [torch.randn(size, generator=generator) for size in sizes], options


def loss_of(function, options):
    def loss(*inputs):
        states, last = function(*inputs, **options)
        return states.square().sum() + last.sin().sum()

    return loss


def second_derivative(function, inputs, options):
    """Return the gradients of the sum of squares of the gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(loss_of(function, options)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)


def doubles(inputs):
    return [x.double() for x in inputs]


def assert_close(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gates", sorted(PARTS))
@pytest.mark.parametrize("function", [scan, scan_by_layer], ids=["scan", "layer"])
def test_second_derivative_is_that_of_the_float64_loop(function, gates):
    inputs, options = make_inputs(gates)
    assert_close(
        second_derivative(function, inputs, options),
        second_derivative(scan_reference, doubles(inputs), options),
    )


def test_a_second_derivative_holds_fixed_what_is_computed_from_the_input_it_is_by():
    inputs, options = make_inputs("mingru")

    def with_computed_state(function):
        return lambda x, weight, bias, _, reset_state, **options: function(
            x, weight, bias, x[:, 0].sum(-1, keepdim=True).expand(-1, WIDTH), reset_state, **options
        )

    given = [x.requires_grad_() for x in inputs]
    for function in (scan, scan_by_layer):
        loss = loss_of(with_computed_state(function), options)
        (first,) = torch.autograd.grad(loss(*given), given[:1], create_graph=True)
        (plain,) = torch.autograd.grad(loss(*given), given[:1])
        torch.testing.assert_close(first, plain)


@pytest.mark.parametrize("gates", sorted(PARTS))
@pytest.mark.parametrize("function", [scan, scan_by_layer], ids=["scan", "layer"])
def test_forward_mode_is_that_of_the_float64_loop(function, gates):
    inputs, options = make_inputs(gates)
    tangents = [x.flip(0) for x in inputs]

    def of(function):
        return lambda *inputs: function(*inputs, **options)

    outputs, derivatives = jvp(of(function), tuple(inputs), tuple(tangents))
    expected = jvp(of(scan_reference), tuple(doubles(inputs)), tuple(doubles(tangents)))
    assert_close([*outputs, *derivatives], [*expected[0], *expected[1]])


def test_a_hessian_is_that_of_the_float64_loop():
    inputs, options = make_inputs("minlstm")
    assert_close(
        hessian(loss_of(scan_by_layer, options), argnums=(0, 2))(*inputs)[0],
        hessian(loss_of(scan_reference, options), argnums=(0, 2))(*doubles(inputs))[0],
    )


@pytest.mark.parametrize("cell", [MinGRU, MinLSTM])
def test_an_ensemble_of_cells_runs_as_one(cell):
    cells = [cell(FEATURES, WIDTH, num_layers=2, batch_first=True) for _ in range(3)]
    x, resets = torch.randn(BATCH, LENGTH, FEATURES), torch.rand(BATCH, LENGTH) < 0.3
    parameters, buffers = stack_module_state(cells)
    outputs, h_n = vmap(lambda *state: functional_call(cells[0], state, (x,), {"resets": resets}))(
        parameters, buffers
    )
    for one, output, h in zip(cells, outputs, h_n, strict=True):
        expected, expected_h = one(x, resets=resets)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(h, expected_h)


# PyTorch's own GRU and LSTM cannot be vectorised.
@pytest.mark.parametrize("mixer", sorted(MIXERS.keys() - {"gru", "lstm"}))
def test_gradients_of_single_sequences_in_every_backbone(mixer):
    options = {"context": LENGTH} if mixer == "transformer" else {}
    backbone = Backbone(8, backbone=mixer, num_layers=1, **options)
    parameters, x = dict(backbone.named_parameters()), torch.randn(3, LENGTH, 8)

    def loss(parameters, x):
        return functional_call(backbone, parameters, (x.unsqueeze(0),))[0].square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for row in range(len(x)):
        backbone.zero_grad()
        loss(parameters, x[row]).backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                torch.testing.assert_close(
                    gradients[name][row], parameter.grad, rtol=1e-4, atol=1e-5, msg=name
                )
