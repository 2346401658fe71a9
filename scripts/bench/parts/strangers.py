"""Texts and files of strangers: what is shown of them steers nothing, and reading them runs nothing."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

import ertacache
from ertacache import Plan, UserError
from ertacache.cli.inspect import drawn
from ertacache.evaluation import page, report, table
from ertacache.evaluation.rows import Row, read_source
from ertacache.utils import media
from parts.campaign import steering
from parts.flux_demo import CALL, FOLDER, SHIPPED, pipeline

PIECES = [
    *("\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\r", "\n", "\x00", "\u202e", "\u2066", "\u2028", "\ufeff"),
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "'\" onload=x ", "-->", "&lt;", "{{ 7 * 7 }}"),
    *("|", "\\|", "\\", "`", "\n```\n", "](javascript:alert(1))", "![x](http://x)", "$\\frac$", "[red]", "[/]"),
    *("%s", "{0}", "a", " ", "é", "漢", "🦊", "0" * 300),
]
CELL_END = re.compile(r"(?<!\\)(?:\\\\)*\|")  # in Markdown: a pipe that no backslash escapes


class Tags(HTMLParser):
    """The kinds of tags of a page with the names of their attributes, and how many scripts it has."""

    def __init__(self, text: str):
        super().__init__()
        self.kinds: set[tuple] = set()
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.kinds |= {(tag, name) for name, _ in [("", ""), *attrs]}
        self.scripts += tag == "script"


def rows(text: str) -> list[dict]:
    """Return the rows of an evaluation whose every text is this one."""
    same = dict.fromkeys(("folder", "label", "method", "model", "machine", "date", "plan", "captions"), text)
    numbers = {"steps": 12, "nfe": 6, "prompts": 2, "seed": 7, "batch_size": 2, "flops": 1e9, "latency_s": 1.0}
    numbers |= dict.fromkeys(("speedup_flops", "speedup_nfe", "speedup_latency", "speedup_end_to_end"), 2.0)
    numbers |= {"psnr": 40.0, "psnr_p10": 30.0, "psnr_worst": 20.0, "below_30db": 0.1, "latents_below_30db": 0.1}
    more = {
        "settings": {"steps": 12, text: text},
        "libraries": {text: text},
        "samples": ["a.png"],
        "sample_prompts": [text],
    }
    row = {**dict.fromkeys(Row.__annotations__), **same, **numbers, **more, "family": "peer", "asked": 2.0, "ssim": 0.9}
    uncached = {**row, "method": "none", "label": "none", "family": "none", "asked": None, "psnr": None}
    return [uncached, row, {**row, "label": f"{text} 2", "psnr": 41.0}]


def shown(text: str, plan: Plan, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what is made of a stranger's text, each with where: a terminal, a card, tables, a page, an error."""
    provenance = {**plan.provenance, "model": text, "machine": text, text: [text, {text: 1}]}
    settings = {**plan.requirements.settings, "prompt_2": text, text: text}
    theirs = replace(plan, provenance=provenance, requirements=replace(plan.requirements, settings=settings))
    console = Console(file=io.StringIO(), width=100, highlight=False)
    console.print(drawn(theirs, 100))
    yield "terminal", console.file.getvalue()
    yield "card", str(theirs.generate_model_card(repo_id="someone/plan"))
    file = folder / "rows.json"
    file.write_text(json.dumps(rows(text)))
    source = read_source(file)
    sections = report.sections([source])
    yield "tables", f"{table.one_line_each(source.rows)}\n\n{page.tables(sections)}"
    yield "page", page.page(sections, [source], text)
    for read in (Plan.load, read_source):
        try:
            read(folder / text)
        except UserError as error:
            yield "error", str(error)


def check(where: str, text: str, harmless: str) -> None:
    """Raise AssertionError where a text steers, or is more than a harmless one in its place."""
    problem = steering(text)
    assert problem is None, problem
    if where == "page":
        tags, usual = Tags(text), Tags(harmless)
        assert tags.kinds <= usual.kinds, f"other tags: {sorted(tags.kinds - usual.kinds)[:3]}"
        assert tags.scripts == usual.scripts, f"{tags.scripts} scripts"
    if where == "error":
        assert len(text.splitlines()) == 1 and len(text) < 1100, "no line"
    if where == "tables":
        for lines in re.findall(r"(?:^\|.*\n?)+", text, re.M):
            assert len({len(CELL_END.findall(line)) for line in lines.splitlines()}) == 1, "another number of cells"
    if where == "card":
        code = re.search(r"^```python\n(.*?)\n```$", text, re.M | re.S)
        compile(code[1], "card", "exec")
        body = text.split("---\n", 2)[2].replace(code[0], "")
        assert not re.search(r"<script|<img|^```", re.sub(r"(?<!\\)`[^`\n]*`", "", body), re.M), "markup"


class Bomb:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def unpickled(folder: Path, pipe) -> list[str]:
    """Return which of the ways to read a stranger's file run what it holds."""
    target, found = folder / "unpickled", []
    bare, packed = pickle.dumps(Bomb(target)), folder / "list.pt"
    torch.save({"mask": Bomb(target)}, packed)
    zipped = packed.read_bytes()
    for content in (bare, zipped):
        for name, read in {
            "plan.json": Plan.load,
            "rows.json": read_source,
            "list.pt": lambda path: ertacache.import_schedule(pipe, path, **CALL),
            "list.json": lambda path: ertacache.import_schedule(pipe, path, **CALL),
        }.items():
            (folder / name).write_bytes(content)
            (folder / "plan.safetensors").write_bytes(content)
            with contextlib.suppress(UserError):
                read(folder / name)
                found.append(f"{name} was read")
            if target.exists():
                found.append(f"{name} was unpickled")
                target.rmdir()
    return found


def strangers(count: int, seed: int) -> tuple[str, list[tuple]]:
    """Show random texts in all places; read files that run something if unpickled. Return the table's line, faults."""
    rng, faults, places = random.Random(seed), [], 0
    plans = [Plan.load(FOLDER / "cache" / f"{name}.json") for name in SHIPPED]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        media.save_png(folder / "a.png", Image.new("RGB", (8, 8)))
        usual = [dict(shown("harmless", plan, folder)) for plan in plans]
        for number in range(count):
            text = "".join(rng.choices(PIECES, k=rng.choice([1, 2, 5, 20])))
            where, plan = "", number % len(plans)
            try:
                for where, found in shown(text, plans[plan], folder):
                    check(where, found, usual[plan][where])
                    places += 1
            except Exception as error:
                faults.append((number, f"after {where or 'nothing'}", f"{type(error).__name__}: {str(error)[:120]!r}"))
        faults += [("unpickled", problem) for problem in unpickled(folder, pipeline())]
    return f"{count} texts in {places} places; 8 pickles in place of plans, rows and lists", faults
