"""The documentation site: `.venv/bin/sphinx-build -W common/docs runs/docs`. It needs no network."""

import inspect
import re

NAVIGATION = {  # caption in the side bar → its pages, all but index.md
    "Start": ("quickstart", "choose", "how-it-works", "troubleshooting"),
    "On your pipeline": ("calibrate", "works-with", "drift", "sharing", "command-line"),
    "Measured": ("compare", "results", "tables", "paper-tables"),
    "Reference": ("api", "algorithm", "comparison", "plan-format", "rows", "metrics"),
}
project = html_title = "ERTACache"
html_theme = "furo"
html_copy_source = html_show_copyright = html_show_sphinx = False
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "index"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100


def prepare(app, page: str, source: list[str]) -> None:
    """From the repository's Markdown to the site's: the front page gets the side bar; a link out of this folder becomes
    its text, which is a file's path."""
    source[0] = re.sub(r"\[`?([^]`]+)`?\]\(\.\./[^)]+\)", r"`\1`", source[0])
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            source[0] += "\n".join(["\n\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def as_restructured_text(app, what, name, of, options, lines: list[str]) -> None:
    """Docstrings are plain text with `code`: mark the parameters that they explain, escape what has a meaning here."""
    text = "\n".join(lines)
    if what in ("function", "method", "class"):
        known = "|".join(inspect.signature(of).parameters)
        text = re.sub(rf"(?m)(^|[.:] )((?:{known})(?:, (?:{known}))*): ", r"\1`\2`: ", text)
    parts = re.split(r"`([^`]+)`", text)
    plain = [re.sub(r"([\\*|_`])", r"\\\1", part) for part in parts[::2]]
    code = [f"``{part}``" for part in parts[1::2]] + [""]
    lines[:] = "".join(before + mark for before, mark in zip(plain, code, strict=True)).split("\n")


def with_literal_defaults(app, what, name, of, options, signature: str | None, returns: str | None):
    """A dataclass's default factory is shown as what it makes, or the signature could not be parsed."""
    return signature and signature.replace("<factory>", "{}"), returns


def setup(app) -> None:
    app.connect("source-read", prepare)
    app.connect("autodoc-process-docstring", as_restructured_text)
    app.connect("autodoc-process-signature", with_literal_defaults)
