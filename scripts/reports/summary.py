"""Everything a report says as plain JSON values, so that its pages can be made again from them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from minrl.data.dataset_ids import EMBEDDED_IDS
from minrl.envs.evaluation import student_t_quantile
from minrl.scripts.reports.collect import Run, headline
from minrl.scripts.reports.comparison import ablations, comparisons
from minrl.scripts.reports.methods import NOT_THE_METHOD, Method
from minrl.scripts.train_config import FINAL_SEED, SELECTION_SEED

CHECKPOINTS = ("last", "best")
FORMAT = 1

# Settings that a reader must know of, with their names; of others only where methods differ.
PROTOCOL = {
    "preset": "preset",
    "steps": "training steps",
    "batch_size": "windows a step",
    "context": "steps of a window",
    "burn_in": "burn-in steps before a window",
    "learning_rate": "learning rate",
    "schedule": "schedule",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "width": "width",
    "num_layers": "blocks",
    "tokens": "tokens",
    "dropout": "dropout",
    "match_parameters": "parameters matched to",
    "best_fraction": "share of the data (best episodes)",
    "held_out": "share of episodes held out",
    "refresh_every": "acting: 0 recurrent, 1 windowed",
    "eval_every": "steps between evaluations",
    "eval_episodes": "episodes each, for each target",
    "precision": "precision",
    "device": "device",
}


def summarise(
    runs: list[Run], methods: list[Method], left_out: list[dict[str, str]]
) -> dict[str, Any]:
    """Return what these runs say, of which the report is made."""
    runs, repeated = _without_repetitions(runs)
    tasks = describe_tasks(runs)
    cells = _cells(runs, methods, tasks)
    study = {
        "report": FORMAT,
        "methods": [asdict(method) for method in methods],
        "tasks": tasks,
        "cells": cells,
        "comparisons": comparisons(methods, tasks, cells),
        "ablations": ablations(methods, tasks, cells),
        "protocol": describe_protocol(runs, methods, tasks),
        "runs": [_describe_run(run, tasks) for run in runs],
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
        described.append(
            {
                "id": "+".join(datasets),
                "label": " + ".join(_label(name) for name in datasets),
                "environment": environment,
                "unit": "score" if scored else "return_mean",
                "score_note": "; ".join(notes) or None,
                "targets": list(dict.fromkeys(t for run in members for t in run.targets)),
            }
        )
    labels = [task["label"] for task in described]
    for task in described:
        if labels.count(task["label"]) > 1:
            task["label"] += f" in {task['environment']}"
    return described


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
    known = [run.seconds for run in runs if run.seconds is not None]
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
        "seconds": float(np.mean(known)) if known else None,
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
        "interval": student_interval(values),
        "episodes": sorted({evaluation["episodes"] for _, evaluation in found}),
    }


def student_interval(values: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean (Student's t); None for a single value."""
    if len(values) < 2:
        return None
    half = student_t_quantile(0.95, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


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
            "seeds": len(items),
        }
        for target, items in got.items()
    ]


def describe_protocol(
    runs: list[Run], methods: list[Method], tasks: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what the runs' own configurations say they had in common, and where they differ."""
    ours = [run for run in runs if run.library is None]
    return {
        "settings": _compare_settings(ours, methods),
        "seeds": sorted({run.seed for run in runs}),
        "selection_seed": SELECTION_SEED,
        "final_seed": FINAL_SEED,
        "episodes": sorted({e["episodes"] for run in runs for e in run.evaluations}),
        "unexpected_seeds": _unexpected_seeds(ours),
        "score_notes": list(dict.fromkeys(task["score_note"] for task in tasks)),
        "versions": _versions(ours),
        "machines": sorted({run.machine for run in ours if run.machine}),
        "peers": {
            run.method: {"library": run.library, "steps": run.steps, "note": run.note}
            for run in runs
            if run.library is not None
        },
    }


def _compare_settings(runs: list[Run], methods: list[Method]) -> dict[str, dict[str, list[str]]]:
    """Return by setting and value the methods that have it.

    What only an ablation changes is said where its worth is, not here.
    """
    usual = {method.name for method in methods if not method.changes}
    others = dict.fromkeys(name for run in runs for name in run.settings)
    settings = {}
    for name in (*PROTOCOL, *(n for n in others if n not in (*PROTOCOL, *NOT_THE_METHOD))):
        values: dict[str, set[str]] = {}
        for run in runs:
            if name in run.settings and run.method in usual:
                values.setdefault(_shown(run.settings[name]), set()).add(run.method)
        if name in PROTOCOL or len(values) > 1:
            title = PROTOCOL.get(name, name.replace("_", " "))
            settings[title] = {value: sorted(names) for value, names in values.items()}
    return settings


def _shown(value: Any) -> str:
    return f"{value:,g}" if isinstance(value, (int, float)) and value >= 1000 else f"{value}"


def _unexpected_seeds(runs: list[Run]) -> list[str]:
    """Name the runs whose final episodes are not those that the protocol says."""
    return [
        run.folder
        for run in runs
        if any(e["seed"] != FINAL_SEED + run.seed for e in run.evaluations)
    ]


def _versions(runs: list[Run]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run.versions.items():
            found.setdefault(name, set()).add(version)
    return {name: sorted(versions) for name, versions in found.items()}


def _describe_run(run: Run, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a run without what the rest of the report holds already."""
    task = next(index for index, task in enumerate(tasks) if _is_of(run, task))
    values = asdict(run) | {"task": task}
    for name in (
        "path",
        "datasets",
        "environment",
        "settings",
        "score_note",
        "versions",
        "machine",
        "library",
    ):
        values.pop(name)
    return values


def _plain(value: Any) -> Any:
    """Return JSON values with six digits, which is more than the figures have; NaN as None."""
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
