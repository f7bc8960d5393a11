"""From the JSON of a report to what a reader sees: cells, notes, details, plain text.

Everything here takes the parsed document, so a report that was saved a year ago renders as the
day it was made. :mod:`custom_quantizer.report.html` renders the same :class:`View` as a page.
"""

from __future__ import annotations

from custom_quantizer.report.views.counts import bias_sentence, tally_of
from custom_quantizer.report.views.graph import graph_view
from custom_quantizer.report.views.plain import WIDTH, detail_text, text
from custom_quantizer.report.views.program import program_view
from custom_quantizer.report.views.values import WORST, Column, Json, Row, Table, View

__all__ = [
    "WIDTH",
    "WORST",
    "Column",
    "Row",
    "Table",
    "View",
    "bias_sentence",
    "detail_text",
    "tally_of",
    "text",
    "view_of",
]


def view_of(document: Json) -> View:
    """The view of a parsed report of either kind."""
    return program_view(document) if document["kind"] == "program" else graph_view(document)
