"""The report as one HTML file that needs nothing else."""

from html import escape
from typing import Any

from minrl.scripts.reports.cells import (
    MISSING,
    OUTSIDE,
    Cell,
    Facts,
    Picture,
    Section,
    Table,
    columns_of_words,
)
from minrl.scripts.reports.content import lead_of, sections_of, title_of
from minrl.scripts.reports.palette import styles_of

WIDE = 9  # columns

STYLE = """
:root { color-scheme: light dark; --sans: "Inter", "Segoe UI", system-ui, -apple-system,
  "Helvetica Neue", "DejaVu Sans", sans-serif; --ink: #1c2128; --soft: #5b6572; --line: #dfe3e8;
  --page: #ffffff; --panel: #f6f8fa; --mark: #e7f1fb; --warn: #8a5a00; --warnbg: #fff7e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --soft: #9aa5b1; --line: #30363e;
  --page: #12161b; --panel: #1a1f26; --mark: #14304a; --warn: #e8b75a; --warnbg: #2a2214; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 var(--sans); }
main { max-width: 1180px; margin: 0 auto; padding: 40px 28px 80px; }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0; letter-spacing: -.02em; }
.lead { font-size: 1.1rem; color: var(--soft); margin: .35rem 0 1.1rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: .7rem 0;
  border-block: 1px solid var(--line); font-size: .88rem; }
nav a { color: var(--soft); text-decoration: none; } nav a:hover { color: var(--ink); }
section { margin-top: 2.8rem; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { max-width: 78ch; margin: .4rem 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem;
  width: 100%; }
thead th { white-space: normal; }
th, td { text-align: right; padding: .38rem .6rem; vertical-align: top; }
td, tbody th { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: .3rem; }
thead th { font-weight: 600; border-bottom: 1.5px solid var(--soft); vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr + tr { border-top: 1px solid var(--line); }
tbody tr.sum { background: var(--panel); }
tbody tr.first-sum { border-top: 1.5px solid var(--soft); }
td.bold { font-weight: 700; } td.top { background: var(--mark); }
td.none { color: var(--soft); }
small { display: block; font-size: .78em; font-weight: 400; color: var(--soft); line-height: 1.35; }
table.wide { font-size: .82rem; } .wide th, .wide td { padding-inline: .4rem; }
td.words, th.words { text-align: left; white-space: normal; min-width: 11rem; }
.note { font-size: .82rem; color: var(--soft); margin: .5rem 0 0; max-width: 95ch; }
i.dot { display: inline-block; width: .62em; height: .62em; border-radius: 50%;
  margin-right: .5em; }
thead i.dot { display: block; margin: 0 0 .25rem auto; }
figure { margin: 1.4rem 0; }
figure svg { width: 100%; min-width: 760px; height: auto; display: block; }
figcaption { font-size: .82rem; color: var(--soft); max-width: 95ch; }
dl { margin: 0; font-size: .88rem; border-top: 1px solid var(--line); }
dl > div { display: grid; grid-template-columns: 9rem 1fr; padding: .36rem .3rem;
  border-bottom: 1px solid var(--line); }
dt, dd { margin: 0; } dt { color: var(--soft); } dd { overflow-wrap: anywhere; max-width: 90ch; }
dl.values { border: 0; display: grid; gap: .7rem 1.6rem; margin-top: 1rem; padding: 1rem 1.1rem;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); background: var(--panel);
  border-radius: 8px; }
dl.values > div { display: block; border: 0; padding: 0; } dl.values dt { font-size: .85em; }
dl.values dd { font-weight: 500; }
.others { margin-top: 4rem; padding: 1.4rem 1.6rem 1.6rem; border: 1px solid var(--warn);
  border-radius: 8px; background: var(--warnbg); }
.others h2 { color: var(--warn); }
.others table { font-size: .8rem; } .others th, .others td { padding: .25rem .6rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .8rem; }
@media (max-width: 640px) { main { padding: 20px 14px 60px; }
  dl > div { grid-template-columns: 1fr; } }
@media print { @page { size: A4 landscape; margin: 12mm; }
  :root { --ink: #000; --soft: #444; --line: #ccc; --page: #fff; --panel: #f4f4f4;
    --mark: #e4e4e4; --warn: #555; --warnbg: #fff; color-scheme: light; }
  body { font-size: 10pt; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { max-width: none; padding: 0; } nav { display: none; } .scroll { overflow: visible; }
  table { font-size: 7.6pt; } th, td { padding: .22rem .4rem; }
  figure svg { max-height: 150mm; min-width: 0; }
  figure, tr, dl > div { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def make_page(study: dict[str, Any], figures: dict[str, str]) -> str:
    """Return the HTML of a report.

    Args:
        study: Its figures, from ``summarise``.
        figures: SVG by name.
    """
    sections = sections_of(study, list(figures))
    colours = {name: style.colour for name, style in styles_of(study["methods"]).items()}
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    body = "\n".join(_section(section, figures, colours) for section in sections)
    title = escape(title_of(study))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="lead">{escape(lead_of(study))}</p>
<nav>{links}</nav>
</header>
{body}
<footer>Made by minrl {escape(study["minrl"])} on {escape(study["made"])}.</footer>
</main>
</body>
</html>
"""


def _section(section: Section, figures: dict[str, str], colours: dict[str, str]) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    for part in section.parts:
        if isinstance(part, Table):
            parts.append(_table(part, {} if section.others_work else colours))
        elif isinstance(part, Picture):
            parts += [f"<h3>{escape(part.title)}</h3>"] if part.title else []
            drawn = f'<div class="scroll">{figures[part.name]}</div>'
            caption = f"<figcaption>{escape(part.caption)}</figcaption>"
            parts.append(f"<figure>{drawn}{caption}</figure>")
        else:
            parts.append(_facts(part))
    kind = ' class="others"' if section.others_work else ""
    return f'<section id="{section.anchor}"{kind}>\n' + "\n".join(parts) + "\n</section>"


def _facts(facts: Facts) -> str:
    def listed(facts: list[tuple[str, str]]) -> str:
        rows = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
        return "".join(rows)

    return f'<dl>{listed(facts.rows)}</dl><dl class="values">{listed(facts.values)}</dl>'


def _table(table: Table, colours: dict[str, str]) -> str:
    words = columns_of_words(table)
    heads = "".join(_cell(c, "th", i in words, colours) for i, c in enumerate(table.heads))
    rows = []
    first_sum = len(table.rows) - table.last_rows
    for number, row in enumerate(table.rows):
        kind = "" if number < first_sum else ' class="sum"'
        kind = ' class="sum first-sum"' if number == first_sum and table.last_rows else kind
        cells = [_cell(row[0], "th", False, colours)]
        cells += [_cell(c, "td", i in words, colours) for i, c in enumerate(row[1:], 1)]
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    body = "\n".join(rows)
    wide = ' class="wide"' if len(table.heads) > WIDE else ""
    return (
        f'{title}<div class="scroll"><table{wide}><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>{notes}"
    )


def _cell(cell: Cell, tag: str, words: bool, colours: dict[str, str]) -> str:
    kinds = [
        ("bold", cell.bold),
        ("top", cell.top),
        ("none", cell.text == MISSING),
        ("words", words),
    ]
    chosen = " ".join(kind for kind, holds in kinds if holds)
    colour = colours.get(cell.text.removesuffix(OUTSIDE))
    dot = f'<i class="dot" style="background:{colour}"></i>' if colour and tag == "th" else ""
    text = escape(cell.text).replace(" % ", "&nbsp;%&nbsp;")  # the name "10 % BC" in one line
    below = f"<small>{escape(cell.below)}</small>" if cell.below else ""
    scope = ' scope="col"' if tag == "th" else ""
    kind = f' class="{chosen}"' if chosen else ""
    return f"<{tag}{scope}{kind}>{dot}{text}{below}</{tag}>"
