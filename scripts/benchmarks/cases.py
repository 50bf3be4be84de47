"""The shapes that are measured, and one case of the scan and of the layers, with its tensors."""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from minrl.agents.backbones.scan_torch import PARTS
from minrl.errors import ConfigError
from minrl.scripts.machine import free_bytes

DIRECTIONS = ("forward", "backward", "both")
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


class Shape(NamedTuple):
    """Sizes of the states: batch B, steps T, channels D."""

    batch: int
    length: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.width}"

    @property
    def elements(self) -> int:
        """Count of the states' elements."""
        return self.batch * self.length * self.width


FULL = [
    Shape(*sizes)
    for sizes in itertools.product(
        (1, 16, 64, 256, 1024, 4096),
        (1, 20, 60, 128, 512, 1000, 3000, 4096, 16384),
        (64, 128, 256, 512),
    )
]
# One line over T at the papers' width and batch, then few and many channels, short and long.
DEFAULT = {
    "cpu": [Shape(64, length, 128) for length in (1, 20, 60, 128, 512, 1024)]
    + [Shape(1, 1000, 128), Shape(16, 3000, 64), Shape(256, 60, 128), Shape(64, 60, 512)],
    "cuda": [Shape(64, length, 128) for length in (1, 20, 60, 128, 512, 1000, 1024, 4096, 16384)]
    + [Shape(1, 16384, 128), Shape(16, 16384, 128), Shape(512, 64, 128), Shape(1024, 128, 256)]
    + [Shape(4096, 60, 256), Shape(64, 3000, 512), Shape(4096, 1000, 128)],
}
QUICK = [Shape(16, 20, 64), Shape(16, 60, 64)]
GRIDS = ("quick", "default", "full")
# Tensors of the states' size that must fit. On CUDA a contestant that needs more says so in its
# row, on a CPU it would take the machine down.
TENSORS_HELD = {"cpu": 40, "cuda": 24}


def shapes_of(grid: str, device: torch.device, precision: str) -> tuple[list[Shape], list[Shape]]:
    """Return the shapes of a grid, smallest first, and those that do not fit into memory."""
    shapes = {"quick": QUICK, "default": DEFAULT[device.type], "full": FULL}[grid]
    held = TENSORS_HELD[device.type] * PRECISIONS[precision].itemsize
    room = free_bytes(device)
    shapes = sorted(shapes, key=lambda shape: (shape.elements, shape))
    fitting = [shape for shape in shapes if shape.elements * held <= room]
    return fitting, [shape for shape in shapes if shape.elements * held > room]


def parse_shape(text: str) -> Shape:
    """Read "64x60x128".

    Raises:
        ConfigError: If it is not three positive numbers.
    """
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ConfigError(f"a shape is batch x steps x channels, such as 64x60x128, not {text!r}")
    return Shape(*map(int, sizes))


@dataclass(frozen=True)
class ScanCase:
    """One case of the scan: from packed pre-activations (B, T, G*D) to states (B, T, D).

    Attributes:
        shape: Of the states.
        gates: As in ``gated_scan``.
        precision: Of pre-activations and states.
        direction: "forward", "backward" (after a forward pass that is not timed) or "both".
        device: Where.
        compiled: Whether contestants' gates may be compiled.
        gate_mean: Mean of the gates' pre-activations; -7 makes a long memory.
    """

    shape: Shape
    gates: str
    precision: str
    direction: str
    device: torch.device
    compiled: bool = False
    gate_mean: float = 0.0

    @cached_property
    def projected(self) -> Tensor:
        """Packed pre-activations, the gates' with mean ``gate_mean``, all with deviation 1."""
        batch, length, width = self.shape
        parts = PARTS[self.gates]
        generator = torch.Generator(self.device).manual_seed(0)
        values = torch.randn(batch, length, parts * width, device=self.device, generator=generator)
        values[..., : (parts - 1) * width] += self.gate_mean
        if self.gates != "mingru" and self.gate_mean:  # closed input gate, open forget gate
            values[..., :width] -= 2 * self.gate_mean
        return values.to(PRECISIONS[self.precision])

    @cached_property
    def grad_states(self) -> Tensor:
        """What the states' gradient is, (B, T, D)."""
        generator = torch.Generator(self.device).manual_seed(1)
        values = torch.randn(*self.shape, device=self.device, generator=generator)
        return values.to(PRECISIONS[self.precision])

    @property
    def minimum_bytes(self) -> int:
        """Bytes that must be read and written, the states being recomputed in the backward pass."""
        parts = PARTS[self.gates]
        tensors = {"forward": parts + 1, "backward": 2 * parts + 1, "both": 3 * parts + 2}
        itemsize = PRECISIONS[self.precision].itemsize
        return tensors[self.direction] * self.shape.elements * itemsize
