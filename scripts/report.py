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
from minrl.scripts.reports.stored import read_report, stored_latency, stored_runs
from minrl.scripts.reports.summary import summarise


def report(runs: tuple[Path, ...], /, output: Path = Path("report"), latency: bool = True) -> None:
    """Report on finished runs: tables, statistics over tasks and seeds, figures.

    Writes report.html, which needs nothing else, report.md with its figures beside it, and
    report.json, from which both can be made again.

    Args:
        runs: Folders of runs, or with such folders below them; and the report.json of other
            reports, whose runs count as if their folders were here, but that no time of an action
            can be measured without them. One alone makes its pages again.
        output: Folder to write to.
        latency: Measure how long the agents take to act, which loads their checkpoints.
    """
    if not runs:
        raise ConfigError("name at least one folder of runs")
    study = make_report(runs, latency=latency)
    write_report(study, output)
    for name in ("report.html", "report.md", "report.json"):
        print(f"written: {output / name}")
    for item in study["left_out"]:
        print(f"left out: {item['folder']}: {item['reason']}")


def make_report(paths: tuple[Path, ...], *, latency: bool = True) -> dict[str, Any]:
    """Read runs and return all that a report says, as plain JSON values.

    Args:
        paths: Folders, and the report.json of other reports.
        latency: Measure it, for the methods of which there is a folder. A report.json alone keeps
            its own.

    Raises:
        ConfigError: If a path does not exist or is neither, or no finished run is found.
    """
    folders = [path for path in paths if not path.is_file()]
    runs, left_out = find_runs(folders) if folders else ([], [])
    were_unfinished = {}
    reports = [(path, read_report(path)) for path in paths if path.is_file()]
    for path, made in reports:
        stored, unfinished = stored_runs(path, made)
        runs += stored
        were_unfinished |= {item["folder"]: item for item in unfinished}
    known = {run.folder for run in runs} | {item["folder"] for item in left_out}
    left_out += [item for folder, item in were_unfinished.items() if folder not in known]
    methods = name_methods(runs)
    study = summarise(runs, methods, left_out)
    study["latency"] = None
    if folders and latency:
        study["latency"] = measure_latency(runs, methods)
    elif not folders and len(reports) == 1:
        study["latency"] = stored_latency(*reports[0], methods)
    study["machine"] = device_name(torch.device("cpu"))
    study["made"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    study["minrl"] = __version__
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
