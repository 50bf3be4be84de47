"""Causal depthwise convolution with the state protocol of ``mixers.py``."""

import torch
from torch import Tensor, nn

from minrl.agents.backbones.mixers import State


class DepthwiseConvolution(nn.Conv1d):
    """Each channel's own weighted sum of its last ``kernel_size`` valid steps of the same sequence.

    Parameters are those of ``nn.Conv1d(channels, channels, kernel_size, groups=channels)``.

    Args:
        channels: D.
        kernel_size: Steps seen, the current one included.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, groups=channels)
        self.past = kernel_size - 1

    def initial_state(self, batch_size: int) -> State:
        """Return no past inputs: zeros, ((B, kernel_size - 1, D),)."""
        return (self.weight.new_zeros(batch_size, self.past, self.in_channels),)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Convolve (B, T, D) along time; taps never reach over a reset or into invalid steps."""
        batch, length, _ = x.shape
        (before,) = self.initial_state(batch) if state is None else state
        if mask is not None:  # valid steps move together, and back to their places at the end
            order = torch.sort(~mask, dim=1, stable=True).indices.unsqueeze(-1)  # B T 1
            x = x.gather(1, order.expand_as(x))
            resets = None if resets is None else resets.gather(1, order.squeeze(-1))
        seen = torch.cat([before.to(x.dtype), x], dim=1)  # B P+T D
        mixed = self._weigh(seen, resets)
        if mask is None:
            after = seen[:, length:]
        else:
            mixed = torch.zeros_like(mixed).scatter(1, order.expand_as(mixed), mixed)
            last = mask.sum(1, keepdim=True) + torch.arange(self.past, device=x.device)  # B P
            after = seen.gather(1, last.unsqueeze(-1).expand(-1, -1, self.in_channels))
        if resets is not None:
            after = self._forget_before_reset(after, resets, mask)
        return mixed, (after,)

    def _weigh(self, seen: Tensor, resets: Tensor | None) -> Tensor:
        """Return the sums, (B, T, D), of all inputs, (B, P + T, D), tap by tap.

        On a CPU that takes half the time of ``conv1d``, which wants another layout.
        """
        length, taps = seen.shape[1] - self.past, self.weight.squeeze(1).t()  # P+1 D
        sequence = None
        if resets is not None:
            sequence = nn.functional.pad(resets.long().cumsum(1), (self.past, 0))  # B P+T
        mixed = self.bias
        for tap, weight in enumerate(taps):
            shifted = seen[:, tap : tap + length]
            if sequence is not None:
                same = sequence[:, tap : tap + length] == sequence[:, self.past :]
                shifted = shifted.masked_fill(~same.unsqueeze(-1), 0.0)
            mixed = torch.addcmul(mixed, shifted, weight)
        return mixed

    def _forget_before_reset(self, after: Tensor, resets: Tensor, mask: Tensor | None) -> Tensor:
        """Zero those of the carried inputs, (B, P, D), that lie before the last valid reset."""
        valid = resets.new_full((resets.shape[0],), resets.shape[1], dtype=torch.long)
        if mask is not None:
            valid = mask.sum(1)
        steps = torch.arange(resets.shape[1], device=resets.device)
        started = torch.where(resets & (steps < valid.unsqueeze(1)), steps, -self.past - 1)
        position = valid.unsqueeze(1) - self.past + torch.arange(self.past, device=resets.device)
        return after.masked_fill((position < started.amax(1, keepdim=True)).unsqueeze(-1), 0.0)


class CausalConvolution(nn.Module):
    """A depthwise convolution, and a linear map between the channels.

    Args:
        width: D, channels.
        kernel_size: Steps seen, the current one included.
    """

    def __init__(self, width: int, kernel_size: int):
        super().__init__()
        self.depthwise = DepthwiseConvolution(width, kernel_size)
        self.pointwise = nn.Linear(width, width)

    def initial_state(self, batch_size: int) -> State:
        """Return no past inputs: zeros, ((B, kernel_size - 1, D),)."""
        return self.depthwise.initial_state(batch_size)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Convolve (B, T, D) along time; taps never reach over a reset or into invalid steps."""
        mixed, state = self.depthwise(x, state, resets=resets, mask=mask)
        return self.pointwise(mixed), state
