"""Other ways to compute the scan: textbook ones, and those of other packages.

Each builds a function from packed pre-activations (B, T, G*D) to states (B, T, D) that agrees with
``gated_scan`` from a zero state, with every transpose, padding and gate computation that its kernel
needs. To add one: write a ``build`` and list it in ``SCANS``.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minrl.scripts.benchmarks.cases import ScanCase
from minrl.scripts.benchmarks.measuring import Missing

Scan = Callable[[Tensor], Tensor]


class ScanPeer(NamedTuple):
    """A way to compute the scan.

    Attributes:
        name: Shown in the table.
        build: Returns the function for a case, or raises :class:`Missing`.
        candidate_first: Whether it expects the candidate before the gates in the packed input; the
            order is only a convention, so the reordering is not timed.
    """

    name: str
    build: Callable[[ScanCase], Scan]
    candidate_first: bool = False


def build_log_space(case: ScanCase) -> Scan:
    """The paper's scan: cumsum and logcumsumexp ("Were RNNs All We Needed?", appendix B)."""

    def log_space(projected: Tensor) -> Tensor:
        log_keep, log_add = _log_coefficients(projected, case.gates)
        log_products = log_keep.cumsum(1)
        return torch.exp(log_products + torch.logcumsumexp(log_add - log_products, dim=1))

    return log_space


def build_log_space_compiled(case: ScanCase) -> Scan:
    """The same through ``torch.compile``."""
    return torch.compile(build_log_space(case), dynamic=False)


def build_associative_scan(case: ScanCase) -> Scan:
    """PyTorch's generic associative scan, eager."""
    return _associative_scan(case, "generic")


def build_associative_scan_compiled(case: ScanCase) -> Scan:
    """PyTorch's associative scan, compiled; on CUDA into one Triton scan."""
    mode = "pointwise" if case.device.type == "cuda" else "generic"
    return torch.compile(_associative_scan(case, mode), dynamic=False)


def build_accelerated_scan_warp(case: ScanCase) -> Scan:
    """accelerated-scan's CUDA kernel: (B, D, T), steps padded to a power of two from 32."""
    _need_cuda(case, "accelerated_scan")
    from accelerated_scan.warp import scan

    padded = max(32, 1 << math.ceil(math.log2(case.shape.length)))
    return _channels_first(case, scan, padded - case.shape.length)


def build_accelerated_scan_scalar(case: ScanCase) -> Scan:
    """accelerated-scan's Triton kernel: (B, D, T), any number of steps."""
    _need_cuda(case, "accelerated_scan")
    from accelerated_scan.scalar import scan

    return _channels_first(case, scan, 0)


def build_fla_recurrent(case: ScanCase) -> Scan:
    """flash-linear-attention's HGRN, sequential in time."""
    _need_cuda(case, "fla")
    from fla.ops.hgrn import fused_recurrent_hgrn

    return _with_log_gate(case, fused_recurrent_hgrn)


def build_fla_chunk(case: ScanCase) -> Scan:
    """flash-linear-attention's HGRN in chunks of 128 steps."""
    _need_cuda(case, "fla")
    from fla.ops.hgrn import chunk_hgrn

    return _with_log_gate(case, chunk_hgrn)


def build_mingru_scans_linear(case: ScanCase) -> Scan:
    """mingru-scans' linear scan (Triton on CUDA, eager elsewhere)."""
    from mingru import linear_scan

    coefficients = _compiled(case, _coefficients)
    return lambda projected: linear_scan(*coefficients(projected, case.gates))[1]


def build_mingru_scans_log(case: ScanCase) -> Scan:
    """mingru-scans' log-space scan; a zero state is exp(-10000)."""
    from mingru import parallel_scan_log

    coefficients = _compiled(case, _log_coefficients)

    def scan(projected: Tensor) -> Tensor:
        log_keep, log_add = coefficients(projected, case.gates)
        return parallel_scan_log(log_keep, F.pad(log_add, (0, 0, 1, 0), value=-1e4))

    return scan


def build_lucidrains(case: ScanCase) -> Scan:
    """minGRU-pytorch's modules without their projection."""
    from minGRU_pytorch.minGRU import minGRU
    from minGRU_pytorch.minLSTM import minLSTM

    if case.gates == "mingru":
        layer = minGRU(case.shape.width)
        layer.to_hidden_and_gate = nn.Identity()
    elif case.gates == "minlstm":
        layer = minLSTM(case.shape.width)
        layer.to_hidden_and_f_i_gate = nn.Identity()
    else:
        raise Missing("it has no such gates")
    return layer


TEXTBOOK = (
    ScanPeer("log-space (paper)", build_log_space),
    ScanPeer("associative_scan", build_associative_scan),
)
COMPILED = (
    ScanPeer("log-space (paper), compiled", build_log_space_compiled),
    ScanPeer("associative_scan, compiled", build_associative_scan_compiled),
)
SCANS = (
    ScanPeer("accelerated-scan warp", build_accelerated_scan_warp),
    ScanPeer("accelerated-scan scalar", build_accelerated_scan_scalar),
    ScanPeer("fla fused_recurrent_hgrn", build_fla_recurrent),
    ScanPeer("fla chunk_hgrn", build_fla_chunk),
    ScanPeer("mingru-scans linear", build_mingru_scans_linear),
    ScanPeer("mingru-scans log-space", build_mingru_scans_log),
    ScanPeer("minGRU-pytorch", build_lucidrains, candidate_first=True),
)


def build_lucidrains_layer(cell: str, width: int) -> nn.Module:
    """Return minGRU-pytorch's layer of equal width, batch first."""
    from minGRU_pytorch.minGRU import minGRU
    from minGRU_pytorch.minLSTM import minLSTM

    return {"mingru": minGRU, "minlstm": minLSTM}[cell](width)


def _positive(value: Tensor) -> Tensor:
    return torch.where(value >= 0, value + 0.5, torch.sigmoid(value))


def _log_positive(value: Tensor) -> Tensor:
    return torch.where(value >= 0, (F.relu(value) + 0.5).log(), F.logsigmoid(value))


def _gate_logits(projected: Tensor, gates: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of keeping and of adding, and the candidate, each (B, T, D)."""
    if gates == "mingru":
        update, candidate = projected.chunk(2, -1)
        return -update, update, candidate
    forget, update, candidate = projected.chunk(3, -1)
    if gates == "minlstm":
        update = F.softplus(-forget) - F.softplus(-update)
        forget = -update
    return forget, update, candidate


def _coefficients(projected: Tensor, gates: str) -> tuple[Tensor, Tensor]:
    """Return a and b of h_t = a_t h_{t-1} + b_t."""
    keep, add, candidate = _gate_logits(projected, gates)
    return torch.sigmoid(keep), torch.sigmoid(add) * _positive(candidate)


def _log_coefficients(projected: Tensor, gates: str) -> tuple[Tensor, Tensor]:
    """Return log a and log b."""
    keep, add, candidate = _gate_logits(projected, gates)
    return F.logsigmoid(keep), F.logsigmoid(add) + _log_positive(candidate)


def _log_keep_and_add(projected: Tensor, gates: str) -> tuple[Tensor, Tensor]:
    """Return log a and b."""
    keep, add, candidate = _gate_logits(projected, gates)
    return F.logsigmoid(keep), torch.sigmoid(add) * _positive(candidate)


def _compiled(case: ScanCase, function: Callable) -> Callable:
    return torch.compile(function, dynamic=False) if case.compiled else function


def _combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return left[0] * right[0], right[0] * left[1] + right[1]


def _associative_scan(case: ScanCase, mode: str) -> Scan:
    from torch._higher_order_ops.associative_scan import associative_scan

    def scan(projected: Tensor) -> Tensor:
        coefficients = _coefficients(projected, case.gates)
        return associative_scan(_combine, coefficients, dim=1, combine_mode=mode)[1]

    return scan


def _channels_first(case: ScanCase, scan: Callable, padding: int) -> Scan:
    coefficients = _compiled(case, _coefficients)

    def run(projected: Tensor) -> Tensor:
        keep, add = (x.transpose(1, 2) for x in coefficients(projected, case.gates))  # B D T
        if padding:
            keep, add = F.pad(keep, (0, padding)), F.pad(add, (0, padding))
        states = scan(keep.contiguous(), add.contiguous())
        return states[..., : case.shape.length].transpose(1, 2).contiguous()

    return run


def _with_log_gate(case: ScanCase, scan: Callable) -> Scan:
    coefficients = _compiled(case, _log_keep_and_add)

    def run(projected: Tensor) -> Tensor:
        log_keep, add = coefficients(projected, case.gates)
        return scan(add, log_keep)[0]

    return run


def _need_cuda(case: ScanCase, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Missing("not installed")
    if case.device.type != "cuda":
        raise Missing("it needs CUDA")
