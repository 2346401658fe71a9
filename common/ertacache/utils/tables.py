"""Markdown tables."""

from collections.abc import Iterable, Sequence

MISSING = "–"  # a value that was not measured


def markdown(head: Sequence[str], rows: Iterable[Sequence], align: Sequence[str] | None = None) -> str:
    """Return a Markdown table.

    Args:
        head: Titles of the columns.
        rows: Cells; None is shown as a dash, and what would end a cell is escaped.
        align: "---" or "--:" for each column; default: all to the left.
    """
    lines = [[_cell(value) for value in row] for row in rows]
    lines = [[_cell(title) for title in head], align or ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value) -> str:
    text = MISSING if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
