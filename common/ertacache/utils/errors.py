"""User errors: one line, exit code 2."""

import contextlib
import errno
import os
import re
import reprlib
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator

LONGEST = 1000  # characters of a message
OF_PATHS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP)  # what is wrong with a path that was given
LACK_OF_MEMORY = re.compile("OutOfMemoryError|can't allocate memory|out of memory")  # in torch's errors
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = SHORT.maxlist = 60


class UserError(ValueError):
    """Wrong input. The message names the value and the remedy, on one line without control characters."""

    def __init__(self, message: object = ""):
        text = str(message)
        if len(text) > LONGEST:  # the end has the remedy
            text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
        super().__init__(printable(text))


class PlanError(UserError):
    """A plan that is damaged, or does not fit the run."""


class CallFailed(UserError):
    """A pipeline's call that failed, mostly on a value that it cannot take; the cause is the pipeline's own error."""


class Stopped(Exception):
    """Ctrl-C, on its way through a library that would handle it."""


def printable(text: str, longest: int | None = None) -> str:
    """Return a text with escapes in the place of line breaks and of all that steers a terminal, and cut.

    Args:
        text: Of any origin.
        longest: Number of characters after which " …" takes the place of the rest.
    """
    if longest is not None and len(text) > longest:
        text = text[:longest] + " …"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shown(value: object) -> str:
    """Return a value of any origin for a message: as Python writes it, and short."""
    return printable(SHORT.repr(value))


def reason_of(error: Exception) -> str:
    """Return the message of another library's error on one line, at most 160 characters."""
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" …")


def call_failed(pipeline: str, error: Exception, given: str, remedy: str = "check these arguments") -> CallFailed:
    """Return a pipeline's failing call as one line.

    Args:
        pipeline: Its class.
        error: Whatever pipelines, tokenizers and torch raise for a value.
        given: The arguments of the call, as the user gives them.
        remedy: What to do.
    """
    with_them = f" with {textwrap.shorten(given, 400, placeholder=' …')}" if given else ""
    return CallFailed(f"{pipeline}'s call failed ({reason_of(error)}){with_them}: {remedy}")


@contextlib.contextmanager
def warnings_as(renamed: Callable[[str], str]) -> Iterator[None]:
    """Have warnings say what `renamed` makes of their texts."""
    plain = warnings.formatwarning
    warnings.formatwarning = lambda message, *rest, **more: plain(renamed(str(message)), *rest, **more)
    try:
        yield
    finally:
        warnings.formatwarning = plain


def run_program(main: Callable[[], None]) -> None:
    """Run a command's `main` with one-line errors and warnings on stderr.

    Exit codes: 2 after a UserError, for lack of memory or where the output cannot be written, 130 after Ctrl-C, 141
    where nobody reads the output any more (as in `| head`).
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Stopped) as stop:
        print("; ".join(["interrupted", *stop.args]), file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not LACK_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
            raise
        remedy = "give smaller sizes or batches, or keep less of the model on the GPU"
        print(f"error: not enough memory ({reason_of(error)}): {remedy}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        _close_stdout()
        sys.exit(141)
    except OSError as error:
        if error.filename is not None and error.errno in OF_PATHS:
            print(f"error: {shown(error.filename)}: {error.strerror}, give another path", file=sys.stderr)
            sys.exit(2)
        if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename is not None:
            raise
        _close_stdout()
        print(f"error: cannot write the output ({error.strerror})", file=sys.stderr)
        sys.exit(2)


def _close_stdout() -> None:
    """Keep Python from writing what is left of the output at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
