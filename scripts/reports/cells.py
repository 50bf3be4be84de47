"""What tables are made of, and how figures are written in them; their looks are up to the pages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MISSING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
OUTSIDE = " \N{DAGGER}"  # behind the name of other people's agents


@dataclass(frozen=True)
class Cell:
    """One cell: a figure, and what is said of it in small.

    Attributes:
        text: The figure, or a name.
        below: In small.
        bold: Whether it is as good as the best, as far as can be told.
        top: Whether it is the best.
    """

    text: str
    below: str = ""
    bold: bool = False
    top: bool = False


@dataclass
class Table:
    """One table.

    Attributes:
        title: Above it.
        heads: Of the columns.
        rows: Cells, the first of each row being its name.
        notes: Below it.
        last_rows: How many of the rows sum up those above.
    """

    title: str
    heads: list[Cell]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    last_rows: int = 0


def heads_of(*names: str) -> list[Cell]:
    """Return the heads of columns."""
    return [Cell(name) for name in names]


def method_cell(study: dict[str, Any], name: str) -> Cell:
    """Return the name of a method, marked if it is other people's."""
    outside = any(m["name"] == name and m["library"] for m in study["methods"])
    return Cell(name + OUTSIDE * outside)


def main_methods(study: dict[str, Any]) -> list[str]:
    """Return the methods without changes of settings."""
    return [method["name"] for method in study["methods"] if not method["changes"]]


def mark_best(
    scores: Mapping[str, tuple[float, Sequence[float] | None]],
) -> dict[str, dict[str, bool]]:
    """Return the marks of the highest score and of those inside its interval.

    Nothing is marked if the highest has no interval: it may be so by chance.

    Args:
        scores: By method, score and interval.
    """
    if not scores:
        return {}
    best = max(scores, key=lambda name: scores[name][0])
    interval = scores[best][1]
    if interval is None:
        return {}
    return {
        name: {"bold": True, "top": name == best}
        for name, (score, _) in scores.items()
        if score >= interval[0]
    }


def with_interval(
    values: dict[str, Any] | None, key: str, marks: Mapping[str, bool] | None = None
) -> Cell:
    """Return the cell of an aggregate with its interval below."""
    if not values:
        return Cell(MISSING)
    interval = values[f"{key}_interval"]
    below = span(*interval) if interval else "no interval"
    return Cell(f"{values[key]:.1f}", below, **(marks or {}))


def span(low: float, high: float, form: str = ".1f") -> str:
    """Return an interval, with a dash where no minus sign is near."""
    between = MISSING if low >= 0 and "+" not in form else " to "
    return f"{low:{form}}{between}{high:{form}}"


def number(value: float | None) -> str:
    """Return a score with one digit behind the point."""
    return MISSING if value is None else f"{value:.1f}"


def ratio(value: float | None) -> str:
    """Return a ratio."""
    return MISSING if value is None else f"{TIMES} {value:.2f}"


def counted(items: Sequence, what: str) -> str:
    """Return how many there are of something."""
    return f"{len(items)} {what}{'s' if len(items) != 1 else ''}"


def clock(seconds: float) -> str:
    """Return a time in hours, minutes or seconds."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def thousands(count: float) -> str:
    """Return a count of parameters in thousands or millions."""
    return f"{count / 1e6:.2f} M" if count >= 999_500 else f"{count / 1e3:.0f} k"


def range_of(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """Return the least and the largest of the values that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    low, high = show(min(known)), show(max(known))
    return low if low == high else f"{low} to {high}"
