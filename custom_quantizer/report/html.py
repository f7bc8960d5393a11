"""A report as one HTML page: no external resources, readable without scripts.

The table is complete in the markup. The script only sorts, filters and unfolds it, so the page
can be mailed, archived and opened from a disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from custom_quantizer.report.views import Column, Row, View

__all__ = ["render"]


def render(view: View) -> str:
    """The page; every text of the view is escaped."""
    title = escape(view.title)
    kinds = sorted({row.kind for row in view.rows})
    options = "".join(f"<option>{escape(kind)}</option>" for kind in kinds)
    head = "".join(_heading(column) for column in view.columns)
    body = "\n".join(_row(row, view.columns) for row in view.rows)
    notes = "".join(
        f"<h2>{escape(heading)}</h2>{_list(entries)}" for heading, entries in view.notes
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{_list(view.summary)}
<p class="tools">
<label>Search <input id="search" type="search"></label>
<label>Computes on <select id="kind"><option value="">everything</option>{options}</select></label>
<span id="shown" role="status"></span>
</p>
<table id="ops">
<thead><tr>{head}</tr></thead>
{body}
</table>
{notes}
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _list(entries: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(entry)}</li>' for entry in entries)}</ul>"


def _heading(column: Column) -> str:
    numeric = ' class="number"' if column.numeric else ""
    return f'<th scope="col"{numeric}><button type="button">{escape(column.title)}</button></th>'


def _row(row: Row, columns: tuple[Column, ...]) -> str:
    """A table body of two rows, so that an op and its details move together."""
    cells = "".join(
        f"<td{' class=number' if column.numeric else ''}>{'<br>'.join(map(escape, lines))}</td>"
        for column, lines in zip(columns, row.cells, strict=True)
    )
    return (
        f'<tbody class="{escape(row.kind)}" data-kind="{escape(row.kind)}"><tr>{cells}</tr>\n'
        f'<tr class="detail"><td colspan="{len(columns)}"><details>'
        f"<summary>{escape(row.headline)}</summary>{_details(row)}</details></td></tr></tbody>"
    )


def _details(row: Row) -> str:
    entries = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in row.details
    )
    if not row.table:
        return f"<dl>{entries}</dl>"
    header, *lines = row.table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines
    )
    return (
        f'<dl>{entries}</dl><table class="channels"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 1.6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); }
#ops > thead th { position: sticky; top: 0; background: Canvas; }
#ops > tbody > tr:first-child > td { border-top: 1px solid var(--line); }
#ops > tbody > tr:first-child > td:first-child { border-left: 4px solid transparent; }
tbody.integer > tr:first-child > td:first-child { border-left-color: #2a8a4a !important; }
tbody.dynamic > tr:first-child > td:first-child,
tbody.table > tr:first-child > td:first-child,
tbody.convert > tr:first-child > td:first-child { border-left-color: #2a6ab8 !important; }
tbody.emulated > tr:first-child > td:first-child,
tbody.outside > tr:first-child > td:first-child,
tbody.float > tr:first-child > td:first-child { border-left-color: #c06a10 !important; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.number, .channels td, .channels th { text-align: right; }
.detail > td { padding: 0 .6rem .4rem 1rem; }
summary { cursor: pointer; opacity: .7; font-size: .85em; }
details[open] { background: var(--soft); padding: .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0; }
dt { font-weight: 600; } dd { margin: 0; }
.tools { display: flex; gap: 1.5rem; align-items: center; }
"""

_SCRIPT = """
"use strict";
const table = document.getElementById("ops");
const bodies = Array.from(table.tBodies);
const search = document.getElementById("search");
const kind = document.getElementById("kind");
const shown = document.getElementById("shown");
function filter() {
  const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let count = 0;
  for (const body of bodies) {
    const text = body.rows[0].textContent.toLowerCase();
    const keep = (!kind.value || body.dataset.kind === kind.value)
      && words.every((word) => text.includes(word));
    body.hidden = !keep;
    count += keep;
  }
  shown.textContent = `${count} of ${bodies.length} ops`;
}
function sort(header) {
  const headers = Array.from(table.tHead.rows[0].cells);
  const column = headers.indexOf(header);
  const up = header.getAttribute("aria-sort") !== "ascending";
  for (const other of headers) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (body) => body.rows[0].cells[column].textContent;
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const order = bodies.slice().sort((a, b) => compare(key(a), key(b)));
  table.append(...(up ? order : order.reverse()));
}
search.addEventListener("input", filter);
kind.addEventListener("change", filter);
for (const header of table.tHead.rows[0].cells) {
  header.firstElementChild.addEventListener("click", () => sort(header));
}
filter();
"""
