"""Atomic writes, and checks of input files and output folders."""

import os
import tempfile
from pathlib import Path

from ertacache.utils.errors import UserError


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file under a temporary name in the same folder, then rename it, so that no reader sees half of it.

    Args:
        path: The file; missing folders are created.
        data: Its whole content.

    Raises:
        UserError: The folder is not writable, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise unwritable(path.parent, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def ensure_writable(folder: str | Path) -> Path:
    """Create a folder and write a temporary file into it, so that a long computation does not fail at its end.

    Raises:
        UserError: The folder is not writable.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def unwritable(path: Path, error: OSError) -> UserError:
    """Return the UserError for a path that cannot be written."""
    return UserError(f"cannot write to {path} ({error.strerror}): choose another folder or fix its permissions")


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a UTF-8 text file, one per line, without blank lines and lines that start with #.

    Raises:
        UserError: The file cannot be read, or holds no prompts.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path} ({error}): give a UTF-8 text file, one per line") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UserError(f"no prompts in {path}: write one prompt a line")
    return prompts


def relative(path: str | Path, folder: Path) -> str:
    """Return a path relative to a folder that contains it; other paths become absolute."""
    path = Path(path).resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
