# ruff: noqa: N803, N806, RUF005 - constants in capitals as Triton has them; no starred tuples in it
"""The gated scan's forward pass as Triton kernels; ``scan_cuda`` chooses the sizes and launches.

A program owns C channels of one batch row and walks along time in chunks of S segments of STEPS
steps. Every thread holds one segment of a few channels in registers: it folds its steps into one
map, the maps are composed across the segments, and the thread then runs its steps from the state
it so learned. The gates, nearly all of the work, are thus computed by S times as many threads as
there are channels. With S = 1, for many channels, only the running of the steps is left.

With few channels and long sequences, several programs share the time axis (``splits``): a first
kernel writes the map of every split, and every program of the second starts by composing the maps
of the splits before its own.
"""

import triton
import triton.language as tl

from minrl.agents.backbones.scan_cuda_steps import (
    RESET,
    any_of,
    apply_map,
    compose,
    load_flags,
    load_gates,
    load_steps,
    mark_resets,
    step_map,
    without_masked,
)

# One compiled kernel for all of these. The width is GROUPS of ALIGNED channels, so that the
# compiler knows how wide loads may be.
UNSPECIALISED = ["batch", "length", "groups", "splits", "split_chunks"]


@triton.jit
def locate(
    batch, length, width,
    CHANNELS: tl.constexpr, EVEN: tl.constexpr, BATCH_FIRST: tl.constexpr,
):  # fmt: skip
    """Return this program's row and channels, which of these exist, and the distance of steps.

    Counted in steps: step t of the row is number row + t * distance of the whole tensor.
    """
    blocks = tl.cdiv(width, CHANNELS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channels = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    alive = tl.full((1, CHANNELS), True, tl.int1) if EVEN else channels < width
    if BATCH_FIRST:
        return row, row * length, channels, alive, tl.full((), 1, tl.int64)
    else:
        return row, row, channels, alive, batch.to(tl.int64)


@triton.jit
def load_row(state, row, width, channels, alive, CHANNELS: tl.constexpr, STATE: tl.constexpr):
    """Return a row of a (B, H) tensor, (1, C); zeros if there is none."""
    if state is None:
        return tl.zeros((1, CHANNELS), STATE)
    else:
        return tl.load(state + row * width + channels, mask=alive, other=0.0)


@triton.jit
def fold_steps(drops, gains, starts, fresh, STEPS: tl.constexpr):
    """Fold the maps of STEPS steps into one."""
    drop, gain = drops[0], gains[0]
    if len(starts) > 0:
        gain = tl.where(starts[0], fresh + (gain - drop * fresh), gain)
    for step in tl.static_range(1, STEPS):
        if len(starts) > 0:
            gain = tl.where(starts[step], fresh, gain)
        gain = gain + (gains[step] - drops[step] * gain)
        drop = drop + (drops[step] - drops[step] * drop)
    return mark_resets(drop, starts, STEPS), gain


@triton.jit
def across_segments(
    drop, gain, carry, REVERSE: tl.constexpr, SEGMENTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Compose the segments' maps, (S, C), on a state, the carry, from the last if REVERSE.

    Returns:
        The state before every segment and the state after all, in every row: both (S, C).
    """
    if SEGMENTS == 1:
        return carry, apply_map(drop, gain, carry)
    else:
        segment = tl.arange(0, SEGMENTS)[:, None]
        first = segment == (SEGMENTS - 1 if REVERSE else 0)
        last = segment == (0 if REVERSE else SEGMENTS - 1)
        gain = tl.where(first, apply_map(drop, gain, carry), gain)
        # A neutral map in front of every segment's: what is scanned up to it is the state before.
        neutral = tl.zeros_like(drop)
        if REVERSE:
            drop, gain = tl.join(drop, neutral), tl.join(gain, neutral)
        else:
            drop, gain = tl.join(neutral, drop), tl.join(neutral, gain)
        drop = tl.reshape(tl.permute(drop, (0, 2, 1)), (2 * SEGMENTS, CHANNELS))
        gain = tl.reshape(tl.permute(gain, (0, 2, 1)), (2 * SEGMENTS, CHANNELS))
        _, states = tl.associative_scan((drop, gain), 0, compose, reverse=REVERSE)
        states = tl.permute(tl.reshape(states, (SEGMENTS, 2, CHANNELS)), (0, 2, 1))
        before, after = tl.split(states)
        if REVERSE:
            before, after = after, before
        carried = tl.sum(tl.where(last, after, 0.0), axis=0, keep_dims=True)
        return tl.where(first, carry, before), tl.broadcast_to(carried, (SEGMENTS, CHANNELS))


@triton.jit
def across_splits(
    drops, gains, here, alive, stride, splits, carry,
    REVERSE: tl.constexpr, SEGMENTS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Apply the maps of the splits before this one (after it if REVERSE) to the carry."""
    split = tl.program_id(1)
    segment = tl.arange(0, SEGMENTS)[:, None]
    drop = tl.zeros((SEGMENTS, CHANNELS), carry.dtype)
    gain = tl.zeros((SEGMENTS, CHANNELS), carry.dtype)
    for step in tl.static_range(STEPS):
        if REVERSE:
            other = segment * STEPS + (STEPS - 1 - step)
            wanted = (other > split) & (other < splits) & alive
        else:
            other = segment * STEPS + step
            wanted = (other < split) & alive
        at = here + other * stride
        then_drop = tl.load(drops + at, mask=wanted, other=0.0)
        then_gain = tl.load(gains + at, mask=wanted, other=0.0)
        drop, gain = compose(drop, gain, then_drop, then_gain)
    _, carry = across_segments(drop, gain, carry, REVERSE, SEGMENTS, CHANNELS)
    return carry


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_maps_kernel(
    projected, resets, reset_state, mask, drops, gains,
    batch, length, groups, splits, split_chunks,
    GATES: tl.constexpr, ACTIVATION: tl.constexpr, BATCH_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, STATE: tl.constexpr,
    CHANNELS: tl.constexpr, SEGMENTS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the map of every split of the sequence: drops and gains, (splits, B, H)."""
    width = groups * ALIGNED
    row, origin, channels, alive, distance = locate(
        batch, length, width, CHANNELS, EVEN, BATCH_FIRST
    )
    split = tl.program_id(1)
    # Here a segment is one long run of steps, so that the segments are composed only once.
    segment = tl.arange(0, SEGMENTS)
    begins = (split * SEGMENTS + segment) * (split_chunks * STEPS)
    stride = distance * PARTS * width
    tile = projected + origin * PARTS * width + begins[:, None] * stride + channels
    fresh = load_row(reset_state, row, width, channels, alive, CHANNELS, STATE)
    mask_row = mask if mask is None else mask + origin
    reset_row = resets if resets is None else resets + origin
    drop = tl.zeros((SEGMENTS, CHANNELS), STATE)
    gain = tl.zeros((SEGMENTS, CHANNELS), STATE)
    started = tl.zeros((SEGMENTS, 1), tl.int1)
    for chunk in tl.range(split_chunks, num_stages=STAGES):
        times = begins + chunk * STEPS
        now = tile + chunk * STEPS * stride
        masks = load_flags(mask_row, times, length, distance, STEPS)
        starts = load_flags(reset_row, times, length, distance, STEPS)
        starts = without_masked(starts, masks, STEPS)
        forget, update = load_gates(now, times, length, alive, stride, width, masks, GATES, STEPS)
        now += (PARTS - 1) * width
        value = load_steps(now, times, length, alive, stride, masks, 0.0, STEPS)
        for step in tl.static_range(STEPS):
            step_drop, step_gain = step_map(
                forget[step].to(STATE), update[step].to(STATE), value[step].to(STATE),
                GATES, ACTIVATION,
            )  # fmt: skip
            if resets is not None:
                gain = tl.where(starts[step], fresh, gain)
            gain = gain + (step_gain - step_drop * gain)
            drop = drop + (step_drop - step_drop * drop)
        if resets is not None:
            started = started | any_of(starts, STEPS)
    drop = tl.where(started, RESET, drop)
    if SEGMENTS > 1:
        drop, gain = tl.associative_scan((drop, gain), 0, compose)
    last = (segment == SEGMENTS - 1)[:, None] & alive
    at = (split.to(tl.int64) * batch + row) * width + channels + segment[:, None] * 0
    tl.store(drops + at, drop, mask=last)
    tl.store(gains + at, gain, mask=last)


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    projected, initial_state, resets, reset_state, mask, drops, gains,
    states, last_state, checkpoints,
    batch, length, groups, splits, split_chunks,
    GATES: tl.constexpr, ACTIVATION: tl.constexpr, BATCH_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, STATE: tl.constexpr,
    CHANNELS: tl.constexpr, SEGMENTS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    SPACING: tl.constexpr,
):  # fmt: skip
    """Write the states of one split, the state before every SPACING-th step, and the last one."""
    CHUNK: tl.constexpr = SEGMENTS * STEPS
    width = groups * ALIGNED
    row, origin, channels, alive, distance = locate(
        batch, length, width, CHANNELS, EVEN, BATCH_FIRST
    )
    segment = tl.arange(0, SEGMENTS)
    here = row * width + channels + segment[:, None] * 0
    steps = origin + segment[:, None] * STEPS * distance
    stride = distance * PARTS * width
    tile = projected + steps * PARTS * width + channels
    state_tile = states + steps * width + channels
    mask_row = mask if mask is None else mask + origin
    reset_row = resets if resets is None else resets + origin
    fresh = load_row(reset_state, row, width, channels, alive, CHANNELS, STATE)
    carry = load_row(initial_state, row, width, channels, alive, CHANNELS, STATE)
    carry = tl.broadcast_to(carry, (SEGMENTS, CHANNELS))
    size = batch.to(tl.int64) * width
    if drops is not None:
        carry = across_splits(
            drops, gains, here, alive, size, splits, carry, False, SEGMENTS, STEPS, CHANNELS
        )
    first_chunk = tl.program_id(1) * split_chunks
    last_chunk = tl.minimum(first_chunk + split_chunks, tl.cdiv(length, CHUNK))
    for chunk in tl.range(first_chunk, last_chunk, num_stages=STAGES):
        times = chunk * CHUNK + segment * STEPS
        now = tile + chunk * CHUNK * stride
        masks = load_flags(mask_row, times, length, distance, STEPS)
        starts = load_flags(reset_row, times, length, distance, STEPS)
        starts = without_masked(starts, masks, STEPS)
        forget, update = load_gates(now, times, length, alive, stride, width, masks, GATES, STEPS)
        now += (PARTS - 1) * width
        value = load_steps(now, times, length, alive, stride, masks, 0.0, STEPS)
        drop, gain = (), ()
        for step in tl.static_range(STEPS):
            step_drop, step_gain = step_map(
                forget[step].to(STATE), update[step].to(STATE), value[step].to(STATE),
                GATES, ACTIVATION,
            )  # fmt: skip
            drop, gain = drop + (step_drop,), gain + (step_gain,)
        state = carry
        if SEGMENTS > 1:
            all_drop, all_gain = fold_steps(drop, gain, starts, fresh, STEPS)
            state, carry = across_segments(all_drop, all_gain, carry, False, SEGMENTS, CHANNELS)
        saved = ((times % SPACING == 0) & (times > 0) & (times < length))[:, None] & alive
        at = checkpoints + (times // SPACING - 1)[:, None] * size + here
        tl.store(at, state, mask=saved)
        now = state_tile + chunk * CHUNK * (distance * width)
        for step in tl.static_range(STEPS):
            if resets is not None:
                state = tl.where(starts[step], fresh, state)
            state = state + (gain[step] - drop[step] * state)
            inside = (times + step < length)[:, None] & alive
            at = now + step * (distance * width)
            tl.store(at, state.to(states.dtype.element_ty), mask=inside)
        if SEGMENTS == 1:
            carry = state
    if last_chunk * CHUNK >= length:
        tl.store(last_state + here, carry, mask=(segment == 0)[:, None] & alive)
