"""Ctrl-C in one line, from this import on: programs import it before the libraries that take seconds to import."""

import sys


def _one_line(kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _one_line
