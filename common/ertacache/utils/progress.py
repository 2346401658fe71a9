"""Progress of long work: a bar on a terminal or in a notebook, elsewhere (a log, nohup) a line per minute."""

import sys
import time

from tqdm.auto import tqdm

EVERY = 60.0  # seconds between lines


class Progress:
    """Counts units of work of a known total.

    Args:
        unit: Of the work, for example "call".
        silent: Whether to show nothing.

    Attributes:
        n, total: Units done, and all; the total may shrink, as work turns out not to be needed.
        stage: What is being done.
    """

    def __init__(self, unit: str, silent: bool = False):
        in_notebook = any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)
        shows_bar = not silent and (sys.stderr.isatty() or in_notebook)
        self.bar = tqdm(total=0, unit=unit, disable=not shows_bar)
        self.unit, self.says_lines = unit, not silent and not shows_bar
        self.n = self.total = 0
        self.stage = ""
        self.start = self.said = time.monotonic()

    def begin(self, stage: str) -> None:
        """Name what is done from now on."""
        self.stage = stage
        self.bar.set_description(stage)

    def expect(self, units: int) -> None:
        """Add to the total; a negative number takes away what is not needed."""
        self.total = max(self.n, self.total + units)
        self.bar.total = self.total
        self.bar.refresh()

    def update(self, units: int = 1, note: str = "") -> None:
        """Count units that are done."""
        self.n += units
        self.bar.update(units)
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        now = time.monotonic()
        if self.says_lines and now - self.said >= EVERY and self.total > self.n > 0:
            self.said = now
            left = duration((now - self.start) / self.n * (self.total - self.n))
            text = f"{self.stage}: {self.n} of at most {self.total} {self.unit}s, about {left} left"
            print(f"{text}{note and f', {note}'}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def duration(seconds: float) -> str:
    """Return a time in words: "40 seconds", "3 minutes", "2.5 hours"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
