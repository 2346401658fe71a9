"""The report as one HTML file, which needs no network, and as Markdown tables.

For each model: quality against speed-up, the steps that each plan computes, images or videos side by side, tables with
every method's place at each target speed-up, and where and how the rows were measured. The page needs the packages of
the extra `report`, the tables do not.
"""

import base64
import hashlib
import json
import textwrap
from importlib.util import find_spec
from pathlib import Path

from ertacache.evaluation import report
from ertacache.evaluation.plots import AXES, PLOTTED, legend, plot, timeline
from ertacache.evaluation.ranking import is_ours, markdown, speedup
from ertacache.evaluation.rows import MEDIA
from ertacache.utils.errors import UserError, printable
from ertacache.utils.tables import MISSING, escaped
from ertacache.utils.tables import markdown as markdown_table
from ertacache.utils.words import counted

TEMPLATES = Path(__file__).resolve().parent / "templates"
WIDTH = 100  # of prose in Markdown


def missing_packages() -> list[str]:
    """Return which packages of the extra `report` are not installed."""
    return [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]


class Media:
    """Images and videos in base64, each content once."""

    def __init__(self):
        self.entries: list[dict] = []
        self.known: dict[bytes, int] = {}

    def add(self, path: Path) -> int:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read sample {path} ({error.strerror}): fix its permissions") from error
        if data not in self.known:
            self.known[data] = len(self.entries)
            self.entries.append({"type": MEDIA[path.suffix], "data": base64.b64encode(data).decode()})
        return self.known[data]


def samples(section, media: Media) -> dict | None:
    """Return images or videos of each method at each of its settings, and of the uncached run; None if there are none.

    Prompts are those of the uncached run that the method has too, each by its number in `prompts`.
    """
    uncached = next((row for row in section.rows if row["method"] == "none" and row["samples"]), None)
    if uncached is None:
        return None
    prompts = uncached["sample_prompts"]
    reference = [media.add(path) for path in uncached["samples"]]
    methods = []
    for name, rows in report.curves(section).items():
        shown = [(printable(setting(row)), of_prompts(row, prompts, media)) for row in rows if row["samples"]]
        runs = [{"name": text, "samples": numbers} for text, numbers in shown if numbers]
        if runs:
            methods.append({"name": printable(name), "ours": is_ours(rows[0]), "runs": runs})
    return {"prompts": [*map(printable, prompts)], "uncached": reference, "methods": methods} if methods else None


def of_prompts(row: dict, prompts: list[str], media: Media) -> dict[int, int]:
    pairs = zip(row["sample_prompts"], row["samples"], strict=True)
    return {prompts.index(prompt): media.add(path) for prompt, path in pairs if prompt in prompts}


def setting(row: dict) -> str:
    """Return a row in one line: target and reached speed-up, label, PSNR."""
    asked = "" if row["asked"] is None else f"{row['asked']:g}× asked, "
    psnr = "" if row.get("psnr") is None else f", {row['psnr']:.1f} dB"
    return f"{asked}{speedup(row):.2f}× reached: {row['label']}{psnr}"


def cleaned(value):
    """Return what the template shows: of texts, which may be a stranger's, without control characters."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def view(section, media) -> dict:
    """Return what the template shows of a model folder."""
    targets = [*section.targets, *([None] if any(row["asked"] is None for row in section.methods) else [])]
    ours = [row for rows in report.curves(section).values() for row in rows if is_ours(row)]
    return {
        "section": section,
        "tables": [report.table(section, value) for value in targets],
        "verdicts": {value: report.verdicts(section, value) for value in section.targets},
        "plots": {axis: {report.plain(m): plot(section, m, axis) for m in PLOTTED} for axis in AXES},
        "legend": legend(section),
        "timelines": [timeline(section, row, n) for n, row in enumerate(ours) if row.get("timeline")],
        "samples": samples(section, media),
        "provenance": report.provenance(section),
    }


def page(sections, sources, title: str, measured_by: str = "scripts/evaluate.py") -> str:
    """Return the HTML; its only script is allowed by its hash, and no rule lets it reach a network.

    Args:
        sections: The sources' rows, grouped.
        sources: Files of rows.
        title: Of the page.
        measured_by: The command that the rows come from.
    """
    import jinja2

    options = {"autoescape": True, "finalize": cleaned, "undefined": jinja2.StrictUndefined, "trim_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), **options)
    media = Media()
    script = (TEMPLATES / "page.js").read_text("utf-8")
    rows = [{**row, "samples": [path.name for path in row["samples"]]} for source in sources for row in source.rows]
    return environment.get_template("page.html.jinja").render(
        title=title,
        measured_by=measured_by,
        views=[view(section, media) for section in sections],
        media=media.entries,
        style=(TEMPLATES / "page.css").read_text("utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        rows=base64.b64encode(json.dumps(rows, indent=1).encode()).decode(),
        axes=AXES,
        half=report.HALF,
    )


def summary(sections: list[report.Section]) -> str:
    """Return a Markdown table: who is first at each speed-up, and the margin of our budget plans."""
    head = ["model", "asked", "by", "first", "value", "our best place", "− best other cache", "− best of all others"]
    lines = []
    for section in sections:
        for target in section.targets:
            for verdict in report.verdicts(section, target):
                first = ", ".join(escaped(row["label"]) for row, _ in verdict["first"])
                place = f"{verdict['ours'][0] if verdict['ours'] else MISSING} of {verdict['of']}"
                leads = [report.lead(section, target, verdict["metric"], others=("peer",)), verdict["margin"]]
                model = escaped(section.folder).removeprefix("ERTACache4")
                lines.append([model, f"{target:g}×", verdict["title"], first, verdict["first"][0][1], place, *leads])
    return markdown_table(head, lines)


def tables(sections) -> str:
    """Return Markdown: who is first, and a table for each folder and target speed-up."""
    parts = ["## Who is first", "Differences are those of our best budget plan.", summary(sections)]
    for section in sections:
        facts = section.rows[0]
        where = escaped(f"{counted(facts['prompts'], 'prompt')}, {facts['machine']}, {facts['date']}")
        parts += [f"## {escaped(f'{section.folder}, {section.model}')}"]
        parts += [f"{where}. Bold: the best among the rows with a place."]
        if section.hardness is not None:
            parts += [f"How hard it is: fewer steps at {report.HALF}× reach {section.hardness:.1f} dB."]
        for target in section.targets:
            rows = [row for row in section.methods if row["asked"] == target]
            empty = {name for name in report.TABLE[:-1] if all(row.get(name) is None for row in rows)}
            columns = [name for name in report.TABLE if name not in empty]
            notes = [escaped(note) for note in report.notes(rows)]  # wrapped where no word is a stranger's
            notes = [textwrap.fill(note, WIDTH) if note.startswith(MISSING) else note for note in notes]
            parts += [f"### {target:g}×", markdown(rows, columns), *notes]
    return "\n\n".join(parts) + "\n"
