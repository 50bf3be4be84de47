"""``minrl benchmark layer``: MinGRU and MinLSTM against the recurrent layers they stand in for."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from minrl.agents.backbones.cells import MinGRU, MinLSTM
from minrl.scripts.benchmarks.cases import PRECISIONS, Shape
from minrl.scripts.benchmarks.measuring import (
    Clock,
    Contestant,
    Prepared,
    compete,
    summarise,
)
from minrl.scripts.benchmarks.peers import build_lucidrains_layer
from minrl.scripts.benchmarks.report import Report, print_case

CELLS = {"mingru": (MinGRU, nn.GRU, nn.GRUCell), "minlstm": (MinLSTM, nn.LSTM, nn.LSTMCell)}


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """One case of a layer of D features in, D out.

    Attributes:
        shape: Of its output.
        cell: "mingru" or "minlstm".
        precision: "float32", "tf32" (matrix products in TF32) or "bfloat16" (weights too).
        direction: "forward", or "both": with the gradients of weights and input.
        device: Where.
    """

    shape: Shape
    cell: str
    precision: str
    direction: str
    device: torch.device

    @property
    def options(self) -> dict:
        """Device and type of weights."""
        return {"device": self.device, "dtype": PRECISIONS[self.precision]}


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """What to measure.

    Attributes:
        shapes: For each precision.
        cells: "mingru", "minlstm".
        directions: "forward", "both".
        peers: Whether to run other packages' layers.
        naive: Whether to run the step-by-step loop that the paper compares with.
        seconds: For the rounds of each case.
    """

    shapes: dict[str, list[Shape]]
    cells: Sequence[str]
    directions: Sequence[str]
    peers: bool
    naive: bool
    seconds: float


def run_layer(settings: LayerSettings, report: Report) -> None:
    """Measure and add to the report."""
    for precision, shapes in settings.shapes.items():
        with matrix_precision(precision):
            for shape in shapes:
                for cell in settings.cells:
                    for direction in settings.directions:
                        case = LayerCase(shape, cell, precision, direction, report.device)
                        _time_case(settings, case, report)
                report.save()


@contextlib.contextmanager
def matrix_precision(name: str) -> Iterator[None]:
    """Let float32 matrix products, cuDNN's recurrent layers included, use TF32 or not."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def _time_case(settings: LayerSettings, case: LayerCase, report: Report) -> None:
    ours, classic, _ = (layer.__name__ for layer in CELLS[case.cell])
    where = "cuDNN" if case.device.type == "cuda" else "CPU"
    contestants = [
        Contestant(f"minrl {ours}", _prepare_ours),
        Contestant(f"nn.{classic} ({where})", _prepare_classic),
        Contestant("its projection alone", _prepare_projection),
    ]
    if settings.naive:
        name = f"{classic}Cell in a loop (the paper's)"
        contestants.append(Contestant(name, _prepare_loop))
    if settings.peers:
        contestants.append(Contestant("minGRU-pytorch", _prepare_lucidrains))
    outcomes = compete(contestants, case, Clock(case.device), seconds=settings.seconds)
    summary = summarise(outcomes)
    batch, length, width = case.shape
    what = f"{case.cell} {case.precision} {case.direction}"
    print_case(f"layer {what}, B={batch} T={length} D={width}", summary)
    values = {"cell": case.cell, "precision": case.precision, "direction": case.direction}
    report.add("cases", {**values, "shape": case.shape._asdict(), "times": summary})
    if (batch, width) == (64, 128):
        report.panel(f"{what}, B=64 D=128").add_times(length, summary)


def _prepare_ours(case: LayerCase) -> Prepared:
    layer = CELLS[case.cell][0](case.shape.width, case.shape.width, batch_first=True)
    return _prepare(layer, lambda x: layer(x)[0], case, batch_first=True)


def _prepare_classic(case: LayerCase) -> Prepared:
    layer = CELLS[case.cell][1](case.shape.width, case.shape.width)
    return _prepare(layer, lambda x: layer(x)[0], case, batch_first=False)


def _prepare_projection(case: LayerCase) -> Prepared:
    """The matrix products that our layer cannot do without."""
    parts = {"mingru": 2, "minlstm": 3}[case.cell]
    layer = nn.Linear(case.shape.width, parts * case.shape.width)
    return _prepare(layer, layer, case, batch_first=True)


def _prepare_loop(case: LayerCase) -> Prepared:
    cell = CELLS[case.cell][2](case.shape.width, case.shape.width)

    def loop(x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(0):
            state = cell(step, state)
            outputs.append(state[0] if case.cell == "minlstm" else state)
        return torch.stack(outputs)

    return _prepare(cell, loop, case, batch_first=False)


def _prepare_lucidrains(case: LayerCase) -> Prepared:
    layer = build_lucidrains_layer(case.cell, case.shape.width)
    return _prepare(layer, layer, case, batch_first=True)


def _prepare(
    layer: nn.Module, forward: Callable[[Tensor], Tensor], case: LayerCase, *, batch_first: bool
) -> Prepared:
    """Return what to time; every layer gets its input in the layout it likes best."""
    layer.to(**case.options)
    batch, length, width = case.shape
    sizes = (batch, length, width) if batch_first else (length, batch, width)
    x = torch.randn(sizes, **case.options)
    if case.direction == "forward":
        return Prepared(torch.no_grad()(partial(forward, x)))
    leaves = [x.requires_grad_(), *layer.parameters()]
    with torch.no_grad():
        gradient = torch.randn_like(forward(x))
    return Prepared(lambda: torch.autograd.grad(forward(x), leaves, gradient))
