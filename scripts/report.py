"""Make one HTML file, which needs no network, and markdown tables from the rows of scripts/evaluate.py.

    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods budget --speedups 2,3 --samples 4 --json flux.json
    .venv/bin/python scripts/report.py flux.json wan.json --out report.html --markdown tables.md

For each model folder: quality against speed-up, the steps that each plan computes, pictures or videos side by side,
tables with every method's place at each asked speed-up, and where and how the rows were measured. It needs the packages
of the extra `report`: `.venv/bin/pip install -c constraints.txt -e .[report]`.
"""

import base64
import hashlib
import io
import json
import math
import re
from html import escape
from importlib.util import find_spec
from pathlib import Path

from ertacache import UserError, report
from ertacache.errors import ArgumentParser, run_program
from ertacache.files import write_atomically
from ertacache.standing import OURS, TITLES, is_ours, markdown, speedup

PAGE = Path(__file__).resolve().parent / "page"
PLOTTED = ("psnr", "ssim", "exact_psnr")
AXES = {"flops": "speed-up by FLOPs", "latency": "measured latency speed-up"}
MARKERS = "o^svDPX<>phd*8"
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
COLOURS = {f"#0000a{i}": f"var(--c{i})" for i in range(10)}  # 0 and 1: ours; 2 to 7: others
COLOURS |= {"#0000b0": "var(--ink)", "#0000b1": "var(--line)", "#0000b2": "var(--page)"}
INK, LINE, GROUND = "#0000b0", "#0000b1", "#0000b2"
TEXT = {"textcoords": "offset points", "fontsize": 8.5, "zorder": 5}
SSIM_TICKS = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999, 0.99999, 0.999999)


def towards_one(ssim: float) -> float:
    """−log10(1 − SSIM), so that 0.9, 0.99, 0.999 are equally far apart; at most 6."""
    return -math.log10(max(1 - ssim, 1e-6))


def style(number: int, rows: list[dict]) -> dict:
    """Marker, dash and colour of a curve: ours thick and filled, others thin and hollow."""
    ours = is_ours(rows[0])
    colour = f"#0000a{OURS.index(rows[0]['family']) if ours else 2 + number % 6}"
    return {
        "color": colour,
        "marker": MARKERS[number % len(MARKERS)],
        "markerfacecolor": colour if ours else GROUND,
        "markersize": 6.5 if ours else 5.5,
        "linestyle": "-" if ours else DASHES[number % len(DASHES)],
        "linewidth": 2.4 if ours else 1.1,
        "zorder": 4 if ours else 3,
    }


def figure(width: float, height: float, **options):
    """A matplotlib figure (inches) and its axes; drawn in placeholder colours, which `svg` makes CSS variables."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.fonttype": "none", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK))
    rcParams.update({"axes.edgecolor": INK, "grid.color": LINE, "grid.linewidth": 0.7, "axes.axisbelow": True})
    drawing = Figure(figsize=(width, height), layout="constrained")
    return drawing, drawing.subplots(**options)


def svg(drawing, name: str, alt: str) -> str:
    """An <svg> for inlining: scalable, without ids that two drawings share, colours as the page's CSS variables."""
    from matplotlib import rcParams

    rcParams["svg.hashsalt"] = name
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*_\d+"', "<g", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for placeholder, variable in COLOURS.items():
        text = text.replace(placeholder, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def plot(section, metric: str, axis: str) -> str | None:
    """Quality against speed-up, a curve a method; None when nothing was measured."""
    x_of = speedup if axis == "flops" else lambda row: row.get("speedup_latency")
    y_of = (lambda row: towards_one(row[metric])) if metric == "ssim" else lambda row: row[metric]
    drawing, axes = figure(4.3, 3.1)
    starts = []
    for number, (name, rows) in enumerate(report.curves(section).items()):
        points = sorted((x_of(row), y_of(row)) for row in rows if None not in (x_of(row), row.get(metric)))
        if points:
            axes.plot(*zip(*points, strict=True), **style(number, rows))
            starts += [(*points[0], name)] if is_ours(rows[0]) else []
    if not axes.lines:
        return None
    uncached = section.uncached and section.uncached.get(metric)
    if uncached is not None:
        axes.axhline(uncached, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate("uncached", (1, uncached), (-2, 2), xycoords=("axes fraction", "data"), ha="right", **TEXT)
    axes.set(xlabel=f"{AXES[axis]}, ×", ylabel=TITLES[metric])
    axes.margins(x=0.06, y=0.08)
    axes.grid(True)
    if metric == "ssim":
        low, high = axes.get_ylim()
        ticks = [tick for tick in SSIM_TICKS if low <= towards_one(tick) <= high]
        axes.set_yticks([towards_one(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    label_starts(axes, starts)
    alt = f"{section.folder}: {TITLES[metric]} against {AXES[axis]}, a curve a method; the values are in the tables"
    return svg(drawing, f"{section.folder}-{section.model}-{metric}-{axis}", alt)


def label_starts(axes, starts: list[tuple]) -> None:
    """The name of each of our curves, right of its first point, none over another."""
    height, at = axes.get_ylim()[1] - axes.get_ylim()[0], math.inf
    for x, y, name in sorted(starts, key=lambda start: -start[1]):
        at = min(y, at - 0.07 * height)
        axes.annotate(name, (x, at), (7, 2), weight="bold", parse_math=False, **TEXT)


def timeline(section, row: dict, number: int) -> dict:
    """Which steps of a plan's grid are computed, and the error at each of them."""
    found = row["timeline"]
    steps, computed, error = len(found["sigmas"]) - 1, found["computed"], found["error"]
    drawing, (above, below) = figure(4.3, 1.7, nrows=2, sharex=True, height_ratios=(4, 1))
    shown = [(i, e) for i, e in zip(computed, error or computed, strict=True) if error and e > 0]
    if shown:
        above.plot(*zip(*shown, strict=True), marker="o", markersize=3.5, color="#0000a0")
        above.set(yscale="log", ylabel="error")
        above.grid(True, axis="y")
    else:
        above.text(0.5, 0.5, "no error on this grid", ha="center", transform=above.transAxes)
        above.set_yticks([])
    below.vlines(range(steps), 0, 0.35, color=INK, linewidth=0.8)
    below.bar(computed, 1, width=max(0.7, steps / 90), color="#0000a0")
    below.set(yticks=[], ylim=(0, 1), xlim=(-1, steps))
    below.set_xlabel(f"step (noise level {found['sigmas'][0]:.3g} to {found['sigmas'][-1]:.3g})")
    below.spines["left"].set_visible(False)
    alt = f"{row['label']}: {len(computed)} of {steps} steps are computed: {', '.join(map(str, computed))}"
    name = f"{section.folder}-{section.model}-timeline-{number}"
    return {"row": row, "svg": svg(drawing, name, alt), "steps": steps}


def legend(section) -> list[dict]:
    """A swatch a curve."""
    entries = []
    for number, (name, rows) in enumerate(report.curves(section).items()):
        drawing, axes = figure(0.5, 0.2)
        axes.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], **style(number, rows))
        axes.set_axis_off()
        swatch = svg(drawing, f"{section.folder}-{section.model}-swatch-{number}", f"marker of {name}")
        entries.append({"name": name, "ours": is_ours(rows[0]), "svg": swatch})
    return entries


class Media:
    """Pictures and videos in base64, each content once."""

    def __init__(self):
        self.entries: list[dict] = []
        self.known: dict[bytes, int] = {}

    def add(self, path: Path) -> int:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read sample {path} ({error.strerror}): mend its permissions") from error
        if data not in self.known:
            self.known[data] = len(self.entries)
            self.entries.append({"type": report.MEDIA[path.suffix], "data": base64.b64encode(data).decode()})
        return self.known[data]


def samples(section, media: Media) -> dict | None:
    """Pictures or videos of each method at each of its settings, beside the uncached ones; None without any.

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
    """A row in one line: asked and reached speed-up, label, PSNR."""
    asked = "" if row["asked"] is None else f"{row['asked']:g}× asked, "
    psnr = "" if row.get("psnr") is None else f", {row['psnr']:.1f} dB"
    return f"{asked}{speedup(row):.2f}× reached: {row['label']}{psnr}"


def view(section, media) -> dict:
    """All that the template shows of a model folder."""
    asked = [*section.asked, *([None] if any(row["asked"] is None for row in section.methods) else [])]
    plans = [row for rows in report.curves(section).values() for row in rows if row.get("timeline")]
    return {
        "section": section,
        "tables": [report.table(section, value) for value in asked],
        "verdicts": {value: report.verdicts(section, value) for value in section.asked},
        "plots": {axis: {report.plain(m): plot(section, m, axis) for m in PLOTTED} for axis in AXES},
        "legend": legend(section),
        "timelines": [timeline(section, row, number) for number, row in enumerate(plans)],
        "samples": samples(section, media),
        "provenance": report.provenance(section),
    }


def page(sections, sources, title: str) -> str:
    """The HTML; its only script is allowed by its hash, and no rule lets it reach a network."""
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


def tables(sections) -> str:
    """Markdown, a table for each folder and asked speed-up."""
    parts = []
    for section in sections:
        facts = section.rows[0]
        where = f"{facts['prompts']} prompts, {facts['machine']}, {facts['date']}"
        parts += [f"## {section.folder}, {section.model}", f"{where}. Bold: the best among the rows with a place."]
        for asked in section.asked:
            rows = [row for row in section.methods if row["asked"] == asked]
            parts += [f"### {asked:g}×", markdown(rows, list(report.TABLE)), *report.notes(rows)]
    return "\n\n".join(parts) + "\n"


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROWS.json", help="written by scripts/evaluate.py --json")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--title", default="ERTACache: what was measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as markdown")
    args = parser.parse_args()
    for path in filter(None, (args.out, args.markdown)):
        if not path.parent.is_dir() or path.is_dir():
            raise UserError(f"cannot write {path}: name a file in a folder that exists")
    absent = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if absent:
        raise UserError(f"{', '.join(absent)} is not installed: .venv/bin/pip install -c constraints.txt -e .[report]")
    sources = [report.read_source(path) for path in args.rows]
    sections = report.sections(sources)
    html = page(sections, sources, args.title).encode()
    if args.markdown:
        write_atomically(args.markdown, tables(sections).encode())
    write_atomically(args.out, html)
    print(
        f"{args.out}: {len(html) / 2**20:.1f} MiB, {sum(len(s.rows) for s in sources)} rows of {len(sections)} models"
    )


if __name__ == "__main__":
    run_program(main)
