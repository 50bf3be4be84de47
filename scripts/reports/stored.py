"""Runs inside a report.json: so much of each that another report can put it beside new runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from minrl.agents.field_types import is_of
from minrl.errors import ConfigError
from minrl.scripts.reports.collect import Run, check_evaluation
from minrl.scripts.train_config import TrainConfig, flatten

FORMAT = 6
PARTS = {
    *("report", "methods", "tasks", "cells", "comparisons", "ablations", "protocol", "settings"),
    *("runs", "unfinished", "left_out", "latency", "machine", "made", "minrl"),
}
"""What a report.json has at its top."""

IN_THE_TASK = ("datasets", "environment")
OF_THE_MACHINE = ("path", "run_dir")  # a field and a setting


def read_report(path: Path) -> dict[str, Any]:
    """Read a report.json.

    Raises:
        ConfigError: If it is none, or of another version's format.
    """
    try:
        study = json.loads(path.read_text())
        known = study["report"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} is not the report.json of a report: {error}") from error
    if known != FORMAT:
        raise ConfigError(f"{path} has format {known}; this version of minrl reads {FORMAT}")
    if missing := PARTS - study.keys():
        raise ConfigError(f"{path} is not the report.json of a report: it has no {min(missing)}")
    return study


def shared_settings(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the settings in which no two runs of ours differ: these are stored once."""
    ours = [run.settings for run in runs if run.library is None]
    return {
        name: value
        for name, value in (ours[0] if ours else {}).items()
        if name not in OF_THE_MACHINE and all(s.get(name, ...) == value for s in ours)
    }


def describe_run(run: Run, task: int, shared: dict[str, Any]) -> dict[str, Any]:
    """Return a run without what its task, or all runs of ours, have anyway.

    Args:
        run: The run.
        task: Number of its task in the report.
        shared: From `shared_settings`.
    """
    left_out = (*OF_THE_MACHINE, *IN_THE_TASK)
    fields = {name: value for name, value in vars(run).items() if name not in left_out}
    settings = {
        name: value
        for name, value in run.settings.items()
        if name not in shared and name not in OF_THE_MACHINE
    }
    return fields | {"task": task, "settings": settings}


def stored_runs(path: Path, study: dict[str, Any]) -> tuple[list[Run], list[dict[str, str]]]:
    """Return the runs of a report as they were read for it, but for their folders.

    Args:
        path: Of the report.json, to be named in messages.
        study: What `read_report` returned.

    Returns:
        The runs, and for each that was not finished its "folder" and the "reason".

    Raises:
        ConfigError: If something in it is not as it was written.
    """
    try:
        runs = [_restore(stored, study) for stored in study["runs"]]
        unfinished = [
            {name: str(item[name]) for name in ("folder", "reason")}
            for item in study["left_out"][: study["unfinished"]]
        ]
    except Exception as error:  # of many kinds: anything may be in the files of a stranger
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the runs in {path} cannot be read: {problem}") from error
    return runs, unfinished


def _restore(stored: dict[str, Any], study: dict[str, Any]) -> Run:
    for evaluation in stored["evaluations"]:
        check_evaluation(evaluation)
    task = study["tasks"][stored["task"]]
    types = get_type_hints(Run)
    fields = {name: _as_tuple(value) for name, value in stored.items() if name in types}
    fields |= {
        "path": None,
        "datasets": tuple(task["id"].split("+")),
        "environment": task["environment"],
        "settings": {},
        "evaluations": stored["evaluations"],
    }
    if stored["library"] is None:
        settings = study["settings"] | stored["settings"] | {"run_dir": None}
        if missing := flatten(TrainConfig()).keys() - settings.keys():
            raise ValueError(f"the setting {min(missing)} of {stored['folder']} is missing")
        fields["settings"] = {name: _as_tuple(value) for name, value in settings.items()}
    for name, declared in types.items():
        if get_origin(declared) not in (list, dict) and not is_of(fields[name], declared):
            raise ValueError(f"{name} of {stored['folder']} is {fields[name]!r:.50}")
    return Run(**fields)


def _as_tuple(value: Any) -> Any:  # which JSON writes as a list
    return tuple(value) if isinstance(value, list) else value
