"""What the gates of a recurrent layer begin with, so that it can learn to remember."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_memory(memory: float, bias: bool = True) -> None:
    """Refuse a memory that gates cannot begin with.

    Raises:
        ValueError: If it is less than two steps or not finite, or the gates have no bias.
    """
    if not 2 <= memory < math.inf or not bias:
        raise ValueError(
            f"memory needs a bias and a number of steps, at least two, not {memory=}, {bias=}"
        )


@torch.no_grad()
def remember(weight: Tensor, bias: Tensor, signs: Sequence[int], memory: float) -> None:
    """Let gates keep 1 - 1/T of the state at inputs near zero, T from 2 to ``memory``.

    But not at all inputs, or where T is large next to nothing would ever be written: from channel
    to channel, others open the gates not at all to easily. The biases are those of the chrono
    initialisation (Tallec & Ollivier, arXiv 1804.11188), evenly in the logarithm of T.

    Args:
        weight: From the inputs to the gates, (G, H, F), drawn as ``nn.Linear`` and ``nn.GRU`` with
            H = F draw theirs; made larger in place.
        bias: Of the gates, (G, H); set in place.
        signs: Of each gate, 1 where it is open while the state is kept, else -1.
        memory: Steps, at least 2; a layer of one channel has all of it.

    Raises:
        ValueError: If ``memory`` is less, or not finite.
    """
    check_memory(memory)
    size, device = bias.shape[1], weight.device
    longest = math.log(memory)
    shortest = math.log(2) if size > 1 else longest
    log_steps = torch.linspace(shortest, longest, size, device=device)  # H
    logit = log_steps + torch.log1p(-torch.exp(-log_steps))  # of 1 - 1/T
    bias.copy_(torch.outer(torch.tensor(signs, device=device), logit))
    # The standard deviation of the logits over inputs of unit variance: as drawn it is 3**-0.5,
    # wanted is up to 1.5 times what holds the gate.
    spread = 1.5 * logit * torch.rand(size, device=device)
    weight *= (3**0.5 * spread).clamp(min=1.0).unsqueeze(-1)
