"""What lies where under scripts/: programs, and beside them folders of what programs share."""

import ast
from pathlib import Path

import pytest

from conftest import ROOT

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
