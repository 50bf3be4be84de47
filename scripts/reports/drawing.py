"""What all figures have in common: canvas, SVG, and how an estimate is drawn."""

import io
import re

from minrl.scripts.reports.palette import Style

INK = "#010203"  # becomes the colour of the text
WIDTH = 10.6  # inches at 72 units an inch, as wide as the page
RC = {
    "text.parse_math": False,  # a dollar sign in a name is one
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


def subplots(count: int, columns: int, height: float, share: bool = False):
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


def to_svg(figure, name: str) -> str:
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


def draw_estimate(
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
