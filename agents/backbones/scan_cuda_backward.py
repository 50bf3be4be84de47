# ruff: noqa: N803, N806, RUF005 - constants in capitals as Triton has them; no starred tuples in it
"""The gated scan's backward pass as Triton kernels, cut like the forward pass.

The states are recomputed chunk by chunk, from the last chunk to the first, each from its
checkpoint. What is carried backwards is the gradient by the state before a step, which is again
a map for every step: grad -> outer + grad, then minus drop times itself.
"""

import triton
import triton.language as tl

from minrl.agents.backbones.scan_cuda_forward import (
    UNSPECIALISED,
    across_segments,
    across_splits,
    fold_steps,
    load_row,
    locate,
)
from minrl.agents.backbones.scan_cuda_steps import (
    RESET,
    any_of,
    candidate_slope,
    compose,
    gate_slopes,
    load_flags,
    load_gates,
    load_steps,
    mark_resets,
    step_drop,
    without_masked,
)


@triton.jit
def fold_steps_backwards(drops, outer, starts, drop, grad, STEPS: tl.constexpr):
    """Continue a map of gradients over STEPS earlier steps; the drop as if there were no starts."""
    for step in tl.static_range(STEPS - 1, -1, -1):
        grad = outer[step].to(grad.dtype) + grad
        grad = grad - drops[step] * grad
        drop = drop + (drops[step] - drops[step] * drop)
        if len(starts) > 0:
            grad = tl.where(starts[step], 0.0, grad)
    return drop, grad


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_maps_kernel(
    grad_states, projected, resets, mask, drops, gains,
    batch, length, groups, splits, split_chunks,
    GATES: tl.constexpr, BATCH_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, STATE: tl.constexpr,
    CHANNELS: tl.constexpr, SEGMENTS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write what every split makes of the gradient that enters at its end, (splits, B, H)."""
    width = groups * ALIGNED
    row, origin, channels, alive, distance = locate(
        batch, length, width, CHANNELS, EVEN, BATCH_FIRST
    )
    split = tl.program_id(1)
    segment = tl.arange(0, SEGMENTS)
    begins = (split * SEGMENTS + segment) * (split_chunks * STEPS)
    steps = origin + begins[:, None] * distance
    stride = distance * PARTS * width
    tile = projected + steps * PARTS * width + channels
    grad_tile = grad_states + steps * width + channels
    mask_row = mask if mask is None else mask + origin
    reset_row = resets if resets is None else resets + origin
    drop = tl.zeros((SEGMENTS, CHANNELS), STATE)
    grad = tl.zeros((SEGMENTS, CHANNELS), STATE)
    started = tl.zeros((SEGMENTS, 1), tl.int1)
    for done in tl.range(split_chunks, num_stages=STAGES):
        first = (split_chunks - 1 - done) * STEPS
        times = begins + first
        masks = load_flags(mask_row, times, length, distance, STEPS)
        starts = load_flags(reset_row, times, length, distance, STEPS)
        starts = without_masked(starts, masks, STEPS)
        forget, update = load_gates(
            tile + first * stride, times, length, alive, stride, width, masks, GATES, STEPS
        )
        now = grad_tile + first * (distance * width)
        outer = load_steps(now, times, length, alive, distance * width, (), 0.0, STEPS)
        step_drops = ()
        for step in tl.static_range(STEPS):
            step_drops = step_drops + (
                step_drop(forget[step].to(STATE), update[step].to(STATE), GATES),
            )
        drop, grad = fold_steps_backwards(step_drops, outer, starts, drop, grad, STEPS)
        if resets is not None:
            started = started | any_of(starts, STEPS)
    drop = tl.where(started, RESET, drop)
    if SEGMENTS > 1:
        drop, grad = tl.associative_scan((drop, grad), 0, compose, reverse=True)
    at = (split.to(tl.int64) * batch + row) * width + channels + segment[:, None] * 0
    tl.store(drops + at, drop, mask=(segment == 0)[:, None] & alive)
    tl.store(gains + at, grad, mask=(segment == 0)[:, None] & alive)


@triton.jit
def slopes_of_steps(
    forget, update, value, STATE: tl.constexpr,
    GATES: tl.constexpr, ACTIVATION: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Return, for STEPS steps: drop, gain, g(value), and the slopes by the three logits."""
    drop, gain, candidate, by_forget, by_update, by_value = (), (), (), (), (), ()
    for step in tl.static_range(STEPS):
        dropped, take, gate_forget, gate_update = gate_slopes(
            forget[step].to(STATE), update[step].to(STATE), GATES
        )
        shown, slope = candidate_slope(value[step].to(STATE), ACTIVATION)
        drop, gain, candidate = drop + (dropped,), gain + (take * shown,), candidate + (shown,)
        by_forget, by_update = by_forget + (gate_forget,), by_update + (gate_update,)
        by_value = by_value + (take * slope,)
    return drop, gain, candidate, by_forget, by_update, by_value


@triton.jit
def slopes_of_states(
    state, drop, gain, candidate, by_forget, by_update, starts, fresh,
    GATES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Run the steps from a state; return the slopes of the state after each by its two gates."""
    for_forget, for_update = (), ()
    for step in tl.static_range(STEPS):
        if len(starts) > 0:
            state = tl.where(starts[step], fresh, state)
        if GATES == "minlstm_unnormalised":
            for_forget = for_forget + (-by_forget[step] * state,)
            for_update = for_update + (by_update[step] * candidate[step],)
        else:
            gap = candidate[step] - state
            for_forget = for_forget + (by_forget[step] * gap,)
            for_update = for_update + (by_update[step] * gap,)
        state = state + (gain[step] - drop[step] * state)
    return for_forget, for_update


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_kernel(
    grad_states, grad_last, projected, checkpoints, initial_state, resets, reset_state, mask,
    drops, gains, grad_projected, grad_initial, grad_reset,
    batch, length, groups, splits, split_chunks,
    GATES: tl.constexpr, ACTIVATION: tl.constexpr, BATCH_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, STATE: tl.constexpr,
    CHANNELS: tl.constexpr, SEGMENTS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one split; of the reset state, (splits, B, H), its share."""
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
    grad_tile = grad_states + steps * width + channels
    out_tile = grad_projected + steps * PARTS * width + channels
    out_type = grad_projected.dtype.element_ty
    mask_row = mask if mask is None else mask + origin
    reset_row = resets if resets is None else resets + origin
    fresh = load_row(reset_state, row, width, channels, alive, CHANNELS, STATE)
    initial = load_row(initial_state, row, width, channels, alive, CHANNELS, STATE)
    reset_total = tl.zeros((SEGMENTS, CHANNELS), STATE)
    size = batch.to(tl.int64) * width
    carry = load_row(grad_last, row, width, channels, alive, CHANNELS, STATE)
    carry = tl.broadcast_to(carry, (SEGMENTS, CHANNELS))
    if drops is not None:
        carry = across_splits(
            drops, gains, here, alive, size, splits, carry, True, SEGMENTS, STEPS, CHANNELS
        )
    first_chunk = tl.program_id(1) * split_chunks
    last_chunk = tl.minimum(first_chunk + split_chunks, tl.cdiv(length, CHUNK))
    for done in tl.range(last_chunk - first_chunk, num_stages=STAGES):
        chunk = last_chunk - 1 - done
        times = chunk * CHUNK + segment * STEPS
        now = tile + chunk * CHUNK * stride
        masks = load_flags(mask_row, times, length, distance, STEPS)
        starts = load_flags(reset_row, times, length, distance, STEPS)
        starts = without_masked(starts, masks, STEPS)
        forget, update = load_gates(now, times, length, alive, stride, width, masks, GATES, STEPS)
        now += (PARTS - 1) * width
        value = load_steps(now, times, length, alive, stride, masks, 0.0, STEPS)
        now = grad_tile + chunk * CHUNK * (distance * width)
        outer = load_steps(now, times, length, alive, distance * width, (), 0.0, STEPS)
        # Only the first segment's state is known; its row stands for the chunk.
        known = ((segment == 0) & (times > 0))[:, None] & alive
        state = tl.load(checkpoints + (chunk - 1) * size + here, mask=known, other=0.0)
        state = tl.where(known, state, initial)
        drop, gain, candidate, by_forget, by_update, by_value = slopes_of_steps(
            forget, update, value, STATE, GATES, ACTIVATION, STEPS
        )
        if SEGMENTS > 1:
            all_drop, all_gain = fold_steps(drop, gain, starts, fresh, STEPS)
            state, _ = across_segments(all_drop, all_gain, state, False, SEGMENTS, CHANNELS)
        by_forget, by_update = slopes_of_states(
            state, drop, gain, candidate, by_forget, by_update, starts, fresh, GATES, STEPS
        )
        grad = carry
        if SEGMENTS > 1:
            zero = tl.zeros((SEGMENTS, CHANNELS), STATE)
            all_drop, all_grad = fold_steps_backwards(drop, outer, starts, zero, zero, STEPS)
            all_drop = mark_resets(all_drop, starts, STEPS)
            grad, carry = across_segments(all_drop, all_grad, carry, True, SEGMENTS, CHANNELS)
        now = out_tile + chunk * CHUNK * stride
        for step in tl.static_range(STEPS - 1, -1, -1):
            grad = outer[step].to(STATE) + grad
            inside = (times + step < length)[:, None] & alive
            at = now + step * stride
            if GATES != "mingru":
                tl.store(at, (grad * by_forget[step]).to(out_type), mask=inside)
                at += width
            tl.store(at, (grad * by_update[step]).to(out_type), mask=inside)
            tl.store(at + width, (grad * by_value[step]).to(out_type), mask=inside)
            grad = grad - drop[step] * grad
            if resets is not None:
                reset_total += tl.where(starts[step], grad, 0.0)
                grad = tl.where(starts[step], 0.0, grad)
        if SEGMENTS == 1:
            carry = grad
    if first_chunk == 0:
        tl.store(grad_initial + here, carry, mask=(segment == 0)[:, None] & alive)
    total = tl.sum(reset_total, axis=0, keep_dims=True)
    at = (tl.program_id(1).to(tl.int64) * batch + row) * width + channels
    tl.store(grad_reset + at, total, mask=alive)
