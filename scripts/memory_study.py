"""Recurrent cores under the same PPO, on tasks that need memory.

    python -m minrl.scripts.memory_study

trains `scripts/examples/ppo_recurrent.py` with each core and seed on each task, one CSV a run, then
writes `memory.json` and `memory.png` and prints tables. Runs that are complete, with the settings
that they would have now, are not repeated: stop it and start it again as you like. The POPGym tasks
need `pip install popgym`; they are left out, and named, where it is missing.
"""

import contextlib
import csv
import importlib.util
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from filelock import FileLock

from minrl.agents.files import write_atomically
from minrl.errors import ConfigError
from minrl.scripts import memory_report
from minrl.scripts.benchmarks.report import rounded
from minrl.scripts.examples.ppo_recurrent import Config, train
from minrl.scripts.memory_tasks import CORES, TASKS


@dataclass
class Study:
    """What to run, and where to write."""

    tasks: tuple[str, ...] = tuple(TASKS)
    cores: tuple[str, ...] = tuple(CORES)
    seeds: int = 3
    runs: Path = Path("runs/memory")
    """Folder of the learning curves."""
    results: Path = Path("runs/memory")
    """Folder of memory.json and memory.png."""
    processes: int = 2
    report_only: bool = False
    """Train nothing and time no updates: report what is there."""


def configs_of(study: Study) -> dict[tuple[str, str, int], Config]:
    """Return all runs by task, core and seed: a whole task first, and in it a whole seed first."""
    return {
        (task, name, seed): replace(
            TASKS[task].config,
            core=CORES[name].core,
            num_layers=CORES[name].num_layers,
            seed=seed,
            output=study.runs / f"{task}-{name}-{seed}.csv",
        )
        for task in study.tasks
        for seed in range(study.seeds)
        for name in study.cores
    }


def settings_file_of(config: Config) -> Path:
    """Return what holds the settings of a run, beside its curve."""
    return config.output.with_suffix(".json")


def settings_of(config: Config) -> dict[str, Any]:
    """Return what decides a run's result, as JSON has it."""
    settings = asdict(config)
    del settings["output"]
    return json.loads(json.dumps(settings))


def curve_of(path: Path) -> list[dict[str, float]]:
    """Read the rows of a learning curve, none if it has not been begun."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]  # the last line may be cut off
    return [{name: float(n) for name, n in row.items()} for row in csv.DictReader(whole.split())]


def is_complete(config: Config) -> bool:
    """Say whether a run with these settings has reached its last step."""
    rows, settings = curve_of(config.output), None
    with contextlib.suppress(FileNotFoundError):
        settings = json.loads(settings_file_of(config).read_text())
    is_of_these = settings == settings_of(config)
    return is_of_these and bool(rows) and rows[-1]["steps"] >= config.total_steps


def run(config: Config) -> str:
    """Train once, on one thread, unless another study in this folder has done so meanwhile."""
    torch.set_num_threads(1)
    with FileLock(config.output.with_suffix(".lock"), poll_interval=0.5):
        if not is_complete(config):
            config.output.unlink(missing_ok=True)  # it must not pass for one with these settings
            settings = json.dumps(settings_of(config)) + "\n"
            write_atomically(settings_file_of(config), settings.encode())
            train(config)
        last = curve_of(config.output)[-1]
    return f"{config.output.stem}: {last['episodic_return']:.3g} after {last['seconds']:.0f} s"


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that all runs on a task have."""
    own = ("core", "num_layers", "seed")
    return {name: value for name, value in settings.items() if name not in own}


def _updates_in(file: Path) -> dict[str, dict[str, float]]:
    """Return what updates took when this was last measured, nothing if it never was."""
    return json.loads(file.read_text())["update"] if file.exists() else {}


def report(study: Study) -> None:
    """Write and print what the complete runs say."""
    rows: dict[str, dict[str, list]] = {}
    for (task, core, _), config in configs_of(study).items():
        if is_complete(config):
            rows.setdefault(task, {}).setdefault(core, []).append(curve_of(config.output))
    file = study.results / "memory.json"
    result = {
        "torch": torch.__version__,
        "processors": os.cpu_count(),
        "tasks": {
            task: {core: memory_report.summary_of(seeds) for core, seeds in cores.items()}
            for task, cores in rows.items()
        },
        "settings": {task: _shared(settings_of(TASKS[task].config)) for task in rows},
        "update": _updates_in(file) if study.report_only else memory_report.measure_updates(),
    }
    study.results.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(rounded(result)) + "\n").encode())
    if rows:
        memory_report.draw(result["tasks"], study.results / "memory.png")
    memory_report.print_returns(result["tasks"])
    if result["update"]:
        memory_report.print_updates(result["update"])


def main(study: Study) -> None:
    """Train what is missing, then report.

    Raises:
        ConfigError: If a task or a core is unknown.
    """
    for name, given, known in (("task", study.tasks, TASKS), ("core", study.cores, CORES)):
        if unknown := set(given) - set(known):
            raise ConfigError(f"{name} must be of {', '.join(known)}, not {min(unknown)!r}")
    study.runs.mkdir(parents=True, exist_ok=True)
    if not study.report_only:
        missing = [config for config in configs_of(study).values() if not is_complete(config)]
        if importlib.util.find_spec("popgym") is None:
            left_out = [config for config in missing if "popgym" in config.environment]
            missing = [config for config in missing if config not in left_out]
            names = ", ".join(config.output.stem for config in left_out)
            print(f"popgym is not installed, left out: {names or 'nothing'}")
        with ProcessPoolExecutor(study.processes) as pool:
            for line in pool.map(run, missing):
                print(line, flush=True)
    report(study)


if __name__ == "__main__":
    try:
        main(tyro.cli(Study))
    except ConfigError as error:
        raise SystemExit(f"memory_study: error: {error}") from None
