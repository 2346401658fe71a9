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


class _NoOtherSizes(logging.Filter):
    """Lets nothing through, and raises a ValueError where a size is not taken as it was given."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno == logging.WARNING and "divisible by" in text:
            raise ValueError(text.partition(". ")[0].rstrip("."))
        return record.levelno > logging.WARNING


@contextlib.contextmanager
def refusing_other_sizes(library: str) -> Iterator[None]:
    """Have a library's warning that it takes another size than the one given be an error; its others are not shown."""
    logger, refusal = logging.getLogger(library), _NoOtherSizes()
    level = logger.level
    logger.setLevel(logging.WARNING)
    with contextlib.ExitStack() as stack:
        stack.callback(logger.setLevel, level)
        for each in logger.handlers:
            each.addFilter(refusal)
            stack.callback(each.removeFilter, refusal)
        yield


@contextlib.contextmanager
def each_line_once(library: str) -> Iterator[None]:
    """Have a library's log show each message once, for work that calls it many times on the same input."""
    with contextlib.ExitStack() as stack:
        for handler in logging.getLogger(library).handlers:
            once = _Once()
            handler.addFilter(once)
            stack.callback(handler.removeFilter, once)
        yield
