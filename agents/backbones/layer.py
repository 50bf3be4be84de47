"""A recurrent layer, projection and scan: on CPUs one operator, ``torch.ops.minrl.gated_layer``.

It goes through many or long sequences in chunks, whose pre-activations stay in the processor's
caches between matrix products and scan, and whose gradient, the largest tensor of a training step,
is there for one chunk at a time.
"""

import torch
from torch import Tensor
from torch.nn import functional

from minrl.agents.backbones.native import new_empty
from minrl.agents.backbones.operators import (
    define_operator,
    differentiable_gradients,
    is_transformed,
)
from minrl.agents.backbones.scan import check_arguments, gated_scan
from minrl.agents.backbones.scan_operator import Gradients, backend_of, contiguous
from minrl.agents.backbones.scan_torch import PARTS, scan_by_steps

# Steps in a chunk, counted over its sequences, for each thread (measured, 128 features).
CHUNK = 4096


def gated_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    *,
    gates: str,
    activation: str,
    resets: Tensor | None,
    reset_state: Tensor | None,
    mask: Tensor | None,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``gated_scan(linear(x, weight, bias), initial_state, ...)``, on CPUs in one pass.

    Args:
        x: (B, T, F), or (T, B, F) if not ``batch_first``.
        weight: (G*H, F).
        bias: (G*H,).
        initial_state: (B, H).
        gates: As in :func:`minrl.agents.backbones.scan.gated_scan`, like all that follow.
        activation: Likewise.
        resets: Likewise.
        reset_state: Likewise.
        mask: Likewise.
        batch_first: Likewise.

    Raises:
        ValueError: As there, or if weight or initial state have other sizes.
    """
    tensors = [x, weight, bias, initial_state, reset_state]
    if not _are_taken(tensors, batch_first):
        return gated_scan(
            functional.linear(x, weight, bias),
            initial_state,
            gates=gates,
            activation=activation,
            resets=resets,
            reset_state=reset_state,
            mask=mask,
            batch_first=batch_first,
        )
    check_arguments(
        activation,
        x=x,
        weight=weight,
        bias=bias,
        initial_state=initial_state,
        resets=resets,
        reset_state=reset_state,
        mask=mask,
    )
    _check_sizes(x, weight, initial_state, gates, batch_first)
    alone = batch_first and len(x) == 1
    if alone:  # time-first it is the same memory, and can be cut along time
        x, resets, mask = (y if y is None else y.transpose(0, 1) for y in (x, resets, mask))
        batch_first = False
    if reset_state is not None:
        reset_state = reset_state.expand_as(initial_state)
    learns = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in tensors)
    states, last, _ = torch.ops.minrl.gated_layer(
        x, weight, bias, initial_state, resets, reset_state, mask,
        gates, activation, batch_first, learns,
    )  # fmt: skip
    return states.transpose(0, 1) if alone else states, last


def _check_sizes(
    x: Tensor, weight: Tensor, initial_state: Tensor, gates: str, batch_first: bool
) -> None:
    if gates not in PARTS:
        raise ValueError(f"gates must be one of {sorted(PARTS)}, not {gates!r}")
    expected = (x.shape[0 if batch_first else 1], len(weight) // PARTS[gates])
    if initial_state.shape != expected or len(weight) % PARTS[gates]:
        raise ValueError(
            f"{gates} with a weight of {tuple(weight.shape)} on {tuple(x.shape)} needs a state of "
            f"{expected}, not {tuple(initial_state.shape)}"
        )


def _are_taken(tensors: list[Tensor | None], batch_first: bool) -> bool:
    """Return whether the operator takes these: float32 sequences on a CPU."""
    x = tensors[0]
    return (
        x.device.type == "cpu"
        and all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and not is_transformed()
        and x.numel() > 0
        and tensors[1].numel() > 0
        and x.shape[1 if batch_first else 0] > 1
    )


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    resets: Tensor | None,
    reset_state: Tensor | None,
    mask: Tensor | None,
    gates: str,
    activation: str,
    batch_first: bool,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all states, the last one, and what learning needs besides, the pre-activations."""
    x, resets, mask = contiguous(x, resets, mask)
    last = initial_state.clone(memory_format=torch.contiguous_format)
    fresh = torch.zeros_like(last) if reset_state is None else reset_state.contiguous()
    states, chunks = new_empty(x, *x.shape[:2], last.shape[1]), _chunks(x, batch_first)
    packed = new_empty(x, *(x if learns else x[chunks[0][0]]).shape[:2], len(weight))
    backend = backend_of(x, gates, activation)
    for chunk, rows in chunks:
        inputs, resets_now, mask_now = _at(chunk, x, resets, mask)
        projected = packed[chunk if learns else slice(len(inputs))]
        if bias is None:
            torch.mm(inputs.flatten(0, 1), weight.t(), out=projected.flatten(0, 1))
        else:
            torch.addmm(bias, inputs.flatten(0, 1), weight.t(), out=projected.flatten(0, 1))
        scan = (projected, last[rows], resets_now, fresh[rows], mask_now)
        out = (states[chunk], last[rows])
        backend.scan_forward(*scan, gates, activation, batch_first, out)
    return states, last, packed if learns else x.new_empty(0)


def _backward(
    grad_states: Tensor,
    grad_last: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    states: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    reset_state: Tensor | None,
    mask: Tensor | None,
    gates: str,
    activation: str,
    batch_first: bool,
    by_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by x (if ``by_input``), weight, bias, initial and reset state."""
    if packed.numel() == 0:
        raise RuntimeError("gated_layer was traced without gradients; trace it with them enabled")
    x, resets, mask, grad_states, initial = contiguous(x, resets, mask, grad_states, initial_state)
    carry = grad_last.clone(memory_format=torch.contiguous_format)
    grad_reset = torch.zeros_like(carry)
    fresh = torch.zeros_like(carry) if reset_state is None else reset_state.contiguous()
    grad_x = new_empty(x, *(x.shape if by_input else (0,)))
    grad_weight, grad_bias = weight.new_zeros(weight.shape), weight.new_zeros(len(weight))
    chunks, backend = _chunks(x, batch_first), backend_of(x, gates, activation)
    room = torch.empty_like(packed[chunks[0][0]])
    for chunk, rows in reversed(chunks):
        inputs, resets_now, mask_now = _at(chunk, x, resets, mask)
        before = initial[rows] if batch_first or chunk.start == 0 else states[chunk.start - 1]
        grad_packed = room[: len(inputs)]
        scan = (grad_states[chunk], carry[rows], packed[chunk], states[chunk], before)
        out = (grad_packed, carry[rows], grad_reset[rows])
        flags = (resets_now, fresh[rows], mask_now)
        backend.scan_backward(*scan, *flags, gates, activation, batch_first, out)
        grad_packed, inputs = grad_packed.flatten(0, 1), inputs.flatten(0, 1)
        if by_input:
            torch.mm(grad_packed, weight, out=grad_x[chunk].flatten(0, 1))
        grad_weight.addmm_(grad_packed.t(), inputs)
        grad_bias += grad_packed.sum(0)
    return grad_x, grad_weight, grad_bias, carry, grad_reset


def _chunks(x: Tensor, batch_first: bool) -> list[tuple[slice, slice]]:
    """Return, for each chunk, its range of the first axis of ``x``, and of a state's rows."""
    size = max(1, CHUNK * torch.get_num_threads() // x.shape[1])
    ranges = [slice(first, first + size) for first in range(0, len(x), size)]
    return [(chunk, chunk if batch_first else slice(None)) for chunk in ranges]


def _at(chunk: slice, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor[chunk] for tensor in tensors)


def _forward_shapes(x, weight, _bias, initial_state, *others):
    sizes = x.shape[:2]
    return (
        x.new_empty(*sizes, initial_state.shape[1]),
        x.new_empty(initial_state.shape),
        x.new_empty((*sizes, len(weight)) if others[-1] else (0,)),
    )


def _backward_shapes(_grad_states, grad_last, x, weight, *others):
    return (
        x.new_empty(x.shape if others[-1] else (0,)),
        weight.new_empty(weight.shape),
        weight.new_empty(len(weight)),
        x.new_empty(grad_last.shape),
        x.new_empty(grad_last.shape),
    )


def _save(ctx, inputs, output) -> None:
    x, weight, bias, initial_state, resets, reset_state, mask, *options, _ = inputs
    states, _, packed = output
    ctx.save_for_backward(x, weight, bias, packed, states, initial_state, resets, reset_state, mask)
    ctx.options = options
    ctx.set_materialize_grads(False)  # or zeros as large as ``packed`` are made, for nothing


def _differentiate(ctx, grad_states: Tensor | None, grad_last: Tensor | None, _) -> Gradients:
    x, weight, bias, packed, states, *state = ctx.saved_tensors
    initial_state, resets, reset_state, mask = state
    grad_states = torch.zeros_like(states) if grad_states is None else grad_states
    grad_last = torch.zeros_like(initial_state) if grad_last is None else grad_last
    if torch.is_grad_enabled():  # create_graph=True
        by_x, by_weight, by_bias, by_initial, by_reset = differentiable_gradients(
            lambda x, weight, bias, initial, fresh: scan_by_steps(
                functional.linear(x, weight, bias), initial, resets, fresh, mask, *ctx.options
            ),
            (x, weight, bias, initial_state, reset_state),
            (grad_states, grad_last),
        )
        return by_x, by_weight, by_bias, by_initial, None, by_reset, *[None] * 5
    by_input = ctx.needs_input_grad[0]
    by_x, by_weight, by_bias, by_initial, by_reset = torch.ops.minrl.gated_layer_backward(
        grad_states, grad_last, x, weight, packed, states, *state, *ctx.options, by_input
    )
    return (
        by_x if by_input else None,
        by_weight,
        None if bias is None else by_bias,
        by_initial,
        None,
        None if reset_state is None else by_reset,
        *[None] * 5,
    )


_STATES = "Tensor initial_state, Tensor? resets, Tensor? reset_state, Tensor? mask"
_OPTIONS = "str gates, str activation, bool batch_first"
define_operator(
    f"gated_layer(Tensor x, Tensor weight, Tensor? bias, {_STATES}, {_OPTIONS}, bool learns)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_shapes,
    _differentiate,
    _save,
)
define_operator(
    "gated_layer_backward(Tensor grad_states, Tensor grad_last, Tensor x, Tensor weight, "
    f"Tensor packed, Tensor states, {_STATES}, {_OPTIONS}, bool by_input)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_shapes,
)
