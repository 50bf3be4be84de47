"""The ``minrl`` command: each subcommand is one file of ``minrl.scripts``, imported when used."""

import io
import os
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from minrl import __version__
from minrl.errors import INTERRUPTED, ConfigError, MinrlError

CLOSED_PIPE = 141  # as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    _let_idle_threads_sleep()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot encode must not cost a training
            stream.reconfigure(errors="replace")
    try:
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as of `minrl ... | head`; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def _let_idle_threads_sleep() -> None:
    """Have GNU OpenMP's threads wait for microseconds and then sleep, not spin for milliseconds.

    Where there is other work, spinning takes the processor from the thread that is waited for
    (measured in results/README.md). OpenMP looks at this once, when torch is imported.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"minrl {__version__}")
        return 0
    warnings.showwarning = _show_warning
    try:
        command, *rest = _import_first(arguments)
        if command not in COMMANDS:
            print(f"minrl: error: unknown command {command!r}\n\n{usage()}", file=sys.stderr)
            return 2
        return COMMANDS[command][0](rest)
    except BrokenPipeError:
        raise
    except (MinrlError, OSError) as error:  # OSError: a full disk, a folder that is not writable
        print(f"minrl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minrl: interrupted", file=sys.stderr)
        return INTERRUPTED


def _import_first(arguments: list[str]) -> list[str]:
    """Import the modules named before the command; return the rest of the arguments."""
    from minrl.scripts.imports import add_import, import_named

    import_named()
    while arguments and arguments[0].partition("=")[0] == "--import":
        flag, equals, name = arguments.pop(0).partition("=")
        name = name if equals or not arguments else arguments.pop(0)
        if not name or not arguments:
            raise ConfigError(f"{flag} needs the name of a module, and then a command")
        add_import(name)
    return arguments


def usage() -> str:
    """Return the list of commands."""
    lines = [f"  minrl {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: minrl [--import MODULE] COMMAND [options]",
            "",
            *lines,
            "",
            "minrl COMMAND --help explains each option, minrl --version tells the version;",
            "--import MODULE first imports a module of yours that registers environments.",
        ]
    )


def _train(arguments: list[str]) -> int:
    from minrl.scripts.run_folder import RunFolder
    from minrl.scripts.train import train
    from minrl.scripts.train_config import PRESETS, TrainConfig

    # What the flags not given stand at depends on these four, so they are looked at first.
    resume = _last_value_of("--resume", arguments)
    preset = PRESETS.get(_last_value_of("--preset", arguments) or "quick", PRESETS["quick"])
    if resume == "":
        raise ConfigError("resume needs the folder of a run, and got an empty name")
    if resume is not None:
        base = RunFolder(resume).read_config()
    else:
        chosen = {"backbone": _last_value_of("--backbone", arguments) or "mingru"}
        if dataset := _last_value_of("--dataset", arguments):
            chosen["dataset"] = (dataset,)
        base = preset(**chosen)

    def run(config: TrainConfig = base, resume: Path | None = None) -> int:
        path = train(config, resume)  # None on all processes of torchrun but the first
        return 0 if path is None or RunFolder(path).is_finished() else INTERRUPTED

    run.__doc__ = train.__doc__
    return _call(run, "train", arguments)


def _evaluate(arguments: list[str]) -> int:
    from minrl.scripts.evaluate import evaluate_command

    _call(evaluate_command, "evaluate", arguments)
    return 0


def _study(arguments: list[str]) -> int:
    from minrl.scripts.study import study

    return _call(study, "study", arguments)


def _report(arguments: list[str]) -> int:
    from minrl.scripts.report import report

    _call(report, "report", arguments)
    return 0


def _export(arguments: list[str]) -> int:
    from minrl.scripts.export import export_command

    _call(export_command, "export", arguments)
    return 0


def _datasets(arguments: list[str]) -> int:
    import tyro

    from minrl.scripts import datasets

    tyro.extras.subcommand_cli_from_dict(datasets.COMMANDS, prog="minrl datasets", args=arguments)
    return 0


def _doctor(arguments: list[str]) -> int:
    from minrl.scripts.doctor import doctor

    return _call(doctor, "doctor", arguments)


def _benchmark(arguments: list[str]) -> int:
    from minrl.scripts.benchmark import benchmark

    benchmark(arguments)
    return 0


def _call(function: Any, command: str, arguments: list[str]) -> Any:
    import tyro

    config = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(function, prog=f"minrl {command}", args=arguments, config=config)


def _last_value_of(flag: str, arguments: list[str]) -> str | None:
    value = None
    for argument, following in pairwise([*arguments, None]):
        if argument == flag:
            value = following
        elif argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
    return value


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"minrl: warning: {message}", file=file or sys.stderr)


COMMANDS = {
    "train": (_train, "train on offline data, evaluate, leave a run folder"),
    "evaluate": (_evaluate, "evaluate a trained run: returns, normalised scores, video"),
    "study": (_study, "train every method on every task and seed, here or on a Ray cluster"),
    "report": (_report, "report on runs: tables, intervals, figures, as HTML, Markdown and JSON"),
    "export": (_export, "write a trained agent as an ONNX or .pt2 file that runs without minrl"),
    "datasets": (_datasets, "make, list and inspect datasets, import your own or D4RL's"),
    "doctor": (_doctor, "print versions and devices, check this machine by a small run"),
    "benchmark": (_benchmark, "measure the scan, layers, acting, training or data against others"),
}
"""Name of each command, what runs it with the arguments after it, and what it does."""


if __name__ == "__main__":
    sys.exit(main())
