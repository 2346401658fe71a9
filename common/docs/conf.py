"""The documentation site: `.venv/bin/sphinx-build -W common/docs runs/docs`. It needs no network."""

import posixpath
import re

NAVIGATION = {  # caption in the side bar → its pages; with index.md these are all pages
    "Guide": [
        "guide/quickstart",
        "guide/accelerate",
        "guide/choose",
        "guide/how-it-works",
        "guide/calibrate",
        "guide/real-models",
        "guide/works-with",
        "guide/drift",
        "guide/sharing",
        "guide/trust",
        "guide/serve",
        "guide/comfyui",
        "guide/command-line",
        "guide/troubleshooting",
    ],
    "Reference": [
        "reference/api",
        "reference/flags",
        "reference/algorithm",
        "reference/glossary",
        "reference/plan-format",
        "reference/rows",
        "reference/metrics",
    ],
    "Results": [
        "results/overview",
        "results/strength",
        "results/planner",
        "results/hardness",
        "results/unets",
        "results/census",
        "results/reliability",
        "results/comfyui",
        "results/real-size",
        "results/flux",
        "results/wan",
        "results/cogvideox",
        "results/opensora",
        "results/comparison",
        "results/paper-tables",
        "results/tables/all-methods",
        "results/tables/hardness",
    ],
}
project = html_title = "ERTACache"
html_theme = "furo"
html_static_path, html_css_files = ["static"], ["site.css"]
html_copy_source = html_show_copyright = html_show_sphinx = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
myst_heading_anchors = 4
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100


def prepare(app, page: str, source: list[str]) -> None:
    """Adapt a page to the site: links out of common/docs become their text, and the front page gets the side bar."""
    folder = posixpath.dirname(page)

    def inside(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        return f"`{link[1]}`" if target.startswith("../") else link[0]

    source[0] = re.sub(r"(?<!!)\[`?([^]`]+)`?\]\((\.\./[^)]+)\)", inside, source[0])
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            source[0] += "\n".join(["\n\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def escape(app, what, name, of, options, lines: list[str]) -> None:
    """Docstrings are plain text with `code`: escape what reStructuredText would read as markup. Napoleon runs later."""
    parts = re.split(r"`([^`]+)`", "\n".join(lines))
    plain = [re.sub(r"(\\|(?<!\*)\*(?!\*)|\||_(?!\w))", r"\\\1", part) for part in parts[::2]]
    code = [f"``{part}``" for part in parts[1::2]] + [""]
    lines[:] = "".join(before + mark for before, mark in zip(plain, code, strict=True)).split("\n")


def with_literal_defaults(app, what, name, of, options, signature: str | None, returns: str | None):
    """Show a dataclass's default factory as what it makes; otherwise the signature could not be parsed."""
    return signature and signature.replace("<factory>", "{}"), returns


def setup(app) -> None:
    app.connect("source-read", prepare)
    app.connect("autodoc-process-docstring", escape, priority=400)
    app.connect("autodoc-process-signature", with_literal_defaults)
