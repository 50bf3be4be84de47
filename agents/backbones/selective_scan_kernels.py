"""The selective scan for CPUs, in Numba's Python; compiled and called by ``selective_scan.py``.

The state of a step is N rows of D channels, one row for each of the N numbers that a channel keeps,
so that every loop runs over channels. A unit of work is a sequence.
"""

from numba import njit

from minrl.agents.backbones.native_math import ZERO, copy, exp_minus


def fused_in_any_order(function):
    """Compile a helper into the loop that calls it; sums over channels may be reordered."""
    return njit(fastmath={"contract", "reassoc"}, error_model="numpy")(function)


@fused_in_any_order
def clear(target, at, count):
    """Write zeros."""
    for channel in range(count):
        target[at + channel] = ZERO


@fused_in_any_order
def advance(x, delta, at, rates, rate, enter, read, before, was, states, out, y, width):
    """Take one step with one row of the state; what ``read`` gets of it is added to y."""
    for channel in range(width):
        here = at + channel
        keep = exp_minus(delta[here] * rates[rate + channel])
        state = keep * before[was + channel] + (delta[here] * x[here]) * enter
        states[out + channel] = state
        y[here] += state * read


@fused_in_any_order
def gather(x, delta, states, out, grad_y, carry, to, at, read, width):
    """Add to ``carry`` what y says of one row of the state; return the gradients by B and C."""
    grad_enter, grad_read = ZERO, ZERO
    for channel in range(width):
        here = at + channel
        pulled = carry[to + channel] + grad_y[here] * read
        carry[to + channel] = pulled
        grad_enter += pulled * (delta[here] * x[here])
        grad_read += grad_y[here] * states[out + channel]
    return grad_enter, grad_read


@fused_in_any_order
def retreat(
    delta, at, rates, rate, enter, before, was, carry, to, grad_x, grad_delta, grad_rates, width
):
    """Undo one step of one row; ``grad_x`` is left without its factor ``delta``."""
    for channel in range(width):
        here = at + channel
        pulled = carry[to + channel]
        kept = pulled * exp_minus(delta[here] * rates[rate + channel])
        by_decay = kept * before[was + channel]
        carry[to + channel] = kept
        grad_x[here] += pulled * enter
        grad_delta[here] -= by_decay * rates[rate + channel]
        grad_rates[to + channel] -= by_decay * delta[here]


@fused_in_any_order
def finish(x, delta, at, grad_x, grad_delta, width):
    """Turn the gradient by delta x into those by x and by delta."""
    for channel in range(at, at + width):
        by_product = grad_x[channel]
        grad_x[channel] = by_product * delta[channel]
        grad_delta[channel] += by_product * x[channel]


def forward(
    x,
    delta,
    rates,
    enter,
    read,
    initial,
    resets,
    mask,
    y,
    states,
    has_resets,
    has_mask,
    length,
    width,
    size,
    first,
    stop,
):
    """Write y and all states."""
    area = size * width
    for sequence in range(first, stop):
        for step in range(length):
            row = sequence * length + step
            at, out = row * width, row * area
            before, was = states, out - area
            if step == 0:
                before, was = initial, sequence * area
            clear(y, at, width)
            if has_mask and not mask[row]:
                copy(before, was, states, out, area)
                continue
            if has_resets and resets[row]:
                clear(states, out, area)
                before, was = states, out
            for part in range(size):
                e, r = enter[row * size + part], read[row * size + part]
                shift = part * width
                was_there, to = was + shift, out + shift
                advance(x, delta, at, rates, shift, e, r, before, was_there, states, to, y, width)


def backward(
    x,
    delta,
    rates,
    enter,
    read,
    initial,
    nothing,
    states,
    resets,
    mask,
    grad_y,
    carry,
    grad_x,
    grad_delta,
    grad_rates,
    grad_enter,
    grad_read,
    has_resets,
    has_mask,
    length,
    width,
    size,
    first,
    stop,
):
    """Write the gradients; ``carry`` begins as that by the last state, ends as by the first."""
    area = size * width
    for sequence in range(first, stop):
        own = sequence * area
        for back in range(length):
            step = length - 1 - back
            row = sequence * length + step
            at, out = row * width, row * area
            clear(grad_x, at, width)
            clear(grad_delta, at, width)
            if has_mask and not mask[row]:
                clear(grad_enter, row * size, size)
                clear(grad_read, row * size, size)
                continue
            fresh = has_resets and resets[row]
            before, was = states, out - area
            if fresh:
                before, was = nothing, 0
            elif step == 0:
                before, was = initial, own
            for part in range(size):
                here, shift = row * size + part, part * width
                to, state, past = own + shift, out + shift, was + shift
                by_enter, by_read = gather(
                    x, delta, states, state, grad_y, carry, to, at, read[here], width
                )
                grad_enter[here], grad_read[here] = by_enter, by_read
                retreat(
                    delta,
                    at,
                    rates,
                    shift,
                    enter[here],
                    before,
                    past,
                    carry,
                    to,
                    grad_x,
                    grad_delta,
                    grad_rates,
                    width,
                )
            finish(x, delta, at, grad_x, grad_delta, width)
            if fresh:
                clear(carry, own, area)


def kernels() -> dict:
    """Return forward and backward, with their arguments' types."""
    return {
        "forward": (forward, "ffffffbbff" + "i" * 7),
        "backward": (backward, "ffffffffbb" + "fffffff" + "i" * 7),
    }
