"""Recurrent cores under the same PPO, on tasks that need memory.

    python -m minrl.scripts.memory_study

trains `scripts/examples/ppo_recurrent.py` with each core and seed on each task, one CSV a run, then
writes `memory.json` and `memory.png` and prints tables. Runs that are complete, with the settings
that they would have now, are not repeated: stop it and start it again as you like. The POPGym tasks
need `pip install popgym`; they are left out, and named, where it is missing.
"""

import csv
import importlib.util
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from minrl.scripts.examples.ppo_recurrent import (
    Collector,
    Config,
    make_agent,
    make_environments,
    train,
    update,
)


@dataclass(frozen=True)
class Contestant:
    """A core, and how it is shown."""

    title: str
    colour: str
    core: str
    num_layers: int = 1


# Two layers of ours have as many weights as one of nn.GRU (minLSTM) or fewer (minGRU).
CORES = {
    "gru": Contestant("nn.GRU", "tab:grey", "gru"),
    "lstm": Contestant("nn.LSTM", "black", "lstm"),
    "mingru": Contestant("MinGRU", "tab:cyan", "mingru"),
    "minlstm": Contestant("MinLSTM", "tab:olive", "minlstm"),
    "mingru-2": Contestant("MinGRU, 2 layers", "tab:blue", "mingru", 2),
    "minlstm-2": Contestant("MinLSTM, 2 layers", "tab:orange", "minlstm", 2),
    "backbone": Contestant("Backbone", "tab:pink", "backbone"),
    "backbone-2": Contestant("Backbone, 2 blocks", "tab:green", "backbone", 2),
}
WHOLE = "lstm, one call, no resets"
ROUNDS = 5  # of each core, where updates are timed
RECALL = Config(num_envs=32, num_steps=64, hidden_size=64, learning_rate=1e-3, total_steps=150_000)
BASE = replace(RECALL, anneal=True, gae_lambda=0.95, memory=10)


@dataclass(frozen=True)
class Task:
    """A task, and what is known about its returns."""

    title: str
    config: Config
    without_memory: float | None = None
    """The best return without any memory, where that is known."""


TASKS = {
    "recall-20": Task(
        "Recall, 20 blank steps", replace(RECALL, environment_options={"length": 20}), 0.25
    ),
    "cartpole": Task(
        "CartPole, no velocities",
        replace(
            BASE,
            environment="CartPole-v1",
            hide_velocities=True,
            normalize=True,
            num_steps=32,
            memory=20,
            gae_lambda=0.9,
            entropy_coefficient=0.0,
            total_steps=200_000,
        ),
    ),
    "repeat-previous": Task(
        "POPGym RepeatPreviousEasy",
        replace(BASE, environment="popgym:popgym-RepeatPreviousEasy-v0"),
        -0.5,
    ),
    "count-recall": Task(
        "POPGym CountRecallEasy",
        replace(BASE, environment="popgym:popgym-CountRecallEasy-v0", memory=100),
    ),
    "hopper": Task(
        "Hopper, no velocities (short)",
        replace(
            BASE,
            environment="Hopper-v5",
            hide_velocities=True,
            normalize=True,
            learning_rate=3e-4,
            memory=20,
            entropy_coefficient=0.0,
            total_steps=60_000,
        ),
    ),
    "recall-200": Task(
        "Recall, 200 blank steps",
        replace(
            RECALL,
            environment_options={"length": 200},
            num_steps=404,
            total_steps=1_000_000,
        ),
        0.25,
    ),
}


@dataclass
class Study:
    """What to run, and where to write."""

    tasks: tuple[str, ...] = tuple(TASKS)
    cores: tuple[str, ...] = tuple(CORES)
    seeds: int = 3
    runs: Path = Path("runs/memory")
    """Folder of the learning curves."""
    results: Path = Path("results")
    """Folder of memory.json and memory.png."""
    processes: int = 2
    report_only: bool = False
    """Train nothing and time no updates: report what is there."""


def curve_of(path: Path) -> list[dict[str, float]]:
    """Read the rows of a learning curve, none if it has not been begun."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]  # cut off
        return [{name: float(text) for name, text in row.items()} for row in rows]


def is_complete(config: Config) -> bool:
    """Say whether a run with these settings has reached its last step."""
    rows, settings = curve_of(config.output), settings_file_of(config)
    is_of_these = settings.exists() and json.loads(settings.read_text()) == settings_of(config)
    return is_of_these and bool(rows) and rows[-1]["steps"] >= config.total_steps


def settings_file_of(config: Config) -> Path:
    """Return what holds the settings of a run, beside its curve."""
    return config.output.with_suffix(".json")


def settings_of(config: Config) -> dict[str, Any]:
    """Return what decides a run's result, as JSON has it."""
    settings = asdict(config)
    del settings["output"]
    return json.loads(json.dumps(settings))


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


def run(config: Config) -> str:
    """Train once, on one thread."""
    torch.set_num_threads(1)
    config.output.unlink(missing_ok=True)  # of other settings: it must not pass for one of these
    settings_file_of(config).write_text(json.dumps(settings_of(config)) + "\n")
    last = train(config)[-1]
    return f"{config.output.stem}: {last['episodic_return']:.3g} after {last['seconds']:.0f} s"


def summary_of(rows_per_seed: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Sum up the complete runs of one core on one task; times are means over the seeds."""
    last = [rows[-1] for rows in rows_per_seed]
    # One row averages 50 episodes; the last tenth of the run evens out the rest.
    final = [
        statistics.fmean(row["episodic_return"] for row in rows[-max(1, len(rows) // 10) :])
        for rows in rows_per_seed
    ]
    times = ("processor_seconds", "seconds", "rollout_seconds", "update_seconds")
    return {
        "final_returns": final,
        "final_return_mean": statistics.fmean(final),
        "steps": last[0]["steps"],
        **{name: statistics.fmean(row[name] for row in last) for name in times},
    }


class WholeSequence(nn.Module):
    """`nn.LSTM` in one call, which forgets nothing between episodes: a bound on its speed."""

    def __init__(self, lstm: nn.LSTM):
        super().__init__()
        self.lstm = lstm

    def forward(self, hidden: Tensor, state: Any, *, resets: Tensor) -> tuple[Tensor, Any]:
        """Run over (T, B, H); the resets are not looked at."""
        return self.lstm(hidden, state)


def measure_updates() -> dict[str, dict[str, float]]:
    """Time one epoch of PPO: 16 environments, 128 steps, hidden 128, resets inside, one thread.

    The cores take turns, so that whatever else the machine does hits all of them.
    """
    torch.set_num_threads(1)
    updates = {}
    for name in (*CORES, WHOLE):
        contestant = CORES["lstm" if name == WHOLE else name]
        config = Config(
            core=contestant.core,
            num_layers=contestant.num_layers,
            update_epochs=1,
            environment_options={"length": 20},
        )
        environments = make_environments(config)
        agent = make_agent(environments, config)
        rollout = Collector(environments, agent, config).collect()
        if name == WHOLE:
            agent.core = WholeSequence(agent.core)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-5)
        updates[name] = (agent, optimizer, rollout, config)
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for index in range(ROUNDS + 1):
        for name, arguments in updates.items():
            start = time.perf_counter()
            update(*arguments)
            if index:  # the first round compiles and warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"min_seconds": min(times), "median_seconds": statistics.median(times)}
        for name, times in seconds.items()
    }


def draw(curves: dict[str, dict[str, list]], path: Path) -> None:
    """Draw mean returns with their range over the seeds: against steps above, time below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(8.4, 3.6 * len(curves)), 6.4), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    handles = {}
    for column, (task, cores) in enumerate(curves.items()):
        for core, seeds in cores.items():
            returns = np.array([[row["episodic_return"] for row in rows] for rows in seeds])
            for axis, name in zip(axes[:, column], ("steps", "processor_seconds"), strict=True):
                x = np.mean([[row[name] for row in rows] for rows in seeds], 0)
                colour, title = CORES[core].colour, CORES[core].title
                (line,) = axis.plot(x, returns.mean(0), color=colour, linewidth=1.6)
                axis.fill_between(
                    x, returns.min(0), returns.max(0), color=colour, alpha=0.12, linewidth=0
                )
                handles[title] = line
        axes[0, column].set_title(TASKS[task].title, fontsize=10)
        axes[0, column].set_xlabel("environment steps")
        axes[0, column].xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:g}k")
        axes[1, column].set_xlabel("processor time (s, one core)")
        for axis in axes[:, column]:
            if (chance := TASKS[task].without_memory) is not None:
                line = axis.axhline(chance, color="tab:red", linestyle=":", linewidth=1)
                handles.setdefault("best without memory", line)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("return (mean, range over seeds)")
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=int(figure.get_figwidth() / 2.3),
        frameon=False,
    )
    figure.savefig(path, dpi=120)


def print_tables(result: dict[str, Any]) -> None:
    """Print what memory.json holds as Markdown."""
    print("\n| task | core | return, mean (each seed) | steps | updates s | rollouts s |")
    print("|---|---|---|---|---|---|")
    for task, cores in result["tasks"].items():
        for core, summary in cores.items():
            each = ", ".join(f"{value:.3g}" for value in summary["final_returns"])
            print(
                f"| {task} | {CORES[core].title} | {summary['final_return_mean']:.3g} ({each}) "
                f"| {summary['steps']:.0f} | {summary['update_seconds']:.1f} "
                f"| {summary['rollout_seconds']:.1f} |"
            )
    print("\n| one epoch of updates | min s | median s | times faster than nn.LSTM's loop |")
    print("|---|---|---|---|")
    loop = result["update"]["lstm"]
    for name, times in result["update"].items():
        ratio = loop["median_seconds"] / times["median_seconds"]
        title = "nn.LSTM, one call, no resets" if name == WHOLE else CORES[name].title
        print(
            f"| {title} | {times['min_seconds']:.3f} "
            f"| {times['median_seconds']:.3f} | {ratio:.1f} |"
        )


def report(study: Study) -> None:
    """Write and print what the complete runs say."""
    curves: dict[str, dict[str, list]] = {}
    for (task, name, _), config in configs_of(study).items():
        if is_complete(config):
            rows = curve_of(config.output)
            curves.setdefault(task, {}).setdefault(name, []).append(rows)
    result = {
        "torch": torch.__version__,
        "processors": os.cpu_count(),
        "tasks": {
            task: {core: summary_of(seeds) for core, seeds in cores.items()}
            for task, cores in curves.items()
        },
        "settings": {task: settings_of(TASKS[task].config) for task in curves},
    }
    file = study.results / "memory.json"
    if study.report_only and file.exists():
        result["update"] = json.loads(file.read_text())["update"]
    else:
        result["update"] = measure_updates()
    study.results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    if curves:
        draw(curves, study.results / "memory.png")
    print_tables(result)


def main(study: Study) -> None:
    """Train what is missing, then report."""
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
    main(tyro.cli(Study))
