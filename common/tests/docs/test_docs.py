"""The documentation, without the site generator: links lead somewhere, commands exist, quotes are true."""

import ast
import re
import runpy
import shlex
from pathlib import Path

import pytest

from conftest import ROOT

DOCS = ROOT / "common" / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READMES = [ROOT / "README.md", *sorted(ROOT.glob("ERTACache4*/README.md"))]
TEXTS = [*PAGES, *READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(\.\./)?(scripts|common|cache|ERTACache4[^/]+)(/|$)|.*\.(py|sh)$")  # words that name a file
WRITTEN = {"--out", "--json", "--csv", "--markdown", "--picture", "-o"}  # the next word is written, not read
WIDTH = 100  # of prose in Markdown


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as the repository's web view and the site make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def section(page: Path, title: str) -> str:
    """Return the text below a heading of the second or third level, up to the next of its level or above."""
    level, text = re.search(rf"\n(###?) {re.escape(title)}\n(.*)", page.read_text(), re.DOTALL).groups()
    return re.split(rf"\n#{{1,{len(level)}}} ", text)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def conf():
    return runpy.run_path(str(DOCS / "conf.py"))


def test_every_page_is_in_the_side_bar_once(conf):
    listed = [page for pages in conf["NAVIGATION"].values() for page in pages]
    assert sorted([*listed, conf["root_doc"]]) == sorted(
        page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES
    )


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        file = (page.parent / file).resolve() if file else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_prose_is_wrapped(page):
    for line in prose(page).splitlines():
        if not line.startswith(("|", "#", "![")) and len(line) > WIDTH:
            assert " " not in re.sub(r"`[^`]*`|\[[^]]*\]\([^)]*\)", "x", line).strip("-> "), line


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_no_line_of_prose_is_a_comment_of_the_site(page):
    """MyST leaves out a line that begins with a per cent sign."""
    assert not [line for line in prose(page).splitlines() if line.lstrip().startswith("%")]


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_commands_name_existing_files(page):
    folder_of_page = page.parent if page in READMES else ROOT
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        folder, before = folder_of_page, ""
        for word in shlex.split(line, comments=True):
            if before == "cd":
                folder = folder / word
                assert folder.is_dir(), line
            elif before not in WRITTEN and FILE.match(word) and not word.endswith(".venv/bin/python"):
                assert (folder / word).exists(), line
            before = word


@pytest.mark.parametrize("page", TEXTS[:-1], ids=name)  # the change log names former files
def test_named_files_exist(page):
    """Paths in `code` that begin at the root of the repository or inside the package."""
    package = ROOT / "common" / "ertacache"
    packages = "|".join(sorted(path.name for path in package.iterdir() if (path / "__init__.py").is_file()))
    for path in re.findall(r"`((?:common|scripts)/[\w./*-]+)`", prose(page)):
        assert list(ROOT.glob(path.rstrip("/"))), path
    for path in re.findall(rf"`(?:ertacache/)?((?:{packages})/\w+\.py)`", prose(page)):
        assert (package / path).is_file(), path


def test_the_readme_fits_on_one_screen():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert "no real checkpoint could be measured yet" in text


@pytest.mark.parametrize("page", READMES[1:], ids=name)
def test_real_models_take_the_budget_route(page):
    lines = [line for line in "\n".join(blocks(page, "sh")).splitlines() if "MODEL=" in line]
    assert lines and all("SPEEDUP=" in line and "LAMBDA=" not in line for line in lines)


def test_quoted_lines_of_troubleshooting_are_those_of_the_package():
    texts = set()
    for file in (ROOT / "common" / "ertacache").rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text()))
        texts |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    table = rows((DOCS / "guide/troubleshooting.md").read_text())
    quoted = [line for row in table for line in re.findall("`([^`]+)`", row[0])]
    assert len(quoted) > 30
    for line in quoted:
        for part in filter(None, line.split("…")):
            assert any(part.strip("(): ") in text for text in texts), f"{part!r} of {line!r}"


def test_the_table_of_speed_ups_is_that_of_the_results():
    overview = DOCS / "results/overview.md"
    measured = {(row[1], row[0]): row[2].strip("*") for row in rows(section(overview, "Quality")) if len(row) == 9}
    fewer = {row[0]: row[6] for row in rows(section(overview, "Quality")) if row[1] == "5×"}
    latency = rows(section(overview, "Latency of budget plans"))
    loops = {
        (s, row[0]): cell.split()[0] for row in latency[2:] for s, cell in zip(latency[0][1:], row[1:], strict=True)
    }
    head, _, *shown = rows(section(DOCS / "guide/choose.md", "What 1.5× to 5× cost"))
    for speedup, *cells in shown[:4]:
        for demo, cell in zip(head[1:], cells, strict=True):
            loop = loops.get((speedup, demo))
            assert cell == measured[speedup, demo] + (f" ({loop})" if loop else "")
    assert shown[4][1:] == [f"*{fewer[demo]}*" for demo in head[1:]]


def test_the_table_of_the_readme_is_that_of_the_results():
    quality = rows(section(DOCS / "results/overview.md", "Quality"))
    at_two = {row[0]: row for row in quality if row[1] == "2×"}
    shown = [row for row in rows((ROOT / "README.md").read_text()) if row[0] in at_two]
    assert len(shown) == 4
    for row in shown:
        measured = at_two[row[0]]
        assert row[1:5] == [measured[2], measured[3], measured[4], measured[6]]


def test_the_table_of_open_captions_is_that_of_the_pages():
    heading = "Captions that leave something open"
    pages = {"FLUX": "flux", "Wan2.1": "wan", "Open-Sora": "opensora", "CogVideoX": "cogvideox"}
    head, _, *shown = rows(section(DOCS / "results/overview.md", heading))
    for demo, page in pages.items():
        titles, _, *measured = rows(section(DOCS / f"results/{page}.md", heading))
        on_page = [dict(zip(titles, row, strict=True)) | {"demo": demo} for row in measured if row[0] == "open"]
        here = [row for row in shown if row[0] == demo]
        assert here == [[row[title] for title in head] for row in on_page]


def test_the_plans_that_are_drawn_are_those_that_are_shipped(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = DOCS / "guide/how-it-works.md"
    exec(blocks(page, "python")[0], {})
    assert capsys.readouterr().out == blocks(page, "text")[0]


def test_docstrings_become_restructured_text(conf):
    lines = ["Sum of *x* | `v_i`, x_ and x_i.", "", "Args:", "    **settings: Of `f`."]
    conf["escape"](None, "function", "f", None, {}, lines)
    assert lines == [r"Sum of \*x\* \| ``v_i``, x\_ and x_i.", "", "Args:", "    **settings: Of ``f``."]


def test_a_link_out_of_the_docs_becomes_its_text(conf):
    source = ["[ERTACache4FLUX/README.md](../../../ERTACache4FLUX/README.md), [`plan`](../reference/plan-format.md)"]
    conf["prepare"](None, "guide/quickstart", source)
    assert source == ["`ERTACache4FLUX/README.md`, [`plan`](../reference/plan-format.md)"]
