"""``minrl benchmark``: how fast the scan, layers, acting, training and data are, and against whom.

Read with argparse rather than tyro: the GPU machines that matter may have neither tyro nor the
simulators, and need no more than torch for scan, layer, act and train.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from minrl.agents.backbones.scan_torch import PARTS
from minrl.agents.devices import choose_device
from minrl.errors import ConfigError
from minrl.scripts.benchmarks.cases import (
    DIRECTIONS,
    GRIDS,
    PRECISIONS,
    Shape,
    parse_shape,
    shapes_of,
)
from minrl.scripts.benchmarks.report import Report
from minrl.scripts.machine import keep_freed_memory

SECONDS = {"quick": 0.03, "default": 0.3, "full": 0.3}


def benchmark(arguments: Sequence[str]) -> None:
    """Run one benchmark: print a table, write JSON and a picture.

    Args:
        arguments: Of the command line.

    Raises:
        ConfigError: If they are wrong.
    """
    options = _parser().parse_args(arguments)
    on_cpu = options.name in ("data", "libraries") and options.device == "auto"
    device = choose_device("cpu" if on_cpu else options.device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"benchmarks run on cpu or cuda, not on {options.device!r}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose streams and events are used unless one is named
    if options.threads is not None:
        if options.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)
    memory_is_kept = device.type == "cpu" and keep_freed_memory()
    if options.seconds is None:
        options.seconds = SECONDS[options.grid]
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    settings["memory_is_kept"] = memory_is_kept
    report = Report(options.name, device, settings, options.output)
    run, _ = _BENCHMARKS[options.name]
    run(options, report)
    report.finish()


def _run_scan(options: argparse.Namespace, report: Report) -> None:
    from minrl.scripts.benchmarks.scan import ScanSettings, run_scan

    on_cuda = report.device.type == "cuda"
    if not on_cuda and "cold" in (options.caches or ()):
        raise ConfigError("caches are flushed on CUDA only, not on a CPU")
    settings = ScanSettings(
        grid=options.grid,
        shapes=_shapes(options, report, ("float32", "bfloat16")),
        gates=options.gates,
        directions=options.directions or (DIRECTIONS if on_cuda else ("forward", "both")),
        caches=options.caches or ("cold" if on_cuda else "warm",),
        peers=options.peers,
        compiled=options.compiled,
        seconds=options.seconds,
    )
    run_scan(settings, report)


def _run_layer(options: argparse.Namespace, report: Report) -> None:
    from minrl.scripts.benchmarks.layer import LayerSettings, run_layer

    settings = LayerSettings(
        shapes=_shapes(options, report, ("float32", "tf32", "bfloat16")),
        cells=options.cells,
        directions=options.directions or ("forward", "both"),
        peers=options.peers,
        naive=options.naive,
        seconds=options.seconds,
    )
    run_layer(settings, report)


def _run_act(options: argparse.Namespace, report: Report) -> None:
    from minrl.scripts.benchmarks.act import run_act

    run_act(options.grid, options.seconds, report)


def _run_train(options: argparse.Namespace, report: Report) -> None:
    from minrl.scripts.benchmarks.train import run_train

    precisions = _precisions(options, report, ("float32", "bfloat16"))
    run_train(options.grid, precisions, options.profile, options.seconds, report)


def _run_data(options: argparse.Namespace, report: Report) -> None:
    from minrl.scripts.benchmarks.data import run_data

    if report.device.type != "cpu":
        raise ConfigError("data is loaded on the CPU: --device cpu")
    run_data(options.grid, options.seconds, report)


def _run_libraries(options: argparse.Namespace, report: Report) -> None:
    from minrl.scripts.benchmarks.libraries import run_libraries

    if report.device.type != "cpu":
        raise ConfigError("the libraries are measured on the CPU: --device cpu")
    run_libraries(options.grid, options.seconds, report)


_BENCHMARKS = {
    "scan": (_run_scan, "the recurrence from pre-activations to states"),
    "layer": (_run_layer, "MinGRU and MinLSTM against nn.GRU and nn.LSTM"),
    "act": (_run_act, "one step of an agent"),
    "train": (_run_train, "one training step; long contexts"),
    "data": (_run_data, "loading a million steps and drawing windows from them"),
    "libraries": (_run_libraries, "our cores inside TorchRL and sb3-contrib, against their own"),
}


def _precisions(
    options: argparse.Namespace, report: Report, on_cuda: tuple[str, ...]
) -> tuple[str, ...]:
    if options.precisions:
        return tuple(options.precisions)
    return on_cuda if report.device.type == "cuda" else ("float32",)


def _shapes(
    options: argparse.Namespace, report: Report, on_cuda: tuple[str, ...]
) -> dict[str, list[Shape]]:
    """Return the shapes to measure for each precision; name those that do not fit."""
    chosen = {}
    for precision in _precisions(options, report, on_cuda):
        if options.shapes:
            chosen[precision] = [parse_shape(text) for text in options.shapes]
            continue
        chosen[precision], too_large = shapes_of(options.grid, report.device, precision)
        if too_large:
            print(f"do not fit into memory ({precision}): {', '.join(map(str, too_large))}")
    return chosen


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as every other command does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    shared = _Parser(add_help=False)
    shared.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if any")
    shared.add_argument(
        "--grid", choices=GRIDS, default="default", help="quick: seconds; default: minutes"
    )
    shared.add_argument("--seconds", type=float, help="of repeats of each contestant in each case")
    shared.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    shared.add_argument("--output", type=Path, default=Path(), help="folder of JSON and picture")
    parser = _Parser(prog="minrl benchmark", description=benchmark.__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="name", required=True, metavar="BENCHMARK")
    scan, layer, _, train, *_ = (
        commands.add_parser(name, parents=[shared], help=text, description=text)
        for name, (_, text) in _BENCHMARKS.items()
    )
    for each in (scan, layer):
        each.add_argument(
            "--peers", action="store_true", help='other packages, those of the extra "bench"'
        )
        each.add_argument("--shapes", nargs="+", help="such as 64x60x128, instead of a grid")
    for each, choices in ((scan, DIRECTIONS), (layer, ("forward", "both"))):
        each.add_argument("--directions", nargs="+", choices=choices)
    for each in (scan, train):
        each.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"))
    layer.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS))
    scan.add_argument("--gates", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    scan.add_argument(
        "--caches", nargs="+", choices=("cold", "warm"), help="L2 cache of a GPU, cold by default"
    )
    scan.add_argument(
        "--compiled", action="store_true", help="compiled contestants and gates (takes long)"
    )
    layer.add_argument(
        "--cells", nargs="+", choices=("mingru", "minlstm"), default=("mingru", "minlstm")
    )
    layer.add_argument("--naive", action="store_true", help="the paper's step-by-step loop")
    train.add_argument("--profile", action="store_true", help="where a step's time goes")
    return parser
