"""Markdown: tables, and texts of any origin."""

import re
from collections.abc import Iterable, Sequence

from ertacache.utils.errors import printable

MISSING = "–"  # a value that was not measured


def markdown(head: Sequence[str], rows: Iterable[Sequence], align: Sequence[str] | None = None) -> str:
    """Return a Markdown table.

    Args:
        head: Titles of the columns.
        rows: Cells; None is shown as a dash; what would end a cell, and HTML, is escaped.
        align: "---" or "--:" for each column; default: all to the left.
    """
    lines = [[_cell(value) for value in row] for row in rows]
    lines = [[_cell(title) for title in head], align or ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Return Markdown that shows a text as it is: nothing in it is markup or HTML."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]])", r"\\\1", text)


def code(text: str) -> str:
    """Return Markdown that shows a text as code."""
    return f"`{printable(text).replace('`', chr(39))}`"


def _cell(value) -> str:
    text = MISSING if value is None else str(value)
    return printable(text.replace("|", "\\|").replace("\n", " ")).replace("<", "&lt;")
