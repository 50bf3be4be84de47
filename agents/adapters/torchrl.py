"""minGRU and minLSTM in TorchRL: TensorDictModules where ``GRUModule`` and ``LSTMModule`` stand.

    recurrent = MinGRUModule(F, H, in_key="observation", out_key="embedding")  # was GRUModule(...)
    policy = TensorDictSequential(recurrent, head)
    environment = TransformedEnv(GymEnv("CartPole-v1"), get_env_transforms_from_module(policy))

Step by step in a rollout, whole sequences under ``set_recurrent_mode(True)``, which TorchRL's
losses set themselves; a ``GAE`` called on its own needs ``with set_recurrent_mode(True):`` around
it, and ``deactivate_vmap=True``. Where ``is_init`` is set inside a sequence, TorchRL's modules cut
the batch there and pad the pieces, or loop over time; here it is a reset in the one scan.

The bare cell works inside TorchRL's own modules too, with ``recurrent_backend="pad"``, the default:

    GRUModule(gru=MinGRU(F, H, batch_first=True), in_key=..., out_key=...)
    LSTMModule(lstm=MinLSTM(F, H, batch_first=True, return_cell=True), in_key=..., out_key=...)

``"scan"`` and ``"triton"`` do not work there, nor does ``"auto"`` under ``torch.compile``, where it
means "scan": they read the weights of an ``nn.GRU`` or ``nn.LSTM``, recurrent ones among them. And
a learned initial state is not looked at there, since they pass zeros: that is for the modules here.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrl.agents.adapters.libraries import check_call, interface_of
from minrl.agents.backbones.blocks import Backbone
from minrl.agents.backbones.cells import MinGRU, MinLSTM

with interface_of("torchrl", install="pip install torchrl", known="0.14"):
    from tensordict import TensorDictBase, unravel_key_list
    from tensordict.nn import TensorDictModuleBase, dispatch
    from torchrl.data import Unbounded
    from torchrl.envs import TensorDictPrimer
    from torchrl.modules import GRUModule, recurrent_mode

    check_call(TensorDictPrimer.__init__, None, {}, expand_specs=True)
    check_call(recurrent_mode)
    check_call(Unbounded.__init__, None, shape=(1,), dtype=torch.float32)
    DEFAULT_STATE_KEYS = (GRUModule.DEFAULT_IN_KEYS, GRUModule.DEFAULT_OUT_KEYS)


# Of TorchRL's modules, how they compute; here there is one way, the scan.
BACKEND_OPTIONS = (
    "python_based",
    "recurrent_backend",
    "recurrent_compute_dtype",
    "recurrent_matmul_precision",
    "recurrent_recompute",
)


class _RecurrentModule(TensorDictModuleBase):
    """What the modules share: all but what a state looks like to the core.

    Args:
        core: What is called, kept as the attribute ``core_name``.
        in_key: Key of the input, (*batch, F), (*batch, T, F) in recurrent mode; the state's key is
            then "recurrent_state". Give this or ``in_keys``.
        in_keys: Keys of the input, of the state and, unless it is "is_init", of the starts.
        out_key: Key of the output; the state's is then ("next", "recurrent_state").
        out_keys: Keys of the output and of the new state.
        default_recurrent_mode: Whether inputs are sequences where ``set_recurrent_mode`` is not
            in force.
    """

    DEFAULT_IN_KEYS, DEFAULT_OUT_KEYS = DEFAULT_STATE_KEYS
    core_name: str

    def __init__(
        self,
        core: nn.Module,
        *,
        in_key=None,
        in_keys=None,
        out_key=None,
        out_keys=None,
        default_recurrent_mode: bool | None = None,
    ):
        super().__init__()
        in_keys = _keys("in", in_key, in_keys, self.DEFAULT_IN_KEYS)
        self.out_keys = _keys("out", out_key, out_keys, self.DEFAULT_OUT_KEYS)
        if len(in_keys) == 2:
            in_keys.append("is_init")
        if len(in_keys) != 3 or len(self.out_keys) != 2:
            raise ValueError(
                f"{type(self).__name__} takes an input, a state and is_init and returns an output "
                f"and a state, not {in_keys} and {self.out_keys}"
            )
        self.in_keys = in_keys
        setattr(self, self.core_name, core)
        self._default_recurrent_mode = bool(default_recurrent_mode)

    @property
    def recurrent_mode(self) -> bool:
        """Whether inputs are sequences: what ``set_recurrent_mode`` says, else the default."""
        mode = recurrent_mode()
        return self._default_recurrent_mode if mode is None else mode

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that puts the state into an environment's specs and resets.

        Raises:
            RuntimeError: If the new state's key is not ("next", <the state's key>).
        """
        state_in, state_out = (
            (key,) if isinstance(key, str) else key for key in (self.in_keys[1], self.out_keys[1])
        )
        if state_out != ("next", *state_in):
            raise RuntimeError(f"a state of key {state_out} is not carried over to {state_in}")
        state = self._initial_state()
        return TensorDictPrimer(
            {state_in: Unbounded(shape=state.shape[1:], dtype=state.dtype)}, expand_specs=True
        )

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the output and the new state.

        One step of every element, the state set back where ``is_init`` is set; or in recurrent mode
        sequences, time being the last batch dimension. There the state is read where a sequence
        starts, at the first step and where ``is_init`` is set, as TorchRL's modules do: the state
        stored at these steps, or the initial state if there is none, or it is zero where
        ``is_init`` is set. What is written is the state after the last step, at the last step, and
        zeros before it (TorchRL's modules also write it where an episode ends before that).

        Raises:
            ValueError: In recurrent mode, if there is no time dimension.
            KeyError: If there is no input or, for want of an ``InitTracker``, no ``is_init``; or,
                step by step, no state in the middle of an episode, for want of a primer: nothing
                would ever be remembered.
        """
        x, state, starts = (
            tensordict[self.in_keys[0]],
            tensordict.get(self.in_keys[1], None),
            tensordict[self.in_keys[2]],
        )
        shape, in_sequence = tensordict.batch_size, self.recurrent_mode
        if in_sequence and not shape:
            raise ValueError(f"{type(self).__name__} in recurrent mode: there is no time dimension")
        steps = shape[-1] if in_sequence else 1
        x, starts = x.reshape(-1, steps, x.shape[-1]), starts.reshape(-1, steps)  # B T F
        if state is not None:
            state = state.reshape(-1, steps, *state.shape[len(shape) :])  # B T ...
        if in_sequence:
            output, state = self._run_sequences(x, state, starts)
            # zeros before, for there has to be a state at every step
            state = functional.pad(state.unsqueeze(1), [0, 0] * (state.dim() - 1) + [steps - 1, 0])
        else:
            if state is None:
                self._refuse_to_forget(starts)
            output, state = self._run(x, None if state is None else state[:, 0], starts)
        tensordict.set(self.out_keys[0], output.reshape(*shape, output.shape[-1]))
        tensordict.set(self.out_keys[1], state.reshape(*shape, *state.shape[1 + in_sequence :]))
        return tensordict

    def _run_sequences(
        self, x: Tensor, state: Tensor | None, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        if state is None:
            return self._run(x, None, starts)
        stored = _stored(state, starts)
        if stored is None:
            return self._run(x, state[:, 0], starts)
        resets = starts & ~stored
        if not stored[:, 1:].any():
            return self._run(x, state[:, 0], resets)
        # A reset has one state for all, so rows are cut where another one is stored. That is for
        # slices laid end to end, and the "next" half of an advantage: not what is learned from.
        stored[:, 0] = True
        first = stored.flatten().nonzero().squeeze(1)  # N pieces, of the rows end to end
        lengths = torch.diff(first, append=first.new_tensor([starts.numel()]))
        steps = torch.arange(int(lengths.max()), device=x.device)
        inside = steps < lengths.unsqueeze(1)  # N T
        places = torch.where(inside, first.unsqueeze(1) + steps, 0)
        x, resets = x.flatten(0, 1)[places], resets.flatten()[places]
        output, last = self._run(x, state.flatten(0, 1)[first], resets, inside)
        ends = (first + lengths) % starts.shape[1] == 0
        return output[inside].unflatten(0, starts.shape), last[ends]

    @torch.compiler.disable  # it looks at data; with a primer it is never called
    def _refuse_to_forget(self, starts: Tensor) -> None:
        if not starts.all():
            raise KeyError(
                f"no {self.in_keys[1]!r} in the middle of an episode: append "
                f"{type(self).__name__}.make_tensordict_primer() to the environment's transforms, "
                "or get_env_transforms_from_module(policy)"
            )

    def _initial_state(self) -> Tensor:
        """Return the state of one element before a sequence starts, (1, ...)."""
        raise NotImplementedError

    def _run(
        self, x: Tensor, state: Tensor | None, resets: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the output for (B, T, F) and the last state; states are (B, ...)."""
        raise NotImplementedError


@torch.compiler.disable  # what is looked up depends on the data
def _stored(state: Tensor, starts: Tensor) -> Tensor | None:
    """Return which of the starts, (B, T), have a state stored; None if none has."""
    there = state[starts].flatten(1).any(1)
    if not there.any():
        return None
    return starts.masked_scatter(starts, there)


def _keys(side: str, key, keys, default: list) -> list:
    if (key is None) == (keys is None):
        raise ValueError(f"give either {side}_key or {side}_keys, not {key!r} and {keys!r}")
    return unravel_key_list([key, *default] if keys is None else list(keys))


class _CellModule(_RecurrentModule):
    """A module around a :class:`MinGRU` or :class:`MinLSTM`; their states are (L, B, H)."""

    cell: type[nn.Module]

    def __init__(
        self,
        input_size: int | None = None,
        hidden_size: int | None = None,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        *,
        in_key=None,
        in_keys=None,
        out_key=None,
        out_keys=None,
        default_recurrent_mode: bool | None = None,
        **options,
    ):
        for name in BACKEND_OPTIONS:
            options.pop(name, None)
        core = options.pop(self.core_name, None)
        if core is None:
            sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout)
            core = self.cell(*sizes, **options)
        elif options or (input_size, hidden_size, num_layers, bias, batch_first, dropout) != (
            *(None, None, 1, True, True, 0.0),
        ):
            raise ValueError(f"give either {self.core_name} or the arguments to build one")
        if not isinstance(core, self.cell):
            raise ValueError(f"{self.core_name} must be a {self.cell.__name__}, not {core!r}")
        if not core.batch_first or core.return_cell:
            raise ValueError(f"{self.core_name} must have batch_first=True and one state, not two")
        super().__init__(
            core,
            in_key=in_key,
            in_keys=in_keys,
            out_key=out_key,
            out_keys=out_keys,
            default_recurrent_mode=default_recurrent_mode,
        )

    def _initial_state(self) -> Tensor:
        return getattr(self, self.core_name).initial_state(1).transpose(0, 1)

    def _run(
        self, x: Tensor, state: Tensor | None, resets: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        state = None if state is None else state.transpose(0, 1)
        core = getattr(self, self.core_name)
        output, state = core(x, state, resets=resets, mask=mask)
        return output, state.transpose(0, 1)


class MinGRUModule(_CellModule):
    """A :class:`MinGRU` with the arguments, keys and modes of TorchRL's ``GRUModule``.

    The state is (*batch, L, H), (*batch, T, L, H) in recurrent mode; L layers. Weights are named as
    in ``GRUModule(gru=MinGRU(...))``: a state_dict fits both.

    Args:
        input_size: F; this and all that follow up to ``dropout`` as in :class:`MinGRU`.
        hidden_size: H.
        num_layers: L.
        bias: Whether there is one.
        batch_first: True.
        dropout: Between layers, in training.
        in_key: As in ``GRUModule``, like the other keys: the input, then the state, then is_init.
        in_keys: Instead of ``in_key``.
        out_key: The output, then the new state.
        out_keys: Instead of ``out_key``.
        default_recurrent_mode: Whether inputs are sequences outside ``set_recurrent_mode``.
        **options: ``gru``, a core to use instead of building one; or ``device``, ``dtype``,
            ``candidate``, ``memory`` and ``learn_initial_state`` of the one that is built;
            ``python_based`` and what TorchRL calls ``recurrent_...`` change nothing.

    Raises:
        ValueError: If the core is another cell or has ``batch_first=False``, or keys do not fit.
    """

    core_name, cell = "gru", MinGRU


class MinLSTMModule(_CellModule):
    """A :class:`MinLSTM` with the arguments, keys and modes of ``LSTMModule``, but one state.

    Who comes from ``LSTMModule`` leaves one key out on both sides: ``in_keys=[x, "h"]`` and
    ``out_keys=[y, ("next", "h")]`` stand for ``[x, "h", "c"]`` and ``[y, ("next", "h"),
    ("next", "c")]``. With ``in_key`` and ``out_key`` the state's key is "recurrent_state", as
    ``GRUModule``'s, where ``LSTMModule`` has "recurrent_state_h" and "recurrent_state_c".

    Arguments are those of :class:`MinGRUModule`, with ``lstm`` for ``gru`` (one of
    ``return_cell=False``) and with ``normalize`` and ``forget_bias`` besides.
    """

    core_name, cell = "lstm", MinLSTM


class BackboneModule(_RecurrentModule):
    """A :class:`Backbone`, of the input's width, likewise; its state is one vector, (*batch, S).

    Arguments are the :class:`Backbone` and the keys of :class:`MinGRUModule`.
    """

    core_name = "backbone"

    def __init__(self, backbone: Backbone, **options):
        if not backbone.batch_first:
            raise ValueError("backbone must have batch_first=True")
        if not backbone.state_shapes:
            raise ValueError("this backbone remembers nothing: it needs no recurrent module")
        super().__init__(backbone, **options)

    def _initial_state(self) -> Tensor:
        return _flat(self.backbone.initial_state(1))

    def _run(
        self, x: Tensor, state: Tensor | None, resets: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if state is not None:
            shapes = self.backbone.state_shapes
            parts = state.split([math.prod(shape) for shape in shapes], dim=1)
            parts = zip(parts, shapes, strict=True)
            state = tuple(part.unflatten(1, shape) for part, shape in parts)
        output, state = self.backbone(x, state, resets=resets, mask=mask)
        return output, _flat(state)


def _flat(state: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten(1) for part in state], dim=1)
