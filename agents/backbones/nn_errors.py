"""What ``nn.GRU`` and ``nn.LSTM`` refuse, refused in their words."""

import warnings

import torch
from torch import Tensor


def check_construction(
    input_size: int,
    hidden_size: int,
    num_layers: int,
    *,
    bias: bool,
    batch_first: bool,
    dropout: float,
    stacklevel: int,
) -> None:
    """Refuse sizes that no layer has; warn, at ``stacklevel``, where dropout has no place to be."""
    for name, flag in (("bias", bias), ("batch_first", batch_first)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{name} must be greater than zero")
    if isinstance(dropout, bool) or not 0 <= float(dropout) <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an "
            "element being zeroed"
        )
    if dropout and num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last recurrent layer, so non-zero "
            f"dropout expects num_layers greater than 1, but got {dropout=} and {num_layers=}",
            stacklevel=stacklevel,
        )


def check_axes(layer_name: str, input: Tensor, hx: Tensor | None, returns_pairs: bool) -> None:
    """Refuse an input that is not a sequence, and a state with another number of axes."""
    if input.dim() not in (2, 3):
        raise ValueError(f"{layer_name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    if hx is not None and hx.dim() != input.dim():
        kind, wanted = ("batched", 3) if input.dim() == 3 else ("unbatched", 2)
        names, got = "hx", f"{hx.dim()}-D tensor"
        if returns_pairs:
            names, got = "hx and cx", f"({hx.dim()}-D, {hx.dim()}-D) tensors"
        raise RuntimeError(
            f"For {kind} {wanted}-D input, {names} should also be {wanted}-D but got {got}"
        )


def check_input(input: Tensor, weight: Tensor) -> None:
    """Refuse an input that the first layer's weight (., F) cannot be multiplied with."""
    features, dtype, device = weight.shape[1], weight.dtype, weight.device
    if input.shape[-1] != features:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {features}, got {input.shape[-1]}"
        )
    if input.device != device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{input.device} and parameter tensor at {device}"
        )
    if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
            f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
        )


def check_state(
    state: Tensor, expected: tuple[int, int, int], input: Tensor, name: str = "hidden"
) -> None:
    """Refuse a state of another shape than (num_layers, B, H), on another device, or of a type.

    It has the input's type or, as the layers return it, float32 for a narrower one.
    """
    if state.shape != expected:
        raise RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}")
    if state.device != input.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, found input tensor at "
            f"{input.device} and hidden tensor at {state.device}"
        )
    types = (input.dtype, torch.promote_types(input.dtype, torch.float32))
    if state.dtype not in types and not torch.is_autocast_enabled(input.device.type):
        names = (part.type().rpartition(".")[2].removesuffix("Tensor") for part in (state, input))
        raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {' and '.join(names)}")
