"""``minrl report``: what a set of runs shows, as a page, as Markdown, and as figures in JSON."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from minrl import __version__
from minrl.errors import ConfigError
from minrl.scripts.machine import device_name
from minrl.scripts.reports.collect import find_runs
from minrl.scripts.reports.figures import draw_figures
from minrl.scripts.reports.latency import measure_latency
from minrl.scripts.reports.markdown import make_markdown, standalone
from minrl.scripts.reports.methods import name_methods
from minrl.scripts.reports.page import make_page
from minrl.scripts.reports.summary import FORMAT, summarise

PARTS = {
    *("report", "methods", "tasks", "cells", "comparisons", "ablations", "protocol", "runs"),
    *("unfinished", "left_out", "latency", "machine", "made", "minrl"),
}
"""What a report.json has at its top."""


def report(runs: tuple[Path, ...], /, output: Path = Path("report"), latency: bool = True) -> None:
    """Report on finished runs: tables, statistics over tasks and seeds, figures.

    Writes report.html, which needs nothing else, report.md with its figures beside it, and
    report.json, from which both can be made again.

    Args:
        runs: Folders of runs, or with such folders below them; or the report.json of a report, to
            make its pages again.
        output: Folder to write to.
        latency: Measure how long the agents take to act, which loads their checkpoints.
    """
    if not runs:
        raise ConfigError("name at least one folder of runs")
    if runs[0].is_file() and len(runs) > 1:
        raise ConfigError(f"{runs[0]} is a report of its own: nothing can be added to it")
    study = read_report(runs[0]) if runs[0].is_file() else make_report(runs, latency=latency)
    write_report(study, output)
    for name in ("report.html", "report.md", "report.json"):
        print(f"written: {output / name}")
    for item in study["left_out"]:
        print(f"left out: {item['folder']}: {item['reason']}")


def make_report(folders: tuple[Path, ...], *, latency: bool = True) -> dict[str, Any]:
    """Read runs and return all that a report says, as plain JSON values.

    Raises:
        ConfigError: If a folder does not exist, or no finished run is found.
    """
    runs, left_out = find_runs(folders)
    methods = name_methods(runs)
    study = summarise(runs, methods, left_out)
    study["latency"] = measure_latency(runs, methods) if latency else None
    study["machine"] = device_name(torch.device("cpu"))
    study["made"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    study["minrl"] = __version__
    return study


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


def write_report(study: dict[str, Any], output: Path) -> None:
    """Write the page, the Markdown file with its figures, and report.json.

    Raises:
        ConfigError: If there is no folder to write to, and none can be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output} is no folder to write to: {error.strerror}") from error
    figures = draw_figures(study)
    files = {name: f"report-{name}.svg" for name in figures}
    contents = {files[name]: standalone(svg) for name, svg in figures.items()}
    contents["report.html"] = make_page(study, figures)
    contents["report.md"] = make_markdown(study, figures, files)
    contents["report.json"] = json.dumps(study, separators=(",", ":")) + "\n"
    for name, content in contents.items():
        (output / name).write_text(content, encoding="utf-8")
