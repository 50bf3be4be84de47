"""What a benchmark leaves: a table on the screen, a JSON file, a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minrl.scripts.machine import describe_machine, device_name, file_name

NAME_WIDTH = 36


@dataclass
class Panel:
    """One diagram of a picture: a line for each contestant.

    Attributes:
        title: Above it.
        lines: Points (x, y) by contestant.
    """

    title: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, name: str, x: float, y: float) -> None:
        """Add a point to a line."""
        self.lines.setdefault(name, []).append((x, y))

    def add_times(self, x: float, summary: dict[str, dict[str, Any]]) -> None:
        """Add a point to the line of every contestant that ran."""
        for name, row in summary.items():
            if "median" in row:
                self.add(name, x, row["median"])


@dataclass
class Report:
    """The result of one benchmark.

    Attributes:
        benchmark: Its name.
        device: Where it ran.
        settings: What it was asked to do.
        folder: Where its files go.
        sections: Lists of plain JSON values by name, one value a case.
        panels: Of the picture.
        axes: What the picture's axes show, x and y.
    """

    benchmark: str
    device: torch.device
    settings: dict[str, Any]
    folder: Path
    sections: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    panels: list[Panel] = field(default_factory=list)
    axes: tuple[str, str] = ("T, steps", "seconds")

    def add(self, section: str, case: dict[str, Any]) -> None:
        """Add a case to a section."""
        self.sections.setdefault(section, []).append(case)

    def panel(self, title: str) -> Panel:
        """Return the panel with this title, a new one if there is none."""
        panel = next((panel for panel in self.panels if panel.title == title), None)
        if panel is None:
            self.panels.append(panel := Panel(title))
        return panel

    def save(self) -> Path:
        """Write what there is so far as JSON, so that a run cut short is not lost."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{file_name(self.benchmark, self.device)}.json"
        head = {"benchmark": self.benchmark, **describe_machine(self.device)}
        values = {**head, "settings": self.settings, **self.sections}
        path.write_text(json.dumps(rounded(values), indent=1) + "\n")
        return path

    def finish(self) -> None:
        """Write the JSON file, and the PNG if there is something to draw."""
        path = self.save()
        print(f"\nwritten: {path}")
        if not any(len(line) > 1 for panel in self.panels for line in panel.lines.values()):
            return
        title = f"{self.benchmark}, {device_name(self.device)}, {torch.get_num_threads()} threads"
        if draw(self.panels, title, self.axes, path.with_suffix(".png")):
            print(f"written: {path.with_suffix('.png')}")
        else:
            print("no picture: matplotlib is not installed")


def print_case(title: str, summary: dict[str, dict[str, Any]]) -> None:
    """Print one case: a line for each contestant, the ratios being to the first.

    Args:
        title: What was measured.
        summary: See :func:`minrl.scripts.benchmarks.measuring.summarise`.
    """
    print(f"\n{title}")
    heads = ("median", "quartiles", "least", "x first", "memory")
    print(f"  {'':<{NAME_WIDTH}} {heads[0]:>9} {heads[1]:>19} {heads[2]:>9} ", end="")
    print(f"{heads[3]:>8} {heads[4]:>8}")
    for name, row in summary.items():
        if "missing" in row:
            print(f"  {name:<{NAME_WIDTH}} missing ({row['missing']})")
            continue
        quartiles = f"{duration(row['quartile_low'])} - {duration(row['quartile_high'])}"
        ratio = f"{row['ratio']['median']:.3g}" if "ratio" in row else "-"
        memory = "-" if row["peak_bytes"] is None else size(row["peak_bytes"])
        print(
            f"  {name:<{NAME_WIDTH}} {duration(row['median']):>9} {quartiles:>19} "
            f"{duration(row['minimum']):>9} {ratio:>8} {memory:>8}",
            flush=True,
        )


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.3g} ns"


def size(count: float) -> str:
    """Return a count of bytes with three digits and its unit."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def draw(panels: Sequence[Panel], title: str, axes: tuple[str, str], path: Path) -> bool:
    """Draw the panels side by side on logarithmic axes; False if there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6 * len(panels), 5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel=axes[0], ylabel=axes[1])
        axis.set_title(panel.title, fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return True


def rounded(value: Any) -> Any:
    """Return JSON values with five digits, which is more than a measurement has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value
