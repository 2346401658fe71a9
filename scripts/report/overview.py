"""Print one table of what all methods reach: a line per model folder and speed-up.

    .venv/bin/python scripts/report/overview.py runs/all.json
    .venv/bin/python scripts/report/overview.py runs/all.json --of latency

Of quality: PSNR to the uncached run, mean / 10th percentile / worst / share below 30 dB, of the rows that reach nine
tenths of the target speed-up in FLOPs; of several settings of a method (threshold plans cache at two sites), and of all
methods that are no plans of ours, the best by the mean. Of latency: the measured speed-up of the loop, and that in
FLOPs.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

from pathlib import Path

from ertacache.cli.arguments import ArgumentParser
from ertacache.evaluation import report, table
from ertacache.evaluation.ranking import is_ours, reaches
from ertacache.evaluation.rows import read_source
from ertacache.utils.errors import run_program
from ertacache.utils.tables import MISSING, escaped, markdown

OTHERS = "best other method"
METHODS = ("budget", "ertacache", OTHERS, "teacache", "fewer-steps", "fewer-steps-tuned", "least-squares")


def best_of_each(rows: list[dict], target: float) -> list[dict | None]:
    """Return the best row of each of METHODS, among those that reach the target speed-up."""
    rows = [row for row in rows if row["asked"] == target and reaches(row, target) and row["psnr"] is not None]
    groups = [
        [row for row in rows if row["method"] == name or (name == OTHERS and not is_ours(row))] for name in METHODS
    ]
    return [max(group, key=lambda row: row["psnr"], default=None) for group in groups]


def text(row: dict | None, of: str, first: float, named: bool) -> str:
    """Return a cell. first: the best mean of its line; named: whether it names the method."""
    if row is None:
        return MISSING
    name = f" ({table.title_of(row)})" if named else ""
    if of == "latency":
        return table.latency(row) + name
    shown = f"{table.tail(row)} / {table.percent(row['below_30db'])}"
    return (f"**{shown}**" if row["psnr"] == first else shown) + name


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROWS.json", help="written by scripts/evaluate.py --json")
    parser.add_argument("--of", choices=("quality", "latency"), default="quality", help="what the table is of")
    args = parser.parse_args()
    sections = report.sections([read_source(path) for path in args.rows])
    asked = [(section, target) for section in sections for target in section.targets]
    found = [best_of_each(section.methods, target) for section, target in asked]
    titles = [table.TITLES.get(name, name) for name in METHODS]
    shown = [n for n in range(len(titles)) if any(line[n] for line in found)]
    lines = []
    for (section, target), best in zip(asked, found, strict=True):
        first = max((row["psnr"] for row in best if row), default=0)
        cells = [text(best[n], args.of, first, titles[n] == OTHERS) for n in shown]
        lines.append([escaped(section.folder.removeprefix("ERTACache4")), f"{target:g}×", *cells])
    rows = [row for section in sections for row in section.rows]
    print(markdown(["demo", "speed-up", *(titles[n] for n in shown)], lines))
    print(f"\n{table.facts_of(rows)}")


if __name__ == "__main__":
    run_program(main)
