"""What every command line shares: one-line complaints, lists of numbers, prompts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ertacache.utils.errors import UserError, shown
from ertacache.utils.files import read_prompts


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and says the defaults."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        says_nothing = action.default in (None, "", False, argparse.SUPPRESS) or not action.option_strings
        return text if says_nothing or "default" in text else f"{text} (default: %(default)s)"


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, like all others."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def parse_list(text: str) -> list[float]:
    """Return the numbers of a flag like --thresholds, which are separated by commas."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"{text!r} is no list of numbers: write them with commas between, like 0.05,0.1") from error
    if not values:
        raise UserError("an empty list of numbers: give at least one, like 0.1")
    return values


def check_counts(args: argparse.Namespace, *names: str, least: int = 1, most: int | None = None) -> None:
    """Refuse numbers below `least` or above `most`; those that are not given are None. names: of the arguments."""
    for name in names:
        value = getattr(args, name)
        if value is not None and (value < least or (most is not None and value > most)):
            limits = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise UserError(f"--{name.replace('_', '-')} {shown(value)}: give a whole number {limits}")


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
