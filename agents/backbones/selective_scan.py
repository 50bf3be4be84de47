"""The recurrence of Mamba, whose rates depend on the input, over a whole sequence at once.

    h_t = exp(-delta_t a) h_{t-1} + delta_t B_t x_t,   y_t = C_t h_t

for each channel, with N numbers in h, a, B and C (Gu & Dao, arXiv 2312.00752, algorithm 2; B by
Euler's rule, as in the code released with it, and a = -A). For float32 on CPUs there is a compiled
pass over memory; elsewhere it is ``gated_scan``'s, under other names:

    h_t = (1 - z_t) h_{t-1} + z_t c_t,   z = 1 - exp(-delta a),   c = delta B x / z

On CUDA, where ``mamba_ssm`` is installed with its compiled ``selective_scan``, that runs sequences
without resets, mask and initial state. (We have not run this path: there was no GPU at hand.)
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from minrl.agents.backbones.native import load_kernels, new_empty
from minrl.agents.backbones.operators import (
    define_operator,
    differentiable_gradients,
    is_transformed,
)
from minrl.agents.backbones.scan import check_arguments, gated_scan
from minrl.agents.backbones.scan_operator import contiguous
from minrl.agents.backbones.threads import run_parallel

KERNELS = "minrl.agents.backbones.selective_scan_kernels"

# Elements of the state, about two nanoseconds each, below which another thread is not worth waking.
WORTH_A_THREAD = 25_000

# Added to every step size: where that has underflowed to zero, its logarithm stays finite.
TINY = 1e-30


def selective_scan(
    x: Tensor,
    delta: Tensor,
    rates: Tensor,
    enter: Tensor,
    read: Tensor,
    initial_state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over the time axis, in parallel over batch and channels.

    Args:
        x: Input, (B, T, D).
        delta: How long each step is, (B, T, D), positive.
        rates: How fast the state decays, a, (N, D), positive.
        enter: B, (B, T, N).
        read: C, (B, T, N).
        initial_state: State before the first step, (B, N, D); zeros if not given.
        resets: bool, (B, T), True where a new sequence starts: the state before that step is zero.
        mask: bool, (B, T), False where the state is carried over unchanged, a reset included; y is
            meaningless there.

    Returns:
        y, (B, T, D), and the last state, (B, N, D), both in the type of the inputs, float32 at
        least. Through ``mamba_ssm`` the last state has no gradient.

    Raises:
        ValueError: If sizes, types or devices do not fit each other.
    """
    operands = {"x": x, "delta": delta, "rates": rates, "enter": enter, "read": read}
    check_arguments("identity", **operands, initial_state=initial_state, resets=resets, mask=mask)
    _check_sizes(x, delta, rates, enter, read, initial_state)
    wide = torch.promote_types(x.dtype, torch.float32)
    x, delta, rates, enter, read = (part.to(wide) for part in (x, delta, rates, enter, read))
    if x.is_cuda and initial_state is None and resets is None and mask is None and _mamba_ssm():
        return _scan_by_mamba_ssm(x, delta, rates, enter, read)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *rates.shape)
    state = initial_state.to(wide)
    if _is_native(x, rates):
        y, last, _ = torch.ops.minrl.selective_scan(
            x, delta, rates, enter, read, state, resets, mask
        )
        return y, last
    return _scan_by_gates(x, delta, rates, enter, read, state, resets, mask)


def _check_sizes(
    x: Tensor,
    delta: Tensor,
    rates: Tensor,
    enter: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be (B, T, D), not {tuple(x.shape)}")
    (batch, length, width), size = x.shape, len(rates)
    expected = {
        "delta": (delta, x.shape),
        "rates": (rates, (size, width)),
        "enter": (enter, (batch, length, size)),
        "read": (read, (batch, length, size)),
        "initial_state": (initial_state, (batch, size, width)),
    }
    for name, (given, shape) in expected.items():
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, not {tuple(given.shape)}")


def _is_native(x: Tensor, rates: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and rates.numel() > 0
        and not torch.compiler.is_exporting()
        and not is_transformed()
        and _has_kernels()
    )


@torch.compiler.assume_constant_result  # Dynamo cannot look into the compiler of the kernels
def _has_kernels() -> bool:
    return load_kernels(KERNELS) is not None


@functools.cache
def _mamba_ssm() -> Callable | None:
    """Return ``mamba_ssm``'s function, if it is there and so is the extension that it calls."""
    try:
        from mamba_ssm.ops import selective_scan_interface
    except ImportError:
        return None
    compiled = getattr(selective_scan_interface, "selective_scan_cuda", None)
    return selective_scan_interface.selective_scan_fn if compiled is not None else None


def _scan_by_mamba_ssm(
    x: Tensor, delta: Tensor, rates: Tensor, enter: Tensor, read: Tensor
) -> tuple[Tensor, Tensor]:
    sequences = (part.transpose(1, 2) for part in (x, delta))  # B D T
    weights = (part.transpose(1, 2) for part in (enter, read))  # B N T
    a = -rates.t().contiguous()  # D N
    y, last = _mamba_ssm()(*sequences, a, *weights, return_last_state=True)
    return y.transpose(1, 2), last.detach().transpose(1, 2)


def _scan_by_gates(
    x: Tensor,
    delta: Tensor,
    rates: Tensor,
    enter: Tensor,
    read: Tensor,
    state: Tensor,
    resets: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    decay = (delta + TINY).unsqueeze(2) * rates  # B T N D
    closing = -torch.expm1(-decay)  # z, exact also where it is tiny
    logit = decay + torch.log(closing)  # of z: log(exp(decay) - 1) without an overflow
    value = (decay / closing) * (x.unsqueeze(2) * enter.unsqueeze(3) / rates)
    states, last = gated_scan(
        torch.cat([logit.flatten(2), value.flatten(2)], dim=-1),
        state.flatten(1),
        activation="identity",
        resets=resets,
        mask=mask,
    )
    with torch.autocast(x.device.type, enabled=False):
        y = read.unsqueeze(2) @ states.unflatten(2, rates.shape)  # B T 1 D
    return y.squeeze(2), last.unflatten(1, rates.shape)


def _forward(
    x: Tensor,
    delta: Tensor,
    rates: Tensor,
    enter: Tensor,
    read: Tensor,
    state: Tensor,
    resets: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state, and all states, which the backward pass needs."""
    given = tuple(contiguous(x, delta, rates, enter, read, state, resets, mask))
    y, states = new_empty(x, *x.shape), new_empty(x, *x.shape[:2], *rates.shape)
    _run("forward", (*given, y, states), resets, mask, x, rates)
    return y, states[:, -1].clone(), states


def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    x: Tensor,
    delta: Tensor,
    rates: Tensor,
    enter: Tensor,
    read: Tensor,
    state: Tensor,
    states: Tensor,
    resets: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by x, delta, rates, enter, read and the initial state."""
    given = contiguous(x, delta, rates, enter, read, state)
    nothing = torch.zeros_like(rates, memory_format=torch.contiguous_format)
    others = contiguous(states, resets, mask, grad_y)
    carry = grad_last.clone(memory_format=torch.contiguous_format)
    grad_x, grad_delta = new_empty(x, *x.shape), new_empty(x, *x.shape)
    grad_rates = torch.zeros_like(carry)  # of each sequence, by its own thread
    grad_enter, grad_read = new_empty(x, *enter.shape), new_empty(x, *read.shape)
    grads = (carry, grad_x, grad_delta, grad_rates, grad_enter, grad_read)
    _run("backward", (*given, nothing, *others, *grads), resets, mask, x, rates)
    return grad_x, grad_delta, grad_rates.sum(0), grad_enter, grad_read, carry


def _run(
    name: str,
    tensors: tuple[Tensor | None, ...],
    resets: Tensor | None,
    mask: Tensor | None,
    x: Tensor,
    rates: Tensor,
) -> None:
    pointers = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    (batch, length, width), size = x.shape, len(rates)
    numbers = (resets is not None, mask is not None, length, width, size)
    least = -(-WORTH_A_THREAD // (length * width * size))
    run_parallel(load_kernels(KERNELS)[name], (*pointers, *numbers), batch, least=least)


def _forward_shapes(x, _delta, rates, _enter, _read, state, _resets, _mask):
    return (
        x.new_empty(x.shape),
        state.new_empty(state.shape),
        x.new_empty(*x.shape[:2], *rates.shape),
    )


def _backward_shapes(_grad_y, _grad_last, x, delta, rates, enter, read, state, *_others):
    return tuple(part.new_empty(part.shape) for part in (x, delta, rates, enter, read, state))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.set_materialize_grads(False)  # zeros for all states would cost as much as the scan


def _differentiate(ctx, grad_y: Tensor | None, grad_last: Tensor | None, _) -> tuple:
    *given, resets, mask, states = ctx.saved_tensors
    x, state = given[0], given[-1]
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_last = torch.zeros_like(state) if grad_last is None else grad_last
    if torch.is_grad_enabled():  # create_graph=True
        grads = differentiable_gradients(
            # In float64: the gradient by the rates is a small difference of large terms.
            lambda *inputs: [
                y.to(x.dtype)
                for y in _scan_by_gates(*(value.double() for value in inputs), resets, mask)
            ],
            given,
            (grad_y, grad_last),
        )
    else:
        grads = torch.ops.minrl.selective_scan_backward(
            grad_y, grad_last, *given, states, resets, mask
        )
    return *grads, None, None


_GIVEN = "Tensor x, Tensor delta, Tensor rates, Tensor enter, Tensor read, Tensor initial_state"
_FLAGS = "Tensor? resets, Tensor? mask"
define_operator(
    f"selective_scan({_GIVEN}, {_FLAGS}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_shapes,
    _differentiate,
    _save,
)
define_operator(
    f"selective_scan_backward(Tensor grad_y, Tensor grad_last, {_GIVEN}, Tensor states, {_FLAGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_shapes,
)
