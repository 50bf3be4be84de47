"""The scan for CPUs: gates, candidate and recurrence in one pass, in Numba's Python.

Work is split into units of (batch row, block of channels); a call does a range of them. A *row* of
memory holds the channels of one step of one sequence. Compiled and called by
:mod:`minrl.agents.backbones.scan_cpu`, where the arguments are described.
"""

import numpy as np

from minrl.agents.backbones.native_math import (
    HALF,
    ONE,
    TWO,
    ZERO,
    copy,
    exp_minus,
    fused,
    prefetch,
)

# Where both of minLSTM's gates are closed further than this, only their difference counts.
CLOSED = np.float32(-20)

# Steps ahead at which memory is asked for: on its own a core waits for a third of the time. The
# backward pass asks for runs of steps, each in ascending order, as the hardware expects it.
AHEAD = 1
RUN = 8


# Candidates: g(v) and g'(v).


@fused
def positive(v):
    """Return g(v) and its derivative (arXiv 2410.01201, appendix B)."""
    sigmoid = ONE / (ONE + exp_minus(v))
    open_side = v >= ZERO
    return v + HALF if open_side else sigmoid, ONE if open_side else sigmoid - sigmoid * sigmoid


@fused
def identity(v):
    """Return v and 1."""
    return v, ONE


@fused
def tanh(v):
    """Return the hyperbolic tangent and its derivative."""
    power = exp_minus(TWO * v)
    value = (ONE - power) / (ONE + power)
    return value, ONE - value * value


# Gates: the state becomes state + (enter * candidate - leave * state), so that a state that hardly
# changes loses no precision. Gradients by pre-activations come from ``pulled``, the gradient by the
# state after the step, and the state before it.


@fused
def mingru_gates(packed, at, width):
    """Return z = sigmoid(k), twice."""
    z = ONE / (ONE + exp_minus(packed[at]))
    return z, z


@fused
def mingru_gradients(packed, at, width, grad, pulled, state, value):
    """Write dL/dk."""
    power = exp_minus(packed[at])
    z = ONE / (ONE + power)
    grad[at] = pulled * (value - state) * (z * (power * z))


@fused
def minlstm_powers(packed, at, width):
    """Return exp(-f) and exp(-i), both smaller by a factor that changes neither gate."""
    forget, enter = packed[at], packed[at + width]
    larger = forget if forget > enter else enter
    shift = larger - CLOSED if larger < CLOSED else ZERO
    return exp_minus(forget - shift), exp_minus(enter - shift)


@fused
def minlstm_gates(packed, at, width):
    """Return z = i / (f + i), f and i the sigmoids of their pre-activations, twice."""
    forget, enter = minlstm_powers(packed, at, width)
    z = (ONE + forget) / (TWO + forget + enter)
    return z, z


@fused
def minlstm_gradients(packed, at, width, grad, pulled, state, value):
    """Write dL/df and dL/di, by way of the logit of z, softplus(-f) - softplus(-i)."""
    forget, enter = minlstm_powers(packed, at, width)
    scale = ONE / (TWO + forget + enter)
    z, closed = (ONE + forget) * scale, (ONE + enter) * scale
    by_logit = pulled * (value - state) * (z * closed)
    grad[at] = -by_logit * (forget / (ONE + forget))
    grad[at + width] = by_logit * (enter / (ONE + enter))


@fused
def unnormalised_gates(packed, at, width):
    """Return sigmoid(i) and sigmoid(-f)."""
    forget = exp_minus(packed[at])
    return ONE / (ONE + exp_minus(packed[at + width])), forget / (ONE + forget)


@fused
def unnormalised_gradients(packed, at, width, grad, pulled, state, value):
    """Write dL/df and dL/di."""
    forget, enter = exp_minus(packed[at]), exp_minus(packed[at + width])
    keep, z = ONE / (ONE + forget), ONE / (ONE + enter)
    grad[at] = pulled * state * (keep * (forget * keep))
    grad[at + width] = pulled * value * (z * (enter * z))


CANDIDATES = {"g": positive, "identity": identity, "tanh": tanh}
GATES = {
    "mingru": (mingru_gates, mingru_gradients, 2),
    "minlstm": (minlstm_gates, minlstm_gradients, 3),
    "minlstm_unnormalised": (unnormalised_gates, unnormalised_gradients, 3),
}


def kernels(gates: str, activation: str) -> dict:
    """Return forward and backward for one kind of gates and one activation, with their types."""
    gate, gradients, parts = GATES[gates]
    advance = _make_advance(gate, CANDIDATES[activation], parts, gates != "minlstm_unnormalised")
    retreat = _make_retreat(gate, gradients, CANDIDATES[activation], parts)
    return {
        "forward": (_make_forward(advance, parts), "fffbbff" + "i" * 9),
        "backward": (_make_backward(retreat, parts), "ffffbbffff" + "i" * 9),
    }


def _make_advance(gate, candidate, parts, normalised):
    last_part = parts - 1

    @fused
    def advance(packed, at, width, before, was, states, out, count):
        """Take one step of one sequence."""
        for channel in range(count):
            enter, leave = gate(packed, at + channel, width)
            value, _ = candidate(packed[at + last_part * width + channel])
            state = before[was + channel]
            if normalised:
                states[out + channel] = state + enter * (value - state)
            else:
                states[out + channel] = state + (enter * value - leave * state)

    return advance


def _make_retreat(gate, gradients, candidate, parts):
    last_part = parts - 1

    @fused
    def retreat(packed, at, width, before, was, grad_states, out, carry, to, grad_packed, count):
        """Undo one step of one sequence; ``carry`` holds the gradient by the state after it."""
        for channel in range(count):
            here = at + channel
            enter, leave = gate(packed, here, width)
            value, slope = candidate(packed[here + last_part * width])
            pulled = carry[to + channel] + grad_states[out + channel]
            gradients(packed, here, width, grad_packed, pulled, before[was + channel], value)
            grad_packed[here + last_part * width] = pulled * (enter * slope)
            carry[to + channel] = pulled - leave * pulled

    return retreat


@fused
def fetch(pointer, at, count):
    """Ask for ``count`` elements, a cache line of 16 at a time."""
    for line in range(0, count, 16):
        prefetch(pointer, at + line)


@fused
def fetch_parts(packed, at, width, parts, count):
    """Ask for a row of each part."""
    for part in range(parts):
        fetch(packed, at + part * width, count)


@fused
def skip_back(carry, to, grad_states, out, grad_packed, at, width, parts, count):
    """Undo a step that was not valid: the gradient passes it by."""
    for channel in range(count):
        carry[to + channel] += grad_states[out + channel]
    for part in range(parts):
        for channel in range(count):
            grad_packed[at + part * width + channel] = ZERO


@fused
def move(source, target, at, count):
    """Add elements of one gradient to another, and leave zeros."""
    for channel in range(count):
        target[at + channel] += source[at + channel]
        source[at + channel] = ZERO


def _make_forward(advance, parts):
    def forward(
        packed,
        initial,
        reset_state,
        resets,
        mask,
        states,
        last,
        has_resets,
        has_mask,
        batch,
        length,
        width,
        time_first,
        block,
        first,
        stop,
    ):
        blocks = (width + block - 1) // block
        # Memory is walked in order: sequence by sequence, or all sequences step by step.
        for outer in range(length if time_first else stop - first):
            for inner in range(stop - first if time_first else length):
                unit, step = (inner, outer) if time_first else (outer, inner)
                unit += first
                sequence, channel = unit // blocks, unit % blocks * block
                count = min(block, width - channel)
                row = step * batch + sequence if time_first else sequence * length + step
                to, out = sequence * width + channel, row * width + channel
                before, was = states, out - (batch if time_first else 1) * width
                if step == 0:
                    before, was = initial, to
                if has_mask and not mask[row]:
                    copy(before, was, states, out, count)
                else:
                    if has_resets and resets[row]:
                        before, was = reset_state, to
                    at = row * parts * width + channel
                    ahead = at + AHEAD * (batch if time_first else 1) * parts * width
                    fetch_parts(packed, ahead, width, parts, count)
                    advance(packed, at, width, before, was, states, out, count)
                if step == length - 1:
                    copy(states, out, last, to, count)

    return forward


def _make_backward(retreat, parts):
    def backward(
        packed,
        initial,
        reset_state,
        states,
        resets,
        mask,
        grad_states,
        carry,
        grad_packed,
        grad_reset,
        has_resets,
        has_mask,
        batch,
        length,
        width,
        time_first,
        block,
        first,
        stop,
    ):
        blocks = (width + block - 1) // block
        for outer in range(length if time_first else stop - first):
            for inner in range(stop - first if time_first else length):
                unit, step = (inner, outer) if time_first else (outer, inner)
                unit += first
                step = length - 1 - step
                sequence, channel = unit // blocks, unit % blocks * block
                count = min(block, width - channel)
                row = step * batch + sequence if time_first else sequence * length + step
                to, out = sequence * width + channel, row * width + channel
                at = row * parts * width + channel
                if has_mask and not mask[row]:
                    skip_back(carry, to, grad_states, out, grad_packed, at, width, parts, count)
                    continue
                fresh = has_resets and resets[row]
                before, was = states, out - (batch if time_first else 1) * width
                if fresh:
                    before, was = reset_state, to
                elif step == 0:
                    before, was = initial, to
                ahead = (2 * (step % RUN) + 1) * (batch if time_first else 1) * width
                fetch_parts(packed, at - parts * ahead, width, parts, count)
                fetch_parts(grad_packed, at - parts * ahead, width, parts, count)
                fetch(grad_states, out - ahead, count)
                fetch(states, out - ahead, count)
                retreat(
                    packed, at, width, before, was, grad_states, out, carry, to, grad_packed, count
                )
                if fresh:
                    move(carry, grad_reset, to, count)

    return backward
