"""Make one HTML file, which needs no network, and markdown tables from the rows of scripts/evaluate.py.

    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods budget --speedups 2,3 --samples 4 --json flux.json
    .venv/bin/python scripts/report/report.py flux.json wan.json --out report.html --markdown tables.md

For each model folder: quality against speed-up, the steps that each plan computes, images or videos side by side,
tables with every method's place at each target speed-up, and where and how the rows were measured. It needs the
packages of the extra `report`: `.venv/bin/pip install -c constraints.txt -e .[report]`.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import base64
import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

from ertacache import UserError
from ertacache.cli.arguments import ArgumentParser
from ertacache.evaluation import report
from ertacache.evaluation.plots import AXES, PLOTTED, legend, overview, plot, timeline
from ertacache.evaluation.ranking import is_ours, markdown, speedup
from ertacache.evaluation.rows import MEDIA, read_source
from ertacache.utils.errors import run_program
from ertacache.utils.files import write_atomically
from ertacache.utils.tables import MISSING, escaped
from ertacache.utils.tables import markdown as markdown_table

PAGE = Path(__file__).resolve().parent / "page"


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
    """Images or videos of each method at each of its settings, beside the uncached ones; None without any.

    Prompts are those of the uncached run that the method has too, each by its number in `prompts`.
    """
    uncached = next((row for row in section.rows if row["method"] == "none" and row["samples"]), None)
    if uncached is None:
        return None
    prompts = uncached["sample_prompts"]
    reference = [media.add(path) for path in uncached["samples"]]
    methods = []
    for name, rows in report.curves(section).items():
        runs = [{"name": setting(row), "samples": of_prompts(row, prompts, media)} for row in rows if row["samples"]]
        runs = [run for run in runs if run["samples"]]
        if runs:
            methods.append({"name": name, "ours": is_ours(rows[0]), "runs": runs})
    return {"prompts": prompts, "uncached": reference, "methods": methods} if methods else None


def of_prompts(row: dict, prompts: list[str], media: Media) -> dict[int, int]:
    pairs = zip(row["sample_prompts"], row["samples"], strict=True)
    return {prompts.index(prompt): media.add(path) for prompt, path in pairs if prompt in prompts}


def setting(row: dict) -> str:
    """Return a row in one line: target and reached speed-up, label, PSNR."""
    asked = "" if row["asked"] is None else f"{row['asked']:g}× asked, "
    psnr = "" if row.get("psnr") is None else f", {row['psnr']:.1f} dB"
    return f"{asked}{speedup(row):.2f}× reached: {row['label']}{psnr}"


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


def page(sections, sources, title: str) -> str:
    """Return the HTML; its only script is allowed by its hash, and no rule lets it reach a network."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    media = Media()
    script = (PAGE / "page.js").read_text("utf-8")
    rows = [{**row, "samples": [path.name for path in row["samples"]]} for source in sources for row in source.rows]
    return environment.get_template("page.html.jinja").render(
        title=title,
        views=[view(section, media) for section in sections],
        media=media.entries,
        style=(PAGE / "page.css").read_text("utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        rows=base64.b64encode(json.dumps(rows, indent=1).encode()).decode(),
        axes=AXES,
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
        where = escaped(f"{facts['prompts']} prompts, {facts['machine']}, {facts['date']}")
        parts += [f"## {escaped(f'{section.folder}, {section.model}')}"]
        parts += [f"{where}. Bold: the best among the rows with a place."]
        for target in section.targets:
            rows = [row for row in section.methods if row["asked"] == target]
            parts += [f"### {target:g}×", markdown(rows, list(report.TABLE)), *report.notes(rows)]
    return "\n\n".join(parts) + "\n"


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROWS.json", help="written by scripts/evaluate.py --json")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--title", default="ERTACache: what was measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as markdown")
    parser.add_argument(
        "--image", type=Path, metavar="FILE.png", help="also draw PSNR against speed-up, a panel a model"
    )
    args = parser.parse_args()
    for path in filter(None, (args.out, args.markdown, args.image)):
        if not path.parent.is_dir() or path.is_dir():
            raise UserError(f"cannot write {path}: name a file in a folder that exists")
    absent = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if absent:
        raise UserError(f"{', '.join(absent)} is not installed: .venv/bin/pip install -c constraints.txt -e .[report]")
    sources = [read_source(path) for path in args.rows]
    sections = report.sections(sources)
    html = page(sections, sources, args.title).encode()
    if args.markdown:
        write_atomically(args.markdown, tables(sections).encode())
    if args.image:
        write_atomically(args.image, overview(sections))
    write_atomically(args.out, html)
    print(
        f"{args.out}: {len(html) / 2**20:.1f} MiB, {sum(len(s.rows) for s in sources)} rows of {len(sections)} models"
    )


if __name__ == "__main__":
    run_program(main)
