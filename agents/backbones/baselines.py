"""Recurrent rivals of the minimal RNNs, under the same blocks and with the same state protocol."""

import torch
from torch import Tensor, nn

from minrl.agents.backbones.cells import MinGRU, MinLSTM
from minrl.agents.backbones.mixers import ALL, State


class TorchMixer(nn.Module):
    """``nn.GRU`` or ``nn.LSTM``, whose gates look at the state, and a projection back to ``width``.

    Sequences without resets and masks are one call of PyTorch; others are run step by step, since
    PyTorch's layers can neither forget nor stand still on the way.

    Args:
        cell: ``nn.GRU`` or ``nn.LSTM``.
        width: D, features in and out.
        expansion: Hidden channels per feature.
        learn_initial_state: Whether the state before a sequence is learned, rather than zero.
    """

    def __init__(
        self,
        cell: type[nn.GRU | nn.LSTM],
        width: int,
        *,
        expansion: int = 1,
        learn_initial_state: bool = True,
    ):
        super().__init__()
        hidden = expansion * width
        self.cell = cell(width, hidden, batch_first=True)
        self.output = nn.Linear(hidden, width)
        first = torch.zeros(2 if cell is nn.LSTM else 1, hidden)  # h, and the LSTM's c
        if learn_initial_state:
            self.bias_h0 = nn.Parameter(first)
        else:
            self.register_buffer("bias_h0", first, persistent=False)

    def initial_state(self, batch_size: int) -> State:
        """Return the state before a sequence, ((B, H),) or for ``nn.LSTM`` ((B, H), (B, H))."""
        return tuple(part.repeat(batch_size, 1) for part in self.bias_h0)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
        outputs: slice = ALL,
    ) -> tuple[Tensor, State]:
        """Mix (B, T, D) along time."""
        fresh = self.initial_state(x.shape[0])
        state = fresh if state is None else state
        if resets is None and mask is None:
            hidden, state = self._run(x, state)
            return self.output(hidden[:, outputs]), state
        hidden = []
        for step in range(x.shape[1]):
            valid = None if mask is None else mask[:, step]
            if resets is not None:
                starts = resets[:, step] if valid is None else resets[:, step] & valid
                state = _choose(starts, fresh, state)
            output, after = self._run(x[:, step : step + 1], state)
            state = after if valid is None else _choose(valid, after, state)
            hidden.append(output)
        return self.output(torch.cat(hidden, 1)[:, outputs]), state

    def _run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        parts = tuple(part.unsqueeze(0) for part in state)
        is_lstm = isinstance(self.cell, nn.LSTM)
        hidden, after = self.cell(x, parts if is_lstm else parts[0])
        after = after if is_lstm else (after,)
        # Autocast makes h and c narrower, and only under it would they be taken.
        return hidden, tuple(
            part[0].to(before.dtype) for part, before in zip(after, state, strict=True)
        )


class GilrLSTMMixer(nn.Module):
    """GILR-LSTM (Martin & Cundy 2018, arXiv 1709.04057, section 3.2): an LSTM with two scans.

    A gated linear recurrence s_t, whose gates look at the input alone, stands in for the LSTM's own
    past, so that nothing is left to be computed step by step:

        f_t, i_t, o_t = sigmoid(W [x_t, s_{t-1}]),   z_t = tanh(W_z [x_t, s_{t-1}])
        c_t = f_t c_{t-1} + i_t z_t,   h_t = o_t c_t

    Args:
        width: D, features in and out.
        expansion: Hidden channels per feature.
        learn_initial_state: Whether the state before a sequence is learned, rather than zero.
    """

    def __init__(self, width: int, *, expansion: int = 1, learn_initial_state: bool = True):
        super().__init__()
        hidden = expansion * width
        options = {
            "batch_first": True,
            "candidate": "tanh",
            "learn_initial_state": learn_initial_state,
        }
        self.surrogate = MinGRU(width, hidden, **options)
        self.cell = MinLSTM(width + hidden, hidden, normalize=False, forget_bias=1.0, **options)
        self.output_gate = nn.Linear(width + hidden, hidden)
        self.output = nn.Linear(hidden, width)

    def initial_state(self, batch_size: int) -> State:
        """Return s and c before a sequence, ((B, H), (B, H))."""
        return tuple(layer.initial_state(batch_size)[0] for layer in (self.surrogate, self.cell))

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
        outputs: slice = ALL,
    ) -> tuple[Tensor, State]:
        """Mix (B, T, D) along time."""
        fresh = self.initial_state(x.shape[0])
        surrogate, cell = fresh if state is None else state
        linear, s_n = self.surrogate(x, surrogate.unsqueeze(0), resets=resets, mask=mask)
        before = torch.cat([surrogate.to(linear.dtype).unsqueeze(1), linear[:, :-1]], 1)  # B T H
        if resets is not None:
            starts = resets if mask is None else resets & mask
            restarted = fresh[0].to(before.dtype).unsqueeze(1)
            before = torch.where(starts.unsqueeze(-1), restarted, before)
        seen = torch.cat([x, before], -1)
        cells, c_n = self.cell(seen, cell.unsqueeze(0), resets=resets, mask=mask)
        hidden = self.output_gate(seen[:, outputs]).sigmoid() * cells[:, outputs]
        return self.output(hidden), (s_n[0], c_n[0])


def _choose(rows: Tensor, there: State, elsewhere: State) -> State:
    """Return ``there`` in the rows, (B,) bool, and ``elsewhere`` in the others."""
    rows = rows.unsqueeze(1)
    return tuple(torch.where(rows, a, b) for a, b in zip(there, elsewhere, strict=True))
