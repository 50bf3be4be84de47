"""How long trained agents take to act in one environment, measured in turns."""

import contextlib
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minrl.agents.decision_agent import DecisionAgent
from minrl.agents.native_step import native_step
from minrl.agents.step_policy import StepPolicy
from minrl.errors import CheckpointError
from minrl.scripts.benchmarks.measuring import Clock, Contestant, Prepared, compete
from minrl.scripts.machine import device_name
from minrl.scripts.reports.collect import Run
from minrl.scripts.reports.comparison import way_to_act
from minrl.scripts.reports.methods import MEMORYLESS, Method

SECONDS = 1.0  # of calls of each agent
MOST_ROUNDS = 1000
EPISODE = 1000  # steps, after which it starts again
RECURRENT, WINDOWED = 0, 1


def measure_latency(runs: Sequence[Run], methods: Sequence[Method]) -> dict[str, Any]:
    """Time ``DecisionAgent.act`` of one run of each method, for one environment, on the CPU.

    Each acts in the way it was trained for, and those with a memory in the other way too: with a
    state that is carried along (recurrent; of a Transformer, cached keys and values), and from the
    last steps at every step (windowed). Those with a compiled step act without it too (eager), as
    all others do: what is compared then is the architectures.

    Args:
        runs: With checkpoints, or they are shown as missing; those without a folder, which were
            read from a report.json, are passed over.
        methods: Which ones; those with changes of settings and outside agents are passed over.

    Returns:
        "device", "threads", and "rows": method, way of acting, whether it is the one trained for
        and by a compiled step, median and p95 in seconds, rounds; or "missing", why it could not be
        measured.
    """
    contestants, rows = [], []
    runs = [run for run in runs if run.path is not None]
    commonest = Counter(run.datasets for run in runs).most_common(1)
    for method in methods:
        if method.library is not None or method.changes:
            continue
        of_method = [run for run in runs if run.method == method.name]
        if not of_method:
            continue
        run = next((run for run in of_method if run.datasets == commonest[0][0]), of_method[0])
        trained_for = run.refresh_every
        ways = {trained_for} if method.family in MEMORYLESS else {trained_for, RECURRENT, WINDOWED}
        ordered = sorted(ways, key=lambda way, trained_for=trained_for: way != trained_for)
        has_compiled = _has_compiled_step(run.path)
        for way, is_eager in [(way, False) for way in ordered] + [(RECURRENT, True)] * has_compiled:
            prepare = functools.partial(_prepare, run.path, way, is_eager)
            acting = way_to_act(way, method.family) + ", eager" * is_eager
            contestants.append(Contestant(f"{method.name} {acting}", prepare))
            rows.append(
                {
                    "method": method.name,
                    "acting": acting,
                    "as_trained": way == trained_for and not is_eager,
                    "compiled": has_compiled and not is_eager,
                }
            )
    clock = Clock(torch.device("cpu"))
    outcomes = compete(
        contestants,
        None,
        clock,
        seconds=SECONDS,
        most_rounds=MOST_ROUNDS,
        measure_memory=False,
    )
    for row, outcome in zip(rows, outcomes, strict=True):
        if outcome.missing is not None:
            row["missing"] = outcome.missing
            continue
        row["rounds"] = len(outcome.seconds)
        row["median"], row["p95"] = np.quantile(outcome.seconds, (0.5, 0.95)).tolist()
    return {"device": device_name(clock.device), "threads": torch.get_num_threads(), "rows": rows}


def _has_compiled_step(folder: Path) -> bool:
    """Return whether a run's agent acts by compiled code, here and now."""
    with contextlib.suppress(CheckpointError):  # why will be said where it is timed
        return native_step(StepPolicy(DecisionAgent.load(folder).model)) is not None
    return False


def _prepare(folder: Path, refresh_every: int, is_eager: bool, _case: None) -> Prepared:
    """Return the steps of an agent that has its window full already."""
    agent = DecisionAgent.load(folder)
    agent.refresh_every = refresh_every
    if is_eager:  # compiled code would pass a hook by, so a model with one is not compiled
        agent.model.register_forward_hook(lambda *_: None)
    random = np.random.default_rng(0)
    mean, std = (x.numpy() for x in (agent.model.observation_mean, agent.model.observation_std))
    observations = random.normal(mean, std, (EPISODE, len(mean))).astype(np.float32)
    taken = 0

    def step() -> None:
        nonlocal taken
        agent.act(observations[taken % EPISODE], 1.0)
        taken += 1

    def restart() -> None:  # so that no agent acts beyond what it was trained on
        if taken and taken % EPISODE == 0:
            agent.reset()
            for _ in range(agent.context):
                step()

    agent.reset()
    for _ in range(agent.context):
        step()
    return Prepared(step, restart)
