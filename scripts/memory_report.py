"""What the memory study found, as JSON, tables and a picture, and what an update costs."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minrl.scripts.examples.ppo_recurrent import (
    Collector,
    Config,
    make_agent,
    make_environments,
    update,
)
from minrl.scripts.memory_tasks import CORES, TASKS

WHOLE = "lstm, one call, no resets"
ROUNDS = 5  # of each core, where updates are timed
POINTS = 64  # of a learning curve, at most


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
        "curve": _curve_over_seeds(rows_per_seed),
    }


def _curve_over_seeds(rows_per_seed: list[list[dict[str, float]]]) -> dict[str, list[float]]:
    """Return the mean, lowest and highest return of the seeds, and when it was reached."""
    count = min(POINTS, len(rows_per_seed[0]))
    chosen = np.linspace(0, len(rows_per_seed[0]) - 1, count).round().astype(int)
    over_seeds = {
        name: np.array([[rows[index][name] for index in chosen] for rows in rows_per_seed])
        for name in ("steps", "processor_seconds", "episodic_return")
    }
    returns = over_seeds.pop("episodic_return")
    return {
        **{name: values.mean(0).tolist() for name, values in over_seeds.items()},
        "mean": returns.mean(0).tolist(),
        "lowest": returns.min(0).tolist(),
        "highest": returns.max(0).tolist(),
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


def draw(tasks: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw mean returns with their range over the seeds: against steps above, time below.

    A run has one thread, so that processor time is the wall time on a core of its own; of what else
    a machine does it says far less.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(8.4, 3.6 * len(tasks)), 6.4), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False)
    handles = {}
    for column, (task, cores) in enumerate(tasks.items()):
        for core, summary in cores.items():
            curve, contestant = summary["curve"], CORES[core]
            for axis, name in zip(axes[:, column], ("steps", "processor_seconds"), strict=True):
                (line,) = axis.plot(curve[name], curve["mean"], color=contestant.colour)
                axis.fill_between(
                    curve[name],
                    curve["lowest"],
                    curve["highest"],
                    color=contestant.colour,
                    alpha=0.12,
                    linewidth=0,
                )
                handles[contestant.title] = line
        axes[0, column].set_title(TASKS[task].title, fontsize=10)
        axes[0, column].set_xlabel("environment steps")
        axes[0, column].xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:g}k")
        axes[1, column].set_xlabel("time of one core (s)")
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


def print_returns(tasks: dict[str, dict[str, Any]]) -> None:
    """Print the summaries by task and core as Markdown."""
    print("\n| task | core | return, mean (each seed) | steps | processor s | wall s | updates s |")
    print("|---|---|---|---|---|---|---|")
    for task, cores in tasks.items():
        for core, summary in cores.items():
            each = ", ".join(f"{value:.3g}" for value in summary["final_returns"])
            print(
                f"| {task} | {CORES[core].title} | {summary['final_return_mean']:.3g} ({each}) "
                f"| {summary['steps']:.0f} | {summary['processor_seconds']:.1f} "
                f"| {summary['seconds']:.1f} | {summary['update_seconds']:.1f} |"
            )


def print_updates(updates: dict[str, dict[str, float]]) -> None:
    """Print what `measure_updates` found as Markdown."""
    print("\n| one epoch of updates | min s | median s | times faster than nn.LSTM's loop |")
    print("|---|---|---|---|")
    for name, times in updates.items():
        ratio = updates["lstm"]["median_seconds"] / times["median_seconds"]
        title = "nn.LSTM, one call, no resets" if name == WHOLE else CORES[name].title
        print(
            f"| {title} | {times['min_seconds']:.3f} "
            f"| {times['median_seconds']:.3f} | {ratio:.1f} |"
        )
