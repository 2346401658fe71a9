"""What lies where under scripts/: programs, and beside them folders of what programs share."""

import argparse
import ast
import runpy
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from ertacache.cli.arguments import ArgumentParser, HelpFormatter

SCRIPTS = ROOT / "scripts"
SHARED = ("bench/parts", "serve/server_parts", "train/recipes")  # no programs
MODEL_FOLDERS = ("bench/closed_form",)  # scripts/evaluate.py runs them
COMMAND_LINES = ("parse_args", "parse_arguments", "sys.argv", "run_parts", "options_of")  # what reads one
FILES = sorted(path.relative_to(SCRIPTS) for path in SCRIPTS.rglob("*.py"))


def is_in(path: Path, folders) -> bool:
    return path.parent.as_posix() in folders


def is_program(path: Path) -> bool:
    """Whether the file ends with a call that is made where it is run, and reads a command line."""
    text = (SCRIPTS / path).read_text("utf-8")
    last = ast.parse(text).body[-1]
    runs = isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    return runs and any(word in text for word in COMMAND_LINES)


@pytest.mark.parametrize("path", FILES, ids=Path.as_posix)
def test_a_script_is_a_program_unless_its_folder_says_otherwise(path):
    assert is_program(path) != is_in(path, SHARED + MODEL_FOLDERS)


def test_the_folders_of_what_programs_share_are_packages():
    assert all((SCRIPTS / folder / "__init__.py").is_file() for folder in SHARED)
    assert all((SCRIPTS / folder / "generate.py").is_file() for folder in MODEL_FOLDERS)


PROGRAMS = [path for path in FILES if not is_in(path, SHARED + MODEL_FOLDERS) and path.name != "run.py"]


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=Path.as_posix)
def test_the_help_of_a_program_has_an_example_and_says_what_each_flag_is_without_it(path, monkeypatch):
    seen = []
    monkeypatch.syspath_prepend((SCRIPTS / path).parent)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(ArgumentParser, "print_help", lambda parser: seen.append(parser))
    try:
        main = runpy.run_path(str(SCRIPTS / path))["main"]
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    with pytest.raises(SystemExit):
        main()
    (parser,) = seen
    assert f"scripts/{path.as_posix()}" in parser.description
    for action in (action for action in parser._actions if action.option_strings):
        text, default = HelpFormatter("")._get_help_string(action), action.default
        assert text, action.dest
        assert default in (None, "", argparse.SUPPRESS) or default is False or "default" in text, action.dest
