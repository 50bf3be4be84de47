"""Inputs of a gated scan, and all that comes out of one, gradients included."""

import torch

from minrl.agents.backbones.scan_torch import PARTS

GATES = sorted(PARTS)


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
