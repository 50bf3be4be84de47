"""minGRU and minLSTM as layers that stand where ``nn.GRU`` and ``nn.LSTM`` stand.

Same constructor, shapes and attribute names; the gates look at the input alone, so a whole sequence
is one parallel pass ("Were RNNs All We Needed?", arXiv 2410.01201, sections 3.1 and 3.2).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from minrl.agents.backbones.dropout import dropout
from minrl.agents.backbones.layer import gated_layer
from minrl.agents.backbones.memory import check_memory, remember
from minrl.agents.backbones.nn_errors import (
    check_axes,
    check_construction,
    check_input,
    check_state,
)
from minrl.agents.backbones.scan import check_flags, flags_of_step
from minrl.agents.backbones.scan_torch import CANDIDATES, PARTS

State = Tensor | tuple[Tensor, Tensor]  # a pair (h, c) if there is ``return_cell``


class _MinimalRNN(nn.Module):
    """What the two cells share: everything but the gates of one layer."""

    gates: str
    return_cell = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        candidate: str = "g",
        learn_initial_state: bool = False,
        memory: float | None = None,
    ):
        super().__init__()
        if bidirectional:
            raise ValueError(f"{type(self).__name__} acts online, step by step: no bidirectional")
        if proj_size:
            raise ValueError(f"{type(self).__name__} projects nothing: no {proj_size=}")
        if candidate not in CANDIDATES:
            raise ValueError(f"candidate must be one of {sorted(CANDIDATES)}, not {candidate!r}")
        if memory is not None:
            check_memory(memory, bias)
        check_construction(
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            stacklevel=3 if type(self).__init__ is _MinimalRNN.__init__ else 4,
        )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = False, 0
        self.candidate, self.memory = candidate, memory
        options = {"device": device, "dtype": dtype}
        rows = PARTS[self.gates] * hidden_size
        for layer in range(num_layers):
            columns = input_size if layer == 0 else hidden_size
            weight = nn.Parameter(torch.empty(rows, columns, **options))
            setattr(self, f"weight_ih_l{layer}", weight)
            if bias:
                setattr(self, f"bias_ih_l{layer}", nn.Parameter(torch.empty(rows, **options)))
        # Named bias_*, so that init loops over names set it to a constant, not orthogonal.
        h0 = torch.empty(num_layers, hidden_size, **options) if learn_initial_state else None
        self.register_parameter("bias_h0", None if h0 is None else nn.Parameter(h0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as ``nn.Linear`` does, the gates' as ``memory`` asks; zero the first state.

        Call it after loops that initialise all parameters alike.
        """
        for layer in range(self.num_layers):
            weight = getattr(self, f"weight_ih_l{layer}")
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            if self.bias:
                bias = getattr(self, f"bias_ih_l{layer}")
                nn.init.uniform_(bias, -bound, bound)
                with torch.no_grad():
                    rows = (-1, self.hidden_size)
                    self._start_gates(weight.unflatten(0, rows), bias.unflatten(0, rows))
        if self.bias_h0 is not None:
            nn.init.zeros_(self.bias_h0)

    def _start_gates(self, weight: Tensor, bias: Tensor) -> None:
        """Set what the gates, rows of ``weight`` (G, H, F) and ``bias`` (G, H), begin with."""

    def flatten_parameters(self) -> None:
        """Do nothing: there is no cuDNN buffer to flatten; callers of ``nn.GRU`` may ask."""

    def extra_repr(self) -> str:
        """Show the arguments that differ from their defaults, as ``nn.GRU`` does."""
        shown = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
        defaults |= {"candidate": "g", "normalize": True, "return_cell": False, "memory": None}
        defaults["forget_bias"] = 3.0
        for name, default in defaults.items():
            if getattr(self, name, default) != default:
                shown.append(f"{name}={getattr(self, name)!r}")
        if self.bias_h0 is not None:
            shown.append("learn_initial_state=True")
        return ", ".join(shown)

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The weight of every layer and, if there is one, its bias."""
        names = ("weight_ih", "bias_ih") if self.bias else ("weight_ih",)
        return [
            [getattr(self, f"{name}_l{layer}") for name in names]
            for layer in range(self.num_layers)
        ]

    def initial_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Return the state before a sequence starts, (num_layers, B, H): learned, else zeros."""
        return self._paired(self._first_state(batch_size, device, dtype))

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run whole sequences in parallel.

        Args:
            input: (T, B, F), with ``batch_first`` (B, T, F), unbatched (T, F), or packed.
            hx: State before the first step, (num_layers, B, H), unbatched (num_layers, H).
            resets: bool, shaped like the input without F; True where a new sequence starts: the
                state is set back to ``initial_state`` before that step.
            mask: bool, likewise; where False the step is not valid: the state is carried over it,
                its input may be anything, NaN included, and a reset there does nothing: set it at
                the first valid step of the sequence.

        Returns:
            The top layer's states, shaped like the input, and the last valid state of every layer,
            (num_layers, B, H), in float32 or wider so that a split sequence loses nothing.

        Raises:
            RuntimeError, ValueError: If a shape, type or device does not fit, in the words of
                ``nn.GRU`` (of ``nn.LSTM`` for a pair).
            TypeError: If a pair (h, c) is passed where there is one state, or the other way round.
        """
        hx = self._single(hx)
        if isinstance(input, PackedSequence):
            output, h_n = self._forward_packed(input, hx, resets, mask)
            return output, self._paired(h_n)
        check_axes(type(self).__name__, input, hx, self.return_cell)
        check_flags(input.shape[:-1], resets=resets, mask=mask)
        if input.dim() == 3:
            output, h_n = self._run(input, hx, resets, mask, self.batch_first)
            return output, self._paired(h_n)
        input, hx = input.unsqueeze(1), None if hx is None else hx.unsqueeze(1)
        resets, mask = (None if flag is None else flag.unsqueeze(1) for flag in (resets, mask))
        output, h_n = self._run(input, hx, resets, mask, batch_first=False)
        return output.squeeze(1), self._paired(h_n.squeeze(1))

    def step(
        self, x: Tensor, h: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance one step: ``forward`` with T = 1.

        Args:
            x: (B, F).
            h: State, (num_layers, B, H); the initial state if not given.
            reset: (B,) bool; True rows start a new sequence at this step.

        Returns:
            The output (B, H) and the new state (num_layers, B, H).
        """
        flags = flags_of_step(reset, x)
        output, h = self._run(x.unsqueeze(1), self._single(h), flags, None, batch_first=True)
        return output.squeeze(1), self._paired(h)

    def _single(self, state: State | None) -> Tensor | None:
        if isinstance(state, (tuple, list)) != self.return_cell and state is not None:
            raise TypeError(
                "with return_cell=True a state is a pair (h, c)"
                if self.return_cell
                else f"{type(self).__name__} has one state, not (h, c); where a caller insists on "
                "two, use MinLSTM(..., return_cell=True)"
            )
        if not self.return_cell or state is None:
            return state
        if len(state) != 2:
            raise RuntimeError("lstm expects two hidden states")
        h, c = state
        if c.shape != h.shape:
            raise RuntimeError(f"Expected hidden[1] size {tuple(h.shape)}, got {list(c.shape)}")
        return h

    def _paired(self, state: Tensor) -> State:
        return (state, state) if self.return_cell else state

    def _first_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        weight = self.weight_ih_l0
        where = {"device": device or weight.device, "dtype": dtype or _state_type(weight)}
        if self.bias_h0 is not None:
            # A copy: who sets rows of a state to something must not set the parameter.
            return self.bias_h0.unsqueeze(1).repeat(1, batch_size, 1).to(**where)
        return torch.zeros(self.num_layers, batch_size, self.hidden_size, **where)

    def _run(
        self,
        x: Tensor,
        hx: Tensor | None,
        resets: Tensor | None,
        mask: Tensor | None,
        batch_first: bool,
    ) -> tuple[Tensor, Tensor]:
        check_input(x, self.weight_ih_l0)
        batch = x.shape[0 if batch_first else 1]  # B T F or T B F
        first = self._first_state(batch) if hx is None else hx
        name = "hidden[0]" if self.return_cell else "hidden"
        check_state(first, (self.num_layers, batch, self.hidden_size), x, name)
        if mask is not None:  # not a product: 0 * NaN is NaN in the backward pass
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        last = []
        for layer in range(self.num_layers):
            bias = getattr(self, f"bias_ih_l{layer}") if self.bias else None
            x, h = gated_layer(
                x,
                getattr(self, f"weight_ih_l{layer}"),
                bias,
                first[layer],
                gates=self.gates,
                activation=self.candidate,
                resets=resets,
                reset_state=None if self.bias_h0 is None else self.bias_h0[layer],
                mask=mask,
                batch_first=batch_first,
            )
            last.append(h)
            if layer < self.num_layers - 1:
                x = dropout(x, self.dropout, self.training)
        return x, torch.stack(last)

    def _forward_packed(
        self,
        packed: PackedSequence,
        hx: Tensor | None,
        resets: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[PackedSequence, Tensor]:
        if resets is not None or mask is not None:
            raise ValueError("a PackedSequence has its own lengths: pass no resets and no mask")
        x, lengths = pad_packed_sequence(packed, batch_first=True)
        valid = torch.arange(x.shape[1], device=lengths.device) < lengths.unsqueeze(1)
        output, h_n = self._run(x, hx, None, valid.to(x.device), batch_first=True)
        in_order = packed.sorted_indices is None
        return pack_padded_sequence(output, lengths, True, enforce_sorted=in_order), h_n


class MinGRU(_MinimalRNN):
    """minGRU: h_t = (1 - z_t) h_{t-1} + z_t g(c_t), z_t = sigmoid(W_z x_t), c_t = W_c x_t.

    Takes the arguments of ``nn.GRU``; those it has no meaning for are refused. The rows of
    ``weight_ih_l*`` are the update gate's, then the candidate's. Unlike ``nn.GRU``, it keeps its
    output for the backward pass, so do not change that in place.

    Args:
        input_size: Features of the input, F.
        hidden_size: Features of the state, H.
        num_layers: Layers on top of each other.
        bias: Whether the projections have a bias.
        batch_first: Whether input and output are (B, T, .) rather than (T, B, .).
        dropout: On the output of each layer but the last, in training.
        bidirectional: Refused.
        proj_size: Refused.
        device: As in any module.
        dtype: Likewise.
        candidate: "g" keeps a state positive that begins so (the paper's), "identity" or "tanh"
            (tanh: GILR, Martin & Cundy, arXiv 1709.04057).
        learn_initial_state: Whether the state before a sequence is a parameter rather than zero.
        memory: Steps that the last channel remembers at the start, the others fewer, down to two,
            evenly in the logarithm (chrono initialisation, Tallec & Ollivier, arXiv 1804.11188).
            Without it gates begin half open, all memories end after a few steps, and what lies
            further back has no gradient to learn from. That is at inputs near zero. What differs
            from them, as a cue does, is written at once by some of the channels (their gates begin
            with larger weights), where one part in T of it would be written otherwise. So where all
            inputs are large, of unit variance for instance, only a quarter of the channels remember
            ten steps or more: then ask for more ``memory``.
    """

    gates = "mingru"

    def _start_gates(self, weight: Tensor, bias: Tensor) -> None:
        if self.memory is not None:
            remember(weight[:1], bias[:1], (-1,), self.memory)


class MinLSTM(_MinimalRNN):
    """minLSTM: h_t = f_t h_{t-1} + i_t g(c_t), with f and i divided by f + i if ``normalize``.

    Takes the arguments of ``nn.LSTM``, but has one state, not (h, c). The rows of ``weight_ih_l*``
    are the forget gate's, the input gate's, then the candidate's.

    Args:
        input_size: Features of the input, F.
        hidden_size: Features of the state, H.
        num_layers: Layers on top of each other.
        bias: Whether the projections have a bias.
        batch_first: Whether input and output are (B, T, .) rather than (T, B, .).
        dropout: On the output of each layer but the last, in training.
        bidirectional: Refused.
        proj_size: Refused.
        device: As in any module.
        dtype: Likewise.
        normalize: The paper's equations if True; the configuration its code was released with,
            where f + i is not 1 and the state can grow, if False.
        forget_bias: Added to the forget gate's bias at the start; 3 in the released code. Not where
            there is no bias, or ``memory`` says what the gates begin with.
        return_cell: Whether states are pairs (h, c) wherever they are taken and returned, for code
            written for ``nn.LSTM``. Both are the one state there is; the c that is passed in is not
            looked at.
        candidate: As in :class:`MinGRU`.
        learn_initial_state: As in :class:`MinGRU`.
        memory: As in :class:`MinGRU`.
    """

    def __init__(
        self,
        *args,
        normalize: bool = True,
        forget_bias: float = 3.0,
        return_cell: bool = False,
        **kwargs,
    ):
        self.normalize, self.forget_bias, self.return_cell = normalize, forget_bias, return_cell
        self.gates = "minlstm" if normalize else "minlstm_unnormalised"
        super().__init__(*args, **kwargs)

    def _start_gates(self, weight: Tensor, bias: Tensor) -> None:
        if self.memory is None:
            bias[0] += self.forget_bias
        else:
            remember(weight[:2], bias[:2], (1, -1), self.memory)


CELLS = {"mingru": MinGRU, "minlstm": MinLSTM}


def _state_type(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
