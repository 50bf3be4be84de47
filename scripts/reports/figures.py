"""The figures of a report as SVG, which follows the colour of the text around it."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minrl.envs.scores import normalized_score, reference_scores
from minrl.errors import EnvError
from minrl.scripts.reports.cells import counted
from minrl.scripts.reports.palette import Style, styles_of

INK = "#010203"  # becomes the colour of the text
WIDTH = 10.6  # inches at 72 units an inch, as wide as the page
COLUMNS = 3
RC = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "font.size": 9,
    "axes.titlesize": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titleweight": "bold",
}


def draw_figures(study: dict[str, Any]) -> dict[str, str]:
    """Return all figures there is something to draw for, as SVG by name."""
    import matplotlib as mpl

    styles = styles_of(study["methods"])
    figures: dict[str, str | None] = {}
    with mpl.rc_context(RC):
        if study["comparisons"]:
            figures["aggregates"] = draw_aggregates(study["comparisons"], styles)
            figures["profiles"] = draw_profiles(study["comparisons"][0], styles)
        for axis in ("steps", "seconds"):
            figures[f"curves-{axis}"] = draw_curves(study, styles, axis)
        figures["asked-got"] = draw_asked(study, styles)
    return {name: svg for name, svg in figures.items() if svg is not None}


def draw_aggregates(comparisons: list[dict[str, Any]], styles: dict[str, Style]) -> str:
    """Draw the interquartile means, last and best, as strokes in their intervals."""
    panels = [(comparisons[0], "last"), (comparisons[0], "best")]
    panels += [(comparison, "last") for comparison in comparisons[1:]]
    names = list(dict.fromkeys(name for of, _ in panels for name in of["methods"]))
    figure, axes = _subplots(len(panels), len(panels), 0.55 + 0.27 * len(names), share=True)
    for axis, (comparison, checkpoint) in zip(axes, panels, strict=True):
        for place, name in enumerate(names):
            values = comparison[checkpoint].get(name)
            if values is not None:
                _draw_estimate(axis, values["iqm"], values["iqm_interval"], place, styles[name])
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlabel("normalised score, %")
        axis.set_title(f"IQM, {checkpoint}, {counted(comparison['tasks'], 'task')}", loc="left")
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
    return _svg(figure, "aggregates")


def draw_profiles(comparison: dict[str, Any], styles: dict[str, Style]) -> str:
    """Draw the share of runs above each score, and the probabilities of improvement."""
    rows = comparison["improvement"]
    rivals = len({row["rival"] for row in rows})
    figure, axes = _subplots(2 if rows else 1, 2, max(3.1, 0.9 + 0.3 * rivals))
    profiles, axis = comparison["profiles"], axes[0]
    for name, line in profiles["lines"].items():
        style = styles[name]
        axis.plot(
            profiles["thresholds"],
            line["share"],
            color=style.colour,
            linestyle=style.line,
            linewidth=style.width,
            drawstyle="steps-post",
            label=name,
        )
        if line["interval"] and style.width > 2:  # bands of all would hide one another
            axis.fill_between(
                profiles["thresholds"],
                *line["interval"],
                color=style.colour,
                alpha=0.15,
                linewidth=0,
                step="post",
            )
    axis.set_xlabel("normalised score s, %")
    axis.set_ylabel("share of runs that score more than s")
    axis.set_ylim(-0.02, 1.02)
    axis.set_title("Performance profiles, last checkpoint", loc="left")
    axis.legend(frameon=False, fontsize=8, loc="best", handlelength=2.6)
    if rows:
        _draw_improvement(axes[1], rows, styles)
    return _svg(figure, "profiles")


def _draw_improvement(axis, rows: list[dict[str, Any]], styles: dict[str, Style]) -> None:
    ours = list(dict.fromkeys(row["method"] for row in rows))
    rivals = list(dict.fromkeys(row["rival"] for row in rows))
    for row in rows:
        place = rivals.index(row["rival"]) + 0.36 * (ours.index(row["method"]) / len(ours) - 0.25)
        label = f"{row['method']} is better" if row["rival"] == rivals[-1] else None
        _draw_estimate(
            axis, row["probability"], row["interval"], place, styles[row["method"]], label
        )
    axis.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rivals)), [f"than {rival}" for rival in rivals])
    axis.set_ylim(len(rivals) - 0.4, -0.6)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("probability")
    axis.set_title("Probability of improvement, last checkpoint", loc="left")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.legend(frameon=False, fontsize=8, loc="lower left")


def _draw_estimate(
    axis, value: float, interval: list[float] | None, place: float, style: Style, label=None
) -> None:
    """Draw an estimate as a stroke in the bar of its interval."""
    if interval:
        axis.plot(
            interval,
            [place, place],
            color=style.colour,
            linewidth=6,
            alpha=0.35,
            solid_capstyle="butt",
        )
    axis.plot(value, place, "|", color=style.colour, markersize=11, mew=2.6, label=label)


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
            line = _mean_curve(runs, task["unit"], against)
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
            style = styles[name]
            axis.plot(
                x / divisor,
                mean,
                color=style.colour,
                linestyle=style.line,
                linewidth=style.width,
                marker=style.marker,
                markersize=3.5,
                label=name,
            )
            axis.fill_between(x / divisor, low, high, color=style.colour, alpha=0.1, linewidth=0)
        axis.set_xlabel(unit)
        axis.set_ylabel("score, %" if task["unit"] == "score" else "return")
        axis.set_xlim(left=0)
        if against == "steps":
            axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")

    return _draw_panels(f"curves-{against}", panels, draw)


def _mean_curve(runs: list[dict[str, Any]], unit: str, against: str) -> tuple | None:
    """Return x, mean, least and largest over the runs, at the steps that all were evaluated at."""
    curves = []
    for run in runs:
        curve, target = run["curve"], run["targets"][0]
        values = curve.get("targets", {}).get("" if target is None else f"{target:g}")
        if values and None not in curve["seconds"]:
            y = values["score" if unit == "score" else "return"]
            curves.append((curve["steps"], curve["seconds"], y))
    if not curves:
        return None
    common = sorted(set.intersection(*(set(steps) for steps, *_ in curves)))
    if not common:
        return None
    at = [[steps.index(step) for step in common] for steps, *_ in curves]
    y = np.array([[c[2][i] for i in where] for c, where in zip(curves, at, strict=True)], float)
    seconds = np.array([[c[1][i] for i in where] for c, where in zip(curves, at, strict=True)])
    x = np.array(common, float) if against == "steps" else seconds.mean(0)
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
            style = styles[name]
            axis.plot(
                asked,
                got,
                color=style.colour,
                linestyle=style.line,
                linewidth=style.width,
                marker=style.marker,
                markersize=4.5,
                label=name,
            )
        ends = [0, max((asked.max() for asked, _ in lines.values()), default=1)]
        axis.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":", label="as asked")
        axis.set_xlabel("return asked for")
        axis.set_ylabel("return got")
        expert = _expert_return(task)
        if expert is not None and expert < 1.3 * ends[1]:
            axis.axhline(expert, color=INK, linewidth=0.6, alpha=0.5, label="expert, 100 %")

    return _draw_panels("asked-got", panels, draw)


def _expert_return(task: dict[str, Any]) -> float | None:
    """Return the return of 100 percent where D4RL's references are the measure."""
    try:
        name = task["environment"] or task["id"]
        highest = reference_scores(name)[1]
    except EnvError:
        return None
    return highest if math.isclose(normalized_score(highest, name), 100.0) else None


def _draw_panels(name: str, panels: Sequence[tuple], draw: Callable) -> str:
    """Draw a panel for each task, and one legend for all."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _subplots(len(panels), columns, 2.25 * rows + 0.5)
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
    return _svg(figure, name)


def _subplots(count: int, columns: int, height: float, share: bool = False):
    """Return a figure and its axes; places without one are left empty."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)  # drawn without a display, whatever the user's backend
    rows = -(-count // columns)
    sharing = {"sharex": True, "sharey": True} if share else {}
    axes = figure.subplots(rows, columns, squeeze=False, **sharing).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.grid(alpha=0.15, color=INK, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_alpha(0.4)
        axis.patch.set_visible(False)
    return figure, axes[:count]


def _svg(figure, name: str) -> str:
    """Return the figure as an SVG element to be put into a page."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--sans, sans-serif)", svg)
    svg = re.sub(r"(\d\.\d{2})\d+", r"\1", svg)  # hundredths of a point are fine enough
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
