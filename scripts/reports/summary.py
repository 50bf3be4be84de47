"""Everything a report says as plain JSON values, so that its pages can be made again from them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from minrl.data.dataset_ids import EMBEDDED_IDS
from minrl.envs.scores import REFERENCE_SCORES
from minrl.scripts.reports.collect import Run, headline
from minrl.scripts.reports.comparison import CHECKPOINTS, ablations, comparisons
from minrl.scripts.reports.methods import Method
from minrl.scripts.reports.protocol import describe_protocol
from minrl.scripts.reports.statistics import student_interval
from minrl.scripts.reports.stored import FORMAT, describe_run, shared_settings

COMPARED = ("settings", "references", "targets", "target")


def summarise(
    runs: list[Run], methods: list[Method], left_out: list[dict[str, str]]
) -> dict[str, Any]:
    """Return what these runs say, of which the report is made."""
    runs, repeated = _without_repetitions(runs)
    tasks = describe_tasks(runs)
    cells = _cells(runs, methods, tasks)
    labels = {(task["id"], task["environment"]): task["label"] for task in tasks}
    settings = shared_settings(runs)
    study = {
        "report": FORMAT,
        "methods": [asdict(method) for method in methods],
        "tasks": tasks,
        "cells": cells,
        "comparisons": comparisons(methods, tasks, cells),
        "ablations": ablations(methods, tasks, cells),
        "protocol": describe_protocol(runs, methods, labels),
        "settings": settings,
        "runs": [describe_run(run, _task_of(run, tasks), settings) for run in runs],
        "unfinished": len(left_out),
        "left_out": left_out + repeated,
    }
    return json.loads(json.dumps(_plain(study)))


def _without_repetitions(runs: list[Run]) -> tuple[list[Run], list[dict[str, str]]]:
    """Leave out runs that would count the same seed of the same method twice."""
    kept: dict[tuple, Run] = {}
    repeated = []
    for run in runs:
        key = run.method, run.datasets, run.environment, run.seed
        if key in kept:
            reason = f"the same method, task and seed as {kept[key].folder}"
            repeated.append({"folder": run.folder, "reason": reason})
        kept.setdefault(key, run)
    return list(kept.values()), repeated


def describe_tasks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the tasks in the order of the embedded datasets, others behind."""
    by_task: dict[tuple, list[Run]] = {}
    for run in runs:
        by_task.setdefault((run.datasets, run.environment), []).append(run)

    def place(task):
        known = [EMBEDDED_IDS.index(name) for name in task[0] if name in EMBEDDED_IDS]
        return known or [len(EMBEDDED_IDS)], task[0], task[1] or ""

    described = []
    for datasets, environment in sorted(by_task, key=place):
        members = by_task[datasets, environment]
        scored = all(e["score"] is not None for run in members for e in run.evaluations)
        notes = dict.fromkeys(run.score_note for run in members if run.score_note)
        references = {run.references for run in members} - {None}
        shared = references.pop() if len(references) == 1 else None
        data = {run.data for run in members if run.data}
        described.append(
            {
                "id": "+".join(datasets),
                "label": " + ".join(_label(name) for name in datasets),
                "environment": environment,
                "unit": "score" if scored else "return_mean",
                "score_note": "; ".join(notes) or None
                if scored
                else "no reference scores are known",
                "references": shared,
                "scale": _scale_of(shared),
                "targets": list(dict.fromkeys(t for run in members for t in run.targets)),
                "same_data": len(data) < 2,
            }
        )
    labels = [task["label"] for task in described]
    for task in described:
        if labels.count(task["label"]) > 1:
            task["label"] += f" in {task['environment']}"
    return described


def _scale_of(references: tuple[float, float] | None) -> str:
    """Say whose the references are that all runs of a task share."""
    if references is None:
        return "unknown"
    return "D4RL's" if references in REFERENCE_SCORES.values() else "its own"


def _label(dataset: str) -> str:
    parts = dataset.rpartition("-v")[0].split("/")
    return " ".join(parts[1:]) if dataset in EMBEDDED_IDS else dataset


def _cells(runs: list[Run], methods: list[Method], tasks: list[dict]) -> list[dict[str, Any]]:
    """Return what each method did on each task that it has runs of."""
    cells = []
    for index, task in enumerate(tasks):
        for method in methods:
            members = [r for r in runs if r.method == method.name and _is_of(r, task)]
            if members:
                members.sort(key=lambda run: run.seed)
                cells.append({"task": index, **_cell(method, members, task["unit"])})
    return cells


def _is_of(run: Run, task: dict[str, Any]) -> bool:
    return ("+".join(run.datasets), run.environment) == (task["id"], task["environment"])


def _cell(method: Method, runs: list[Run], unit: str) -> dict[str, Any]:
    known = [run.step_seconds for run in runs if run.step_seconds is not None]
    acting = sorted(
        {e["refresh_every"] for run in runs for e in run.evaluations if method.library is None}
    )
    return {
        "method": method.name,
        "refresh_every": runs[0].refresh_every,
        **{name: _scores(runs, name, unit) for name in CHECKPOINTS},
        "acting": {str(refresh): _scores(runs, "last", unit, refresh) for refresh in acting},
        "asked": _asked(runs),
        "parameters": next((run.parameters for run in runs if run.parameters), None),
        "step_seconds": float(np.median(known)) if known else None,
        "steps": runs[0].steps,
    }


def _scores(
    runs: list[Run], checkpoint: str, unit: str, refresh_every: int | None = None
) -> dict[str, Any]:
    """Return the scores by seed at the first target, and what they say together."""
    evaluated = [(run, headline(run, checkpoint, refresh_every)) for run in runs]
    found = [
        (run, evaluation)
        for run, evaluation in evaluated
        if evaluation and evaluation[unit] is not None and math.isfinite(evaluation[unit])
    ]
    values = np.array([evaluation[unit] for _, evaluation in found])
    return {
        "target": found[0][0].targets[0] if found else None,
        "seeds": [run.seed for run, _ in found],
        "values": values.tolist(),
        "mean": float(values.mean()) if found else None,
        "std": float(values.std(ddof=1)) if len(found) > 1 else None,
        "interval": student_interval([values]),
        "episodes": sorted({evaluation["episodes"] for _, evaluation in found}),
    }


def _asked(runs: list[Run]) -> list[dict[str, Any]]:
    """Return, by target, the mean return that the last checkpoints got, acting as trained."""
    got: dict[float, list[dict[str, Any]]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            as_trained = evaluation["refresh_every"] == run.refresh_every
            if evaluation["checkpoint"] == "last" and as_trained:
                got.setdefault(evaluation["target"], []).append(evaluation)
    return [
        {
            "target": target,
            "return_mean": float(np.mean([item["return_mean"] for item in items])),
        }
        for target, items in got.items()
    ]


def _task_of(run: Run, tasks: list[dict[str, Any]]) -> int:
    return next(index for index, task in enumerate(tasks) if _is_of(run, task))


def _plain(value: Any) -> Any:
    """Return JSON values with six digits, which is more than the figures have; NaN as None.

    What is compared with other runs to the last digit keeps them all.
    """
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(k): v if k in COMPARED else _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
