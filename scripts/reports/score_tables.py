"""The tables of scores: all at a glance, by task, against rivals, by the return asked for."""

import math
from collections.abc import Callable
from typing import Any

from minrl.envs.evaluation import format_return
from minrl.scripts.reports.cells import (
    MISSING,
    NOT_WIDENED,
    OUTSIDE,
    Cell,
    Table,
    clock,
    counted,
    difference_cell,
    duration,
    has_single_seed,
    heads_of,
    main_methods,
    mark_best,
    method_cell,
    number,
    range_of,
    span,
    thousands,
    with_interval,
)
from minrl.scripts.reports.statistics import MISSES

TITLES = {
    "last": "Last checkpoint",
    "best": "Best checkpoint, chosen while training on other episodes than these",
}
OTHERS_TOO = "outside agents too"


def overview(study: dict[str, Any]) -> Table | None:
    """Return a row for each method: score over the tasks and what it costs."""
    if not study["comparisons"]:
        return None
    first, *more = study["comparisons"]
    columns = [(first, "last", "iqm"), (first, "best", "iqm"), (first, "last", "mean")]
    columns += [(other, "last", "iqm") for other in more]
    titles = ("IQM, last", "IQM, best", "mean, last", *("IQM, last" for _ in more))
    heads = [Cell("method")]
    for title, (of, *_) in zip(titles, columns, strict=True):
        heads.append(Cell(title, counted(of["tasks"], "task")))
    marks = [mark_best(_estimates(of, checkpoint, key)) for of, checkpoint, key in columns]
    latency = {
        row["method"]: row
        for row in (study["latency"] or {"rows": []})["rows"]
        if row["as_trained"] and "median" in row
    }
    rows = []
    for name in main_methods(study):
        cells = [
            with_interval(of[checkpoint].get(name), key, marked.get(name))
            for (of, checkpoint, key), marked in zip(columns, marks, strict=True)
        ]
        of_method = [cell for cell in study["cells"] if cell["method"] == name]
        parameters = Cell(range_of([cell["parameters"] for cell in of_method], thousands))
        times = [_training_cell(of_method), _latency_cell(latency.get(name))]
        rows.append([method_cell(study, name), *cells, parameters, *times])
    wall_time = ", of outside agents wall time" if study["protocol"]["peers"] else ""
    notes = [
        f"Percent over {counted(first['tasks'], 'task')}{_seeds_each(first)}, at the first target "
        f"of each task. IQM: interquartile mean of all runs.{_interval_note(study, first)} "
        f"Training: the median step times the steps{wall_time}; acting: as trained, median.",
        *(note for comparison in study["comparisons"] for note in _left_out(study, comparison)),
    ]
    return Table("", heads + heads_of("parameters", "training", "acting"), rows, notes)


def _estimates(comparison: dict[str, Any], checkpoint: str, key: str) -> dict[str, tuple]:
    return {
        name: (values[key], values[f"{key}_interval"])
        for name, values in comparison[checkpoint].items()
    }


def _latency_cell(row: dict[str, Any] | None) -> Cell:
    if row is None:
        return Cell(MISSING)
    how = ", compiled" if row["compiled"] else ""
    return Cell(duration(row["median"]), f"p95 {duration(row['p95'])}{how}")


def _training_cell(cells: list[dict[str, Any]]) -> Cell:
    known = [cell for cell in cells if cell["step_seconds"]]
    if not known:
        return Cell(MISSING)
    each = sum(cell["step_seconds"] for cell in known) / len(known)
    whole = sum(cell["step_seconds"] * cell["steps"] for cell in known) / len(known)
    return Cell(clock(whole), f"{duration(each)} per step")


def _seeds_each(comparison: dict[str, Any]) -> str:
    seeds = [values["seeds"] for values in comparison["last"].values()]
    return f", {range_of(seeds, str)} seed{'s' * (max(seeds) > 1)} each" if seeds else ""


def _interval_note(study: dict[str, Any], comparison: dict[str, Any]) -> str:
    if has_single_seed(study):
        return ""
    return (
        " With stratified bootstrap 95 % intervals; a method with a single seed on some task has "
        f"none. {_how_narrow(comparison, 0)} Bold: inside the interval of the highest, unless all "
        "are; shaded: nothing else is inside."
    )


def _how_narrow(comparison: dict[str, Any], which: int) -> str:
    """Say what share of such intervals missed the truth in simulations of studies of this size."""
    seeds = min((values["seeds"] for values in comparison["last"].values()), default=1)
    tasks = len(comparison["tasks"])

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / seeds)) + abs(math.log(size[1] / tasks))

    nearest = min(MISSES, key=distance)
    is_simulated = which == 0 and nearest[1] > 1
    uneven = ", and about twice as many where most of the spread is on a few tasks" * is_simulated
    return (
        f"With few runs they are too narrow: in simulated studies of {nearest[0]} seeds and "
        f"{counted(range(nearest[1]), 'task')} {100 * MISSES[nearest][which]:.0f} % of them missed "
        f"the truth, not 5 %{uneven}."
    )


def _left_out(study: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """Say which tasks and methods a comparison is not about."""
    notes = []
    of = f"The {counted(comparison['tasks'], 'task')} {comparison['title']}"
    if comparison["left_out_tasks"]:
        labels = [study["tasks"][task]["label"] for task in comparison["left_out_tasks"]]
        notes.append(f"{of}: without {', '.join(labels)}, of which some method has no run.")
    if comparison["left_out_methods"]:
        names = ", ".join(comparison["left_out_methods"])
        notes.append(f"{of}: without {names}, which have too few of the tasks.")
    found = [
        (checkpoint, *item) for checkpoint in TITLES for item in comparison[checkpoint].items()
    ]
    for checkpoint, name, values in found:
        if values["seeds"] < values["seeds_at_most"]:
            notes.append(
                f"{of}, {checkpoint} checkpoints: of {name} only the first "
                f"{counted(range(values['seeds']), 'seed')} of each task, since it has no more on "
                "some: so no task weighs more."
            )
    return notes


def score_table(study: dict[str, Any], checkpoint: str) -> Table:
    """Return the table of tasks and methods."""
    by_place = {(cell["method"], cell["task"]): cell[checkpoint] for cell in study["cells"]}
    evaluated = {name for (name, _), scores in by_place.items() if scores["values"]}
    names = [name for name in main_methods(study) if name in evaluated]
    usual = _usual_count(study, checkpoint)
    rows = []
    for index, task in enumerate(study["tasks"]):
        scores = {
            name: by_place[name, index]
            for name in names
            if (name, index) in by_place and by_place[name, index]["values"]
        }
        marks = mark_best({name: (s["mean"], s["interval"]) for name, s in scores.items()})
        cells = [_score_cell(scores.get(name), marks.get(name, {}), task, usual) for name in names]
        rows.append([Cell(task["label"], _target_of(task, scores)), *cells])
    summing = _summing_rows(study, checkpoint, names)
    heads = [Cell("task"), *(method_cell(study, name) for name in names)]
    notes = [_score_note(study, checkpoint, usual), *_peer_notes(study)]
    return Table(TITLES[checkpoint], heads, rows + summing, notes, len(summing))


def _summing_rows(study: dict[str, Any], checkpoint: str, names: list[str]) -> list[list[Cell]]:
    rows = []
    for comparison in study["comparisons"]:
        found = comparison[checkpoint]
        if not found:
            continue
        tasks = counted(comparison["tasks"], "task")
        below = tasks if comparison is study["comparisons"][0] else f"{tasks}, {OTHERS_TOO}"
        for key, title in (("mean", "mean"), ("iqm", "interquartile mean")):
            marks = mark_best(_estimates(comparison, checkpoint, key))
            cells = [with_interval(found.get(name), key, marks.get(name)) for name in names]
            rows.append([Cell(title, below), *cells])
    return rows


def _score_cell(
    scores: dict[str, Any] | None, marks: dict[str, bool], task: dict[str, Any], usual: int
) -> Cell:
    if not scores:
        return Cell(MISSING)
    as_text = number if task["unit"] == "score" else format_return
    below = "" if scores["std"] is None else f"± {as_text(scores['std'])}"
    if len(scores["seeds"]) != usual:
        below = f"{below}, {counted(scores['seeds'], 'seed')}".removeprefix(", ")
    return Cell(as_text(scores["mean"]), below, **marks)


def _usual_count(study: dict[str, Any], checkpoint: str) -> int:
    """Return the number of seeds that most cells have."""
    counts = [len(cell[checkpoint]["seeds"]) for cell in study["cells"]]
    counts = [count for count in counts if count]
    return max(counts, key=counts.count) if counts else 0


def _target_of(task: dict[str, Any], scores: dict[str, Any]) -> str:
    targets = {score["target"] for score in scores.values() if score["target"] is not None}
    asked = f"target {', '.join(f'{target:g}' for target in sorted(targets))}" if targets else ""
    return asked if task["unit"] == "score" else f"{asked}, mean return".removeprefix(", ")


def _score_note(study: dict[str, Any], checkpoint: str, usual: int) -> str:
    episodes = sorted({e for cell in study["cells"] for e in cell[checkpoint]["episodes"]})
    if not episodes:
        return "No such evaluation."
    seeds = counted(range(usual), "seed")
    spread = f"Mean ± standard deviation over {seeds} unless the cell says otherwise"
    if usual < 2:
        spread = "One seed, which has no spread, unless the cell says otherwise"
    marks = (
        " Bold: inside the 95 % interval (Student's t over the seeds) of the row's highest, unless "
        "all are or that has one seed; shaded: nothing else is inside. Means over tasks with "
        "stratified bootstrap 95 % intervals."
    )
    marks = "" if has_single_seed(study) else marks
    return (
        f"The {checkpoint} checkpoint at the first target, {range_of(episodes, str)} episodes per "
        "run, in percent of reference returns where there are any. "
        f"{spread}. {MISSING}: no such run.{marks}"
    )


def _peer_notes(study: dict[str, Any]) -> list[str]:
    peers = [
        ", ".join(filter(None, (name, peer["library"], f"{peer['steps']:,} steps", peer["note"])))
        for name, peer in study["protocol"]["peers"].items()
    ]
    if not peers:
        return []
    return [f"{OUTSIDE.strip()} Other people's code, with its own budget: {'; '.join(peers)}."]


def improvement_table(study: dict[str, Any]) -> Table | None:
    """Return the chances that a run of ours beats one of a rival.

    Outside agents that lack tasks are compared over those that they have.
    """
    by_pair = _by_pair(study)
    note = (
        "The chance that a run of the method on the left scores more than one of the rival above "
        "it on the same task: last checkpoints, averaged over tasks; 0.5 is a draw. With bootstrap "
        "95 % intervals where all have two seeds or more. "
        f"{' '.join(dict.fromkeys(row['narrow'] for row in by_pair.values()))} Bold: the whole "
        "interval is on one side of 0.5."
    )
    return _pair_table(study, by_pair, "Probability of improvement", _improvement_cell, note)


def difference_table(study: dict[str, Any]) -> Table | None:
    """Return how much more ours score than the rivals, by task and seed."""
    note = (
        "How much more the method on the left scores than the one above it: last checkpoints, the "
        "mean over tasks of the differences of runs with the same seed, with its 95 % interval "
        "(Student's t, Welch-Satterthwaite). Bold: it leaves out zero. "
        f"{NOT_WIDENED}"
    )
    by_pair = _by_pair(study)
    fewer = [
        f"{own} and {rival} have seeds in common on {row['difference_tasks']} of these tasks."
        for (own, rival), row in by_pair.items()
        if row["difference_tasks"] < row["tasks"]
    ]
    note = " ".join([note, *fewer])
    return _pair_table(study, by_pair, "Differences of scores", _difference_cell, note)


Pairs = dict[tuple[str, str], dict[str, Any]]


def _by_pair(study: dict[str, Any]) -> Pairs:
    """Return what compares ours with a rival, over the most tasks that they have in common."""
    by_pair: Pairs = {}
    for comparison in study["comparisons"]:
        for row in comparison["improvement"]:
            of = {
                "tasks": len(comparison["tasks"]),
                "narrow": _how_narrow(comparison, 1),
            }
            by_pair.setdefault((row["method"], row["rival"]), row | of)
    return by_pair


def _pair_table(
    study: dict[str, Any],
    by_pair: Pairs,
    title: str,
    cell_of: Callable[[dict[str, Any] | None], Cell],
    note: str,
) -> Table | None:
    """Return a table with a row for each of ours and a column for each rival."""
    rivals = {rival: by_pair[own, rival]["tasks"] for own, rival in by_pair}
    rows = [
        [method_cell(study, own), *(cell_of(by_pair.get((own, rival))) for rival in rivals)]
        for own in dict.fromkeys(own for own, _ in by_pair)
    ]
    heads = [
        Cell(method_cell(study, rival).text, counted(range(tasks), "task"))
        for rival, tasks in rivals.items()
    ]
    return Table(title, [Cell("method"), *heads], rows, [note]) if rows else None


def _difference_cell(row: dict[str, Any] | None) -> Cell:
    if row is None or row["difference"] is None:
        return Cell(MISSING)
    return difference_cell(row["difference"], row["difference_interval"])


def _improvement_cell(row: dict[str, Any] | None) -> Cell:
    if row is None:
        return Cell(MISSING)
    if row["interval"] is None:
        return Cell(f"{row['probability']:.2f}")
    low, high = row["interval"]
    clear = low > 0.5 or high < 0.5
    return Cell(f"{row['probability']:.2f}", span(low, high, ".2f"), bold=clear)


def asked_table(study: dict[str, Any]) -> Table | None:
    """Return the returns that the methods got for each target that they were asked for."""
    by_place = {(cell["method"], cell["task"]): cell["asked"] for cell in study["cells"]}
    asking = {
        n for (n, _), asked in by_place.items() if any(a["target"] is not None for a in asked)
    }
    names = [name for name in main_methods(study) if name in asking]
    rows = []
    for index, task in enumerate(study["tasks"]):
        for target in sorted({t for t in task["targets"] if t is not None}, reverse=True):
            cells = [Cell(task["label"]), Cell(f"{target:g}")]
            for name in names:
                asked = by_place.get((name, index), [])
                got = [item["return_mean"] for item in asked if item["target"] == target]
                cells.append(Cell(format_return(got[0]) if got else MISSING))
            rows.append(cells)
    heads = [Cell("task"), Cell("asked for"), *(method_cell(study, name) for name in names)]
    note = "Mean return, in reward units, of the last checkpoints over seeds and episodes."
    return Table("", heads, rows, [note]) if rows else None
