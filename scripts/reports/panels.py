"""The figures with a panel for each task: learning curves, and return asked against return got."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minrl.scripts.reports.drawing import INK, subplots, to_svg
from minrl.scripts.reports.methods import OURS
from minrl.scripts.reports.palette import Style

COLUMNS = 3


def draw_curves(study: dict[str, Any], styles: dict[str, Style], against: str) -> str | None:
    """Draw the evaluations while training of each task, mean and range over the seeds.

    Args:
        study: The report's figures.
        styles: By method.
        against: "steps", or "seconds" of training.
    """
    panels = []
    for index, task in enumerate(study["tasks"]):
        lines = {}
        for name in styles:
            runs = [r for r in study["runs"] if r["method"] == name and r["task"] == index]
            line = mean_curve(runs, task["unit"], against)
            if line is not None:
                lines[name] = line
        panels.append((task, lines))
    if not any(lines for _, lines in panels):
        return None
    unit, divisor = ("training steps", 1.0)
    if against == "seconds":
        longest = max(line[0].max() for _, lines in panels for line in lines.values())
        unit, divisor = ("minutes of training", 60.0) if longest > 300 else ("seconds", 1.0)
        unit = "seconds of training" if divisor == 1.0 else unit

    def draw(axis, task: dict[str, Any], lines: dict[str, Any]) -> None:
        for name, (x, mean, low, high) in lines.items():
            _draw_line(axis, x / divisor, mean, styles[name], name, markersize=3.5)
            if name in OURS:  # bands of all would hide one another
                colour = styles[name].colour
                axis.fill_between(x / divisor, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xlabel(unit)
        axis.set_ylabel("score, %" if task["unit"] == "score" else "return")
        axis.set_xlim(left=0)
        if against == "steps":
            axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")

    return _draw_panels(f"curves-{against}", panels, draw)


def _draw_line(axis, x, y, style: Style, name: str, *, markersize: float) -> None:
    axis.plot(
        x,
        y,
        color=style.colour,
        linestyle=style.line,
        linewidth=style.width,
        marker=style.marker,
        markersize=markersize,
        label=name,
    )


def mean_curve(runs: list[dict[str, Any]], unit: str, against: str) -> tuple | None:
    """Return x, mean, least and largest over the runs, at the steps that all were evaluated at."""
    curves = []
    for run in runs:
        target = run["targets"][0]
        values = run["curve"].get("" if target is None else f"{target:g}")
        per_step = 1.0 if against == "steps" else run["step_seconds"]
        if values and per_step:
            y = values["score" if unit == "score" else "return"]
            curves.append((dict(zip(values["steps"], y, strict=True)), per_step))
    common = sorted(set.intersection(*(set(values) for values, _ in curves))) if curves else []
    if not common:
        return None
    y = np.array([[values[step] for step in common] for values, _ in curves], float)
    x = np.array(common) * np.mean([per_step for _, per_step in curves])
    return x, y.mean(0), y.min(0), y.max(0)


def draw_asked(study: dict[str, Any], styles: dict[str, Style]) -> str | None:
    """Draw the return got against the return asked for, of each task."""
    panels = []
    for index, task in enumerate(study["tasks"]):
        lines = {}
        for cell in study["cells"]:
            asked = [item for item in cell["asked"] if item["target"] is not None]
            if cell["task"] == index and cell["method"] in styles and asked:
                points = sorted((item["target"], item["return_mean"]) for item in asked)
                lines[cell["method"]] = np.array(points).T
        panels.append((task, lines))
    if not any(lines for _, lines in panels):
        return None

    def draw(axis, task: dict[str, Any], lines: dict[str, Any]) -> None:
        for name, (asked, got) in lines.items():
            _draw_line(axis, asked, got, styles[name], name, markersize=4.5)
        every = [target for asked, _ in lines.values() for target in asked]
        ends = [min(every), max(every)]
        axis.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":", label="as asked")
        axis.set_xlabel("return asked for")
        axis.set_ylabel("return got")
        _, full = task["references"] or (None, None)
        if full is not None and full < 1.3 * ends[1]:
            axis.axhline(full, color=INK, linewidth=0.6, alpha=0.5, label="100 %")

    return _draw_panels("asked-got", panels, draw)


def _draw_panels(name: str, panels: Sequence[tuple], draw: Callable) -> str:
    """Draw a panel for each task, and one legend for all."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = subplots(len(panels), columns, 2.25 * rows + 0.5)
    handles: dict[str, Any] = {}
    for axis, (task, lines) in zip(axes, panels, strict=True):
        axis.set_title(task["label"], loc="left")
        if not lines:
            axis.text(0.5, 0.5, "no evaluations", ha="center", transform=axis.transAxes, alpha=0.6)
            continue
        draw(axis, task, lines)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper left",
        ncols=-(-len(handles) // (1 if len(handles) < 9 else 2)),
        frameon=False,
        handlelength=2.6,
        columnspacing=1.4,
    )
    return to_svg(figure, name)
