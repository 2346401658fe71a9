"""What every command line shares: one-line complaints, lists of numbers, prompts."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ertacache.utils.errors import UserError, shown
from ertacache.utils.files import read_prompts


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and says the defaults."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_none = action.default in (None, "", argparse.SUPPRESS) or action.default is False
        says_nothing = has_none or not action.option_strings
        return text if says_nothing or "default" in text else f"{text} (default: %(default)s)"


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, like all others."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)
        self.register("type", Path, path_of)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def path_of(text: str) -> Path:
    """Return the path of a flag. Path("") would be the folder that the program is run in."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no path: give one, or leave it out")
    return Path(text)


def parse_list(text: str, flag: str, example: str = "0.05,0.1", kind: type = float) -> list:
    """Return the numbers of a flag, which are separated by commas.

    Args:
        text: They.
        flag: For the refusal.
        example: Likewise.
        kind: Of the numbers: float, or int for whole ones of at least 1.
    """
    remedy = f"give {'whole numbers of at least 1' if kind is int else 'numbers'}, like {example}"
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"{flag} {shown(text)} is no list of numbers: {remedy}") from error
    if not values or (kind is int and min(values) < 1):
        raise UserError(f"{flag} {shown(text)}: {remedy}")
    return values


def check_counts(args: argparse.Namespace, *names: str, least: int = 1, most: int | None = None) -> None:
    """Refuse numbers below `least` or above `most`; those that are not given are None. names: of the arguments."""
    for name in names:
        value = getattr(args, name)
        if value is not None and (value < least or (most is not None and value > most)):
            limits = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise UserError(f"--{name.replace('_', '-')} {shown(value)}: give a whole number {limits}")


def check_step_seconds(args: argparse.Namespace) -> None:
    """Refuse --step-seconds that are no time, or that are given without --dry-run."""
    seconds = args.step_seconds
    if seconds is not None and not 0 < seconds < math.inf:
        raise UserError(f"--step-seconds {seconds:g}: give seconds above 0")
    if seconds is not None and not args.dry_run:
        raise UserError(f"--step-seconds {seconds:g} is of --dry-run: give that too, or leave it out")


def prompts_of(prompt: Sequence[str] | None, file: str | Path | None, default: Path | None = None) -> list[str]:
    """Return the prompts of --prompt, of the file of --prompts, or of the default file.

    Raises:
        UserError: Both, or neither and no default; an empty prompt; an unreadable or empty file.
    """
    if prompt and file:
        raise UserError("--prompt and --prompts exclude each other: give --prompt TEXT, or --prompts FILE")
    if not (prompt or file or default):
        raise UserError("no prompt: give --prompt TEXT, or --prompts FILE with one a line")
    prompts = list(prompt) if prompt else read_prompts(file or default)
    if not all(text.strip() for text in prompts):
        raise UserError("--prompt is empty: say what should be seen")
    return prompts
