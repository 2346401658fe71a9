"""Make one HTML file, which needs no network, and markdown tables from the rows of scripts/evaluate.py.

    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods budget --speedups 2,3 --samples 4 --json flux.json
    .venv/bin/python scripts/report/report.py flux.json wan.json --out report.html --markdown tables.md

For each model folder: quality against speed-up, the steps that each plan computes, images or videos side by side,
tables with every method's place at each target speed-up, and where and how the rows were measured. It needs the
packages of the extra `report`: `.venv/bin/pip install -c constraints.txt -e .[report]`.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

from pathlib import Path

from ertacache import UserError
from ertacache.cli.arguments import ArgumentParser
from ertacache.evaluation import report
from ertacache.evaluation.page import missing_packages, page, tables
from ertacache.evaluation.plots import overview
from ertacache.evaluation.rows import read_source
from ertacache.utils.errors import run_program
from ertacache.utils.files import write_atomically
from ertacache.utils.words import counted


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROWS.json", help="written by scripts/evaluate.py --json")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="HTML file to write")
    parser.add_argument("--title", default="ERTACache: what was measured", help="of the page")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as markdown")
    parser.add_argument(
        "--image", type=Path, metavar="FILE.png", help="also draw PSNR against speed-up, a panel a model"
    )
    args = parser.parse_args()
    for path in filter(None, (args.out, args.markdown, args.image)):
        if not path.parent.is_dir() or path.is_dir():
            raise UserError(f"cannot write {path}: name a file in a folder that exists")
    absent = missing_packages()
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
    rows, models = counted(sum(len(s.rows) for s in sources), "row"), counted(len(sections), "model")
    print(f"{args.out}: {len(html) / 2**20:.1f} MiB, {rows} of {models}")


if __name__ == "__main__":
    run_program(main)
