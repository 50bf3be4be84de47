"""The scan as an operator of PyTorch: compiled, recomputed, differentiated, and refused."""

import pytest
import torch
from scan_cases import make_inputs, run_with_gradients
from torch.utils.checkpoint import checkpoint

from minrl.agents.backbones.scan import gated_scan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("flags", ["plain", "all"])
@pytest.mark.parametrize("length", [7, 200])  # in one piece, and in chunks where it has no kernel
def test_operator_passes_pytorchs_own_checks(length, flags, dtype):
    tensors, options = make_inputs(2, length, 4, flags=flags)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resets": torch.zeros(4, 2, dtype=torch.bool)}, "resets must be bool"),
        ({"mask": torch.ones(2, 4)}, "mask must be bool"),
        ({"gates": "minlstm"}, "3 parts"),
        ({"gates": "gru"}, "gates must be one of"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"initial_state": torch.zeros(2, 5, device="meta")}, "initial_state is on meta"),
        ({"initial_state": torch.zeros(1, 5)}, r"initial_state must be \(2, 5\), not \(1, 5\)"),
        (
            {"reset_state": torch.zeros(3, 5)},
            r"reset_state must be \(5,\) or \(2, 5\), not \(3, 5\)",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:25],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gated_scan(torch.zeros(2, 4, 10), **change)


def test_an_input_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"projected must be .B, T, G\*H. .*, not \(4, 10\)"):
        gated_scan(torch.zeros(4, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_sequence_gives_no_states_and_no_step_is_refused(dtype):
    states, last = gated_scan(torch.zeros(0, 4, 10, dtype=dtype))
    assert (states.shape, last.shape) == ((0, 4, 5), (0, 5))
    with pytest.raises(RuntimeError, match="larger than 0"):
        gated_scan(torch.zeros(2, 0, 10, dtype=dtype))
