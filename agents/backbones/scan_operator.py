"""The scan as a PyTorch operator, ``torch.ops.minrl.gated_scan``, with its derivative.

One operator for every kind of device: it picks the implementation, and hands it contiguous tensors.
"""

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from minrl.agents.backbones import scan_cpu, scan_torch
from minrl.agents.backbones.operators import define_operator, differentiable_gradients
from minrl.agents.backbones.scan_torch import PARTS

Gradients = tuple[Tensor | None, ...]


def sizes_of(projected: Tensor, gates: str, batch_first: bool) -> tuple[int, int, int]:
    """Return B, T and H.

    Raises:
        ValueError: If there are not three axes, or the gates are unknown or do not fit the columns.
        RuntimeError: If there is no step, in the words of ``nn.GRU``.
    """
    if gates not in PARTS:
        raise ValueError(f"gates must be one of {sorted(PARTS)}, not {gates!r}")
    if projected.dim() != 3:
        raise ValueError(f"projected must be (B, T, G*H) or (T, B, G*H), not {(*projected.shape,)}")
    batch, length, columns = projected.shape
    if not batch_first:
        batch, length = length, batch
    if length == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if columns % PARTS[gates]:
        raise ValueError(f"{gates} needs {PARTS[gates]} parts of equal size, not {columns} in all")
    return batch, length, columns // PARTS[gates]


def _forward(
    projected: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reset_state: Tensor | None,
    mask: Tensor | None,
    gates: str,
    activation: str,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all states, the last one, and what the backward pass needs besides (on CUDA)."""
    projected, initial_state, resets, reset_state, mask = contiguous(
        projected, initial_state, resets, reset_state, mask
    )
    options = (gates, activation, batch_first)
    if _on_triton(projected):
        from minrl.agents.backbones import scan_cuda

        return scan_cuda.scan_forward(projected, initial_state, resets, reset_state, mask, *options)
    batch, _, width = sizes_of(projected, gates, batch_first)
    dtype = torch.promote_types(projected.dtype, torch.float32)
    zeros = projected.new_zeros(batch, width, dtype=dtype)
    states, last = backend_of(projected, gates, activation).scan_forward(
        projected,
        zeros if initial_state is None else initial_state,
        resets,
        zeros if reset_state is None else reset_state,
        mask,
        *options,
    )
    return states, last, projected.new_empty(0)


def _backward(
    grad_states: Tensor,
    grad_last: Tensor,
    projected: Tensor,
    saved: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reset_state: Tensor | None,
    mask: Tensor | None,
    gates: str,
    activation: str,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by ``projected``, ``initial_state`` and ``reset_state`` (B, H)."""
    grad_states, grad_last, projected, saved, initial_state, resets, reset_state, mask = contiguous(
        grad_states, grad_last, projected, saved, initial_state, resets, reset_state, mask
    )
    grads, options = (grad_states, grad_last), (gates, activation, batch_first)
    if _on_triton(projected):
        from minrl.agents.backbones import scan_cuda

        return scan_cuda.scan_backward(
            *grads, projected, saved, initial_state, resets, reset_state, mask, *options
        )
    zeros = torch.zeros_like(grad_last)
    return backend_of(projected, gates, activation).scan_backward(
        *grads,
        projected,
        saved,
        zeros if initial_state is None else initial_state,
        resets,
        zeros if reset_state is None else reset_state,
        mask,
        *options,
    )


def contiguous(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    """Return the tensors as kernels need them, which get an address and no strides."""
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)


def backend_of(projected: Tensor, gates: str, activation: str) -> ModuleType:
    """Return the module that scans such tensors where Triton does not: compiled, or torch."""
    on_cpu = projected.device.type == "cpu" and projected.numel() > 0
    native = on_cpu and scan_cpu.is_available(projected.dtype, gates, activation)
    return scan_cpu if native else scan_torch


@functools.cache
def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    # It builds its launchers by the system's C compiler, which it brings itself on Windows alone.
    compilers = map(shutil.which, ("cc", "gcc", "clang"))
    return sys.platform != "linux" or bool(os.environ.get("CC") or any(compilers))


def _on_triton(projected: Tensor) -> bool:
    # AMD's GPUs are called "cuda" as well, but do not know the instructions that the kernels use.
    return projected.device.type == "cuda" and torch.version.hip is None and _has_triton()


def _forward_shapes(
    projected, initial_state, resets, reset_state, mask, gates, activation, batch_first
):
    batch, length, width = sizes_of(projected, gates, batch_first)
    dtype = torch.promote_types(projected.dtype, torch.float32)
    saved = (0,)
    if _on_triton(projected):
        from minrl.agents.backbones import scan_cuda

        saved = scan_cuda.checkpoint_shape(batch, length, width)
    return (
        projected.new_empty(*projected.shape[:2], width),
        projected.new_empty(batch, width, dtype=dtype),
        projected.new_empty(saved, dtype=dtype),
    )


def _backward_shapes(grad_states, grad_last, projected, *_others):
    sizes = grad_last.shape
    return (
        torch.empty_like(projected, memory_format=torch.contiguous_format),
        grad_last.new_empty(sizes),
        grad_last.new_empty(sizes),
    )


def _save(ctx, inputs, output) -> None:
    projected, initial_state, resets, reset_state, mask, *ctx.options = inputs
    states, _, checkpoints = output
    saved = checkpoints if _on_triton(projected) else states
    ctx.save_for_backward(projected, saved, initial_state, resets, reset_state, mask)


def _differentiate(ctx, grad_states: Tensor, grad_last: Tensor, _) -> Gradients:
    projected, saved, initial_state, resets, reset_state, mask = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        by_projected, by_initial, by_reset = differentiable_gradients(
            lambda x, initial, fresh: scan_torch.scan_by_steps(
                x, initial, resets, fresh, mask, *ctx.options
            ),
            (projected, initial_state, reset_state),
            (grad_states, grad_last),
        )
        return by_projected, by_initial, None, by_reset, None, None, None, None
    grads = torch.ops.minrl.gated_scan_backward(
        grad_states,
        grad_last,
        projected,
        saved,
        initial_state,
        resets,
        reset_state,
        mask,
        *ctx.options,
    )
    by_initial = None if initial_state is None else grads[1]
    by_reset = None if reset_state is None else grads[2]
    return grads[0], by_initial, None, by_reset, None, None, None, None


_FLAGS = "Tensor? initial_state, Tensor? resets, Tensor? reset_state, Tensor? mask"
_OPTIONS = "str gates, str activation, bool batch_first"
_RESULTS = "(Tensor, Tensor, Tensor)"
define_operator(
    f"gated_scan(Tensor projected, {_FLAGS}, {_OPTIONS}) -> {_RESULTS}",
    _forward,
    _forward_shapes,
    _differentiate,
    _save,
)
define_operator(
    "gated_scan_backward(Tensor grad_states, Tensor grad_last, Tensor projected, Tensor saved, "
    f"{_FLAGS}, {_OPTIONS}) -> {_RESULTS}",
    _backward,
    _backward_shapes,
)
