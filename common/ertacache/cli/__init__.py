"""The command line for people without a clone: `ertacache calibrate | inspect | plans | generate | evaluate`.

Importing this package imports neither torch nor diffusers; each command imports what it needs.
"""

import sys

from ertacache.utils.errors import UserError, run_program

INTERRUPTED = 130  # what typer makes of Ctrl-C


def main() -> None:
    run_program(_main)


def _main() -> None:
    from typer import BadParameter

    from ertacache.cli.commands import app

    UsageError = BadParameter.__base__
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without λ or × shows ? there
    try:
        code = app(standalone_mode=False)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        command = error.ctx.command_path if error.ctx else "ertacache"
        raise UserError(f"{error.format_message().rstrip('.')} (see {command} --help)") from None
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    sys.exit(code or 0)
