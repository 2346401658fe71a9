"""Markdown: tables, and texts of any origin."""

import re
from collections.abc import Iterable, Sequence

from ertacache.utils.errors import printable
from ertacache.utils.words import counted

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
    text = printable((MISSING if value is None else str(value)).replace("\n", " ")).replace("<", "&lt;")
    return re.sub(r"(?<!\\)((?:\\\\)*)\|", r"\1\\|", text)  # a backslash where there is none, or an even number


def planned(what: str, rows: int, prompts: int, steps: float, step_seconds: float | None = None) -> str:
    """Return the line of a --dry-run on what would be measured.

    Args:
        what: A model folder, or a figure of one.
        rows, prompts: How many.
        steps: Model calls over all prompts, about.
        step_seconds: Of a call, for the hours; None leaves them out.
    """
    hours = f", {steps * step_seconds / 3600:.1f} hours" if step_seconds else ""
    count = counted(prompts, "prompt")
    return f"{what}: about {counted(rows, 'row')}, {count}, {steps:.0f} steps{hours}"
