"""What other libraries log."""

import contextlib
import logging
from collections.abc import Iterator


class _Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_new = text not in self.seen
        self.seen.add(text)
        return is_new


@contextlib.contextmanager
def each_line_once(library: str) -> Iterator[None]:
    """Have a library's log show each message once, for work that calls it many times on the same input."""
    with contextlib.ExitStack() as stack:
        for handler in logging.getLogger(library).handlers:
            once = _Once()
            handler.addFilter(once)
            stack.callback(handler.removeFilter, once)
        yield
