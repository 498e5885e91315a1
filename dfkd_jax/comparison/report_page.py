"""The report as text: Markdown, and one HTML file that needs nothing but itself."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple


class Table(NamedTuple):
    """A titled table; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]


class Glossary(NamedTuple):
    """A titled list of terms with their meanings."""

    title: str
    entries: list[tuple[str, str]]


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 72rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.9rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-top: 2px solid #222; border-bottom: 1px solid #222; font-weight: 600; }
tbody tr:last-child td { border-bottom: 2px solid #222; }
tbody tr:hover { background: #f4f6f8; }
td.marked { font-weight: 600; }
table.text td, table.text th { text-align: left; white-space: normal; }
figure { margin: 1.5rem 0 2rem; } img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: 0.9rem; }
dt { font-weight: 600; margin-top: 0.6rem; } dd { margin: 0; color: #444; }
"""


def markdown(
    title: str,
    tables: Sequence[Table],
    notes: Sequence[str] = (),
    glossaries: Sequence[Glossary] = (),
) -> str:
    """The report without its figures."""
    blocks = [f"# {title}"]
    for table in tables:
        blocks.append(f"## {table.title}")
        blocks.append(_markdown_table(table) if table.rows else "Nothing to compare with.")
    if notes:
        blocks += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    for heading, entries in glossaries:
        blocks += [f"## {heading}", "\n".join(f"- **{term}**: {what}" for term, what in entries)]
    return "\n\n".join(blocks) + "\n"


def html(
    title: str,
    tables: Sequence[Table],
    notes: Sequence[str],
    glossaries: Sequence[Glossary],
    figures: Sequence[tuple[Path, str]],
) -> str:
    """The report as one page with its style and figures inside.

    Args:
      title, tables, notes, glossaries: see `markdown`.
      figures: PNG files and their captions.

    Raises:
      OSError: a figure cannot be read.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    for table in tables:
        body.append(f"<h2>{escape(table.title)}</h2>")
        body.append(_html_table(table) if table.rows else "<p>Nothing to compare with.</p>")
    body.append("<h2>Figures</h2>")
    body += [_html_figure(path, caption) for path, caption in figures]
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        body.append(f"<h2>Notes</h2><ul>{items}</ul>")
    for heading, entries in glossaries:
        terms = "".join(f"<dt>{escape(t)}</dt><dd>{escape(what)}</dd>" for t, what in entries)
        body.append(f"<h2>{escape(heading)}</h2><dl>{terms}</dl>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    lines = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{lines}\n</body></html>\n'


def _markdown_table(table: Table) -> str:
    align = ["---", *("---:" for _ in table.header[1:])]
    rows = [[_markdown_cell(cell) for cell in row] for row in (table.header, *table.rows)]
    rows.insert(1, align)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _markdown_cell(cell: str) -> str:
    # A bar would end the cell, an asterisk could start emphasis.
    return cell.replace("\n", " ").replace("|", "\\|").replace("*", "\\*")


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = []
    for row in table.rows:
        cells = [
            f'<td class="marked">{escape(cell)}</td>'
            if cell.endswith(" *")
            else f"<td>{escape(cell)}</td>"
            for cell in row
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    # Sentences wrap, numbers do not.
    kind = ' class="text"' if any(len(row[-1]) > 60 for row in table.rows) else ""
    return (
        f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{chr(10).join(rows)}</tbody></table></div>"
    )


def _html_figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    source = f"data:image/png;base64,{data}"
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'
