"""Progress of long work: a bar on a terminal or in a notebook, elsewhere (a log, nohup) a line per minute."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm

EVERY = 60.0  # seconds between lines


def shows_bars() -> bool:
    """Return whether standard error can show a bar: on a terminal, and in a notebook."""
    return sys.stderr.isatty() or any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)


class Lines:
    """A stream on which each state of a tqdm bar is a line of standard error."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def bar_options(text: str, unit: str, silent: bool = False) -> dict[str, Any]:
    """Return the arguments of a tqdm bar that goes when it is full; where none can be shown, a line a minute instead.

    Args:
        text: Before the counts.
        unit: Of the work, for example "step".
        silent: Whether to show nothing.
    """
    options = {"desc": text, "unit": unit, "leave": False, "disable": silent}
    if not shows_bars():
        plural = unit + ("es" if unit.endswith("ch") else "s")
        words = f"{{desc}}: {{n_fmt}} of {{total_fmt}} {plural}, about {{remaining}} left"
        options |= {"bar_format": words, "file": Lines(), "delay": EVERY, "mininterval": EVERY, "miniters": 1}
    return options


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
        shows_bar = not silent and shows_bars()
        self.bar = tqdm(total=0, unit=unit, disable=not shows_bar, delay=1e-3)  # no bar before there is work
        self.unit, self.says_lines = unit, not silent and not shows_bar
        self.n = self.total = 0
        self.stage = ""
        self.start = self.said = time.monotonic()

    def begin(self, stage: str) -> None:
        """Name what is done from now on."""
        self.stage = stage
        self.bar.set_description(stage, refresh=self.total > 0)

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
    """Return a time in words: "1 second", "40 seconds", "3 minutes", "2.5 hours"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds" if seconds >= 1.5 else "1 second"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
