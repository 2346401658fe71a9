"""Drawings of the report (page.py), by matplotlib; `section` is a `Section` of evaluation/report.py."""

import io
import math
import re
from html import escape

from ertacache.evaluation import report
from ertacache.evaluation.ranking import OUR_FAMILIES, TITLES, is_ours, speedup
from ertacache.utils.errors import printable

PLOTTED = ("psnr", "ssim", "exact_psnr")
AXES = {"flops": "speed-up by FLOPs", "latency": "measured latency speed-up"}
MARKERS = "o^svDPX<>phd*8"
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
# Marked colours of matplotlib → CSS variables. c0 and c1: our methods; c2 to c7: others.
COLOURS = {f"#0000a{i}": f"var(--c{i})" for i in range(10)}
COLOURS |= {"#0000b0": "var(--ink)", "#0000b1": "var(--line)", "#0000b2": "var(--page)"}
INK, LINE, GROUND = "#0000b0", "#0000b1", "#0000b2"
TEXT = {"textcoords": "offset points", "fontsize": 8.5, "zorder": 5}
SSIM_TICKS = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999, 0.99999, 0.999999)


def towards_one(ssim: float) -> float:
    """Return −log10(1 − SSIM), at most 6: 0.9, 0.99 and 0.999 are equally far apart."""
    return -math.log10(max(1 - ssim, 1e-6))


def style(number: int, rows: list[dict]) -> dict:
    """Return the marker, dash and colour of a curve: thick and filled for our methods, thin and hollow for others.

    Args:
        number: Of the curve in its section.
        rows: The curve's points.
    """
    ours = is_ours(rows[0])
    colour = f"#0000a{OUR_FAMILIES.index(rows[0]['family']) if ours else 2 + number % 6}"
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
    """Return a matplotlib figure and its axes, in marked colours, which `svg` replaces by CSS variables.

    Args:
        width: In inches.
        height: In inches.
        **options: Of `Figure.subplots`.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.fonttype": "none", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK))
    rcParams.update({"axes.edgecolor": INK, "grid.color": LINE, "grid.linewidth": 0.7, "axes.axisbelow": True})
    drawing = Figure(figsize=(width, height), layout="constrained")
    return drawing, drawing.subplots(**options)


def svg(drawing, name: str, alt: str) -> str:
    """Return the drawing as an inline <svg>: scalable, in the page's CSS variables, without ids that could clash.

    Args:
        drawing: The figure.
        name: Salt of the remaining ids.
        alt: Alternative text.
    """
    from matplotlib import rcParams

    rcParams["svg.hashsalt"] = printable(name)
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*_\d+"', "<g", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for marked, variable in COLOURS.items():
        text = text.replace(marked, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(printable(alt))}"', 1)


def plot(section, metric: str, axis: str) -> str | None:
    """Draw quality against speed-up, one curve per method.

    Args:
        section: Rows of one model.
        metric: A quality in PLOTTED.
        axis: "flops" or "latency".

    Returns:
        An <svg>, or None when nothing was measured.
    """
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
    alt = f"{section.folder}: {TITLES[metric]} against {AXES[axis]}, one curve per method; the values are in the tables"
    return svg(drawing, f"{section.folder}-{section.model}-{metric}-{axis}", alt)


def label_starts(axes, starts: list[tuple]) -> None:
    """Write the names of our curves to the right of their first points, without overlap."""
    height, y_label = axes.get_ylim()[1] - axes.get_ylim()[0], math.inf
    for x, y, name in sorted(starts, key=lambda start: -start[1]):
        y_label = min(y, y_label - 0.07 * height)
        axes.annotate(printable(name), (x, y_label), (7, 2), weight="bold", parse_math=False, **TEXT)


def timeline(section, row: dict, number: int) -> dict:
    """Draw which steps of a plan's grid are computed, and the error at each of them; return template variables."""
    sigmas, computed, error = (row["timeline"][name] for name in ("sigmas", "computed", "error"))
    steps = len(sigmas) - 1
    drawing, (above, below) = figure(4.3, 1.7, nrows=2, sharex=True, height_ratios=(4, 1))
    points = [(i, e) for i, e in zip(computed, error or computed, strict=True) if error and e > 0]
    if points:
        above.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color="#0000a0")
        above.set(yscale="log", ylabel="error")
        above.grid(True, axis="y")
    else:
        above.text(0.5, 0.5, "no error on this grid", ha="center", transform=above.transAxes)
        above.set_yticks([])
    below.vlines(range(steps), 0, 0.35, color=INK, linewidth=0.8)
    below.bar(computed, 1, width=max(0.7, steps / 90), color="#0000a0")
    below.set(yticks=[], ylim=(0, 1), xlim=(-1, steps))
    below.set_xlabel(f"step (noise level {sigmas[0]:.3g} to {sigmas[-1]:.3g})")
    below.spines["left"].set_visible(False)
    alt = f"{row['label']}: {len(computed)} of {steps} steps are computed: {', '.join(map(str, computed))}"
    name = f"{section.folder}-{section.model}-timeline-{number}"
    return {"row": row, "svg": svg(drawing, name, alt), "steps": steps}


def legend(section) -> list[dict]:
    """Return the legend: name and swatch of each curve."""
    entries = []
    for number, (name, rows) in enumerate(report.curves(section).items()):
        drawing, axes = figure(0.5, 0.2)
        axes.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], **style(number, rows))
        axes.set_axis_off()
        swatch = svg(drawing, f"{section.folder}-{section.model}-swatch-{number}", f"marker of {name}")
        entries.append({"name": name, "ours": is_ours(rows[0]), "svg": swatch})
    return entries


FAMILIES = {  # colour and name of each family in `overview`
    "budget": ("#0b5fd0", "budget plans"),
    "ertacache": ("#0a7d4f", "threshold plans (the paper's)"),
    "peer": ("#9a9a9a", "other caches"),
    "steps": ("#c98a2b", "fewer steps and other solvers"),
}


def overview(sections, metric: str = "psnr") -> bytes:
    """Return a PNG of quality against speed-up: one panel per model folder, one line per method, coloured by family."""
    from matplotlib import style as styles
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    styles.use("default")
    drawing = Figure(figsize=(3.7 * len(sections), 3.6), layout="constrained", facecolor="white")
    panels = drawing.subplots(1, len(sections), squeeze=False)[0]
    for panel, section in zip(panels, sections, strict=True):
        for name, rows in report.curves(section).items():
            if name == "budget-exact" and not metric.startswith("exact"):
                continue  # its target is not the uncached run
            points = sorted((speedup(row), row[metric]) for row in rows if row.get(metric) is not None)
            ours, (colour, _) = is_ours(rows[0]), FAMILIES[rows[0]["family"]]
            line = {"color": colour, "linewidth": 2.4 if ours else 1, "markersize": 5 if ours else 3}
            panel.plot(*zip(*points, strict=True), marker="o", zorder=3 + ours, **line)
        panel.set_title(printable(section.folder.removeprefix("ERTACache4")), parse_math=False)
        panel.set_xlabel("speed-up in FLOPs, ×")
        panel.grid(True, linewidth=0.5, color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(TITLES[metric])
    lines = [Line2D([], [], color=colour, marker="o", label=name) for colour, name in FAMILIES.values()]
    drawing.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
