"""The command line for people without a clone: `ertacache calibrate | inspect | generate | evaluate`.

Importing this package imports neither torch nor diffusers; each command imports what it needs.
"""

import sys

from ertacache.utils.errors import run_program


def main() -> None:
    run_program(_main)


def _main() -> None:
    from ertacache.cli.commands import app

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without λ or × shows ? there
    app()
