"""The scan in plain PyTorch: for devices and types that have no kernel.

In linear space like the kernels, and in the same form, state + (entering - leaving). Up to some
length it goes step by step, beyond it chunks of about sqrt(T) steps advance side by side.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

# Up to this length one pass over the steps is faster than two passes over chunks (CPU, measured).
SEQUENTIAL_LENGTH = 192


def positive(v: Tensor) -> Tensor:
    """Return ``g(v)``: v + 0.5 where v >= 0, else sigmoid(v) (arXiv 2410.01201, appendix B)."""
    return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))


CANDIDATES = {"g": positive, "identity": lambda v: v, "tanh": torch.tanh}

# How many parts of H channels the projection has: gates, then the candidate.
PARTS = {"mingru": 2, "minlstm": 3, "minlstm_unnormalised": 3}


def gate_values(parts: tuple[Tensor, ...], gates: str) -> tuple[Tensor, Tensor]:
    """Return how much of the candidate enters and how much of the state leaves."""
    if gates == "minlstm_unnormalised":
        forget, enter, _ = parts
        return torch.sigmoid(enter), torch.sigmoid(-forget)
    z = torch.sigmoid(_update_logit(parts, gates))
    return z, z


def _update_logit(parts: tuple[Tensor, ...], gates: str) -> Tensor:
    """Return k with z = sigmoid(k); minLSTM's i / (f + i) without the division."""
    if gates == "mingru":
        return parts[0]
    forget, enter, _ = parts
    return functional.softplus(-forget) - functional.softplus(-enter)


def scan_by_steps(
    projected: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reset_state: Tensor | None,
    mask: Tensor | None,
    gates: str,
    activation: str,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """Do what the operator does by a dozen plain operations for each step.

    They can be exported without this package, differentiated in every way, and transformed.
    """
    time, states, state = (1 if batch_first else 0), [], initial_state
    for t in range(projected.shape[time]):
        now = (x if x is None else x.select(time, t) for x in (projected, resets, mask))
        output, state = _scan_one_step(*now, state, reset_state, gates, activation)
        states.append(output)
    return torch.stack(states, time), state


def _scan_one_step(
    projected: Tensor,
    resets: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
    reset_state: Tensor | None,
    gates: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Do one step, (B, G*H)."""
    dtype = torch.promote_types(projected.dtype, torch.float32)
    if mask is not None:  # or the gradient of what is not valid would be 0 * NaN
        projected = projected.masked_fill(~mask.unsqueeze(-1), 0.0)
    parts = projected.to(dtype).chunk(PARTS[gates], dim=-1)
    zeros = torch.zeros_like(parts[-1])
    state = zeros if initial_state is None else initial_state
    fresh = zeros if reset_state is None else reset_state
    before = state if resets is None else torch.where(resets.unsqueeze(-1), fresh, state)
    enter, leave = gate_values(parts, gates)
    after = before + (enter * CANDIDATES[activation](parts[-1]) - leave * before)
    if mask is not None:
        after = torch.where(mask.unsqueeze(-1), after, state)
    return after.to(projected.dtype), after


def scan_forward(
    projected: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    reset_state: Tensor,
    mask: Tensor | None,
    gates: str,
    activation: str,
    batch_first: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the states after every step, in the layout of ``projected``, and the last, (B, H).

    Args:
        projected: (B, T, G*H), or (T, B, G*H) if not ``batch_first``; contiguous.
        initial_state: (B, H) contiguous, as ``reset_state``; both in the state's type.
        resets: bool, (B, T) or (T, B).
        reset_state: (B, H).
        mask: bool, (B, T) or (T, B).
        gates: A key of ``PARTS``.
        activation: A key of ``CANDIDATES``.
        batch_first: See ``projected``.
        out: Where to write both, contiguous; the second may be ``initial_state`` itself.
    """
    time = 1 if batch_first else 0
    parts = _parts(projected, initial_state, gates)
    enter, leave = gate_values(parts, gates)
    entering = enter * CANDIDATES[activation](parts[-1])
    starts = _starts(resets, mask)
    if starts is not None:
        fresh = reset_state.unsqueeze(time)
        entering = torch.where(starts, entering + (fresh - leave * fresh), entering)
    if mask is not None:
        frozen = ~mask.unsqueeze(-1)
        entering, leave = entering.masked_fill(frozen, 0.0), leave.masked_fill(frozen, 0.0)
    states = _recur(entering, leave, initial_state, time, starts)
    results = states.to(projected.dtype), states.select(time, -1)
    if out is None:
        return results[0].contiguous(), results[1].clone(memory_format=torch.contiguous_format)
    return tuple(place.copy_(result) for place, result in zip(out, results, strict=True))


def scan_backward(
    grad_states: Tensor,
    grad_last: Tensor,
    projected: Tensor,
    states: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    reset_state: Tensor,
    mask: Tensor | None,
    gates: str,
    activation: str,
    batch_first: bool,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by ``projected``, ``initial_state`` and ``reset_state`` (a row each).

    With G_t the gradient by the state after step t, G_{t-1} = dL/dh_{t-1} + (1 - leave_t) G_t.
    Arguments as above, but ``out`` is where to write the first two, contiguous, of which the second
    may be ``grad_last`` itself, and what to add the third to.
    """
    time = 1 if batch_first else 0
    parts = _parts(projected, initial_state, gates)
    enter, leave = gate_values(parts, gates)
    value = CANDIDATES[activation](parts[-1])
    before = torch.cat(
        [initial_state.unsqueeze(time), states.narrow(time, 0, states.shape[time] - 1)], time
    )
    starts = _starts(resets, mask)
    if starts is not None:
        before = torch.where(starts, reset_state.unsqueeze(time), before)
    if mask is not None:
        leave = leave.masked_fill(~mask.unsqueeze(-1), 0.0)
    # Backwards: what a step adds is the gradient by its state, and the step after it takes away.
    pulled = _recur(
        grad_states.to(leave.dtype).flip(time),
        _step_after(leave, time).flip(time),
        grad_last,
        time,
        None if starts is None else _step_after(starts, time).flip(time),
    ).flip(time)
    through = pulled - leave * pulled  # by the state before each step, or what it was reset to
    grad_initial, grad_reset = through.select(time, 0), torch.zeros_like(initial_state)
    if starts is not None:
        grad_initial = grad_initial.masked_fill(starts.select(time, 0), 0.0)
        grad_reset = through.masked_fill(~starts, 0.0).sum(time)

    grad_value = pulled * enter * _slope(parts[-1], value, activation)
    grads = [*_gate_gradients(parts, gates, pulled * value, -pulled * before), grad_value]
    grad_projected = torch.cat(grads, dim=-1)
    if mask is not None:
        grad_projected = grad_projected.masked_fill(~mask.unsqueeze(-1), 0.0)
    grad_projected = grad_projected.to(projected.dtype)
    if out is None:
        return grad_projected, grad_initial.contiguous(), grad_reset
    return out[0].copy_(grad_projected), out[1].copy_(grad_initial), out[2].add_(grad_reset)


def _parts(projected: Tensor, state: Tensor, gates: str) -> tuple[Tensor, ...]:
    return projected.to(state.dtype).chunk(PARTS[gates], dim=-1)


def _starts(resets: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return where a valid step starts a sequence, with an axis for the channels."""
    if resets is None:
        return None
    return (resets if mask is None else resets & mask).unsqueeze(-1)


def _step_after(x: Tensor, time: int) -> Tensor:
    """Return for every step the value of the next one, zero for the last."""
    rest = x.narrow(time, 1, x.shape[time] - 1)
    return torch.cat([rest, torch.zeros_like(x.narrow(time, 0, 1))], time)


def _gate_gradients(
    parts: tuple[Tensor, ...], gates: str, grad_enter: Tensor, grad_leave: Tensor
) -> list[Tensor]:
    if gates == "minlstm_unnormalised":
        forget, enter, _ = parts
        return [-grad_leave * _sigmoid_slope(forget), grad_enter * _sigmoid_slope(enter)]
    by_logit = (grad_enter + grad_leave) * _sigmoid_slope(_update_logit(parts, gates))
    if gates == "mingru":
        return [by_logit]
    forget, enter, _ = parts
    return [-by_logit * torch.sigmoid(-forget), by_logit * torch.sigmoid(-enter)]


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _slope(v: Tensor, value: Tensor, activation: str) -> Tensor:
    """Return the derivative of the candidate's activation."""
    if activation == "g":
        return torch.where(v >= 0, torch.ones_like(v), _sigmoid_slope(v))
    return torch.ones_like(v) if activation == "identity" else 1 - value * value


def _recur(
    entering: Tensor, leave: Tensor, start: Tensor, time: int, starts: Tensor | None
) -> Tensor:
    """Return h_t = h_{t-1} + (entering_t - leave_t h_{t-1}), at ``starts`` h_t = entering_t."""
    length = leave.shape[time]
    if length <= SEQUENTIAL_LENGTH:
        return _recur_in_order(entering, leave, start, time, starts)
    # Two levels of about sqrt(T) steps each: all chunks side by side, then the chunks' ends in
    # order. How much of the state before a chunk is gone by each of its steps follows the same
    # recurrence, with 1 for the candidate; after a start all of it is.
    chunk = math.isqrt(length - 1) + 1
    count = -(-length // chunk)
    padding = (0, 0) * (leave.dim() - 1 - time) + (0, count * chunk - length)
    entering, leave, starts = (
        None if x is None else functional.pad(x, padding).unflatten(time, (count, chunk))
        for x in (entering, leave, starts)
    )
    zeros = torch.zeros_like(leave.select(time + 1, 0))
    local = _recur_in_order(entering, leave, zeros, time + 1, starts)
    gone = _recur_in_order(leave, leave, zeros, time + 1, None)
    anew = None if starts is None else starts.cumsum(time + 1) > 0
    ends = _recur_in_order(
        local.select(time + 1, -1),
        gone.select(time + 1, -1),
        start,
        time,
        None if anew is None else anew.select(time + 1, -1),
    )
    before = torch.cat([start.unsqueeze(time), ends.narrow(time, 0, count - 1)], time)
    before = before.unsqueeze(time + 1)
    states = local + (before - gone * before)
    if anew is not None:
        states = torch.where(anew, local, states)
    return states.flatten(time, time + 1).narrow(time, 0, length)


def _recur_in_order(
    entering: Tensor, leave: Tensor, start: Tensor, time: int, starts: Tensor | None
) -> Tensor:
    states, state = torch.empty_like(leave), start
    flags = [None] * leave.shape[time] if starts is None else starts.unbind(time)
    steps = (x.unbind(time) for x in (entering, leave, states))
    for entering_t, leave_t, state_t, starts_t in zip(*steps, flags, strict=True):
        state = torch.addcmul(state + entering_t, leave_t, state, value=-1, out=state_t)
        if starts_t is not None:
            state_t.copy_(torch.where(starts_t, entering_t, state))
    return states
