"""What a report says and in which order, for the page and the Markdown file alike."""

from collections.abc import Sequence
from typing import Any

from minrl.scripts.reports.cells import (
    Facts,
    Picture,
    Section,
    Table,
    counted,
    has_single_seed,
    machine,
    main_methods,
)
from minrl.scripts.reports.comparison import CHECKPOINTS
from minrl.scripts.reports.other_tables import (
    ablation_table,
    latency_table,
    left_out_table,
    published_table,
)
from minrl.scripts.reports.protocol import SAYS_NOTHING
from minrl.scripts.reports.published import PUBLISHED
from minrl.scripts.reports.score_tables import (
    asked_table,
    difference_table,
    improvement_table,
    overview,
    score_table,
)

# By figure: its title, and what it shows.
PICTURES = {
    "aggregates": (
        "",
        "Interquartile means (strokes), with stratified bootstrap 95 % intervals (bars) where "
        "there are any.",
    ),
    "costs": (
        "",
        "What the scores cost: interquartile mean of the last checkpoints against the parameters, "
        "and against the median time of an action as trained (minGRU, minLSTM and GILR by their "
        "compiled step). Up and left is better.",
    ),
    "profiles": (
        "",
        "Left: share of all runs above each score, the higher the better; bands: 95 % intervals of "
        "ours. Right: the chance that a run of ours beats one of the rival on the same task, with "
        "95 % intervals.",
    ),
    "curves-steps": (
        "Over training steps",
        "Evaluations while training at the first target, on the episodes that choose the best "
        "checkpoint: mean over the seeds, and for our methods the range, against training steps.",
    ),
    "curves-seconds": (
        "Over training time",
        "The same against the time spent on training alone: steps times the median step. "
        "Comparable as far as the runs were trained on one machine in one state.",
    ),
    "asked-got": (
        "",
        "Mean return of the last checkpoints for each return asked for; dotted: as asked.",
    ),
}


def title_of(study: dict[str, Any]) -> str:
    """Return the report's title."""
    return "minrl study" if len(study["runs"]) > 1 else "minrl run"


def lead_of(study: dict[str, Any]) -> str:
    """Say in a sentence what the report is about."""
    parts = (
        (study["tasks"], "task"),
        (main_methods(study), "method"),
        (study["protocol"]["seeds"], "seed"),
        (study["runs"], "run"),
    )
    lead = ", ".join(counted(items, what) for items, what in parts)
    if not study["unfinished"]:
        return lead
    finished = len(study["runs"]) + len(study["left_out"]) - study["unfinished"]
    found = finished + study["unfinished"]
    return f"{lead}. {finished} of {counted(range(found), 'run')} are finished"


def sections_of(study: dict[str, Any], figures: Sequence[str]) -> list[Section]:
    """Return all sections that there is something to say in."""

    def pictures(*names: str) -> list[Picture]:
        found = [(name, *PICTURES[name]) for name in names if name in figures]
        return [Picture(name, caption, title) for name, title, caption in found]

    glance = Section("glance", "At a glance", _findings(study))
    glance.parts = [*_some(overview(study)), *pictures("aggregates", "costs")]
    scores = Section("scores", "Scores by task")
    scores.parts = [score_table(study, checkpoint) for checkpoint in CHECKPOINTS]
    statistics = Section("statistics", "Comparing methods", [_statistics_text(study)])
    if not has_single_seed(study):
        tables = [*_some(difference_table(study)), *_some(improvement_table(study))]
        statistics.parts = [*pictures("profiles"), *tables]
    learning = Section("curves", "Learning curves")
    learning.parts = pictures("curves-steps", "curves-seconds")
    asked = Section("asked", "Return asked for, return got")
    asked.parts = [*pictures("asked-got"), *_some(asked_table(study))]
    cost = Section("latency", "Acting latency")
    cost.parts = _some(latency_table(study))
    choices = Section("ablations", "What each choice is worth")
    choices.parts = _some(ablation_table(study))
    left_out = Section("left-out", "Runs that are not in this report")
    left_out.parts = _some(left_out_table(study))
    sections = [glance, _protocol(study), scores, statistics, learning, asked, cost, choices]
    sections = [section for section in [*sections, left_out] if section.parts]
    return [*sections, _published()]


def _some(table: Table | None) -> list[Table]:
    return [] if table is None else [table]


def _findings(study: dict[str, Any]) -> list[str]:
    """Say in a sentence who is ahead, and who may be as good."""
    if has_single_seed(study):
        return [
            "Each method was trained with one seed per task: what lies between two methods may be "
            "chance, and there is no interval to tell."
        ]
    if not study["comparisons"] or not study["comparisons"][0]["last"]:
        return []
    scores = study["comparisons"][0]["last"]
    best = max(scores, key=lambda name: scores[name]["iqm"])
    if len(scores) == 1 or scores[best]["iqm_interval"] is None:
        return []
    low, high = scores[best]["iqm_interval"]
    highest = {
        name: (values["iqm_interval"] or (0, values["iqm"]))[1] for name, values in scores.items()
    }
    equals = [name for name in scores if name != best and highest[name] >= low]
    others = f"The intervals of {', '.join(equals)} reach" if equals else "No other reaches"
    return [
        f"Highest interquartile mean of last checkpoints: {best}, {scores[best]['iqm']:.1f} % "
        f"(95 % interval {low:.1f} to {high:.1f}; with few runs it is too narrow). {others} into "
        "this one."
    ]


def _protocol(study: dict[str, Any]) -> Section:
    protocol = study["protocol"]
    rows = [
        ("data", _data(study)),
        ("targets", _targets(study)),
        ("evaluation", _evaluation(protocol)),
    ]
    if protocol["unexpected_seeds"]:
        named = ", ".join(protocol["unexpected_seeds"])
        rows.append(("other episodes", f"Evaluated on other start states than that: {named}."))
    versions = "; ".join(f"{k} {', '.join(v)}" for k, v in protocol["versions"].items())
    rows.append(("versions", versions or "not recorded: no checkpoint is in the run folders"))
    machines = "; ".join(map(machine, protocol["machines"]))
    rows.append(("trained on", machines or "not recorded"))
    rows.append(("report made on", machine(study["machine"])))
    values = [("seeds", ", ".join(map(str, protocol["seeds"])))]
    values += [(title, _values(of)) for title, of in protocol["settings"].items()]
    text = "Printed from the configurations that the runs were made with." + _scores(study)
    section = Section("protocol", "Protocol", [text], [Facts(rows, values)])
    if protocol["chosen_on"]:
        chosen = "; ".join(
            f"{', '.join(names)}: chosen on {where}"
            for where, names in protocol["chosen_on"].items()
        )
        section.text.append(
            f"What all methods have from the preset was not chosen for the rivals ({chosen}). "
            "Whether one of them wants another learning rate is shown by its ablations, where "
            "there are any."
        )
    return section


def _scores(study: dict[str, Any]) -> str:
    """Say what returns are 0 and 100 percent, and what such scores may be compared with."""
    scored = [task for task in study["tasks"] if task["unit"] == "score"]
    if not scored:
        return ""
    by_scale: dict[str, list[str]] = {}
    for task in scored:
        by_scale.setdefault(task["scale"], []).append(task["label"])
    of_d4rl = "D4RL's reference returns: 0 is a random policy, 100 an expert"
    if by_scale.keys() == {"D4RL's"}:
        text = f" Scores are percent of {of_d4rl}."
    else:
        whose = {
            "D4RL's": of_d4rl,
            "its own": "the dataset's own references",
            "unknown": "references that are not recorded, or of several",
        }
        listed = (f"on {', '.join(by_scale[key])} of {whose[key]}" for key in by_scale)
        text = f" Scores are percent, {'; '.join(listed)}."
    notes = [task["score_note"] or "" for task in scored if task["scale"] == "D4RL's"]
    if not all(note.startswith("D4RL-v2") for note in notes):
        text += (
            " On embedded or Minari data in v5 environments they are a common yardstick, not "
            "D4RL-v2 scores, and may not be compared with published D4RL tables."
        )
    return text


def _data(study: dict[str, Any]) -> str:
    by_note: dict[str | None, list[str]] = {}
    for task in study["tasks"]:
        by_note.setdefault(task["score_note"], []).append(task["id"])
    listed = (
        f"{', '.join(ids)}: {note or 'origin not recorded, no checkpoint is in the run folders'}"
        for note, ids in by_note.items()
    )
    other = [task["label"] for task in study["tasks"] if not task["same_data"]]
    warning = (
        f". Not all runs of {', '.join(other)} were trained on the same files" if other else ""
    )
    return "; ".join(listed) + warning


def _targets(study: dict[str, Any]) -> str:
    tasks: dict[str, list[str]] = {}
    for task in study["tasks"]:
        targets = ", ".join(f"{target:g}" for target in task["targets"] if target is not None)
        tasks.setdefault(targets, []).append(task["label"])
    listed = "; ".join(f"{targets} ({', '.join(labels)})" for targets, labels in tasks.items())
    return f"{listed}. Fixed before training; scores are at the first."


def _evaluation(protocol: dict[str, Any]) -> str:
    return (
        f"{' or '.join(map(str, protocol['episodes']))} episodes for each target at the end, their "
        f"start states drawn with seed {protocol['final_seed']} + the run's seed. The best "
        "checkpoint is the one with the highest mean return at the first target while training, on "
        f"other episodes (seed {protocol['selection_seed']} + the run's seed): no checkpoint "
        "is chosen on the episodes that are reported."
    )


def _values(values: dict[str, list[str]]) -> str:
    """Return what a setting was: the most common value, and who has another."""
    usual = max(values, key=lambda value: len(values[value]))
    named = {value: f"{', '.join(who)} {value}" for value, who in values.items()} | {usual: usual}
    ordered = sorted(named, key=lambda value: value != usual)
    return "; ".join(named[value] for value in ordered if value not in SAYS_NOTHING)


def _statistics_text(study: dict[str, Any]) -> str:
    if not study["comparisons"]:
        return "No task has a score of every method."
    comparison = study["comparisons"][0]
    labels = ", ".join(study["tasks"][task]["label"] for task in comparison["tasks"])
    return (
        f"Over the tasks that all the methods compared have: {labels}. Statistics after Agarwal et "
        "al. (arXiv 2108.13264): intervals are percentiles of a bootstrap that draws runs within "
        "each task and does not draw tasks."
    )


def _published() -> Section:
    text = [
        "Copied from other people's papers and repositories, for orientation. D4RL gym -v2 data "
        "and their own rules for choosing checkpoints and targets: these numbers are not "
        "comparable with those above, nor always with one another. The table of “Were RNNs All We "
        "Needed?” (arXiv 2410.01201) is not here, since it could not be checked against the paper."
    ]
    tables = [published_table(table) for table in PUBLISHED]
    return Section("published", "Published elsewhere, not measured here", text, tables, True)
