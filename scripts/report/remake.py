"""Make the tables of result pages anew: each is what the commands above it print.

    .venv/bin/python scripts/report/remake.py common/docs/results/flux.md
    .venv/bin/python scripts/report/remake.py common/docs/results/flux.md --only drift,ablation
    .venv/bin/python scripts/report/remake.py common/docs/results/*.md --list

Where a block of shell commands is followed by a Markdown table, the commands are run in the repository's root, and the
last table that they print takes the place of the page's, with the line in italics below it that says what was measured
on what and when. Rows that scripts/evaluate.py has finished are not measured again. The page is written after each
table; text is left alone, so read it afterwards: it may quote numbers.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ertacache import UserError
from ertacache.cli.arguments import ArgumentParser
from ertacache.utils.errors import reason_of, run_program
from ertacache.utils.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
TABLE = r"(?:\|.*\|\n)+"
FACTS = r"(?:\n\*[^*\n][^\n]*\*\n)?"
MEASURED = re.compile(rf"```sh\n(?P<commands>(?:(?!```).*\n)+?)```\n\n(?P<table>{TABLE}{FACTS})")


def tables(page: str) -> Iterator[tuple[str, re.Match]]:
    """Yield (heading above it, match) for each table that has commands."""
    for match in MEASURED.finditer(page):
        headings = re.findall(r"^#+ (.*)$", page[: match.start()], re.M)
        yield headings[-1] if headings else "", match


def printed(commands: str) -> str:
    """Run shell commands and return the last table that they print, with the line below it."""
    done = subprocess.run(["bash", "-ec", commands], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    found = re.findall(rf"^{TABLE}{FACTS}", done.stdout, re.M)
    if done.returncode or not found:
        raise UserError(f"no table from {commands.strip()!r} (exit code {done.returncode}): fix it, or the page")
    return found[-1]


def text_of(path: Path) -> str:
    """Return a page's text."""
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({reason_of(error)}): give Markdown files") from error


def remake(path: Path, only: list[str]) -> None:
    """Run the commands of a page and write their tables into it, one after another."""
    page = text_of(path)
    found = [(heading, match["commands"]) for heading, match in tables(page)]
    chosen = [each for each in found if not only or any(text.lower() in each[0].lower() for text in only)]
    if not chosen:
        raise UserError(f"{path}: no table below shell commands{' and such a heading' if only else ''}: see --list")
    for heading, commands in chosen:
        print(f"{path.name}: {heading}", file=sys.stderr)
        new = printed(commands)
        match = next(match for _, match in tables(page) if match["commands"] == commands)
        page = page[: match.start("table")] + new + page[match.end("table") :]
        write_atomically(path, page.encode())


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path, help="Markdown files")
    parser.add_argument("--only", metavar="TEXT,…", default="", help="only below headings that contain one of these")
    parser.add_argument("--list", action="store_true", help="print headings and commands, and run nothing")
    args = parser.parse_args()
    for path in args.pages:
        if not path.is_file():
            raise UserError(f"no page {path}: give Markdown files")
        if args.list:
            for heading, match in tables(text_of(path)):
                print(f"{path.name}: {heading}\n{match['commands']}")
        else:
            remake(path, [text for text in args.only.split(",") if text])


if __name__ == "__main__":
    run_program(main)
