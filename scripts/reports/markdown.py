"""The report as Markdown, with its figures in files beside it."""

from typing import Any

from minrl.scripts.reports.cells import Cell, Facts, Picture, Section, Table, columns_of_words
from minrl.scripts.reports.content import lead_of, sections_of, title_of

INK, PAPER = "#1c2128", "#ffffff"


def make_markdown(study: dict[str, Any], figures: dict[str, str], files: dict[str, str]) -> str:
    """Return the Markdown of a report.

    Args:
        study: Its figures, from ``summarise``.
        figures: SVG by name.
        files: Names of the figures' files, by the figures' names.
    """
    parts = [f"# {title_of(study)}", f"{lead_of(study)}."]
    for section in sections_of(study, list(figures)):
        parts += _section(section, files)
    parts.append(f"Made by minrl {study['minrl']} on {study['made']}.")
    return "\n\n".join(parts) + "\n"


def standalone(svg: str) -> str:
    """Return a figure as a file of its own: dark on white, whatever is around it."""
    head, _, rest = svg.partition(">")
    white = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    svg = f"{head}>{white}{rest}".replace("currentColor", INK)
    return svg.replace("var(--sans, sans-serif)", "sans-serif")


def _section(section: Section, files: dict[str, str]) -> list[str]:
    parts = [f"## {section.title}", *section.text]
    for part in section.parts:
        if isinstance(part, Table):
            parts += _table(part)
        elif isinstance(part, Picture):
            parts += [f"### {part.title}"] if part.title else []
            parts += [f"![{part.name}]({files[part.name]})", part.caption]
        else:
            parts.append(_facts(part))
    if section.others_work:  # set apart from our own figures
        parts = ["---", *parts]
    return parts


def _facts(facts: Facts) -> str:
    rows = "".join(
        f"\n| {_escape(name)} | {_escape(value)} |" for name, value in (*facts.rows, *facts.values)
    )
    return f"| | |\n|---|---|{rows}"


def _table(table: Table) -> list[str]:
    words = {0} | columns_of_words(table)
    rule = "|".join("---" if i in words else "---:" for i in range(len(table.heads)))
    rows = [_row(table.heads), f"|{rule}|", *(_row(row) for row in table.rows)]
    title = [f"### {table.title}"] if table.title else []
    return [*title, "\n".join(rows), *table.notes]


def _row(cells: list[Cell]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(cell: Cell) -> str:
    text = f"**{_escape(cell.text)}**" if cell.bold else _escape(cell.text)
    if cell.below.startswith("±"):
        return f"{text} {cell.below}"
    return f"{text} ({_escape(cell.below)})" if cell.below else text


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("_", "\\_")
