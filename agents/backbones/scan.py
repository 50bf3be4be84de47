"""The gated linear recurrence that minGRU and minLSTM share, over a whole sequence at once.

    h_t = h_{t-1} + (z_t g(v_t) - w_t h_{t-1}),  z_t, w_t gates that look at the input alone

("Were RNNs All We Needed?", arXiv 2410.01201, section 3; ``g`` is its appendix B.) Gates, candidate
and recurrence are one operation, ``torch.ops.minrl.gated_scan``, with a kernel for each kind of
device: pre-activations in, states out. Everything is computed in linear space, with a float32 state
(float64 for float64 inputs): the paper's log-space form loses accuracy as sequences grow, needs
h > 0 and cannot express a reset.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from minrl.agents.backbones.operators import is_transformed
from minrl.agents.backbones.scan_operator import sizes_of
from minrl.agents.backbones.scan_torch import CANDIDATES, scan_by_steps

# A policy's step, of up to this many tokens, is exported as plain operations: it runs without us.
EXPORTED_STEPS = 3


def gated_scan(
    projected: Tensor,
    initial_state: Tensor | None = None,
    *,
    gates: str = "mingru",
    activation: str = "g",
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    mask: Tensor | None = None,
    batch_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over the time axis, in parallel over batch and channels.

    Args:
        projected: The pre-activations as one linear layer puts them out, (B, T, G*H), or
            (T, B, G*H) if not ``batch_first``: G parts of H channels, in the order of ``gates``.
        initial_state: State before the first step, (B, H); zeros if not given.
        gates: What the parts are.
            "mingru": update k, candidate v; z = w = sigmoid(k).
            "minlstm": forget f, input i, candidate v; z = w = i' / (f' + i'), f' = sigmoid(f),
            i' = sigmoid(i) (the division is never carried out: nothing overflows).
            "minlstm_unnormalised": the same parts; z = sigmoid(i), w = 1 - sigmoid(f).
        activation: g, what the candidate passes through: "g", "identity" or "tanh".
        resets: bool, (B, T) or (T, B); True where a new sequence starts: the state *before* that
            step is replaced by ``reset_state``.
        reset_state: (H,) or (B, H); zeros if not given.
        mask: bool, (B, T) or (T, B); the state is carried over unchanged where False (a reset
            included).
        batch_first: Whether the batch is the first axis of ``projected``, ``resets``, ``mask`` and
            the states, or time.

    Returns:
        The states after every step, (B, T, H) or (T, B, H) in the type of ``projected``, and the
        last state, (B, H) in float32 (float64 for float64 inputs).

    NaN anywhere in a step, or a candidate that ``g`` takes to infinity, makes the state not finite,
    until a reset; an infinite gate logit opens or closes the gate.

    Under ``torch.func``'s transforms, in forward-mode differentiation and where gradients are
    differentiated again (``create_graph=True``), it goes step by step in plain operations.

    Raises:
        ValueError: If an option is unknown, or sizes, types or devices do not fit each other.
        RuntimeError: If there is no step at all.
    """
    batch, length, width = sizes_of(projected, gates, batch_first)
    dtype = torch.promote_types(projected.dtype, torch.float32)
    check_arguments(
        activation,
        projected=projected,
        initial_state=initial_state,
        resets=resets,
        reset_state=reset_state,
        mask=mask,
    )
    if initial_state is not None:
        if initial_state.shape != (batch, width):
            given = tuple(initial_state.shape)
            raise ValueError(f"initial_state must be {(batch, width)}, not {given}")
        initial_state = initial_state.to(dtype)
    if reset_state is not None:
        if reset_state.shape not in ((width,), (batch, width)):
            given = tuple(reset_state.shape)
            raise ValueError(f"reset_state must be {(width,)} or {(batch, width)}, not {given}")
        reset_state = reset_state.to(dtype).expand(batch, width)
    if batch == 0:
        states = projected[..., :width]
        return states, states.select(1 if batch_first else 0, -1).to(dtype)
    flags, options = (initial_state, resets, reset_state, mask), (gates, activation, batch_first)
    few = length <= EXPORTED_STEPS and torch.compiler.is_exporting()
    if length == 1 or few or is_transformed():
        return scan_by_steps(projected, *flags, *options)
    output_type = projected.dtype
    if projected.device.type != "cuda":
        projected = projected.to(dtype)
    states, last, _ = torch.ops.minrl.gated_scan(projected, *flags, *options)
    return states.to(output_type), last


def check_arguments(activation: str, **tensors: Tensor | None) -> None:
    """Refuse what the kernels, which see pointers alone, would take for something else.

    Args:
        activation: Of the candidate.
        **tensors: By the caller's names for them: first the sequences, among the others perhaps
            ``resets`` and ``mask``.
    """
    if activation not in CANDIDATES:
        raise ValueError(f"activation must be one of {sorted(CANDIDATES)}, not {activation!r}")
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, sequences = next(iter(given.items()))
    flags = {name: tensors.get(name) for name in ("resets", "mask")}
    check_flags(sequences.shape[:2], **flags)
    for name, tensor in given.items():
        if tensor.device != sequences.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {sequences.device}")


def flags_of_step(reset: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the resets of one step of ``x`` (B, F), (B,), as those of a sequence, (B, 1).

    Raises:
        ValueError: If they are not bool or of another shape, or ``x`` has more or fewer axes.
    """
    if x.dim() != 2:
        raise ValueError(f"a step takes (B, features), one row a sequence, not {tuple(x.shape)}")
    check_flags(x.shape[:1], reset=reset)
    return None if reset is None else reset.unsqueeze(1)


def check_flags(shape: Sequence[int], **flags: Tensor | None) -> None:
    """Refuse flags that are given, but are no tensor of bool of that shape.

    Args:
        shape: Of each.
        **flags: By the caller's names for them.

    Raises:
        ValueError: Names the first that is not.
    """
    for name, given in flags.items():
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        if given is not None and (kind != torch.bool or given.shape != shape):
            found = f"{kind} of {tuple(given.shape)}" if hasattr(given, "shape") else kind
            hint = "" if kind == torch.bool else "; .bool() makes it one of a tensor of 0 and 1"
            raise ValueError(f"{name} must be bool of {tuple(shape)}, not {found}{hint}")


def gated_scan_reference(
    projected: Tensor,
    initial_state: Tensor | None = None,
    *,
    gates: str = "mingru",
    activation: str = "g",
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    mask: Tensor | None = None,
    batch_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`gated_scan` does, one step after another in float64: the tests' oracle.

    Written from the papers' equations, a h + b with a = 1 - z or f, and sharing nothing with the
    implementations.
    """
    time = 1 if batch_first else 0
    parts = projected.double().chunk(2 if gates == "mingru" else 3, dim=-1)
    *gate_parts, candidate = (part.unbind(time) for part in parts)
    state = torch.zeros_like(candidate[0])
    fresh = state if reset_state is None else reset_state.double().expand_as(state)
    if initial_state is not None:
        state = initial_state.double()
    states = []
    for t in range(len(candidate)):
        before = state
        if resets is not None:
            before = torch.where(resets.select(time, t).unsqueeze(-1), fresh, before)
        if gates == "mingru":
            enter = torch.sigmoid(gate_parts[0][t])
            keep = 1 - enter
        else:
            keep, enter = (torch.sigmoid(part[t]) for part in gate_parts)
            if gates == "minlstm":  # f / (f + i), by logarithms where both are zero
                forget, update = (functional.logsigmoid(part[t]) for part in gate_parts)
                keep, enter = torch.sigmoid(forget - update), torch.sigmoid(update - forget)
        v = candidate[t]
        if activation == "g":
            v = torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
        elif activation == "tanh":
            v = torch.tanh(v)
        after = keep * before + enter * v
        if mask is not None:
            after = torch.where(mask.select(time, t).unsqueeze(-1), after, state)
        state = after
        states.append(state)
    return torch.stack(states, dim=time), state
