"""The documentation, without the tool that makes the site: nothing in it points nowhere, and what it quotes is so."""

import ast
import re
import runpy
import shlex
from pathlib import Path

import pytest

from conftest import ROOT

DOCS = ROOT / "common" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READMES = [ROOT / "README.md", *sorted(ROOT.glob("ERTACache4*/README.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"(\.\./)?(scripts|common|cache|ERTACache4[^/]+)(/|$)|.*\.(py|sh)$")  # words that name a file
OUTPUTS = {"--out", "--json", "--csv", "--markdown", "--image", "-o"}  # the word behind them is written, not read


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def history_length(page: Path) -> set[str]:
    """Of the headings, as the repository's web view and the site make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def section(page: Path, title: str) -> str:
    return page.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def conf():
    return runpy.run_path(str(DOCS / "conf.py"))


def test_every_page_is_in_the_side_bar_once(conf):
    listed = [page for pages in conf["NAVIGATION"].values() for page in pages]
    assert sorted([*listed, conf["root_doc"]]) == [page.stem for page in PAGES]


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for target in targets:
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in history_length(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_tells_one_to_run_is_there(page):
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")
    for line in "\n".join(blocks(page, "sh")).splitlines():
        folder, before = ROOT, ""
        for word in shlex.split(line, comments=True):
            if before == "cd":
                folder = folder / word
                assert folder.is_dir(), line
            elif before not in OUTPUTS and OURS.match(word):
                assert (folder / word).exists(), line
            before = word


def test_lines_of_troubleshooting_are_the_packages():
    said = set()
    for file in (ROOT / "common" / "ertacache").rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text()))
        said |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    quoted = [
        line for row in rows((DOCS / "troubleshooting.md").read_text()) for line in re.findall("`([^`]+)`", row[0])
    ]
    assert len(quoted) > 30
    for line in quoted:
        for part in filter(None, line.split("…")):
            assert any(part.strip("(): ") in text for text in said), f"{part!r} of {line!r}"


def test_the_table_of_speed_ups_is_that_of_the_results():
    measured = {(row[1], row[0]): row[2].strip("*") for row in rows((DOCS / "results.md").read_text()) if len(row) == 9}
    latency = rows(section(DOCS / "results.md", "Budget plans, latency of the denoising loop"))
    loops = {
        (s, row[0]): cell.split()[0] for row in latency[2:] for s, cell in zip(latency[0][1:], row[1:], strict=True)
    }
    head, _, *shown = rows(section(DOCS / "choose.md", "What 1.5× to 5× cost"))
    for speedup, *cells in shown[:4]:
        for demo, cell in zip(head[1:], cells, strict=True):
            loop = loops.get((speedup, demo))
            assert cell == measured[speedup, demo] + (f" ({loop})" if loop else "")


def test_the_plans_that_are_drawn_are_those_that_are_shipped(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = DOCS / "how-it-works.md"
    exec(blocks(page, "python")[0], {})
    assert capsys.readouterr().out == blocks(page, "text")[0]


def test_docstrings_become_restructured_text(conf):
    def described(x, v_i):
        pass

    lines = ["Sum of *x* | `v_i`.", "", "x, v_i: of one shape. other: x_ is kept."]
    conf["as_restructured_text"](None, "function", "described", described, {}, lines)
    assert lines == [r"Sum of \*x\* \| ``v_i``.", "", r"``x, v_i``: of one shape. other: x\_ is kept."]


def test_a_link_out_of_the_docs_becomes_its_text(conf):
    source = ["[ERTACache4FLUX/README.md](../../ERTACache4FLUX/README.md) and [`plan`](plan-format.md)"]
    conf["prepare"](None, "quickstart", source)
    assert source == ["`ERTACache4FLUX/README.md` and [`plan`](plan-format.md)"]
