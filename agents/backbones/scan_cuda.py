"""The gated scan on CUDA: which tiles for which shape, and the launches of the Triton kernels.

Without autograd: ``scan_operator`` calls these functions where its tensors are on CUDA. Results are
the same bits on every run of the same shapes, types and :class:`Plan`. Triton is imported when a
scan first runs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minrl.agents.backbones.scan_torch import PARTS


@dataclass(frozen=True)
class Tiles:
    """How one kernel cuts the work.

    Attributes:
        channels: Channels of a program, a power of two.
        segments: Threads along time for every channel, a power of two.
        steps: Consecutive steps that a thread holds in registers.
        warps: Warps of a program.
        stages: Chunks of segments * steps in flight, the present one included (1: none ahead).
    """

    channels: int
    segments: int
    steps: int
    warps: int
    stages: int

    @property
    def chunk(self) -> int:
        """Steps that a program takes at a time."""
        return self.segments * self.steps


@dataclass(frozen=True)
class Plan:
    """The tiles of both kernels and in how many splits, shared by programs, time is cut.

    The forward kernel's ``steps`` divide the backward kernel's chunk, and neither chunk is shorter
    than there are splits.
    """

    forward: Tiles
    backward: Tiles
    splits: int = 1


# The knobs to tune on a GPU, by the number of channels, batch times width, that they are for. With
# many channels two a thread fill the machine: no work across segments in the forward kernel. The
# backward kernel's chunk stays at 32 steps or more, since every chunk costs a checkpoint. Loading a
# chunk ahead costs a tenth more instructions, and keeps the memory busy while few warps compute.
MANY_CHANNELS = 65_536
FEW_CHANNELS = 4_096
MANY = Plan(Tiles(64, 1, 16, 1, 2), Tiles(32, 4, 8, 2, 1))
SOME = Plan(Tiles(32, 8, 16, 4, 2), Tiles(32, 8, 8, 4, 2))
FEW = Plan(Tiles(16, 32, 16, 8, 2), Tiles(16, 32, 8, 8, 2))
# Splits read the inputs twice: worth it only where programs are far too few for the machine.
FEWEST_PROGRAMS = 64
WANTED_PROGRAMS = 256
CHUNKS_OF_A_SPLIT = 2
# Bytes of shared memory that a kernel takes for more than the chunks in flight.
EXCHANGED = 16_384


def make_plan(batch: int, length: int, width: int) -> Plan:
    """Return how to cut a scan: a pure function of the sizes, so that nothing is tuned per call."""
    plan = _plan_for(batch * width)
    forward, backward = (_fit(tiles, length, width) for tiles in (plan.forward, plan.backward))
    programs = batch * -(-width // forward.channels)
    splits = 1
    if programs < FEWEST_PROGRAMS:
        affordable = length // (forward.chunk * CHUNKS_OF_A_SPLIT)
        splits = max(1, min(WANTED_PROGRAMS // programs, affordable, backward.chunk))
    return Plan(forward, backward, splits)


def _plan_for(channels: int) -> Plan:
    return MANY if channels >= MANY_CHANNELS else SOME if channels >= FEW_CHANNELS else FEW


def _fit(tiles: Tiles, length: int, width: int) -> Tiles:
    """Shrink tiles that are longer or wider than the tensor, and the threads with them."""
    channels = min(tiles.channels, _power_of_two(width))
    segments = min(tiles.segments, _power_of_two(-(-length // tiles.steps)))
    share = tiles.channels * tiles.segments // (channels * segments)
    return Tiles(channels, segments, tiles.steps, max(1, tiles.warps // share), tiles.stages)


def affordable_stages(tiles: Tiles, step_bytes: int, room: int) -> int:
    """Return ``tiles.stages``, or 1 where the chunks ahead do not fit into shared memory.

    Args:
        tiles: Of the kernel.
        step_bytes: What a step of a channel takes in all tensors that are loaded ahead.
        room: Bytes of shared memory that a program may have.
    """
    ahead = (tiles.stages - 1) * tiles.chunk * tiles.channels * step_bytes
    return tiles.stages if ahead + EXCHANGED <= room else 1


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def checkpoint_shape(
    batch: int, length: int, width: int, plan: Plan | None = None
) -> tuple[int, int, int]:
    """Return the shape of ``scan_forward``'s checkpoints, (N, B, H).

    They are the states before every chunk of the backward kernel but the first, in float32
    (float64 for float64 inputs). Sizes may be symbolic: a plan shrunk to a short sequence has one
    chunk, and so has the plan that it was made from.
    """
    plan = plan or _plan_for(batch * width)
    return -(-length // plan.backward.chunk) - 1, batch, width


def scan_forward(
    projected: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reset_state: Tensor | None,
    mask: Tensor | None,
    gates: str,
    activation: str,
    batch_first: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence.

    Args:
        projected: Packed pre-activations, (B, T, G*H), or (T, B, G*H) if not ``batch_first``;
            contiguous, as all tensors.
        initial_state: (B, H) in the state's type, float32 (float64 for float64 inputs), or None.
        resets: bool, (B, T) or (T, B), or None.
        reset_state: Like ``initial_state``.
        mask: Like ``resets``.
        gates: "mingru", "minlstm" or "minlstm_unnormalised".
        activation: "g", "identity" or "tanh".
        batch_first: Which axis is the batch.
        plan: Other tiles than those chosen by the sizes.

    Returns:
        The states like ``projected`` but H wide, the last state (B, H), and the checkpoints.
    """
    from minrl.agents.backbones.scan_cuda_forward import forward_kernel, forward_maps_kernel

    launch = _Launch(projected, gates, batch_first, plan)
    plan, state = launch.plan, launch.state
    resets, mask = _bytes(resets), _bytes(mask)
    states = projected.new_empty(*projected.shape[:2], launch.width)
    last_state = state(launch.batch, launch.width)
    checkpoints = state(*checkpoint_shape(launch.batch, launch.length, launch.width, plan))
    drops, gains = launch.maps(plan.forward)
    options = {"ACTIVATION": activation}
    if drops is not None:
        maps = projected, resets, reset_state, mask, drops, gains
        launch(forward_maps_kernel, plan.forward, maps, options)
    inputs = projected, initial_state, resets, reset_state, mask, drops, gains
    options["SPACING"] = plan.backward.chunk
    launch(forward_kernel, plan.forward, (*inputs, states, last_state, checkpoints), options)
    return states, last_state, checkpoints


def scan_backward(
    grad_states: Tensor,
    grad_last: Tensor,
    projected: Tensor,
    checkpoints: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reset_state: Tensor | None,
    mask: Tensor | None,
    gates: str,
    activation: str,
    batch_first: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by ``projected``, and by the initial and the reset state, (B, H).

    Args:
        grad_states: The gradient by the states, like these, contiguous.
        grad_last: The gradient by the last state, (B, H).
        projected: As in :func:`scan_forward`, as are the other arguments.
        checkpoints: What :func:`scan_forward` returned, with the same plan.
        initial_state: As there.
        resets: As there.
        reset_state: As there; its gradient is the sum over the steps, zeros without resets.
        mask: As there.
        gates: As there.
        activation: As there.
        batch_first: As there.
        plan: As there.
    """
    from minrl.agents.backbones.scan_cuda_backward import backward_kernel, backward_maps_kernel

    launch = _Launch(projected, gates, batch_first, plan)
    plan, state = launch.plan, launch.state
    resets, mask = _bytes(resets), _bytes(mask)
    grad_projected = torch.empty_like(projected)
    grad_initial = state(launch.batch, launch.width)
    splits, _ = launch.cut(plan.backward)
    grad_reset = state(splits, launch.batch, launch.width)
    drops, gains = launch.maps(plan.backward)
    if drops is not None:
        maps = grad_states, projected, resets, mask, drops, gains
        launch(backward_maps_kernel, plan.backward, maps, {})
    inputs = grad_states, grad_last, projected, checkpoints, initial_state, resets, reset_state
    outputs = grad_projected, grad_initial, grad_reset
    options = {"ACTIVATION": activation}
    launch(backward_kernel, plan.backward, (*inputs, mask, drops, gains, *outputs), options)
    return grad_projected, grad_initial, grad_reset[0] if splits == 1 else grad_reset.sum(0)


class _Launch:
    """What all kernels of one scan have in common."""

    def __init__(self, projected: Tensor, gates: str, batch_first: bool, plan: Plan | None):
        import triton.language as tl

        self.projected = projected
        first, second, columns = projected.shape
        self.batch, self.length = (first, second) if batch_first else (second, first)
        self.width = columns // PARTS[gates]
        self.plan = plan or make_plan(self.batch, self.length, self.width)
        self.aligned = next(size for size in (16, 8, 4, 2, 1) if self.width % size == 0)
        self.options = {
            "GATES": gates,
            "BATCH_FIRST": batch_first,
            "ALIGNED": self.aligned,
            "PARTS": PARTS[gates],
            "STATE": tl.float64 if projected.dtype is torch.float64 else tl.float32,
            # A fused multiply-add rounds once, which the accuracy of the recurrence counts on.
            "enable_fp_fusion": True,
        }

    def state(self, *size: int) -> Tensor:
        """Return a new tensor in the state's type."""
        dtype = torch.promote_types(self.projected.dtype, torch.float32)
        return self.projected.new_empty(size, dtype=dtype)

    def cut(self, tiles: Tiles) -> tuple[int, int]:
        """Return the number of splits and the chunks of each."""
        chunks = -(-self.length // tiles.chunk)
        split_chunks = -(-chunks // self.plan.splits)
        return -(-chunks // split_chunks), split_chunks

    def stages(self, tiles: Tiles) -> int:
        """Return how many chunks are in flight, which changes no result."""
        device = self.projected.device
        if device.type != "cuda":  # interpreted
            return tiles.stages
        step_bytes = (self.options["PARTS"] + 1) * self.projected.element_size()
        return affordable_stages(tiles, step_bytes, _shared_memory(device))

    def maps(self, tiles: Tiles) -> tuple[Tensor | None, Tensor | None]:
        """Return room for the maps of the splits, if there are several."""
        splits, _ = self.cut(tiles)
        if splits == 1:
            return None, None
        return tuple(self.state(2, splits, self.batch, self.width))

    def __call__(
        self, kernel: Callable, tiles: Tiles, tensors: tuple[Tensor | None, ...], options: dict
    ) -> None:
        splits, split_chunks = self.cut(tiles)
        grid = self.batch * -(-self.width // tiles.channels), splits
        sizes = self.batch, self.length, self.width // self.aligned, splits, split_chunks
        with torch.cuda.device_of(self.projected):
            kernel[grid](
                *tensors,
                *sizes,
                **self.options,
                **options,
                EVEN=self.width % tiles.channels == 0,
                CHANNELS=tiles.channels,
                SEGMENTS=tiles.segments,
                STEPS=tiles.steps,
                STAGES=self.stages(tiles),
                num_warps=tiles.warps,
            )


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.view(torch.uint8)
