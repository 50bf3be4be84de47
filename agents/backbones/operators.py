"""How this package's functions become operators of PyTorch, ``torch.ops.minrl.*``."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("minrl", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define_operator(
    schema: str,
    compute: Callable,
    shapes: Callable,
    differentiate: Callable | None = None,
    save: Callable | None = None,
) -> None:
    """Define an operator, by hand: ``torch.library.custom_op`` costs its first call two seconds.

    Args:
        schema: Its name, arguments and results, as ``torch.library.define`` reads them.
        compute: What it does, on any device.
        shapes: Returns its results without their values.
        differentiate: Its backward pass, as of a ``torch.autograd.Function``, if it has one.
        save: Its ``setup_context``.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minrl::{name}", shapes, lib=_LIBRARY)
    if differentiate is not None:
        torch.library.register_autograd(
            f"minrl::{name}", differentiate, setup_context=save, lib=_LIBRARY
        )


def is_transformed() -> bool:
    """Return whether ``torch.func`` or forward-mode differentiation is at work.

    They see through plain operations, but not into an operator.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable_gradients(
    function: Callable, inputs: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return gradients as a backward pass does, but ones that can be differentiated again.

    Args:
        function: Of ``inputs``, in plain operations.
        inputs: What to differentiate by, where it requires it.
        grads: The gradients by the function's results.

    Returns:
        A gradient for each input, None for those that require none.
    """
    # Of views, so that an input which is computed from another is held fixed when that one varies.
    inputs = [x if x is None else x.view_as(x) for x in inputs]
    learned = [x for x in inputs if x is not None and x.requires_grad]
    with torch.autocast(grads[0].device.type, enabled=False):
        found = torch.autograd.grad(
            function(*inputs), learned, grads, create_graph=True, materialize_grads=True
        )
    by = dict(zip(map(id, learned), found, strict=True))
    return [by.get(id(x)) for x in inputs]
