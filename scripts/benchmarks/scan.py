"""``minrl benchmark scan``: the fused scan against other ways to compute the same states."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from minrl.agents.backbones import scan_torch
from minrl.agents.backbones.scan import gated_scan, gated_scan_reference
from minrl.scripts.benchmarks.cases import ScanCase, Shape
from minrl.scripts.benchmarks.measuring import (
    Clock,
    Contestant,
    Missing,
    Prepared,
    attempt,
    compete,
    summarise,
)
from minrl.scripts.benchmarks.peers import COMPILED, SCANS, TEXTBOOK, Scan, ScanPeer
from minrl.scripts.benchmarks.report import NAME_WIDTH, Report, print_case, size

GATE_MEANS = (0.0, -7.0)
ACCURACY_SHAPES = {
    "quick": [Shape(2, 60, 16)],
    "default": [Shape(4, 60, 64), Shape(4, 1000, 64), Shape(4, 3000, 64)],
}
ACCURACY_SHAPES["full"] = ACCURACY_SHAPES["default"]
STEPS_PER_RESET = 50
RESETS = f"minrl, a reset in {STEPS_PER_RESET} steps"


@dataclasses.dataclass(frozen=True)
class ScanSettings:
    """What to measure.

    Attributes:
        grid: Decides the lengths at which the accuracy is measured.
        shapes: For each precision, those to time.
        gates: Kinds of gates.
        directions: "forward", "backward", "both".
        caches: On CUDA "cold" or "warm" L2, or both; on a CPU nothing is flushed: "warm".
        peers: Whether to run other packages' scans.
        compiled: Whether to run compiled contestants, and compile other packages' gates.
        seconds: For the rounds of each case.
    """

    grid: str
    shapes: dict[str, list[Shape]]
    gates: Sequence[str]
    directions: Sequence[str]
    caches: Sequence[str]
    peers: bool
    compiled: bool
    seconds: float


def run_scan(settings: ScanSettings, report: Report) -> None:
    """Measure the accuracy, then the times, and add them to the report."""
    contestants = scan_contestants(settings.peers, settings.compiled)
    for precision, shapes in settings.shapes.items():
        for gates in settings.gates:
            for shape in ACCURACY_SHAPES[settings.grid] if shapes else ():
                case = ScanCase(shape, gates, precision, "both", report.device)
                measure_accuracy(contestants, case, report)
        for shape in shapes:
            for gates in settings.gates:
                _time_shape(settings, contestants, report, precision, shape, gates)
            report.save()


def scan_contestants(peers: bool, compiled: bool) -> list[ScanPeer]:
    """Return all ways to compute the scan, ours first."""
    return [
        ScanPeer("minrl", _build_ours),
        ScanPeer(RESETS, _build_ours_with_resets),
        ScanPeer("minrl, plain torch", _build_plain),
        *TEXTBOOK,
        *(COMPILED if compiled else ()),
        *(SCANS if peers else ()),
    ]


def measure_accuracy(contestants: Sequence[ScanPeer], case: ScanCase, report: Report) -> None:
    """Add every contestant's relative error (Frobenius) of states and gradients to the report.

    Against the loop in float64 on the same inputs, gates' logits being drawn from N(0, 1), and from
    N(-7, 1), which makes a memory of a thousand steps.
    """
    print(f"\naccuracy {case.gates} {case.precision} {case.shape}, gates from N(0,1) | N(-7,1)")
    rows: dict[str, dict] = {peer.name: {} for peer in contestants}
    for mean in GATE_MEANS:
        drawn = dataclasses.replace(case, gate_mean=mean)
        distribution = f"N({mean:g},1)"
        exact = _states_and_gradient(_build_oracle(case), drawn, torch.float64)
        for peer in contestants:
            if peer in COMPILED or peer.name == RESETS:  # as without; computes something else
                continue
            row = rows[peer.name]
            try:
                scan = attempt(partial(peer.build, drawn))
                got = attempt(partial(_states_and_gradient, scan, drawn, None, peer))
            except Missing as reason:
                row["missing"] = str(reason)
                continue
            for what, ours, expected in zip(("states", "gradient"), got, exact, strict=True):
                error = (ours.double() - expected).norm() / expected.norm()
                row.setdefault(what, {})[distribution] = error.item()
    for name, row in rows.items():
        if "missing" in row:
            print(f"  {name:<{NAME_WIDTH}} missing ({row['missing']})")
        elif row:
            errors = (
                f"{what} {' | '.join(f'{error:.1e}' for error in by.values())}"
                for what, by in row.items()
            )
            print(f"  {name:<{NAME_WIDTH}} {'   '.join(errors)}")
    values = {"gates": case.gates, "precision": case.precision, "shape": case.shape._asdict()}
    report.add("accuracy", {**values, "errors": {name: row for name, row in rows.items() if row}})


def _time_shape(
    settings: ScanSettings,
    contestants: Sequence[ScanPeer],
    report: Report,
    precision: str,
    shape: Shape,
    gates: str,
) -> None:
    for direction in settings.directions:
        for cache in settings.caches:
            if settings.compiled:
                torch._dynamo.reset()  # or the ninth shape would not be compiled any more
            case = ScanCase(shape, gates, precision, direction, report.device, settings.compiled)
            entries = [Contestant(peer.name, partial(_prepare, peer)) for peer in contestants]
            entries += [Contestant("copy", _prepare_copy), Contestant("stream", _prepare_stream)]
            clock = Clock(report.device, cold=cache == "cold")
            summary = summarise(compete(entries, case, clock, seconds=settings.seconds))
            _add_bandwidth(summary, case.minimum_bytes)
            what = f"{gates} {precision} {direction}, {cache} cache"
            print_case(f"scan {what}, B={shape[0]} T={shape[1]} D={shape[2]}", summary)
            _print_bandwidth(summary, case.minimum_bytes)
            values = {
                "gates": gates,
                "precision": precision,
                "direction": direction,
                "cache": cache,
                "shape": shape._asdict(),
                "minimum_bytes": case.minimum_bytes,
                "times": summary,
            }
            report.add("cases", values)
            _plot(report, values)


def _add_bandwidth(summary: dict[str, dict], minimum_bytes: int) -> None:
    for row in summary.values():
        if "median" in row:
            row["useful_bytes_per_second"] = minimum_bytes / row["median"]


def _print_bandwidth(summary: dict[str, dict], minimum_bytes: int) -> None:
    if "missing" in summary["minrl"]:
        return
    rate = size(summary["minrl"]["useful_bytes_per_second"])
    shares = (f"{summary[name]['ratio']['median']:.0%} of a {name}" for name in ("copy", "stream"))
    print(f"  minrl: {size(minimum_bytes)} at {rate}/s, {' and '.join(shares)} of those bytes")


def _plot(report: Report, case: dict) -> None:
    """Add a case to the picture, which shows the paper's cell at the paper's batch and width."""
    shape = case["shape"]
    if (case["gates"], shape["batch"], shape["width"]) != ("mingru", 64, 128):
        return
    what = (case["direction"], case["precision"], case["cache"] + " cache")
    report.panel(f"minGRU scan, {', '.join(what)}, B=64 D=128").add_times(
        shape["length"], case["times"]
    )


def _build_oracle(case: ScanCase) -> Scan:
    return lambda projected: gated_scan_reference(projected, gates=case.gates)[0]


def _build_ours(case: ScanCase) -> Scan:
    return lambda projected: gated_scan(projected, gates=case.gates)[0]


def _build_ours_with_resets(case: ScanCase) -> Scan:
    generator = torch.Generator().manual_seed(2)
    flags = torch.rand(case.shape.batch, case.shape.length, generator=generator)
    resets = (flags < 1 / STEPS_PER_RESET).to(case.device)
    return lambda projected: gated_scan(projected, gates=case.gates, resets=resets)[0]


class _Plain(torch.autograd.Function):
    """The scan in plain torch, which devices without a kernel run."""

    @staticmethod
    def forward(ctx, projected: Tensor, gates: str) -> Tensor:
        """Return the states."""
        width = projected.shape[-1] // scan_torch.PARTS[gates]
        zeros = projected.new_zeros(projected.shape[0], width)
        ctx.gates = gates
        states, _ = scan_torch.scan_forward(projected, zeros, None, zeros, None, gates, "g", True)
        ctx.save_for_backward(projected, states, zeros)
        return states

    @staticmethod
    def backward(ctx, grad_states: Tensor) -> tuple[Tensor, None]:
        """Return the gradient by the packed pre-activations."""
        projected, states, zeros = ctx.saved_tensors
        flags_and_kind = None, zeros, None, ctx.gates, "g", True
        return scan_torch.scan_backward(
            grad_states, zeros, projected, states, zeros, *flags_and_kind
        )[0], None


def _build_plain(case: ScanCase) -> Scan:
    def scan(projected: Tensor) -> Tensor:
        return _Plain.apply(projected.float(), case.gates).to(projected.dtype)

    return scan


def _prepare(peer: ScanPeer, case: ScanCase) -> Prepared:
    return prepare_scan(peer.build(case), case, _packed(peer, case))


def _packed(peer: ScanPeer | None, case: ScanCase) -> Tensor:
    if peer is None or not peer.candidate_first:
        return case.projected
    gates, candidate = case.projected.split(
        [case.projected.shape[-1] - case.shape.width, case.shape.width], -1
    )
    return torch.cat([candidate, gates], -1)


def prepare_scan(scan: Scan, case: ScanCase, projected: Tensor) -> Prepared:
    """Return what to time of a scan in the case's direction."""
    if case.direction == "forward":
        return Prepared(torch.no_grad()(lambda: scan(projected)))
    leaf = projected.detach().requires_grad_()
    if case.direction == "both":
        return Prepared(lambda: torch.autograd.grad(scan(leaf), leaf, case.grad_states))
    kept: dict[str, Tensor] = {}

    def before() -> None:
        kept["states"] = scan(leaf)

    return Prepared(lambda: torch.autograd.grad(kept.pop("states"), leaf, case.grad_states), before)


def _prepare_copy(case: ScanCase) -> Prepared:
    """Read half of the case's minimum bytes, write the other half."""
    source, target = _filled(case, 2)
    return Prepared(lambda: target.copy_(source))


def _prepare_stream(case: ScanCase) -> Prepared:
    """Read two thirds of the minimum bytes, write the rest."""
    one, two, target = _filled(case, 3)
    return Prepared(lambda: torch.add(one, two, out=target))


def _filled(case: ScanCase, count: int) -> tuple[Tensor, ...]:
    dtype = case.projected.dtype
    elements = max(case.minimum_bytes // (count * dtype.itemsize), 1)
    return tuple(torch.ones(elements, dtype=dtype, device=case.device) for _ in range(count))


def _states_and_gradient(
    scan: Callable[[Tensor], Tensor],
    case: ScanCase,
    dtype: torch.dtype | None,
    peer: ScanPeer | None = None,
) -> tuple[Tensor, Tensor]:
    """Return states and the gradient by the packed inputs in our order, computed in ``dtype``."""
    leaf = _packed(peer, case).clone().to(dtype or case.projected.dtype).requires_grad_()
    states = scan(leaf)
    (gradient,) = torch.autograd.grad(states, leaf, case.grad_states.to(states.dtype))
    if peer is not None and peer.candidate_first:
        gradient = gradient.roll(-case.shape.width, -1)
    return states.detach(), gradient
