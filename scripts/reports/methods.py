"""What the methods of a report are called: by their backbone, and by what is unusual about them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minrl.scripts.reports.collect import Run
from minrl.scripts.train_config import PRESETS, TrainConfig, flatten, ignored_settings

BEHAVIOUR_CLONING, BEST_CLONING = "BC", "10 % BC"
MEMORYLESS = ("mlp", BEHAVIOUR_CLONING, BEST_CLONING)
OURS = ("mingru", "minlstm")
ORDER = (
    *OURS,
    *("gilr", "gilr_lstm", "gru", "lstm", "mamba", "transformer"),
    *MEMORYLESS,
)

# Settings that do not make another method: what it learns from and where, and what is only looked
# at.
NOT_THE_METHOD = (
    *("dataset", "on_bad_episode", "environment", "seed"),
    *("preset", "device", "run_dir", "log_every", "final_episodes", "backbone"),
)

# How many runs to each one with the preset's value make another value the report's.
OUTNUMBERED = 4


@dataclass(frozen=True)
class Method:
    """One method of a report.

    Attributes:
        name: Unique in the report.
        family: The backbone, or what the method without its changes is called.
        changes: Settings that differ from the family's usual ones: name, value, usual value.
        library: Whose code it is; None for ours.
    """

    name: str
    family: str
    changes: tuple[tuple[str, Any, Any], ...] = ()
    library: str | None = None


def name_methods(runs: Sequence[Run]) -> list[Method]:
    """Set the method of each run and return all methods, in the order of the report."""
    methods: dict[str, Method] = {}
    families: dict[str, list[Run]] = {}
    budgets: dict[str, set[int]] = {}
    for run in runs:
        if run.library is not None:
            budgets.setdefault(run.agent, set()).add(run.steps)
    for run in runs:
        if run.library is not None:
            is_one = len(budgets[run.agent]) == 1
            run.method = run.agent if is_one else f"{run.agent}, {run.steps:,} steps"
            methods[run.method] = Method(run.method, run.method, library=run.library)
        else:
            families.setdefault(family_of(run.settings), []).append(run)
    report = _values_of([run for members in families.values() for run in members])
    for family, members in families.items():
        for run, changes in _changes(members, report):
            parts = [f"{name}={short(value)}" for name, value, _ in changes]
            run.method = ", ".join([family, *parts])
            methods.setdefault(run.method, Method(run.method, family, tuple(changes)))
    return sorted(methods.values(), key=_place)


def family_of(settings: dict[str, Any]) -> str:
    """Return what a configuration is called without regard to details."""
    backbone = settings["backbone"]
    if backbone != "mlp" or settings["tokens"] != "observation":
        return backbone
    return BEST_CLONING if settings["best_fraction"] == 0.1 else BEHAVIOUR_CLONING


def settings_of(run: Run) -> dict[str, Any]:
    """Return the settings that make a run's method: of those that are looked at."""
    other = ignored_settings(run.settings).union(NOT_THE_METHOD)
    settings = {name: value for name, value in run.settings.items() if name not in other}
    if settings["tokens"] == "observation":
        settings.pop("targets")  # nobody tells it what is asked for
    if settings["match_parameters"] is not None:
        settings.pop("width")  # it was chosen to match
    window = run.settings["burn_in"] + run.settings["context"]
    if settings.get("attention_context") == window:
        settings["attention_context"] = None  # as it was before it was filled in
    return settings


def _values_of(runs: Sequence[Run]) -> dict[tuple[str, Any], Counter]:
    """Return by setting and preset's value how many runs have each, without variants of it."""
    values: dict[tuple[str, Any], Counter] = {}
    for run in runs:
        preset = _preset_of(run.settings)
        for name, value in settings_of(run).items():
            if _varied(run) != name:
                values.setdefault((name, preset[name]), Counter())[value] += 1
    return values


def _changes(
    runs: list[Run], report: dict[tuple[str, Any], Counter]
) -> list[tuple[Run, list[tuple[str, Any, Any]]]]:
    """Return for each run of a family the settings that are unusual on its task.

    Args:
        runs: Of the family.
        report: `_values_of` all runs, of whatever family.
    """
    settings = [settings_of(run) for run in runs]
    presets = {run.datasets: _preset_of(run.settings) for run in runs}
    found = [(run, []) for run in runs]
    for name in dict.fromkeys(name for values in settings for name in values):
        having = [index for index, values in enumerate(settings) if name in values]
        plain = [index for index in having if _varied(runs[index]) != name] or having
        on_tasks: dict[tuple, Counter] = {runs[index].datasets: Counter() for index in having}
        for index in plain:
            on_tasks[runs[index].datasets][settings[index][name]] += 1
        of_presets = {task: presets[task][name] for task in on_tasks}
        in_report = {
            task: report.get((name, value), Counter()) for task, value in of_presets.items()
        }
        usual = _usual(on_tasks, of_presets, in_report)
        for index in having:
            value, baseline = settings[index][name], usual[runs[index].datasets]
            if value != baseline:
                found[index][1].append((name, value, baseline))
    return found


def _usual(
    on_tasks: dict[tuple, Counter], presets: dict[tuple, Any], report: dict[tuple, Counter]
) -> dict:
    """Return the usual value of a setting by task, which a failed run does not change.

    Where runs differ it is the preset's value, if some have that, else the commonest of the whole
    family, as where there is none, or of the task, if it has none with that. The preset's value
    does not count where the report is about another: a run of a user's beside a study that was made
    with fewer steps must not take the name from the study's. A task where all have one value may
    have it for a reason, and keeps it, unless that is the value of a variant elsewhere: then the
    runs with the usual one failed here.

    Args:
        on_tasks: By task, how many runs have each value, without those in which it was varied.
        presets: By task, the preset's value.
        report: By task, how many runs of the report have each value, whatever their family, if the
            preset gives them the same.
    """
    anywhere = sum(on_tasks.values(), Counter())
    commonest = max(anywhere, key=anywhere.get)
    winners = {
        task: presets[task]
        if presets[task] in values
        and report[task][commonest] < OUTNUMBERED * report[task][presets[task]]
        else commonest
        if commonest in values
        else max(values, key=values.get)
        for task, values in on_tasks.items()
        if len(values) > 1
    }
    usual = {}
    for task, values in on_tasks.items():
        value = next(iter(values), commonest)
        beaten_by = [winner for other, winner in winners.items() if value in on_tasks[other]]
        lost = beaten_by and value not in winners.values()
        usual[task] = winners.get(task, beaten_by[0] if lost else value)
    return usual


def _varied(run: Run) -> str | None:
    """Return the setting that ``minrl study`` varied in it: METHOD,NAME=VALUE-sSEED."""
    _, is_variant, setting = run.folder.rpartition("/")[2].partition(",")
    return setting.partition("=")[0].replace("-", "_") if is_variant else None


def _preset_of(settings: dict[str, Any]) -> dict[str, Any]:
    preset = PRESETS.get(settings["preset"], PRESETS["quick"])
    config: TrainConfig = preset(settings["dataset"], settings["backbone"])
    return flatten(config)


def short(value: Any) -> str:
    """Return a setting as it is put into names."""
    if isinstance(value, tuple):
        return " ".join(map(short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _place(method: Method) -> tuple:
    known = ORDER.index(method.family) if method.family in ORDER else math.inf
    return method.library is not None, known, bool(method.changes), method.name
