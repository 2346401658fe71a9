"""The command line of a campaign: its parts, one after another, and the table of what they found."""

import sys
import time
from collections.abc import Callable, Mapping

from ertacache import UserError
from ertacache.cli.arguments import ArgumentParser, check_counts
from ertacache.evaluation.table import facts
from ertacache.utils.checks import check_seed
from ertacache.utils.tables import markdown

SHOWN = 20  # faults of a part
Part = Callable[[int, int], tuple[str, list[tuple]]]  # (count, seed) → (what was tried, faults)


def steering(text: str) -> str | None:
    """Return what of a text would steer a terminal."""
    found = [c for line in text.split("\n") for c in line if not c.isprintable()]
    return f"control character {found[0]!r}" if found else None


def run_parts(description: str, parts: Mapping[str, tuple[Part, int]]) -> None:
    """Run the parts of a campaign that the command line names, and print their table; exit code 1 after a fault.

    Args:
        description: Of the program.
        parts: By name, the part and its count by default.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--count", type=int, help="of what a part tries; default: each part's own")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    args = parser.parse_args()
    check_counts(args, "count")
    check_seed(args.seed)
    unknown = [name for name in args.parts if name not in parts]
    if unknown:
        raise UserError(f"{unknown[0]}: choose from {', '.join(parts)}")
    lines, wrong = [], 0
    for name in args.parts or parts:
        part, count = parts[name]
        start = time.monotonic()
        text, faults = part(args.count or count, args.seed)
        for fault in faults[:SHOWN]:
            print("fault:", *fault, file=sys.stderr)
        wrong += len(faults)
        lines.append([name, text, len(faults), f"{(time.monotonic() - start) / 60:.0f}"])
        print(f"{name}: {text}; {len(faults)} faults", file=sys.stderr, flush=True)
    print(f"{markdown(['part', 'tried', 'faults', 'minutes'], lines)}\n\n{facts(f'seed {args.seed}')}")
    sys.exit(1 if wrong else 0)
