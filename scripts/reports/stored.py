"""Runs inside a report.json: so much of each that another report can put it beside new runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from minrl.agents.checkpoint import is_finite_number
from minrl.agents.field_types import is_of
from minrl.agents.model_config import ModelConfig
from minrl.agents.training import OptimizationConfig
from minrl.errors import ConfigError
from minrl.scripts.reports.collect import Run, check_evaluation
from minrl.scripts.reports.methods import Method
from minrl.scripts.train_config import TrainConfig

FORMAT = 6
PARTS = {
    *("report", "methods", "tasks", "cells", "comparisons", "ablations", "protocol", "settings"),
    *("runs", "unfinished", "left_out", "latency", "machine", "made", "minrl"),
}
"""What a report.json has at its top."""

# Types of what is in a report, by name: of a run, of its settings, of a row of its latency.
FIELDS = get_type_hints(Run)
SETTINGS = {
    name: declared
    for part in (TrainConfig, ModelConfig, OptimizationConfig)
    for name, declared in get_type_hints(part).items()
    if name not in ("model", "optimization")  # whose settings are here too, in one level
}
LATENCY = {"method": str, "acting": str, "as_trained": bool, "compiled": bool}
TIMES = {"median": float, "p95": float, "rounds": int}

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
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
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


def stored_latency(
    path: Path, study: dict[str, Any], methods: Sequence[Method]
) -> dict[str, Any] | None:
    """Return the acting latency of a report, see `measure_latency`; None if it has none.

    Args:
        path: Of the report.json, to be named in messages.
        study: What `read_report` returned.
        methods: Of its runs.

    Raises:
        ConfigError: If it is not as it was written.
    """
    if (latency := study["latency"]) is None:
        return None
    names = {method.name for method in methods}
    try:
        _check_types(latency, {"device": str, "threads": int, "rows": list[dict[str, Any]]})
        for row in latency["rows"]:
            _check_types(row, LATENCY | ({"missing": str} if "missing" in row else TIMES))
            if row["method"] not in names:
                raise ValueError(f"there is no method {row['method']!r:.50}")
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"the acting latency in {path} cannot be read: {error}") from error
    return latency


def _restore(stored: dict[str, Any], study: dict[str, Any]) -> Run:
    task = study["tasks"][stored["task"]]
    fields = {name: _as_tuple(value) for name, value in stored.items() if name in FIELDS}
    fields |= {
        "path": None,
        "datasets": tuple(task["id"].split("+")),
        "environment": task["environment"],
        "settings": {},
        "evaluations": stored["evaluations"],
    }
    if stored["library"] is None:
        fields["settings"] = _settings_of(stored, study)
    _check_types(fields, FIELDS)
    if not fields["targets"]:
        raise ValueError("targets are none")
    for evaluation in fields["evaluations"]:
        check_evaluation(evaluation)
    for curve in fields["curve"].values():
        _check_curve(curve)
    return Run(**fields)


def _settings_of(stored: dict[str, Any], study: dict[str, Any]) -> dict[str, Any]:
    """Return all settings of a run of ours, as `flatten` does."""
    settings = study["settings"] | stored["settings"] | {"run_dir": None}
    settings = {name: _as_tuple(value) for name, value in settings.items()}
    _check_types(settings, SETTINGS)
    return settings


def _check_types(values: dict[str, Any], types: dict[str, Any]) -> None:
    for name, declared in types.items():
        if name not in values:
            raise ValueError(f"{name} is missing")
        if not is_of(values[name], declared):
            raise ValueError(f"{name} is {values[name]!r:.50}")


def _check_curve(curve: dict[str, list]) -> None:
    steps, returns, score = (curve[name] for name in ("steps", "return", "score"))
    if not all(map(is_finite_number, steps + returns)):
        raise ValueError("steps and returns of a curve are not all numbers")
    if not all(value is None or is_finite_number(value) for value in score):
        raise ValueError("scores of a curve are not all numbers")
    if not len(steps) == len(returns) == len(score):
        raise ValueError("steps, returns and scores of a curve are not as many")


def _as_tuple(value: Any) -> Any:  # which JSON writes as a list
    return tuple(value) if isinstance(value, list) else value
