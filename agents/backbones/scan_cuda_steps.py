# ruff: noqa: N803, RUF005 - constants in capitals as Triton has them; no starred tuples in it
"""One step of the gated scan in Triton: loads, gates, candidate, and the maps that steps compose.

The map of a step, or of many, is written as a pair (drop, gain): h -> h + (gain - drop * h).
With drop = 0.0003 this keeps the accuracy that (1 - drop) * h + gain loses to the rounding of
1 - drop. Where drop is 1 (fully open gates) ``apply_map`` adds nothing of the old state, not even
its rounding error, but what is not finite stays so, as it does step by step: whether a divergence
is seen must not hang on how time is cut. Only a reset, drop = RESET, forgets NaN as well.

Tiles are (S, C): segments of the time axis by channels; see ``scan_cuda_forward``.
"""

import triton
import triton.language as tl

# Gate logits read outside the sequence: exactly closed, and within the range of float16.
CLOSED = tl.constexpr(-60000.0)
# The drop of a map with a reset in it, beyond what gates can give.
RESET = tl.constexpr(2.0)
HUGE = tl.constexpr(3.0e38)
# The smallest float32 that is not denormal: of anything smaller the reciprocal below is infinite.
TINY = tl.constexpr(2.0**-126)
LOG2_E = tl.constexpr(1.4426950408889634)
# Triton's own exp and division carry code for denormal numbers, a quarter of the instructions of
# the kernels; its interpreter, on the other hand, knows no PTX, and is to round as that does.
PTX = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def flushed(x):
    """Return x, zero where it is a denormal float32."""
    if x.dtype == tl.float32:
        return tl.where(tl.abs(x) < TINY, 0.0, x)
    else:
        return x


@triton.jit
def exponential(x):
    """Return e^x; of float32 within 2 units in the last place of 2^(x log2 e)."""
    if PTX:
        if x.dtype == tl.float32:
            return tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], tl.float32, True, 1
            )
        else:
            return tl.exp(x)
    else:
        return flushed(tl.exp(x))


@triton.jit
def reciprocal(x):
    """Return 1 / x; of float32 within 1 unit in the last place."""
    if PTX:
        if x.dtype == tl.float32:
            return tl.inline_asm_elementwise(
                "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
            )
        else:
            return 1.0 / x
    else:
        return flushed(1.0 / flushed(x))


@triton.jit
def apply_map(drop, gain, state):
    """Return the state after a map."""
    after = tl.where(drop == 1.0, gain + 0.0 * state, state + (gain - drop * state))
    return tl.where(drop == RESET, gain, after)


@triton.jit
def compose(first_drop, first_gain, then_drop, then_gain):
    """Return the map that is the first map, then the second."""
    drop = first_drop + (then_drop - then_drop * first_drop)
    anew = (first_drop == RESET) | (then_drop == RESET)  # also where the other is not a number
    drop = tl.where(anew, RESET, drop)
    return drop, apply_map(then_drop, then_gain, first_gain)


@triton.jit
def candidate_parts(value, ACTIVATION: tl.constexpr):
    """Return g(value) as (direct, near, top, power): direct where near, else top / (1 + power)."""
    if ACTIVATION == "g":
        power = exponential(-tl.abs(value))
        return value + 0.5, value >= 0.0, power, power
    else:  # its quotient loses relative accuracy near 0, where the series has converged
        tl.static_assert(ACTIVATION == "tanh", "unknown activation")
        power = exponential(-2.0 * tl.abs(value))
        square = value * value
        series = value + value * square * (-1 / 3 + square * (2 / 15 - square * (17 / 315)))
        top = tl.where(value < 0.0, power - 1.0, 1.0 - power)
        bound: tl.constexpr = 0.0 if value.dtype == tl.float64 else 0.1
        return series, tl.abs(value) < bound, top, power


@triton.jit
def inverse_gates(forget, update):
    """Return 1 / sigmoid of both logits, then e^-logit, all times what keeps them finite."""
    # A logit of -inf (an overflow, in float16) would be inf - inf below; NaN has to stay NaN.
    forget = tl.maximum(forget, -HUGE, propagate_nan=tl.PropagateNan.ALL)
    update = tl.maximum(update, -HUGE, propagate_nan=tl.PropagateNan.ALL)
    largest = tl.maximum(tl.maximum(-forget, -update), 0.0)
    one = exponential(-largest)
    forget, update = exponential(-forget - largest), exponential(-update - largest)
    return one + forget, one + update, forget, update


@triton.jit
def step_drop(forget, update, GATES: tl.constexpr):
    """Return the drop of a step alone."""
    if GATES == "mingru":
        return reciprocal(1.0 + exponential(-update))
    elif GATES == "minlstm":
        of_forget, of_update, _, _ = inverse_gates(forget, update)
        return of_forget * reciprocal(of_forget + of_update)
    else:
        return reciprocal(1.0 + exponential(forget))


@triton.jit
def step_map(forget, update, value, GATES: tl.constexpr, ACTIVATION: tl.constexpr):
    """Return (drop, gain) of a step; gate and candidate share one division."""
    if GATES == "minlstm":
        numerator, of_update, _, _ = inverse_gates(forget, update)
        denominator = numerator + of_update
    else:
        numerator, denominator = 1.0, 1.0 + exponential(-update)
    if ACTIVATION == "identity":
        take = numerator * reciprocal(denominator)
        gain = take * value
    else:
        direct, near, top, power = candidate_parts(value, ACTIVATION)
        shared = numerator * reciprocal(denominator * (1.0 + power))
        take = shared * (1.0 + power)
        gain = tl.where(near, take * direct, shared * top)
    if GATES == "minlstm_unnormalised":
        return step_drop(forget, update, GATES), gain
    else:
        return take, gain


@triton.jit
def gate_slopes(forget, update, GATES: tl.constexpr):
    """Return drop, the update gate, and the gates' slopes by the forget and the update logit.

    The first slope is of drop, the second of the update gate; with normalised gates, where the two
    are one, both are of it. For minGRU the first means nothing. Every 0 / 0 is turned into 0.
    """
    if GATES == "minlstm":
        of_forget, of_update, forget_power, update_power = inverse_gates(forget, update)
        total = reciprocal(of_forget + of_update)
        take = of_forget * total
        product = take * (of_update * total)
        # Times sigmoid(-logit), which is 1 - sigmoid(logit) without cancellation.
        by_forget = forget_power * reciprocal(tl.maximum(of_forget, TINY))
        by_update = update_power * reciprocal(tl.maximum(of_update, TINY))
        return take, take, -product * by_forget, product * by_update
    else:
        power = exponential(-update)
        take = reciprocal(1.0 + power)
        by_update = tl.minimum(power, HUGE) * take * take
        if GATES == "mingru":
            return take, take, by_update, by_update
        else:
            power = exponential(forget)
            drop = reciprocal(1.0 + power)
            return drop, take, -tl.minimum(power, HUGE) * drop * drop, by_update


@triton.jit
def candidate_slope(value, ACTIVATION: tl.constexpr):
    """Return g(value) and g'(value)."""
    if ACTIVATION == "identity":
        return value, tl.full(value.shape, 1.0, value.dtype)
    else:
        direct, near, top, power = candidate_parts(value, ACTIVATION)
        quotient = reciprocal(1.0 + power)
        far = top * quotient
        if ACTIVATION == "g":
            slope = tl.where(near, 1.0, far - far * far)
        else:  # 1 - tanh^2 without cancellation
            slope = 4.0 * power * quotient * quotient
        return tl.where(near, direct, far), slope


@triton.jit
def load_flags(flags, times, length, time_stride, STEPS: tl.constexpr):
    """Return STEPS tiles, (S, 1) bool; nothing if there are no flags."""
    loaded = ()
    if flags is not None:
        for step in tl.static_range(STEPS):
            at = times + step
            flag = tl.load(flags + at * time_stride, mask=at < length, other=0)
            loaded = loaded + ((flag != 0)[:, None],)
    return loaded


@triton.jit
def without_masked(flags, masks, STEPS: tl.constexpr):
    """Return the flags, False where a step is masked."""
    if len(flags) == 0 or len(masks) == 0:
        return flags
    else:
        both = ()
        for step in tl.static_range(STEPS):
            both = both + (flags[step] & masks[step],)
        return both


@triton.jit
def any_of(flags, STEPS: tl.constexpr):
    """Return where any of STEPS flags is set."""
    found = flags[0]
    for step in tl.static_range(1, STEPS):
        found = found | flags[step]
    return found


@triton.jit
def mark_resets(drop, starts, STEPS: tl.constexpr):
    """Return the drop of STEPS steps' map, RESET if one of them starts anew."""
    if len(starts) == 0:
        return drop
    else:
        return tl.where(any_of(starts, STEPS), RESET, drop)


@triton.jit
def load_steps(
    tile, times, length, alive, stride, masks, ABSENT: tl.constexpr, STEPS: tl.constexpr
):
    """Return STEPS tiles, (S, C); ABSENT where a step is masked or the sequence over."""
    loaded = ()
    for step in tl.static_range(STEPS):
        inside = ((times + step) < length)[:, None] & alive
        x = tl.load(tile + step * stride, mask=inside, other=ABSENT)
        if len(masks) > 0:
            # A constant of type bfloat16 is more than the interpreter of Triton 3.7 knows.
            absent = tl.full([], ABSENT, tl.float32).to(x.dtype)
            x = tl.where(masks[step], x, absent)
        loaded = loaded + (x,)
    return loaded


@triton.jit
def load_gates(
    tile, times, length, alive, stride, width, masks, GATES: tl.constexpr, STEPS: tl.constexpr
):
    """Return the packed (forget, update) logits, each STEPS tiles; minGRU has no forget gate."""
    if GATES == "mingru":
        update = load_steps(tile, times, length, alive, stride, masks, CLOSED, STEPS)
        return update, update
    else:
        forget = load_steps(tile, times, length, alive, stride, masks, -CLOSED, STEPS)
        tile += width
        update = load_steps(tile, times, length, alive, stride, masks, CLOSED, STEPS)
        return forget, update
