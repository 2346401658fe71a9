"""User errors: one line, exit code 2."""

import sys
import textwrap
import warnings
from collections.abc import Callable


class UserError(ValueError):
    """Wrong input. The message names the value and the remedy, on one line."""


class PlanError(UserError):
    """A plan that is damaged, or does not fit the run."""


def reason_of(error: Exception) -> str:
    """Return the message of another library's error on one line, at most 160 characters."""
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" …")


def run_program(main: Callable[[], None]) -> None:
    """Run a command's `main` with one-line errors and warnings on stderr.

    Exit codes: 2 after a UserError, 130 after Ctrl-C.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes a calibration after its last finished batch", file=sys.stderr)
        sys.exit(130)
