"""The tables of scores: all at a glance, by task, against rivals, by the return asked for."""

from typing import Any

from minrl.scripts.benchmarks.report import duration
from minrl.scripts.reports.cells import (
    MISSING,
    OUTSIDE,
    Cell,
    Table,
    clock,
    counted,
    heads_of,
    main_methods,
    mark_best,
    method_cell,
    range_of,
    span,
    thousands,
    with_interval,
)

CHECKPOINTS = {
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
    notes = [
        f"Percent over {counted(first['tasks'], 'task')}{_runs_each(first)}, at the first target "
        "of each task, with stratified bootstrap 95 % intervals. IQM: interquartile mean of all "
        "runs. Bold: inside the interval of the highest.",
        *(note for comparison in study["comparisons"] for note in _left_out(study, comparison)),
    ]
    return Table("", heads + heads_of("parameters", "training", "acting"), rows, notes)


def _estimates(comparison: dict[str, Any], checkpoint: str, key: str) -> dict[str, tuple]:
    return {
        name: (values[key], values[f"{key}_interval"])
        for name, values in comparison[checkpoint].items()
    }


def _latency_cell(row: dict[str, Any] | None) -> Cell:
    return Cell(duration(row["median"]), f"p95 {duration(row['p95'])}") if row else Cell(MISSING)


def _training_cell(cells: list[dict[str, Any]]) -> Cell:
    known = [cell for cell in cells if cell["seconds"]]
    if not known:
        return Cell(MISSING)
    each = [cell["seconds"] / cell["steps"] for cell in known]
    mean = sum(cell["seconds"] for cell in known) / len(known)
    return Cell(clock(mean), f"{duration(sum(each) / len(each))} a step")


def _runs_each(comparison: dict[str, Any]) -> str:
    runs = sorted({values["runs"] for values in comparison["last"].values()})
    return f", {range_of(runs, str)} runs a method" if runs else ""


def _left_out(study: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """Say which tasks and methods a comparison is not about."""
    notes = []
    of = f"The {counted(comparison['tasks'], 'task')} {comparison['title']}"
    if comparison["left_out_tasks"]:
        labels = [study["tasks"][task]["label"] for task in comparison["left_out_tasks"]]
        notes.append(f"{of}: without {', '.join(labels)}, of which some method has no run.")
    if comparison["left_out_methods"]:
        names = ", ".join(comparison["left_out_methods"])
        notes.append(f"{of}: without {names}, which have less than half of the tasks.")
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
    return Table(CHECKPOINTS[checkpoint], heads, rows + summing, notes, len(summing))


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
    digits = 1 if task["unit"] == "score" else 0
    below = "" if scores["std"] is None else f"± {scores['std']:.{digits}f}"
    if len(scores["seeds"]) != usual:
        below = f"{below}, {counted(scores['seeds'], 'seed')}".removeprefix(", ")
    return Cell(f"{scores['mean']:.{digits}f}", below, **marks)


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
    return (
        f"The {checkpoint} checkpoint at the first target, {range_of(episodes, str)} episodes a "
        "run, in percent of D4RL's reference returns where there are any. "
        f"{spread}. Bold: inside the 95 % interval (Student's t over the seeds) of the row's "
        "highest; nothing where that has one seed. Means over tasks are of all runs, with "
        "stratified bootstrap 95 % intervals. "
        f"{MISSING}: no such run."
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
    by_pair: dict[tuple[str, str], dict[str, Any]] = {}
    for comparison in study["comparisons"]:
        for row in comparison["improvement"]:
            of = {"tasks": counted(comparison["tasks"], "task")}
            by_pair.setdefault((row["method"], row["rival"]), row | of)
    rivals = {rival: by_pair[own, rival]["tasks"] for own, rival in by_pair}
    rows = []
    for own in dict.fromkeys(own for own, _ in by_pair):
        cells = [_improvement_cell(by_pair.get((own, rival))) for rival in rivals]
        rows.append([method_cell(study, own), *cells])
    note = (
        "The chance that a run of the method on the left scores more than one of the rival above "
        "it on the same task: last checkpoints, averaged over tasks, with 95 % intervals; 0.5 is a "
        "draw. Bold: the whole interval is on one side of that."
    )
    heads = [Cell(method_cell(study, rival).text, tasks) for rival, tasks in rivals.items()]
    title = "Probability of improvement"
    return Table(title, [Cell("method"), *heads], rows, [note]) if rows else None


def _improvement_cell(row: dict[str, Any] | None) -> Cell:
    if row is None:
        return Cell(MISSING)
    if row["interval"] is None:
        return Cell(f"{row['probability']:.2f}", "no interval")
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
                cells.append(Cell(f"{got[0]:.0f}" if got else MISSING))
            rows.append(cells)
    heads = [Cell("task"), Cell("asked for"), *(method_cell(study, name) for name in names)]
    note = "Mean return, in reward units, of the last checkpoints over seeds and episodes."
    return Table("", heads, rows, [note]) if rows else None
