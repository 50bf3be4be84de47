"""The tables that are not of scores by task: latency, ablations, other people's numbers."""

from typing import Any

from minrl.scripts.reports.cells import (
    MISSING,
    NOT_WIDENED,
    Cell,
    Table,
    difference_cell,
    duration,
    heads_of,
    machine,
    method_cell,
    number,
    ratio,
)
from minrl.scripts.reports.published import TASKS, PublishedTable


def latency_table(study: dict[str, Any]) -> Table | None:
    """Return the latency of all methods in all ways of acting."""
    if not (study["latency"] and study["latency"]["rows"]):
        return None
    rows = []
    for row in study["latency"]["rows"]:
        name = method_cell(study, row["method"])
        how = [name for name in ("as_trained", "compiled") if row[name]]
        acting = Cell(row["acting"], ", ".join(how).replace("_", " "))
        if "missing" in row:
            rows.append([name, acting, Cell(MISSING, row["missing"]), *heads_of(*3 * [MISSING])])
            continue
        times = [Cell(duration(row[key])) for key in ("median", "p95")]
        counts = [Cell(f"{1 / row['median']:,.0f}"), Cell(str(row["rounds"]))]
        rows.append([name, acting, *times, *counts])
    note = (
        "DecisionAgent.act for one environment, from observation to action, the agents in turns, "
        f"the window full; on {machine(study['latency']['device'])}, "
        f"{study['latency']['threads']} thread(s). Recurrent: a state is carried along; windowed: "
        "as if the last steps were gone through again at every step; cached: keys and values are "
        "kept. What is not compiled runs PyTorch operation by operation, as the eager rows do: "
        "what architectures cost is compared by these."
    )
    heads = ("method", "way of acting", "median", "p95", "actions per second", "calls timed")
    return Table("", heads_of(*heads), rows, [note])


def ablation_table(study: dict[str, Any]) -> Table | None:
    """Return what each choice is worth."""
    rows = []
    for row in study["ablations"]:
        where = [study["tasks"][task]["label"] for task in row["tasks"]]
        where = ", ".join(where) if len(where) < 3 else f"{len(where)} tasks"
        rows.append(
            [
                method_cell(study, row["method"]),
                Cell(row["change"], f"instead of {row['usual']}"),
                Cell(number(row["score"])),
                Cell(number(row["usual_score"])),
                _difference_cell(row),
                Cell(str(row["pairs"]), where),
                Cell(ratio(row.get("step_seconds_ratio"))),
                Cell(ratio(row.get("parameters_ratio"))),
            ]
        )
    heads = heads_of(
        *("method", "choice", "score with it", "baseline", "difference", "pairs"),
        *("training time", "parameters"),
    )
    note = (
        "Last checkpoints at the first target, in percent, over the runs that have the same task "
        "and seed in both; with the 95 % interval of the mean over tasks of these differences "
        "(Student's t, Welch-Satterthwaite), if each task has two pairs. Bold: it leaves out zero. "
        f"{NOT_WIDENED} "
        "Training time (median step) and parameters as multiples of the baseline's."
    )
    return Table("", heads, rows, [note]) if rows else None


def _difference_cell(row: dict[str, Any]) -> Cell:
    if row["difference"] is None:
        return Cell(MISSING, "no run to pair with")
    return difference_cell(row["difference"], row["interval"])


def published_table(published: PublishedTable) -> Table:
    """Return a table of what others published."""
    rows = [
        [Cell(name), *(Cell(scores[index]) for scores in published.methods.values())]
        for index, name in enumerate((*TASKS, "average"))
    ]
    heads = heads_of("task", *published.methods)
    notes = [f"Source: {published.source}", f"Protocol: {published.protocol}"]
    return Table(published.title, heads, rows, notes, last_rows=1)


def left_out_table(study: dict[str, Any]) -> Table | None:
    """Return the folders that are not in the report, and why."""
    rows = [[Cell(item["folder"]), Cell(item["reason"])] for item in study["left_out"]]
    return Table("", heads_of("folder", "reason"), rows) if rows else None
