"""Dropout that takes a training step on a CPU one pass, where PyTorch's takes a tenth of its time.

Which elements are dropped follows from their positions and one random number, which is all that is
kept for the backward pass. It is a PyTorch operator, as the scan is.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrl.agents.backbones.native import load_kernels, new_empty
from minrl.agents.backbones.operators import define_operator, is_transformed
from minrl.agents.backbones.threads import run_parallel

KERNELS = "minrl.agents.backbones.dropout_kernels"

# Elements below which another thread is not worth waking.
WORTH_A_THREAD = 100_000


class Dropout(nn.Module):
    """``nn.Dropout``, on CPUs five to ten times as fast in float32; elsewhere it is the same.

    Args:
        p: Chance of an element to become zero in training; the others are divided by 1 - p.

    Raises:
        ValueError: If it is no chance, in the words of ``nn.Dropout``.
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x, in training with elements dropped that follow from torch's generator."""
        return dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        """Show the chance."""
        return f"p={self.p}"


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Return x, in training with elements dropped that follow from torch's generator."""
    if not (training and p):
        return x
    native = x.device.type == "cpu" and x.dtype == torch.float32 and p < 1
    if not native or is_transformed():
        return functional.dropout(x, p)
    key = torch.randint(2**63 - 1, (1,))
    return torch.ops.minrl.dropout(x, key, p)


def _dropout(x: Tensor, key: Tensor, p: float) -> Tensor:
    """Drop elements of x by their positions: always the same ones for the same key."""
    kernels, number = load_kernels(KERNELS), int(key)
    if kernels is None:
        generator = torch.Generator().manual_seed(number)
        kept = torch.rand(x.shape, generator=generator, dtype=x.dtype) >= p
        return torch.where(kept, x / (1 - p), 0.0)
    x, scale = x.contiguous(), x.new_full((1,), 1 / (1 - p))
    y = new_empty(x, *x.shape)
    pointers = (tensor.data_ptr() for tensor in (x, y, scale))
    numbers = (number & 0xFFFFFFFF, number >> 32, min(round(p * 2**32), 2**32 - 1))
    run_parallel(kernels["dropout"], (*pointers, *numbers), x.numel(), least=WORTH_A_THREAD)
    return y


def _shape(x: Tensor, _key: Tensor, _p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    _, key, ctx.p = inputs
    ctx.save_for_backward(key)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.minrl.dropout(grad, ctx.saved_tensors[0], ctx.p), None, None


define_operator(
    "dropout(Tensor x, Tensor key, float p) -> Tensor", _dropout, _shape, _differentiate, _save
)
