"""How this package's functions become operators of PyTorch, ``torch.ops.minrl.*``."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("minrl", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define_operator(
    schema: str,
    compute: Callable,
    shapes: Callable,
    differentiate: Callable,
    save: Callable | None = None,
) -> None:
    """Define an operator, by hand: ``torch.library.custom_op`` costs its first call two seconds.

    Args:
        schema: Its name, arguments and results, as ``torch.library.define`` reads them.
        compute: What it does, on any device.
        shapes: Returns its results without their values.
        differentiate: Its backward pass, as of a ``torch.autograd.Function``.
        save: Its ``setup_context``.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minrl::{name}", shapes, lib=_LIBRARY)
    torch.library.register_autograd(
        f"minrl::{name}", differentiate, setup_context=save, lib=_LIBRARY
    )


def refuse_gradient(_ctx, *_grads) -> None:
    """Be the backward pass of a backward pass.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError("minrl's scan cannot be differentiated twice")
