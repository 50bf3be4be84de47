"""What a report is made of, and how figures are written in it; their looks are up to the pages."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minrl.scripts.benchmarks.report import duration as plain_duration

MISSING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
NOT_WIDENED = (
    "The intervals are not widened for how many there are: of twenty, one may leave out zero by "
    "chance."
)
OUTSIDE = "\N{NO-BREAK SPACE}\N{DAGGER}"  # behind the name of other people's agents


@dataclass(frozen=True)
class Cell:
    """One cell: a figure, and what is said of it in small.

    Attributes:
        text: The figure, or a name.
        below: In small.
        bold: Whether it is as good as the best, as far as can be told.
        top: Whether it is the best, and clearly so.
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


@dataclass(frozen=True)
class Picture:
    """A figure by its name, with a title above it or none, and what it shows."""

    name: str
    caption: str
    title: str = ""


@dataclass(frozen=True)
class Facts:
    """Sentences, and short values, by what they are about."""

    rows: list[tuple[str, str]]
    values: list[tuple[str, str]]


@dataclass
class Section:
    """A part of the report: paragraphs, then tables, pictures and facts."""

    anchor: str
    title: str
    text: list[str] = field(default_factory=list)
    parts: list[Table | Picture | Facts] = field(default_factory=list)
    others_work: bool = False


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


def has_single_seed(study: dict[str, Any]) -> bool:
    """Return whether no method has more than one run of any task."""
    return all(len(cell["last"]["seeds"]) <= 1 for cell in study["cells"])


def mark_best(
    scores: Mapping[str, tuple[float, Sequence[float] | None]],
) -> dict[str, dict[str, bool]]:
    """Return the marks of the highest score and of those inside its interval.

    Nothing is marked if the highest has no interval, since it may be so by chance, or if nothing is
    outside; it is the top if nothing else is inside.

    Args:
        scores: By method, score and interval.
    """
    if not scores:
        return {}
    best = max(scores, key=lambda name: scores[name][0])
    interval = scores[best][1]
    if interval is None:
        return {}
    inside = [name for name, (score, _) in scores.items() if score >= interval[0]]
    if len(inside) == len(scores):
        return {}
    return {name: {"bold": True, "top": len(inside) == 1} for name in inside}


def with_interval(
    values: dict[str, Any] | None, key: str, marks: Mapping[str, bool] | None = None
) -> Cell:
    """Return the cell of an aggregate with its interval below."""
    if not values:
        return Cell(MISSING)
    interval = values[f"{key}_interval"]
    return Cell(f"{values[key]:.1f}", span(*interval) if interval else "", **(marks or {}))


def difference_cell(difference: float, interval: tuple[float, float] | None) -> Cell:
    """Return the cell of a difference with its interval below, bold if that leaves out zero."""
    if interval is None:
        return Cell(f"{difference:+.1f}")
    low, high = interval
    return Cell(f"{difference:+.1f}", span(low, high, "+.1f"), bold=low > 0 or high < 0)


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


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    return plain_duration(seconds).replace("us", "\N{MICRO SIGN}s")


def machine(name: str) -> str:
    """Return what ``device_name`` calls a machine with its cores in words."""
    return re.sub(r" (\d+) CPU$", r", \1 cores", name)


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


def columns_of_words(table: Table) -> set[int]:
    """Return the columns, but the first, that hold no figures and are set flush left."""

    def is_words(texts: Sequence[str]) -> bool:
        return any(texts) and not any(t[0].isdigit() or t[0] in f"+-{TIMES}" for t in texts)

    columns = range(1, len(table.heads))
    texts = {i: [row[i].text for row in table.rows if row[i].text != MISSING] for i in columns}
    return {i for i in columns if is_words(texts[i])}
