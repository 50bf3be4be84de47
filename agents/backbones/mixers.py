"""What mixes a sequence along time inside a block: the protocol, and the minimal RNNs in it.

A *state* is a tuple of tensors with the batch first; callers pass it on without looking inside.
Every mixer has ``initial_state(batch_size)`` and ``forward(x, state, resets=, mask=, outputs=)``
returning the new state, so that a sequence can be split anywhere.
"""

from torch import Tensor, nn

from minrl.agents.backbones.cells import MinGRU, MinLSTM

State = tuple[Tensor, ...]

ALL = slice(None)


class RecurrentMixer(nn.Module):
    """A minimal RNN of ``expansion * width`` channels and its projection back to ``width``.

    Args:
        cell: The class of the cell.
        width: D, features in and out.
        expansion: Hidden channels per feature.
        learn_initial_state: Whether the state before a sequence is learned, rather than zero.
        **options: Passed to the cell, for instance ``candidate`` or ``normalize``.
    """

    def __init__(
        self,
        cell: type[MinGRU | MinLSTM],
        width: int,
        *,
        expansion: int = 1,
        learn_initial_state: bool = True,
        **options,
    ):
        super().__init__()
        hidden = expansion * width
        self.cell = cell(
            width, hidden, batch_first=True, learn_initial_state=learn_initial_state, **options
        )
        self.output = nn.Linear(hidden, width)

    def initial_state(self, batch_size: int) -> State:
        """Return the state before a sequence, ((B, H),)."""
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
