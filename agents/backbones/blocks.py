"""The residual stack around a mixer, with one explicit state.

    x = x + Convolution(x)                  (optional, causal)
    x = x + Dropout(Mixer(LayerNorm(x)))    mixer: see MIXERS
    x = x + Dropout(MLP(LayerNorm(x)))

The order and the MLP are Decision Mamba's (arXiv 2403.19925), the recurrent mixers with their
down-projection and the optional convolution are those of "Were RNNs All We Needed?" (arXiv
2410.01201). Modules here keep the protocol of ``mixers.py``.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from minrl.agents.backbones.attention import AttentionMixer
from minrl.agents.backbones.baselines import GilrLSTMMixer, TorchMixer
from minrl.agents.backbones.cells import MinGRU, MinLSTM
from minrl.agents.backbones.convolution import CausalConvolution
from minrl.agents.backbones.dropout import Dropout
from minrl.agents.backbones.mamba import MambaMixer
from minrl.agents.backbones.mixers import ALL, RecurrentMixer, State
from minrl.agents.backbones.scan import check_flags, flags_of_step

# What makes the mixer of a block, given its width; "mlp" has blocks without one.
MIXERS = {
    "mingru": partial(RecurrentMixer, MinGRU),
    "minlstm": partial(RecurrentMixer, MinLSTM),
    "gilr": partial(RecurrentMixer, MinGRU, candidate="tanh"),
    "gilr_lstm": GilrLSTMMixer,
    "gru": partial(TorchMixer, nn.GRU),
    "lstm": partial(TorchMixer, nn.LSTM),
    "mamba": MambaMixer,
    "transformer": AttentionMixer,
    "mlp": None,
}


class Block(nn.Module):
    """One residual block; see the module's docstring.

    Args:
        width: D.
        mixer: One of ``MIXERS``; None leaves it out, and only a convolution looks back.
        mlp_ratio: Hidden features of the MLP per feature; 0 leaves the MLP out.
        dropout: After the mixer and after the MLP.
        convolution: Kernel size of the causal convolution; 0 leaves it out.
    """

    def __init__(
        self,
        width: int,
        mixer: nn.Module | None,
        *,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        convolution: int = 0,
    ):
        super().__init__()
        self.convolution = CausalConvolution(width, convolution) if convolution else None
        self.mixer_norm = self.mixer = None
        if mixer is not None:
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
        state = () if self.mixer is None else self.mixer.initial_state(batch_size)
        if self.convolution is not None:
            state += self.convolution.initial_state(batch_size)
        return state

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
        outputs: slice = ALL,
    ) -> tuple[Tensor, State]:
        """Transform (B, T, D); see :meth:`Backbone.forward`."""
        carried: State = ()
        if self.convolution is not None:
            state, past = (None, None) if state is None else (state[:-1], state[-1:])
            mixed, carried = self.convolution(x, past, resets=resets, mask=mask)
            x = x + mixed
        if self.mixer is None:
            x, mixer_state = x[:, outputs], ()
        else:
            mixed, mixer_state = self.mixer(
                self.mixer_norm(x), state, resets=resets, mask=mask, outputs=outputs
            )
            x = x[:, outputs] + self.dropout(mixed)
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, mixer_state + carried


class Backbone(nn.Module):
    """A stack of residual blocks with one explicit state: the drop-in for other people's models.

    Called as the cells are, with ``state`` for ``hx``: a tuple that nobody has to look into, in
    which ``reset_state`` starts sequences anew. It takes no ``PackedSequence``.

    Args:
        width: D, features in and out.
        num_layers: Blocks.
        backbone: A key of ``MIXERS``.
        mlp_ratio: See :class:`Block`.
        dropout: See :class:`Block`.
        convolution: See :class:`Block`.
        batch_first: Whether input and output are (B, T, D) rather than (T, B, D).
        device: As in any module.
        dtype: Likewise.
        **options: Passed to the mixer: ``expansion`` and so on; a transformer needs ``context``,
            the tokens that it sees.
    """

    def __init__(
        self,
        width: int,
        num_layers: int = 3,
        backbone: str = "mingru",
        *,
        batch_first: bool = True,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        convolution: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, not {num_layers}")
        if backbone not in MIXERS:
            raise ValueError(f"backbone must be one of {', '.join(MIXERS)}, not {backbone!r}")
        make_mixer = MIXERS[backbone]
        if make_mixer is None and options:
            raise TypeError(f"{backbone} has no mixer to give {', '.join(options)} to")
        if backbone == "transformer" and "context" not in options:
            raise TypeError("a transformer needs context=, how many tokens it looks back on")
        self.input_size = self.hidden_size = width
        self.num_layers, self.batch_first = num_layers, batch_first
        self.blocks = nn.ModuleList(
            Block(
                width,
                make_mixer and make_mixer(width, **options),
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                convolution=convolution,
            )
            for _ in range(num_layers)
        )
        self.to(device=device, dtype=dtype)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the state's tensors, without their first axis, the batch."""
        return tuple(tuple(part.shape[1:]) for part in self.initial_state(1))

    def flatten_parameters(self) -> None:
        """Do nothing: there is no cuDNN buffer to flatten; callers of ``nn.GRU`` may ask."""

    def initial_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Return the learned state before a sequence starts: a tuple of (B, ...) tensors.

        ``dtype`` is for those of them that are not whole numbers.
        """
        state = sum((block.initial_state(batch_size) for block in self.blocks), ())
        return tuple(
            part.to(device=device, dtype=dtype if part.is_floating_point() else None)
            for part in state
        )

    def reset_state(self, state: State, mask: Tensor) -> State:
        """Return ``state`` with the rows where ``mask`` (B,) is True set to the initial state.

        Raises:
            ValueError: If the mask is not bool or has another shape, or the state is of another
                backbone.
        """
        batch = state[0].shape[0] if state else len(mask)
        self._check_state(state, batch)
        check_flags((batch,), mask=mask)
        fresh = self.initial_state(batch)
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
                state, a reset there included (set it at the first valid step of the sequence); the
                output there is meaningless.
            outputs: Which steps' outputs are returned; for others the last block is not computed
                beyond its state.

        Returns:
            The output of these steps, shaped like x, and the state after the last valid step.

        Raises:
            TypeError: If x is packed.
            ValueError: If x has another number of axes, or of features, flags are not bool or have
                another shape, or the state is not of B such sequences.
        """
        if isinstance(x, PackedSequence):
            raise TypeError("Backbone takes no PackedSequence: pad it, and pass a mask")
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"Backbone: Expected input of (B, T, {self.input_size}), got {tuple(x.shape)}"
            )
        check_flags(x.shape[:-1], resets=resets, mask=mask)
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
        resets = flags_of_step(reset, x)
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
        if state is not None:
            self._check_state(state, x.shape[0])
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        per_block = 0 if state is None else len(state) // len(self.blocks)
        after: State = ()
        for index, block in enumerate(self.blocks):
            before = None  # a new sequence: some mixers have a shorter way for these
            if per_block:
                before = state[index * per_block : (index + 1) * per_block]
            wanted = outputs if index == len(self.blocks) - 1 else ALL
            x, block_state = block(x, before, resets=resets, mask=mask, outputs=wanted)
            after += block_state
        return x, after

    def _check_state(self, state: State, batch: int) -> None:
        expected = [(batch, *shape) for shape in self.state_shapes]
        found = [tuple(part.shape) for part in state]
        if found != expected:
            raise ValueError(f"Backbone: Expected a state of shapes {expected}, got {found}")
