"""Print how hard problems are, and how far budget plans lead on them; draw one against the other.

    .venv/bin/python scripts/report/hardness.py runs/hardness/*.json --figure common/docs/images/hardness.png

Each file holds the rows of one problem, of scripts/evaluate.py: a model folder at some guidance and number of steps. A
problem is as hard as it is to fewer steps: the mean PSNR that half of the uncached run's steps reach. The lead is the
mean PSNR of the budget plan, less that of the best method that is not ours among those that come within a tenth of the
target speed-up; least squares per step, our own code but another method, is among them.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import io
from dataclasses import dataclass
from pathlib import Path

from ertacache.cli.arguments import ArgumentParser
from ertacache.evaluation import table
from ertacache.evaluation.ranking import OTHER_FAMILIES, ranking
from ertacache.evaluation.report import Section, comparable, sections
from ertacache.evaluation.rows import Row, read_source
from ertacache.utils.errors import UserError, run_program
from ertacache.utils.files import check_file, write_atomically
from ertacache.utils.tables import MISSING, markdown

HALF = 2  # the speed-up at which hardness is measured


@dataclass(frozen=True)
class Problem:
    """A model folder at some settings.

    Attributes:
        name: Of the folder, with its model if that is not the demo.
        steps: T.
        guidance: Of the run.
        hardness: Mean PSNR in dB of fewer steps at 2×; lower is harder.
        best: (budget plan, best other method) by target speed-up; None where no row reaches the speed-up.
    """

    name: str
    steps: int
    guidance: float
    hardness: float
    best: dict[float, tuple[Row | None, Row | None]]


def problem_of(section: Section, name: str) -> Problem:
    """Return the problem whose rows these are. name: of its file, for the refusal."""
    settings = comparable(section.rows[0])
    half = [row for row in section.methods if row["method"] == "fewer-steps" and row["asked"] == HALF]
    if not half or half[0]["psnr"] is None:
        raise UserError(f"{name} has no row of fewer steps at {HALF}×: measure it with --methods fewer-steps,…")
    best = {}
    for target in section.targets:
        ranked = [row for _, row in ranking(section.rows, section.folder, target, "psnr")]
        ours = next((row for row in ranked if row["method"] == "budget"), None)
        best[target] = ours, next((row for row in ranked if row["family"] in OTHER_FAMILIES), None)
    title = section.folder.removeprefix("ERTACache4").replace("closed_form", "closed form")
    if section.model != "demo":
        title += f", {section.model}"
    return Problem(title, settings["T"], settings["guidance"], half[0]["psnr"], best)


def lead(pair: tuple[Row | None, Row | None]) -> float | None:
    """Return by how many dB the budget plan leads."""
    ours, theirs = pair
    return None if ours is None or theirs is None else ours["psnr"] - theirs["psnr"]


def lines(problems: list[Problem]) -> str:
    """Return a Markdown table, the hardest problem first."""
    rows = []
    for problem in sorted(problems, key=lambda problem: problem.hardness):
        head = [problem.name, f"{problem.steps}", f"{problem.guidance:g}", f"{problem.hardness:.1f}"]
        for target, (ours, theirs) in problem.best.items():
            cells = [MISSING if row is None else table.mean_and_tail(row) for row in (ours, theirs)]
            if theirs is not None:
                cells[1] += f" ({table.TITLES.get(theirs['method'], theirs['method'])})"
            ahead = lead((ours, theirs))
            if ahead is not None:
                cells[ahead < 0] = f"**{cells[ahead < 0]}**"
            shown = MISSING if ahead is None else f"{ahead:+.1f}".replace("-", "−")
            rows.append([*head, f"{target:g}×", *cells, shown])
    titles = ["problem", "T", "guidance", f"fewer steps at {HALF}×, dB", "speed-up", "budget plan"]
    return markdown([*titles, "best other method", "lead, dB"], rows)


def figure(problems: list[Problem]) -> bytes:
    """Return a PNG: the lead against hardness, one marker per problem and one colour per speed-up."""
    from matplotlib import style
    from matplotlib.figure import Figure

    style.use("default")
    drawing = Figure(figsize=(6.4, 3.8), layout="constrained", facecolor="white")
    axes = drawing.subplots()
    colours = ("#0b5fd0", "#0a7d4f", "#c98a2b", "#8a3fb0")
    targets = sorted({target for problem in problems for target in problem.best})
    for number, target in enumerate(targets):
        for closed, marker in ((False, "o"), (True, "^")):
            found = [p for p in problems if p.name.startswith("closed form") == closed]
            points = [(p.hardness, lead(p.best.get(target, (None, None)))) for p in found]
            points = [point for point in points if point[1] is not None]
            if points:
                label = f"{target:g}×, {'closed form' if closed else 'demos'}"
                colour = colours[number % len(colours)]
                axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel=f"PSNR of fewer steps at {HALF}×, dB (left: hard)", ylabel="lead of the budget plan, dB")
    axes.grid(True, linewidth=0.5, color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    drawing.legend(loc="outside right upper", frameon=False)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROWS.json", help="written by scripts/evaluate.py --json")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="where to write the figure")
    args = parser.parse_args()
    if args.figure:
        check_file(args.figure)
    sources = [read_source(path) for path in args.rows]
    problems = [problem_of(section, source.name) for source in sources for section in sections([source])]
    if args.figure:
        write_atomically(args.figure, figure(problems))
    rows = [row for source in sources for row in source.rows]
    counts = " or ".join(dict.fromkeys(str(row["prompts"]) for row in rows))
    print(f"{lines(problems)}\n\n{table.facts(f'{counts} prompts', day=max(row['date'] for row in rows))}")


if __name__ == "__main__":
    run_program(main)
