"""A campaign against plans, calibrations and runs: what breaks, and whether it breaks well.

    .venv/bin/python scripts/bench/reliability.py                                    # all parts, as in the docs
    .venv/bin/python scripts/bench/reliability.py mutants --count 500 --seed 7
    .venv/bin/python scripts/bench/reliability.py kills --count 10

- mutants: files of shipped plans are changed: bytes; types, depth and sizes of fields; shapes, dtypes and values of
  arrays; most with a valid checksum. Each is loaded, inspected, made a card of, enabled, and every third one followed.
  Expected: refused in one line, or followed to finite latents; no other exception, no stage before the run over 2 s of
  CPU time, no memory over 300 MiB.
- kills: a calibration, by each of three ways, alone or with another process at the same work, is killed (SIGKILL) at
  random moments, then repeated to its end. Expected: the plans of an undisturbed calibration, bit for bit, and no file
  left over.
- soak: generations with plans switched at random, exceptions and interrupts in callbacks, wrong numbers of steps.
  Expected: every result equal to that of a fresh pipeline, and no growth of memory, threads or descriptors.
- together: the same calibration twice at once. Expected: one waits for the other or is refused in one line, and the
  plans are those of one alone, bit for bit.
- disk: a full one, a read-only one (both mounted for it, which needs root), files that cannot grow, a file where the
  folder should be, a folder that vanishes. Expected: one line and no half-written plan; then, with room, the plans of
  an undisturbed calibration, bit for bit.
- strangers: texts with control characters, markup and formats in plans, rows, captions and names of files; pickles in
  place of files. Expected: nothing of them steers a terminal, ends a cell or is markup; nothing is unpickled.

Each part prints a line of the table. The figures are in common/docs/results/reliability.md.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

from ertacache.utils.errors import run_program
from parts.calibrations import disk, kills, together
from parts.campaign import run_parts
from parts.mutants import mutants
from parts.soak import soak
from parts.strangers import strangers

PARTS = {
    "mutants": (mutants, 10_000),
    "kills": (kills, 100),
    "together": (together, 12),
    "soak": (soak, 1_000),
    "disk": (disk, 30),
    "strangers": (strangers, 500),
}


def main() -> None:
    run_parts(__doc__, PARTS)


if __name__ == "__main__":
    run_program(main)
