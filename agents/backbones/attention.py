"""Causal self-attention over a window, as a mixer: the Decision Transformer's."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrl.agents.backbones.mixers import ALL, State


class AttentionMixer(nn.Module):
    """Softmax attention to the last ``context`` valid tokens of the same sequence.

    As in the Decision Transformer (arXiv 2106.01345) the tokens themselves carry the embedding of
    their timestep: there is no other sense of position. A stack of these sees further back than
    ``context``, through what the tokens in the window have seen; on sequences of at most
    ``context`` tokens, as in training on windows, it is the paper's attention, but for its
    dropout of attention weights in training.

    The state is the last keys and values, newest last, and how many of them are of this sequence:
    ((B, P, D), (B, P, D), (B, 1)) with P = context - 1, all of floating point.

    Args:
        width: D, features in and out.
        context: Tokens seen, the current one included.
        num_heads: Heads of D / num_heads features.

    Raises:
        ValueError: If the heads do not divide the width, or the context is empty.
    """

    def __init__(self, width: int, *, context: int, num_heads: int = 1):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads must divide the width {width}, not {num_heads}")
        if context < 1:
            raise ValueError(f"context must be at least 1, not {context}")
        self.width, self.context, self.num_heads = width, context, num_heads
        self.past = context - 1
        self.projection = nn.Linear(width, 3 * width)  # rows of the queries, keys, values
        self.output = nn.Linear(width, width)

    def extra_repr(self) -> str:
        """Show the window."""
        return f"context={self.context}, num_heads={self.num_heads}"

    def initial_state(self, batch_size: int) -> State:
        """Return an empty memory: zeros, ((B, P, D), (B, P, D), (B, 1))."""
        weight = self.output.weight
        empty = weight.new_zeros(batch_size, self.past, self.width)
        return empty, empty.clone(), self._count_nothing(batch_size)

    def _count_nothing(self, batch_size: int) -> Tensor:
        weight = self.output.weight  # counts are exact in float32 at least
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.new_zeros(batch_size, 1, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
        outputs: slice = ALL,
    ) -> tuple[Tensor, State]:
        """Mix (B, T, D) along time; without a state it is one call of PyTorch's attention."""
        batch, length, width = x.shape
        queries, keys, values = self.projection(x).split(width, dim=-1)
        if resets is not None and mask is not None:
            resets = resets & mask
        filled = self._count_nothing(batch) if state is None else state[2]
        if state is not None:
            old_keys, old_values = (part.to(keys.dtype) for part in state[:2])
            if resets is not None:
                filled = filled.masked_fill(resets[:, :1], 0.0)
            keys, values = torch.cat([old_keys, keys], 1), torch.cat([old_values, values], 1)
        if state is None and resets is None and mask is None and length <= self.context:
            mixed = self._attend(queries, keys, values)[:, outputs]
        else:
            visible = self._visible(keys.shape[1], length, filled, resets, mask)[:, outputs]
            attend = self._attend if resets is None else self._attend_apart
            mixed = attend(queries[:, outputs], keys, values, visible)
        return self.output(mixed), self._remember(keys, values, length, filled, resets, mask)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None
    ) -> Tensor:
        """Return what queries, (B, Q, D), read of (B, S, D); causal unless told what they see."""
        heads = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (queries, keys, values)
        )
        mask = None if visible is None else visible.unsqueeze(1)  # B 1 Q S
        mixed = functional.scaled_dot_product_attention(
            *heads, attn_mask=mask, is_causal=visible is None
        )
        return mixed.transpose(1, 2).flatten(2)

    def _attend_apart(
        self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor
    ) -> Tensor:
        """Return the same, but NaN for who sees some and no one else: 0 * NaN is NaN."""
        broken = ~(keys.isfinite() & values.isfinite()).all(-1)
        keys, values = (part.masked_fill(broken.unsqueeze(-1), 0.0) for part in (keys, values))
        mixed = self._attend(queries, keys, values, visible)
        return mixed.masked_fill((visible & broken.unsqueeze(1)).any(-1, True), math.nan)

    def _visible(
        self, seen: int, length: int, filled: Tensor, resets: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return which of the tokens, the remembered first, each new one looks at, (B, T, S)."""
        old = seen - length
        slots = torch.arange(1 - old, 1, device=filled.device)  # S - T
        known = slots > -filled  # B S-T
        if length == 1 and mask is None:
            return functional.pad(known, (0, 1), value=True).unsqueeze(1)
        rank = torch.arange(1, length + 1, device=filled.device).expand(filled.shape[0], -1)
        valid = torch.ones_like(rank, dtype=torch.bool)
        if mask is not None:  # the n-th valid token of those that are new
            rank, valid = mask.cumsum(1), mask
        ranks = torch.cat([slots.expand(rank.shape[0], -1), rank], 1).unsqueeze(1)  # B 1 S
        distance = rank.unsqueeze(-1) - ranks  # B T S
        visible = (distance >= 0) & (distance < self.context)
        visible = visible & torch.cat([known, valid], 1).unsqueeze(1)
        if resets is not None:
            sequence = resets.cumsum(1)
            before = functional.pad(sequence, (old, 0)).unsqueeze(1)
            visible = visible & (sequence.unsqueeze(-1) == before)
        if mask is None:
            return visible
        # A token that is not valid sees itself alone: looking at nothing, softmax would be NaN.
        itself = torch.eye(length, seen, dtype=torch.bool, device=mask.device).roll(old, 1)
        return torch.where(mask.unsqueeze(-1), visible, itself)

    def _remember(
        self,
        keys: Tensor,
        values: Tensor,
        length: int,
        filled: Tensor,
        resets: Tensor | None,
        mask: Tensor | None,
    ) -> State:
        """Return the state after the last valid of the ``length`` new tokens, the last of all."""
        missing = self.past - (keys.shape[1] - length)
        kept = [functional.pad(part, (0, 0, missing, 0)) for part in (keys, values)]  # B P+T D
        if mask is None:
            kept = [part[:, length:] for part in kept]
        else:  # valid tokens move together
            present = functional.pad(mask, (self.past, 0), value=True)
            order = torch.sort(~present, dim=1, stable=True).indices
            last = mask.sum(1, keepdim=True) + torch.arange(self.past, device=mask.device)
            index = order.gather(1, last).unsqueeze(-1).expand(-1, -1, self.width)
            kept = [part.gather(1, index) for part in kept]
        filled = (filled + _count_new(filled, length, resets, mask)).clamp(max=self.past)
        if resets is not None:
            slots = torch.arange(1 - self.past, 1, device=filled.device)
            gone = (slots <= -filled).unsqueeze(-1)  # B P 1
            kept = [part.masked_fill(gone, 0.0) for part in kept]
        return *kept, filled


def _count_new(filled: Tensor, length: int, resets: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return by how many tokens the count of those of the last sequence, (B, 1), changes."""
    valid = filled.new_ones(filled.shape[0], length) if mask is None else mask.to(filled.dtype)
    if resets is None:
        return valid.sum(1, keepdim=True)
    sequence = resets.cumsum(1)
    last = sequence[:, -1:]
    of_last = (valid * (sequence == last)).sum(1, keepdim=True)
    return torch.where(last > 0, of_last - filled, of_last)
