"""Texts of strangers in all that is written of rows and plans: nothing steers a terminal, ends a cell or is markup."""

import base64
import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import sheet as sheets
from PIL import Image

from ertacache.evaluation import page, plots, report, table
from ertacache.evaluation.rows import Row, read_source
from ertacache.plans.card import model_card
from ertacache.utils import media
from ertacache.utils.errors import printable
from ertacache.utils.tables import escaped, markdown
from helpers import flux_plan, row

HOSTILE = "\x1b[31mred\x07|b\\|c\nd\r\x9b2J\u202egnp.\u2066x\u2069\ud800 <script>alert(1)</script> ```*[a](b) $\\x$"
FILE = "\x1b[2J\u202erows.json"
GFM_CELL = re.compile(r"(?:\\.|[^\\|])*")  # a backslash and what it escapes, or anything but the end of a cell


def measured(label, family, asked, speedup, psnr, **values):
    absent = dict.fromkeys(Row.__annotations__)
    hostile = {"model": HOSTILE, "machine": HOSTILE, "date": HOSTILE, "plan": HOSTILE, "captions": HOSTILE}
    settings = {"steps": 12, "negative_prompt": HOSTILE, HOSTILE: HOSTILE}
    hostile |= {"settings": settings, "libraries": {HOSTILE: HOSTILE}}
    return {**absent, **row(HOSTILE, label, family, asked, speedup, psnr), **hostile, **values}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Rows with samples, all of whose texts are hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    media.save_png(folder / "a.png", Image.new("RGB", (8, 8)))
    shown = {"samples": ["a.png"], "sample_prompts": [HOSTILE]}
    timeline = {"sigmas": [1.0, 0.5, 0.0], "computed": [0], "error": [0.1]}
    tails = {"psnr_p10": 30.0, "psnr_worst": 20.0, "below_30db": 0.1, "latents_below_30db": 0.1}
    rows = [
        measured("none", "none", None, 1.0, None, **shown),
        measured(f"budget ({HOSTILE})", "budget", 2.0, 2.0, 60.0, timeline=timeline, **tails, **shown),
        measured(HOSTILE, "peer", 2.0, 2.1, 50.0, **tails, **shown),
        measured(HOSTILE, "peer", 3.0, 3.1, 40.0, **tails),
        measured("another", "peer", 2.0, 2.0, 40.0, **tails, machine="another"),
    ]
    (folder / FILE).write_text(json.dumps(rows))
    return read_source(folder / FILE)


def steering(text):
    return {c for c in text if not c.isprintable() and c != "\n"}


def check_markdown(text):
    """Each table has as many cells in every line; nothing is HTML, a link or a fence."""
    assert not steering(text)
    text = re.sub(r"^```python\n.*?\n```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<!\\)`[^`\n]*`", "", text)
    assert not re.search(r"^```|<script|(?<!\\)\[a|(?<!\\)`", text, re.MULTILINE)
    for lines in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        cells = {len(re.sub(GFM_CELL, "", line.strip())) for line in lines.strip().splitlines()}
        assert len(cells) == 1, lines


def test_the_page(source):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    found = page.page(report.sections([source]), [source], HOSTILE)
    assert not steering(found) and "<script>alert" not in found
    assert found.encode() and html.escape(printable(HOSTILE)).replace("&#x27;", "&#39;") in found
    assert r"\x1b[2J\u202erows.json (5 rows" in html.unescape(found)  # the list of files
    shown = re.search(r'<script type="application/json">(.*?)</script>', found).group(1)
    texts = json.loads(shown)
    assert texts["prompts"] == [printable(HOSTILE)] and texts["methods"][0]["name"] == "budget"
    assert not any(steering(text["name"]) for method in texts["methods"] for text in (method, *method["runs"]))
    embedded = json.loads(base64.b64decode(re.search(r'json;base64,([^"]+)"', found).group(1)))
    assert embedded[1]["label"] == f"budget ({HOSTILE})" and embedded[1]["samples"] == ["a.png"]  # data stays as it is


def test_tables_in_markdown(source):
    sections = report.sections([source])
    found = [
        page.tables(sections),
        report.card_table([{**each, "samples": None, "sample_prompts": None} for each in source.rows]),
        table.one_line_each(source.rows),
    ]
    found += [table.by_speedup([*source.rows, {**source.rows[1], "captions": "full"}]), table.facts(day=HOSTILE)]
    for text in found:
        check_markdown(text)
    headings = [line for line in found[0].splitlines() if line.startswith("#")]
    assert headings == ["## Who is first", f"## {escaped(f'{HOSTILE}, {HOSTILE}')}", "### 2×", "### 3×"]
    assert f"different benches: {escaped(HOSTILE)} at batch size 2; another at" in found[0]


@pytest.mark.parametrize("text", ["a|b", r"a\|b", r"a\\|b", "||", "a\n|b", escaped("|\\|"), "\\"])
def test_a_pipe_ends_no_cell(text):
    line = markdown(["x", "y"], [[text, "z"]]).splitlines()[2]
    cells = [re.sub(r"\\\|", "|", cell.strip()) for cell in GFM_CELL.findall(line) if cell]
    assert cells[-1] == "z" and len(cells) == 2


def test_a_model_card():
    plan, text = flux_plan(), HOSTILE.replace("\ud800", "")  # plans refuse that
    calibration = {"chosen": text, "metric": text, "errors": {text: 0.5, "other": 1.0}}
    provenance = {"model": text, "machine": text, "calibration": calibration, text: [text]}
    requirements = replace(
        plan.requirements,
        settings={"prompt_2": text, text: 1},
        model={"class": text, text: text},
        scheduler={"class": text},
    )
    card = str(model_card(replace(plan, provenance=provenance, requirements=requirements), text, license="mit"))
    check_markdown(card)
    code = re.search(r"```python\n(.*?)\n```", card, re.DOTALL).group(1)
    compile(code, "card", "exec")
    assert f"pipe = DiffusionPipeline.from_pretrained({printable(json.dumps(text, ensure_ascii=False))}" in code


def test_captions_of_images():
    images = np.zeros((1, 16, 16, 3), np.float32)
    for text in (printable(HOSTILE), HOSTILE):
        sheet = media.sheet([text], {text: images})
        grid = sheets.grid([text], images)
        if text is not HOSTILE:
            safe = sheet, grid
    assert all(one.tobytes() == other.tobytes() for one, other in zip(safe, (sheet, grid), strict=True))


def test_drawings(source):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    sections = report.sections([source])
    assert plots.overview(sections).startswith(b"\x89PNG")  # a folder's name is no formula
    for drawing in (plots.plot(sections[0], "psnr", "flops"), *(entry["svg"] for entry in plots.legend(sections[0]))):
        assert not steering(drawing) and "<script" not in drawing


def test_metrics(tmp_path):
    media.save_metrics(tmp_path, {HOSTILE: HOSTILE})
    assert json.loads((tmp_path / "metrics.json").read_bytes()) == {HOSTILE: HOSTILE}
