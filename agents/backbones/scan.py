"""The gated linear recurrence that minGRU and minLSTM share, over a whole sequence at once.

    h_t = a_t * h_{t-1} + b_t,  a_t = sigmoid(-update_t),  b_t = sigmoid(update_t) * g(candidate_t)

("Were RNNs All We Needed?", arXiv 2410.01201, section 3; ``g`` is its appendix B.) Everything is
computed in linear space: the paper's log-space form loses accuracy as sequences grow, needs h > 0
and cannot express a reset. Inputs are pre-activations, so that 1 - z is sigmoid(-update) to full
precision, and the state is float32 (float64 for float64 inputs) whatever the input type.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Up to this length one pass over the steps is faster than two passes over chunks (CPU, measured).
SEQUENTIAL_LENGTH = 192


def positive(x: Tensor) -> Tensor:
    """Return ``g(x)``: x + 0.5 where x >= 0, else sigmoid(x) (arXiv 2410.01201, appendix B)."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


CANDIDATES: dict[str, Callable[[Tensor], Tensor]] = {
    "g": positive,
    "identity": lambda x: x,
    "tanh": torch.tanh,
}


def gated_scan(
    update: Tensor,
    candidate: Tensor,
    initial_state: Tensor | None = None,
    *,
    forget: Tensor | None = None,
    activation: str = "g",
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over the time axis, in parallel over batch and channels.

    Args:
        update: Pre-activation of the update (minLSTM: input) gate, (B, T, H).
        candidate: Pre-activation of the candidate, (B, T, H).
        initial_state: State before the first step, (B, H); zeros if not given.
        forget: Pre-activation of an independent forget gate, (B, T, H): a = sigmoid(forget), as in
            minLSTM without normalisation. By default a = 1 - sigmoid(update).
        activation: What the candidate passes through: "g", "identity" or "tanh".
        resets: (B, T) bool; True where a new sequence starts: the state *before* that step is
            replaced by ``reset_state``.
        reset_state: (H,) or (B, H); zeros if not given.
        mask: (B, T) bool; the state is carried over unchanged where False (a reset included).

    Returns:
        The states after every step, (B, T, H) in the type of ``candidate``, and the last state,
        (B, H) in float32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(candidate.dtype, torch.float32)
    update, value = update.to(dtype), CANDIDATES[activation](candidate.to(dtype))
    a = torch.sigmoid(-update if forget is None else forget.to(dtype))  # B T H
    b = torch.sigmoid(update) * value
    if resets is not None:
        starts = resets.unsqueeze(-1)
        if reset_state is not None:
            b = torch.where(starts, b + a * reset_state.to(dtype).unsqueeze(-2), b)
        a = a.masked_fill(starts, 0.0)
    if mask is not None:
        frozen = ~mask.unsqueeze(-1)
        a, b = a.masked_fill(frozen, 1.0), b.masked_fill(frozen, 0.0)
    if initial_state is None:
        initial_state = b.new_zeros(b.shape[0], b.shape[2])
    states = LinearRecurrence.apply(a, b, initial_state.to(dtype))
    return states.to(candidate.dtype), states[:, -1]


def normalised_gate(forget: Tensor, input_gate: Tensor) -> Tensor:
    """Return the one logit whose sigmoid is i / (f + i), for minLSTM's normalised gates.

    With f = sigmoid(forget) and i = sigmoid(input_gate), i / (f + i) =
    sigmoid(softplus(-forget) - softplus(-input_gate)): the division is never carried out, so
    nothing overflows when both gates are closed.
    """
    dtype = torch.promote_types(forget.dtype, torch.float32)
    softplus = torch.nn.functional.softplus
    return softplus(-forget.to(dtype)) - softplus(-input_gate.to(dtype))


class LinearRecurrence(torch.autograd.Function):
    """h_t = a_t * h_{t-1} + b_t with its exact gradient, itself a recurrence run backwards."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
        """Return all states, (B, T, H), from a and b (B, T, H) and the initial state (B, H)."""
        states = _recur(a, b, initial_state)
        ctx.save_for_backward(a, states, initial_state)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G_t = dL/dh_t + a_{t+1} G_{t+1};  db = G;  da_t = G_t h_{t-1};  dh_0 = a_1 G_1."""
        a, states, initial_state = ctx.saved_tensors
        following = torch.cat([a[:, 1:], torch.ones_like(a[:, :1])], dim=1)
        grad_b = _recur(following, grad_states, torch.zeros_like(initial_state), reverse=True)
        grad_a = torch.empty_like(a)
        torch.mul(grad_b[:, 1:], states[:, :-1], out=grad_a[:, 1:])
        torch.mul(grad_b[:, 0], initial_state, out=grad_a[:, 0])
        return grad_a, grad_b, a[:, 0] * grad_b[:, 0]


def _recur(a: Tensor, b: Tensor, start: Tensor, *, reverse: bool = False) -> Tensor:
    """Return h_t = a_t * h_{t-1} + b_t for all t (from the end if ``reverse``), (B, T, H)."""
    length = a.shape[1]
    if length <= SEQUENTIAL_LENGTH:
        return _recur_in_order(a, b, start, reverse)
    # Two levels of about sqrt(T) steps each: all chunks side by side, then the chunks' ends in
    # order. Products of a can underflow to zero, which is the right answer.
    chunk = math.isqrt(length - 1) + 1
    padding = (0, 0, 0, -length % chunk)
    if reverse:
        a, b = a.flip(1), b.flip(1)
    a, b = (
        torch.nn.functional.pad(x, padding).unflatten(1, (-1, chunk)) for x in (a, b)
    )  # B N C H
    local, decay = torch.empty_like(b), torch.empty_like(a)
    local[:, :, 0], decay[:, :, 0] = b[:, :, 0], a[:, :, 0]
    for step in range(1, chunk):
        torch.addcmul(b[:, :, step], a[:, :, step], local[:, :, step - 1], out=local[:, :, step])
        torch.mul(a[:, :, step], decay[:, :, step - 1], out=decay[:, :, step])
    ends = _recur_in_order(decay[:, :, -1], local[:, :, -1], start, False)  # B N H
    carried = torch.cat([start.unsqueeze(1), ends[:, :-1]], dim=1).unsqueeze(2)
    states = local.addcmul_(decay, carried).flatten(1, 2)[:, :length]
    return states.flip(1) if reverse else states


def _recur_in_order(a: Tensor, b: Tensor, start: Tensor, reverse: bool) -> Tensor:
    states = torch.empty_like(b)
    steps = list(zip(a.unbind(1), b.unbind(1), states.unbind(1), strict=True))
    state = start
    for a_t, b_t, h_t in reversed(steps) if reverse else steps:
        state = torch.addcmul(b_t, a_t, state, out=h_t)
    return states


def gated_scan_reference(
    update: Tensor,
    candidate: Tensor,
    initial_state: Tensor | None = None,
    *,
    forget: Tensor | None = None,
    activation: str = "g",
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`gated_scan` does, one step after another in float64: the tests' oracle."""
    batch, length, width = candidate.shape
    state = torch.zeros(batch, width, dtype=torch.float64, device=candidate.device)
    fresh = state if reset_state is None else reset_state.double().expand(batch, width)
    if initial_state is not None:
        state = initial_state.double()
    states = []
    for t in range(length):
        before = state
        if resets is not None:
            before = torch.where(resets[:, t, None], fresh, before)
        z = torch.sigmoid(update[:, t].double())
        keep = 1 - z if forget is None else torch.sigmoid(forget[:, t].double())
        after = keep * before + z * CANDIDATES[activation](candidate[:, t].double())
        state = after if mask is None else torch.where(mask[:, t, None], after, state)
        states.append(state)
    return torch.stack(states, dim=1), state
