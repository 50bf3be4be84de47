"""The figures of a report as SVG, which follows the colour of the text around it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from minrl.scripts.reports.cells import counted, duration, has_single_seed, thousands
from minrl.scripts.reports.drawing import INK, RC, draw_estimate, subplots, to_svg
from minrl.scripts.reports.palette import Style, styles_of
from minrl.scripts.reports.panels import draw_asked, draw_curves

# Of a name beside its point: offsets, and what of the name is there.
PLACES = (
    *((7, 0, "left", "center"), (-7, 0, "right", "center"), (0, 7, "center", "bottom")),
    *((0, -7, "center", "top"), (6, 5, "left", "bottom"), (6, -5, "left", "top")),
    *((-6, 5, "right", "bottom"), (-6, -5, "right", "top")),
)


def draw_figures(study: dict[str, Any]) -> dict[str, str]:
    """Return all figures there is something to draw for, as SVG by name."""
    import matplotlib as mpl

    styles = styles_of(study["methods"])
    figures: dict[str, str | None] = {}
    with mpl.rc_context(RC):
        if study["comparisons"]:
            figures["aggregates"] = draw_aggregates(study["comparisons"], styles)
            figures["costs"] = draw_costs(study, styles)
            if not has_single_seed(study):
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
    figure, axes = subplots(len(panels), len(panels), 0.55 + 0.27 * len(names), share=True)
    for axis, (comparison, checkpoint) in zip(axes, panels, strict=True):
        for place, name in enumerate(names):
            values = comparison[checkpoint].get(name)
            if values is not None:
                draw_estimate(axis, values["iqm"], values["iqm_interval"], place, styles[name])
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlabel("normalised score, %")
        axis.set_title(f"IQM, {checkpoint}, {counted(comparison['tasks'], 'task')}", loc="left")
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
    return to_svg(figure, "aggregates")


def draw_costs(study: dict[str, Any], styles: dict[str, Style]) -> str | None:
    """Draw the interquartile means of last checkpoints against parameters and acting latency."""
    comparison = study["comparisons"][0]
    parameters: dict[str, list[float]] = {}
    for cell in study["cells"]:
        if cell["parameters"] and cell["task"] in comparison["tasks"]:
            parameters.setdefault(cell["method"], []).append(cell["parameters"])
    rows = (study["latency"] or {"rows": []})["rows"]
    acting = {row["method"]: row["median"] for row in rows if row["as_trained"] and "median" in row}
    panels = (
        ("parameters", thousands, {name: np.mean(found) for name, found in parameters.items()}),
        ("time to act", duration, acting),
    )
    scores = {name: values["iqm"] for name, values in comparison["last"].items()}
    panels = [panel for panel in panels if len(scores.keys() & panel[2].keys()) > 1]
    if not panels:
        return None
    figure, axes = subplots(len(panels), 2, 3.2)
    for axis, (title, form, costs) in zip(axes, panels, strict=True):
        points = {name: (costs[name], score) for name, score in scores.items() if name in costs}
        for name, point in points.items():
            style = styles[name]
            axis.plot(*point, style.marker, color=style.colour, markersize=6)
        _set_costs(axis, form)
        axis.set_xlabel(f"{title}, logarithmic")
        axis.set_ylabel("IQM of last scores, %")
        axis.set_title(f"Score against {title}", loc="left")
        _name_points(axis, points)
    return to_svg(figure, "costs")


def _set_costs(axis, form: Callable[[float], str]) -> None:
    """Make the horizontal axis logarithmic, with room for names and all ticks written out."""
    from matplotlib.ticker import LogLocator

    axis.set_xscale("log")
    axis.margins(x=0.2, y=0.15)
    low, high = axis.get_xlim()
    within_a_decade = high < 10 * low
    axis.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axis.xaxis.set_major_formatter(lambda x, _: form(x))
    axis.xaxis.set_minor_formatter(lambda x, _: form(x) if within_a_decade else "")
    axis.tick_params(axis="x", which="both", length=3.5, pad=3.5)


def _name_points(axis, points: dict[str, tuple[float, float]]) -> None:
    """Write each name beside its point, where it hides least of the others."""
    from matplotlib.transforms import Bbox

    axis.figure.draw_without_rendering()  # from here on it is known where the points are
    taken = [
        Bbox.from_bounds(*(at - 5), 10, 10) for at in axis.transData.transform([*points.values()])
    ]
    for name, point in points.items():
        label = axis.annotate(name, point, (0, 0), textcoords="offset points", fontsize=8)

        def hides(place: tuple, label=label) -> float:
            x, y, horizontal, vertical = place
            label.set(position=(x, y), ha=horizontal, va=vertical)
            box = label.get_window_extent()
            shared = [Bbox.intersection(box, other) for other in taken]
            return sum(both.width * both.height for both in shared if both is not None)

        hides(min(PLACES, key=hides))
        taken.append(label.get_window_extent())


def draw_profiles(comparison: dict[str, Any], styles: dict[str, Style]) -> str:
    """Draw the share of runs above each score, and the probabilities of improvement."""
    rows = comparison["improvement"]
    rivals = len({row["rival"] for row in rows})
    figure, axes = subplots(2 if rows else 1, 2, max(3.1, 0.9 + 0.3 * rivals))
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
    figure.legend(
        loc="outside lower center",
        ncols=min(len(profiles["lines"]), 6),
        frameon=False,
        fontsize=8,
        handlelength=2.6,
    )
    if rows:
        _draw_improvement(axes[1], rows, styles)
    return to_svg(figure, "profiles")


def _draw_improvement(axis, rows: list[dict[str, Any]], styles: dict[str, Style]) -> None:
    ours = list(dict.fromkeys(row["method"] for row in rows))
    rivals = list(dict.fromkeys(row["rival"] for row in rows))
    for row in rows:
        place = rivals.index(row["rival"]) + 0.36 * (ours.index(row["method"]) / len(ours) - 0.25)
        label = f"{row['method']} is better" if row["rival"] == rivals[-1] else None
        draw_estimate(
            axis, row["probability"], row["interval"], place, styles[row["method"]], label
        )
    axis.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rivals)), [f"than {rival}" for rival in rivals])
    axis.set_ylim(len(rivals) - 0.4, -0.6)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("probability")
    axis.set_title("Probability of improvement, last checkpoint", loc="left", pad=20)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.98), "ncols": len(ours)}
    axis.legend(frameon=False, fontsize=8, **above)
