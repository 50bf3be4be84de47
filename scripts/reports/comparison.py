"""Methods against one another: over tasks, by seeds, and what each choice is worth."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minrl.scripts.reports.methods import MEMORYLESS, OURS, Method, short
from minrl.scripts.reports.statistics import (
    bootstrap_interval,
    interquartile_mean,
    mean_over_tasks,
    performance_profile,
    probability_of_improvement,
    student_interval,
)

CHECKPOINTS = ("last", "best")
THRESHOLDS = 81


def comparisons(
    methods: Sequence[Method], tasks: list[dict], cells: list[dict]
) -> list[dict[str, Any]]:
    """Return the comparisons over tasks: of our methods, and of these with outside agents.

    Methods with changes of settings are not among them: they are in the ablations. Each comparison
    is over the tasks that all its methods have; a method that has less than half of the tasks, or
    leaves none in common, is left out and named. Outside agents get a comparison of their own only
    if they lack tasks.
    """
    scored = [index for index, task in enumerate(tasks) if task["unit"] == "score"]
    table = _scores_by(cells, "last")
    ours = [method.name for method in methods if method.library is None and not method.changes]
    peers = [method.name for method in methods if method.library is not None]
    found = []
    for title, names in (
        ("of this study's methods", ours),
        ("of these and outside agents", [*ours, *peers]),
    ):
        kept, common = _common(names, scored, table)
        if found and (not peers or not set(kept) & set(peers)):
            continue
        if found and common == found[0]["tasks"]:
            found.clear()  # one comparison says it all
        if common:
            found.append(_compare(title, kept, common, scored, names, cells))
    return found


def _scores_by(cells: list[dict], checkpoint: str) -> dict[tuple[str, int], np.ndarray]:
    return {
        (cell["method"], cell["task"]): np.array(cell[checkpoint]["values"])
        for cell in cells
        if cell[checkpoint]["values"]
    }


def _common(
    names: list[str], tasks: list[int], table: dict[tuple[str, int], np.ndarray]
) -> tuple[list[str], list[int]]:
    """Return the methods with at least half of the tasks, and the tasks that all of these have."""
    have = {name: {task for task in tasks if (name, task) in table} for name in names}
    anywhere = set().union(*have.values()) if have else set()
    kept = [name for name in names if have[name] and 2 * len(have[name]) >= len(anywhere)]
    common = [task for task in tasks if kept and all(task in have[name] for name in kept)]
    while kept and not common:
        fewest = min(kept, key=lambda name: len(have[name]))
        kept.remove(fewest)
        common = [task for task in tasks if kept and all(task in have[name] for name in kept)]
    return kept, common


def _compare(
    title: str,
    names: list[str],
    common: list[int],
    tasks: list[int],
    asked: list[str],
    cells: list[dict],
) -> dict[str, Any]:
    comparison: dict[str, Any] = {
        "title": title,
        "methods": names,
        "tasks": common,
        "left_out_methods": [name for name in asked if name not in names],
        "left_out_tasks": [task for task in tasks if task not in common],
    }
    for checkpoint in CHECKPOINTS:
        table = _scores_by(cells, checkpoint)
        by_method = {
            name: _as_many([table[name, task] for task in common])
            for name in names
            if all((name, task) in table for task in common)
        }
        comparison[checkpoint] = {name: _aggregate(by_method[name]) for name in by_method}
        for name, values in comparison[checkpoint].items():
            values["seeds_at_most"] = max(len(table[name, task]) for task in common)
        if checkpoint == "last":
            comparison["profiles"] = _profiles(by_method)
            shared = [cell for cell in cells if cell["task"] in common]
            comparison["improvement"] = _improvements(by_method, shared)
    return comparison


def _as_many(scores: list[np.ndarray]) -> list[np.ndarray]:
    """Return the first seeds of each task, as many on all, so that no task weighs more."""
    fewest = min(map(len, scores))
    return [task[:fewest] for task in scores]


def _aggregate(scores: list[np.ndarray]) -> dict[str, Any]:
    return {
        "seeds": len(scores[0]),
        "mean": mean_over_tasks(scores),
        "mean_interval": bootstrap_interval(mean_over_tasks, scores),
        "iqm": interquartile_mean(scores),
        "iqm_interval": bootstrap_interval(interquartile_mean, scores),
    }


def _profiles(by_method: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Return the share of runs above each score, from 0 or the least to the largest."""
    every = np.concatenate([task for scores in by_method.values() for task in scores])
    thresholds = np.linspace(min(0.0, every.min()), every.max(), THRESHOLDS)
    lines = {}
    for name, scores in by_method.items():
        interval = bootstrap_interval(lambda drawn: performance_profile(drawn, thresholds), scores)
        lines[name] = {"share": performance_profile(scores, thresholds), "interval": interval}
    return {"thresholds": thresholds, "lines": lines}


def _improvements(
    by_method: dict[str, list[np.ndarray]], cells: list[dict]
) -> list[dict[str, Any]]:
    """Compare ours with the others: chances to be better, and differences by task and seed."""
    return [
        {
            "method": own,
            "rival": rival,
            "probability": probability_of_improvement(by_method[own], by_method[rival]),
            "interval": bootstrap_interval(
                probability_of_improvement, by_method[own], by_method[rival]
            ),
            "difference": pairs["difference"],
            "difference_interval": pairs["interval"],
            "difference_tasks": len(pairs["tasks"]),
        }
        for own in OURS
        for rival in by_method
        if own in by_method and rival != own and not (rival in OURS and rival < own)
        for pairs in [_pairs(_by_task(cells, own), _by_task(cells, rival))]
    ]


def ablations(
    methods: Sequence[Method], tasks: list[dict], cells: list[dict]
) -> list[dict[str, Any]]:
    """Return what each change is worth: differences of last scores, paired by task and seed."""
    scored = {index for index, task in enumerate(tasks) if task["unit"] == "score"}
    own = [cell for cell in cells if cell["task"] in scored]
    by_name = {method.name: method for method in methods}
    rows = []
    for method in methods:
        if method.changes:
            change = ", ".join(
                f"{name.replace('_', ' ')} {short(value)}" for name, value, _ in method.changes
            )
            usual = ", ".join(short(value) for _, _, value in method.changes)
            base = method.family if method.family in by_name else None
            pairs = _pairs(_by_task(own, method.name), _by_task(own, base))
            costs = _cost_ratios(own, method.name, base)
            rows.append(
                {"method": method.family, "change": change, "usual": usual, **pairs, **costs}
            )
    for method in methods:
        rows += _acting_rows(method, [cell for cell in own if cell["method"] == method.name])
    return rows


def _acting_rows(method: Method, cells: list[dict]) -> list[dict[str, Any]]:
    """Return the rows of ways to act other than the one that a method was trained for."""
    rows = []
    ways = dict.fromkeys(way for cell in cells for way in cell["acting"])
    for way in ways:
        usual = str(cells[0]["refresh_every"])
        names = [way_to_act(int(each), method.family) for each in (way, usual)]
        if names[0] != names[1]:
            changed = {cell["task"]: cell["acting"][way] for cell in cells if way in cell["acting"]}
            base = {cell["task"]: cell["last"] for cell in cells}
            pairs = _pairs(changed, base)
            change = f"acting {names[0]}"
            rows.append({"method": method.name, "change": change, "usual": names[1], **pairs})
    return rows


def way_to_act(refresh_every: int, family: str) -> str:
    """Return what ``DecisionAgent.refresh_every`` means for a backbone, in a word or two."""
    if family in MEMORYLESS:
        return "without memory"
    if refresh_every == 0:
        return "cached" if family == "transformer" else "recurrent"
    return "windowed" if refresh_every == 1 else f"rebuilt every {refresh_every} steps"


def _by_task(cells: list[dict], method: str | None) -> dict[int, dict[str, Any]]:
    return {cell["task"]: cell["last"] for cell in cells if cell["method"] == method}


def _pairs(changed: dict[int, dict], base: dict[int, dict]) -> dict[str, Any]:
    """Return the difference of scores over the seeds and tasks that both have."""
    differences, changed_scores, base_scores, of_tasks = [], [], [], []
    for task in changed:
        new = dict(zip(changed[task]["seeds"], changed[task]["values"], strict=True))
        old = base.get(task, {"seeds": [], "values": []})
        old = dict(zip(old["seeds"], old["values"], strict=True))
        seeds = [seed for seed in new if seed in old]
        if seeds:
            of_tasks.append(task)
            changed_scores.append(np.array([new[seed] for seed in seeds]))
            base_scores.append(np.array([old[seed] for seed in seeds]))
            differences.append(changed_scores[-1] - base_scores[-1])
    row: dict[str, Any] = {"tasks": of_tasks, "pairs": sum(map(len, differences))}
    if not differences:
        alone = [np.array(scores["values"]) for scores in changed.values() if scores["values"]]
        return row | {
            "score": mean_over_tasks(alone) if alone else None,
            **dict.fromkeys(("usual_score", "difference", "interval")),
        }
    return row | {
        "score": mean_over_tasks(changed_scores),
        "usual_score": mean_over_tasks(base_scores),
        "difference": mean_over_tasks(differences),
        "interval": student_interval(differences),
    }


def _cost_ratios(cells: list[dict], method: str, base: str | None) -> dict[str, Any]:
    """Return the time per step and the parameters against the baseline, on the tasks both have."""
    ratios: dict[str, Any] = {}
    for name in ("step_seconds", "parameters"):
        old = {cell["task"]: cell[name] for cell in cells if cell["method"] == base and cell[name]}
        pairs = [
            cell[name] / old[cell["task"]]
            for cell in cells
            if cell["method"] == method and cell[name] and cell["task"] in old
        ]
        ratios[f"{name}_ratio"] = float(np.mean(pairs)) if pairs else None
    return ratios
