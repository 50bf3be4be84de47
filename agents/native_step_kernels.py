"""One step of a :class:`TrajectoryModel` on the CPU in a single call, in Numba's Python.

Weights are laid out in the order of use. A row's actions do not depend on the rows beside it.
Compiled and called by :mod:`minrl.agents.native_step`, which makes the buffers and the order of
weights that the step expects.
"""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from minrl.agents.backbones.native_math import HALF, ONE, TWO, ZERO, exp_minus, fused
from minrl.agents.backbones.scan_cpu_kernels import CANDIDATES, GATES
from minrl.agents.native_layout import GROUP
from minrl.agents.native_products import multiply, shifted

# Rows that go through all layers together: what lies between two layers stays in the cache.
ROWS = 48

EPSILON = np.float32(1e-5)  # of nn.LayerNorm

# erf(x / sqrt(2)) = x P(x^2) / Q(x^2) for |x| <= 5.3, error 8e-9 (a least-squares fit, reweighted
# towards minimax); beyond, it is 1 to 1e-7.
ERF_LIMIT = np.float32(5.3)
P0, P1, P2, P3, P4, P5 = (
    np.float32(number)
    for number in (
        0.7978845081906083,
        0.0658713345681062,
        0.009255972279629049,
        0.00032066656069145566,
        1.275809701950201e-05,
        4.810071608956555e-08,
    )
)
Q1, Q2, Q3, Q4, Q5 = (
    np.float32(number)
    for number in (
        0.24922370396780275,
        0.028138756898329967,
        0.0018365647457467872,
        7.135190637565872e-05,
        1.2371690315710696e-06,
    )
)


@intrinsic
def square_root(_context, _number):
    """Return the square root: the processor's, where NumPy's would call the C library."""

    def generate(_target, builder, _signature, arguments):
        function = builder.module.declare_intrinsic("llvm.sqrt", [arguments[0].type])
        return builder.call(function, arguments)

    return types.float32(types.float32), generate


# Sums in the order that suits vectors.
@njit(fastmath={"contract", "reassoc"}, error_model="numpy", forceinline=True)
def layer_norm(x, stride, rows, count, weights, y):
    """Write the normalised rows into y; return the weights after scale and shift."""
    size = np.float32(count)
    for row in range(rows):
        here, there = shifted(x, row * stride), shifted(y, row * stride)
        total, squares = ZERO, ZERO
        for i in range(count):
            total += here[i]
        mean = total / size
        for i in range(count):
            squares += (here[i] - mean) * (here[i] - mean)
        scale = ONE / square_root(squares / size + EPSILON)
        for i in range(count):
            there[i] = (here[i] - mean) * scale * weights[i] + weights[count + i]
    return shifted(weights, 2 * count)


@fused
def add(x, more, rows, count, stride):
    """Add ``more`` to x."""
    for row in range(rows):
        for i in range(count):
            x[row * stride + i] += more[row * stride + i]


@fused
def gelu(x, count):
    """Replace x by x Phi(x)."""
    for i in range(count):
        value = x[i]
        near = ERF_LIMIT if value > ERF_LIMIT else value
        near = -ERF_LIMIT if near < -ERF_LIMIT else near
        s = near * near
        over = ((((P5 * s + P4) * s + P3) * s + P2) * s + P1) * s + P0
        under = ((((Q5 * s + Q4) * s + Q3) * s + Q2) * s + Q1) * s + ONE
        x[i] = HALF * value * (ONE + near * (over / under))


@fused
def convolve(x, stride, rows, width, taps, weights, before, after, states, restart, mixed):
    """Write the depthwise convolution into ``mixed``, the inputs it will need into ``after``.

    ``weights`` holds (taps, width), the oldest input's first, then the bias.
    """
    past = taps - 1
    for row in range(rows):
        old, new = shifted(before, row * states), shifted(after, row * states)
        here, out = shifted(x, row * stride), shifted(mixed, row * stride)
        keep = restart[row] == 0
        for i in range(width):
            out[i] = weights[taps * width + i] + weights[past * width + i] * here[i]
        for tap in range(past):
            for i in range(width):
                seen = old[tap * width + i] if keep else ZERO
                out[i] += weights[tap * width + i] * seen
                if tap > 0:
                    new[(tap - 1) * width + i] = seen
        if past > 0:
            for i in range(width):
                new[(past - 1) * width + i] = here[i]
    return shifted(weights, (taps + 1) * width)


def kernels(gates: str, activation: str, convolution: str) -> dict:
    """Return the step for one kind of cell, with or without convolution, and its argument types."""
    gate, _, parts = GATES[gates]
    recur = _make_recur(gate, CANDIDATES[activation], parts - 1, gates != "minlstm_unnormalised")
    block = _make_block(recur, parts, convolution == "convolution")
    return {"step": (_make_step(block), "ffffffbbff" + "i" * 13)}


def _make_recur(gate, candidate, last_part, normalised):
    @fused
    def recur(packed, stride, rows, hidden, initial, before, after, states, restart):
        """Take one step of the cell; ``packed`` holds pre-activations."""
        for row in range(rows):
            here = shifted(packed, row * stride)
            old, new = shifted(before, row * states), shifted(after, row * states)
            old = initial if restart[row] else old
            for i in range(hidden):
                enter, leave = gate(here, i, hidden)
                value, _ = candidate(here[last_part * hidden + i])
                state = old[i]
                if normalised:
                    new[i] = state + enter * (value - state)
                else:
                    new[i] = state + (enter * value - leave * state)

    return recur


@fused
def normalise(
    observations, returns, previous, states, starts, weights, observed, acted, rows, inputs
):
    """Write (previous action, return, observation), each normalised, as rows of ``inputs``."""
    means, spread = shifted(weights, 2 * observed), shifted(weights, 3 * observed)
    middle = shifted(weights, 4 * observed)
    scale, largest = middle[4 * acted], middle[4 * acted + 1]
    for row in range(rows):
        out = shifted(inputs, row * (acted + 1 + observed))
        for i in range(acted):
            taken = (previous[row * states + i] - middle[i]) / middle[acted + i]
            out[i] = ZERO if starts[row] else taken
        asked = returns[row] / scale
        asked = largest if asked > largest else asked
        out[acted] = -largest if asked < -largest else asked
        for i in range(observed):
            value = observations[row * observed + i]
            value = weights[i] if value < weights[i] else value
            value = weights[observed + i] if value > weights[observed + i] else value
            out[acted + 1 + i] = (value - means[i]) / spread[i]


def _make_block(recur, parts, convolved):
    @fused
    def block(
        x,
        normed,
        wide,
        rows,
        width,
        hidden,
        features,
        taps,
        weights,
        before,
        after,
        states,
        restart,
    ):
        """Take one residual block's step on the rows of x; return the weights after its own."""
        stride = (width + GROUP - 1) // GROUP * GROUP
        gates = (parts * hidden + GROUP - 1) // GROUP * GROUP
        inner = (features + GROUP - 1) // GROUP * GROUP
        if convolved:
            old, new = shifted(before, hidden), shifted(after, hidden)
            weights = convolve(
                x, stride, rows, width, taps, weights, old, new, states, restart, normed
            )
            weights = multiply(normed, stride, rows, width, weights, wide, width)
            add(x, wide, rows, width, stride)
        # The cell and the MLP are of one form, and in one place: each call is code to compile.
        for half in range(2 if features > 0 else 1):
            outputs = parts * hidden if half == 0 else features
            weights = layer_norm(x, stride, rows, width, weights, normed)
            weights = multiply(normed, stride, rows, width, weights, wide, outputs)
            if half == 0:
                recur(wide, gates, rows, hidden, weights, before, after, states, restart)
                weights, mixed, mixed_stride, inputs = (
                    shifted(weights, hidden),
                    after,
                    states,
                    hidden,
                )
            else:
                gelu(wide, rows * inner)
                mixed, mixed_stride, inputs = wide, inner, features
            weights = multiply(mixed, mixed_stride, rows, inputs, weights, normed, width)
            add(x, normed, rows, width, stride)
        return weights

    return block


@fused
def embed_timestep(x, stride, rows, width, timesteps, earlier, last, table):
    """Add the embeddings of the timesteps, or those before them, to x; the last of none is -1."""
    for row in range(rows if last >= 0 else 0):
        time = np.int64(timesteps[row]) - earlier
        time = time if time > 0 else 0
        time = time if time < last else last
        for i in range(width):
            x[row * stride + i] += table[time * width + i]


@fused
def bound(x, stride, rows, acted, bounds, actions, state, states):
    """Turn the head's outputs into actions, also kept in the state."""
    for row in range(rows):
        for i in range(acted):
            power = exp_minus(x[row * stride + i] * TWO)
            action = bounds[i] + bounds[acted + i] * ((ONE - power) / (ONE + power))
            low, high = bounds[2 * acted + i], bounds[3 * acted + i]
            action = low if action < low else action
            action = high if action > high else action
            actions[row * acted + i] = action
            state[row * states + i] = action


def _make_step(block):
    def step(
        before,
        after,
        weights,
        observations,
        returns,
        timesteps,
        starts,
        never,
        actions,
        scratch,
        observed,
        acted,
        width,
        hidden,
        features,
        layers,
        taps,
        tokens,
        last_timestep,
        body,
        row_floats,
        first,
        stop,
    ):
        stride = (width + GROUP - 1) // GROUP * GROUP
        kept = hidden + (taps - 1 if taps > 0 else 0) * width  # of a state, for each layer
        states = layers * kept + acted
        known = acted + 1 + observed
        constants = shifted(weights, (last_timestep + 1) * width)
        bounds = shifted(constants, 4 * observed)
        for start in range(first, stop, ROWS):
            rows = ROWS if stop - start > ROWS else stop - start
            x = shifted(scratch, first * row_floats)
            normed, wide = shifted(x, rows * stride), shifted(x, 2 * rows * stride)
            old, new = shifted(before, start * states), shifted(after, start * states)
            starting, times = shifted(starts, start), shifted(timesteps, start)
            source, last_action = old, layers * kept
            embedding, current = shifted(bounds, 4 * acted + 2), weights
            for token in range(tokens):
                normalise(
                    shifted(observations, start * observed),
                    shifted(returns, start),
                    shifted(old, last_action),
                    states,
                    starting,
                    constants,
                    observed,
                    acted,
                    rows,
                    wide,
                )
                at, count, earlier, restart = 0, known, 0, starting
                if tokens == 3:  # (action), (return), (observation); an episode starts at the 2nd
                    at = (acted + token - 1) if token > 0 else 0
                    count = acted if token == 0 else (1 if token == 1 else observed)
                    earlier = 1 if token == 0 else 0
                    restart = starting if token == 1 else never
                embedding = multiply(
                    shifted(wide, at), known, rows, count, embedding, normed, width
                )
                embed_timestep(normed, stride, rows, width, times, earlier, last_timestep, weights)
                current = layer_norm(normed, stride, rows, width, shifted(weights, body), x)
                for layer in range(layers):
                    from_, to = shifted(source, layer * kept), shifted(new, layer * kept)
                    current = block(
                        x,
                        normed,
                        wide,
                        rows,
                        width,
                        hidden,
                        features,
                        taps,
                        current,
                        from_,
                        to,
                        states,
                        restart,
                    )
                source = new
            current = layer_norm(x, stride, rows, width, current, normed)
            multiply(normed, stride, rows, width, current, wide, acted)
            head = (acted + GROUP - 1) // GROUP * GROUP
            chosen = shifted(actions, start * acted)
            bound(wide, head, rows, acted, bounds, chosen, shifted(new, last_action), states)

    return step
