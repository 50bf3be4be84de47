"""The residual stack around a recurrent cell, with one explicit state.

    x = x + Convolution(x)                  (optional, causal)
    x = x + Dropout(Mixer(LayerNorm(x)))    mixer: cell of width expansion * D, projected back to D
    x = x + Dropout(MLP(LayerNorm(x)))

The order and the MLP are Decision Mamba's (arXiv 2403.19925), the mixer with its down-projection
and the optional convolution are those of "Were RNNs All We Needed?" (arXiv 2410.01201).

A *state* is a tuple of tensors with the batch first; callers pass it on without looking inside.
Every module here has ``initial_state(batch_size)``, and ``forward(x, state, resets=, mask=)``
returning the new state, so that a sequence can be split anywhere.
"""

import torch
from torch import Tensor, nn

from minrl.agents.backbones.cells import MinGRU, MinLSTM
from minrl.agents.backbones.dropout import Dropout

State = tuple[Tensor, ...]

ALL = slice(None)

MIXERS = {"mingru": MinGRU, "minlstm": MinLSTM}


class RecurrentMixer(nn.Module):
    """A minimal RNN of ``expansion * width`` channels and its projection back to ``width``.

    Args:
        width: D, features in and out.
        cell: "mingru" or "minlstm".
        expansion: Hidden channels per feature.
        **options: Passed to the cell, for instance ``candidate`` or ``normalize``.
    """

    def __init__(self, width: int, cell: str = "mingru", expansion: int = 1, **options):
        super().__init__()
        hidden = expansion * width
        self.cell = MIXERS[cell](
            width, hidden, batch_first=True, learn_initial_state=True, **options
        )
        self.output = nn.Linear(hidden, width)

    def initial_state(self, batch_size: int) -> State:
        """Return the learned state, ((B, H),)."""
        return (self.cell.initial_state(batch_size)[0],)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
        outputs: slice = ALL,
    ) -> tuple[Tensor, State]:
        """Mix (B, T, D) along time; see :meth:`MinGRU.forward` for resets and mask."""
        hx = None if state is None else state[0].unsqueeze(0)
        hidden, h_n = self.cell(x, hx, resets=resets, mask=mask)
        return self.output(hidden[:, outputs]), (h_n[0],)


class CausalConvolution(nn.Module):
    """Depthwise convolution over the last ``kernel_size`` valid steps of the same sequence.

    Args:
        width: D, channels.
        kernel_size: Steps seen, the current one included.
    """

    def __init__(self, width: int, kernel_size: int):
        super().__init__()
        self.width, self.past = width, kernel_size - 1
        self.depthwise = nn.Conv1d(width, width, kernel_size, groups=width)
        self.pointwise = nn.Linear(width, width)

    def initial_state(self, batch_size: int) -> State:
        """Return no past inputs: zeros, ((B, kernel_size - 1, D),)."""
        return (self.depthwise.weight.new_zeros(batch_size, self.past, self.width),)

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
        windows = seen.unfold(1, self.past + 1, 1)  # B T D P+1
        if resets is not None:
            sequence = nn.functional.pad(resets.long().cumsum(1), (self.past, 0))  # B P+T
            same = sequence.unfold(1, self.past + 1, 1) == sequence[:, self.past :, None]
            windows = windows.masked_fill(~same.unsqueeze(2), 0.0)
        mixed = (windows * self.depthwise.weight.squeeze(1)).sum(-1) + self.depthwise.bias
        if mask is None:
            after = seen[:, length:]
        else:
            mixed = torch.zeros_like(mixed).scatter(1, order.expand_as(mixed), mixed)
            last = mask.sum(1, keepdim=True) + torch.arange(self.past, device=x.device)  # B P
            after = seen.gather(1, last.unsqueeze(-1).expand(-1, -1, self.width))
        if resets is not None:
            after = self._forget_before_reset(after, resets, mask)
        return self.pointwise(mixed), (after,)

    def _forget_before_reset(self, after: Tensor, resets: Tensor, mask: Tensor | None) -> Tensor:
        """Zero those of the carried inputs, (B, P, D), that lie before the last valid reset."""
        valid = resets.new_full((resets.shape[0],), resets.shape[1], dtype=torch.long)
        if mask is not None:
            valid = mask.sum(1)
        steps = torch.arange(resets.shape[1], device=resets.device)
        started = torch.where(resets & (steps < valid.unsqueeze(1)), steps, -self.past - 1)
        position = valid.unsqueeze(1) - self.past + torch.arange(self.past, device=resets.device)
        return after.masked_fill((position < started.amax(1, keepdim=True)).unsqueeze(-1), 0.0)


class Block(nn.Module):
    """One residual block; see the module's docstring.

    Args:
        width: D.
        mixer: A module with the state protocol, such as :class:`RecurrentMixer`.
        mlp_ratio: Hidden features of the MLP per feature; 0 leaves the MLP out.
        dropout: After the mixer and after the MLP.
        convolution: Kernel size of the causal convolution; 0 leaves it out.
    """

    def __init__(
        self,
        width: int,
        mixer: nn.Module,
        *,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        convolution: int = 0,
    ):
        super().__init__()
        self.convolution = CausalConvolution(width, convolution) if convolution else None
        self.mixer_norm, self.mixer = nn.LayerNorm(width), mixer
        self.mlp_norm = self.mlp = None
        if mlp_ratio:
            self.mlp_norm = nn.LayerNorm(width)
            self.mlp = nn.Sequential(
                nn.Linear(width, mlp_ratio * width),
                nn.GELU(),
                nn.Linear(mlp_ratio * width, width),
            )
        self.dropout = Dropout(dropout)

    def initial_state(self, batch_size: int) -> State:
        """Return the mixer's state, then the convolution's if there is one."""
        state = self.mixer.initial_state(batch_size)
        if self.convolution is not None:
            state += self.convolution.initial_state(batch_size)
        return state

    def forward(
        self,
        x: Tensor,
        state: State,
        *,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
        outputs: slice = ALL,
    ) -> tuple[Tensor, State]:
        """Transform (B, T, D); see :meth:`Backbone.forward`."""
        carried: State = ()
        if self.convolution is not None:
            *state, past = state
            mixed, carried = self.convolution(x, (past,), resets=resets, mask=mask)
            x = x + mixed
        mixed, mixer_state = self.mixer(
            self.mixer_norm(x), tuple(state), resets=resets, mask=mask, outputs=outputs
        )
        x = x[:, outputs] + self.dropout(mixed)
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, mixer_state + carried


class Backbone(nn.Module):
    """A stack of residual blocks with one explicit state: the drop-in for other people's models.

    Called as the cells are, but for the state, which is a tuple that nobody has to look into:
    ``reset_state`` starts sequences anew in it.

    Args:
        width: D, features in and out.
        num_layers: Blocks.
        backbone: "mingru" or "minlstm".
        expansion: Hidden channels of the cell per feature.
        mlp_ratio: See :class:`Block`.
        dropout: See :class:`Block`.
        convolution: See :class:`Block`.
        batch_first: Whether input and output are (B, T, D) rather than (T, B, D).
        **options: Passed to the cell.
    """

    def __init__(
        self,
        width: int,
        num_layers: int = 3,
        backbone: str = "mingru",
        *,
        batch_first: bool = True,
        expansion: int = 1,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        convolution: int = 0,
        **options,
    ):
        super().__init__()
        self.input_size = self.hidden_size = width
        self.num_layers, self.batch_first = num_layers, batch_first
        self.blocks = nn.ModuleList(
            Block(
                width,
                RecurrentMixer(width, backbone, expansion, **options),
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                convolution=convolution,
            )
            for _ in range(num_layers)
        )

    def initial_state(self, batch_size: int) -> State:
        """Return the learned state before a sequence starts: a tuple of (B, ...) tensors."""
        return sum((block.initial_state(batch_size) for block in self.blocks), ())

    def reset_state(self, state: State, mask: Tensor) -> State:
        """Return ``state`` with the rows where ``mask`` (B,) is True set to the initial state."""
        fresh = self.initial_state(mask.shape[0])
        return tuple(
            torch.where(mask.view(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old)
            for new, old in zip(fresh, state, strict=True)
        )

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
        outputs: slice = ALL,
    ) -> tuple[Tensor, State]:
        """Run sequences in parallel.

        Args:
            x: (B, T, D), or (T, B, D) if not ``batch_first``, or unbatched (T, D).
            state: From the call before; the initial state if not given.
            resets: bool, shaped like x without D, True where a new sequence starts at that step.
            mask: bool, likewise, False where a step is not valid and must leave no trace in the
                state; the output there is meaningless.
            outputs: Which steps' outputs are returned; for others the last block is not computed
                beyond its state.

        Returns:
            The output of these steps, shaped like x, and the state after the last valid step.

        Raises:
            ValueError: If x has another number of axes, or of features.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"Backbone: Expected input of (B, T, {self.input_size}), got {tuple(x.shape)}"
            )
        if x.dim() == 2:
            x, resets, mask = (y if y is None else y.unsqueeze(0) for y in (x, resets, mask))
            y, state = self._run(x, state, resets, mask, outputs)
            return y.squeeze(0), state
        if self.batch_first:
            return self._run(x, state, resets, mask, outputs)
        x, resets, mask = (y if y is None else y.transpose(0, 1) for y in (x, resets, mask))
        y, state = self._run(x, state, resets, mask, outputs)
        return y.transpose(0, 1), state

    def step(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance one step, ``forward`` with T = 1: x (B, D), reset (B,) bool."""
        resets = None if reset is None else reset.unsqueeze(1)
        y, state = self._run(x.unsqueeze(1), state, resets, None, ALL)
        return y.squeeze(1), state

    def _run(
        self,
        x: Tensor,
        state: State | None,
        resets: Tensor | None,
        mask: Tensor | None,
        outputs: slice,
    ) -> tuple[Tensor, State]:
        if state is None:
            state = self.initial_state(x.shape[0])
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        per_block = len(state) // len(self.blocks)
        after: State = ()
        for index, block in enumerate(self.blocks):
            before = state[index * per_block : (index + 1) * per_block]
            wanted = outputs if index == len(self.blocks) - 1 else ALL
            x, block_state = block(x, before, resets=resets, mask=mask, outputs=wanted)
            after += block_state
        return x, after
