"""Errors that a person caused and can mend: one clear line, exit code 2."""

import argparse
import sys
import textwrap
import warnings
from collections.abc import Callable


class UserError(ValueError):
    """Wrong input. The message names the value and the remedy, on one line."""


class PlanError(UserError):
    """A plan that is damaged, or was not made for what it is asked to do."""


def reason_of(error: Exception) -> str:
    """What another library's error says, short and on one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" …")


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, like all others."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def run_program(main: Callable[[], None]) -> None:
    """Run a command's `main`; a UserError becomes one line on stderr and exit code 2, warnings one line each."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; a calibration goes on from its last finished batch", file=sys.stderr)
        sys.exit(130)
