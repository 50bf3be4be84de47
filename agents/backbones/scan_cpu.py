"""The scan on CPUs: calls the compiled kernels on tensors' memory.

Same arguments and results as :mod:`minrl.agents.backbones.scan_torch`, but float32 alone.
"""

import torch
from torch import Tensor

from minrl.agents.backbones.native import load_kernels, new_empty
from minrl.agents.backbones.threads import run_parallel

KERNELS = "minrl.agents.backbones.scan_cpu_kernels"

# Elements, about a nanosecond each, below which another thread is not worth waking.
WORTH_A_THREAD = 50_000


def is_available(dtype: torch.dtype, gates: str, activation: str) -> bool:
    """Return whether there are kernels for this."""
    return dtype == torch.float32 and load_kernels(KERNELS, gates, activation) is not None


def scan_forward(
    projected: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    reset_state: Tensor,
    mask: Tensor | None,
    gates: str,
    activation: str,
    batch_first: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return all states and the last one; see :func:`scan_torch.scan_forward`."""
    batch, width = initial_state.shape
    if out is None:
        states = new_empty(projected, *projected.shape[:2], width)
        out = states, torch.empty_like(initial_state)
    kernel = load_kernels(KERNELS, gates, activation)["forward"]
    pointers = _pointers(projected, initial_state, reset_state, resets, mask, *out)
    _run(kernel, pointers, resets, mask, projected, batch, width, batch_first)
    return out


def scan_backward(
    grad_states: Tensor,
    grad_last: Tensor,
    projected: Tensor,
    states: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    reset_state: Tensor,
    mask: Tensor | None,
    gates: str,
    activation: str,
    batch_first: bool,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients; see :func:`scan_torch.scan_backward`."""
    batch, width = initial_state.shape
    if out is None:
        grad_projected = new_empty(projected, *projected.shape)
        out = grad_projected, torch.empty_like(grad_last), torch.zeros_like(initial_state)
    grad_projected, carry, grad_reset = out
    if carry is not grad_last:
        carry.copy_(grad_last)
    kernel = load_kernels(KERNELS, gates, activation)["backward"]
    pointers = _pointers(projected, initial_state, reset_state, states, resets, mask)
    pointers += _pointers(grad_states, carry, grad_projected, grad_reset)
    _run(kernel, pointers, resets, mask, projected, batch, width, batch_first)
    return out


def _pointers(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _run(kernel, pointers, resets, mask, projected, batch, width, batch_first) -> None:
    length = projected.shape[1 if batch_first else 0]
    # Whole rows are fastest; with fewer sequences than threads their channels are shared out.
    block = -(-width // max(1, torch.get_num_threads() // batch))
    block = min(width, -(-block // 16) * 16)  # whole cache lines
    sizes = (batch, length, width, not batch_first, block)
    run_parallel(
        kernel,
        (*pointers, resets is not None, mask is not None, *sizes),
        units=batch * -(-width // block),
        least=-(-WORTH_A_THREAD // (length * block)),
    )
