"""Writing files so that a reader never sees half of one."""

import os
import tempfile
from pathlib import Path

from ertacache.utils.errors import UserError


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write to a temporary name in the same folder, then rename. An unwritable folder is a UserError."""
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
    """Create the folder and prove that a file can be written there, before any work is done for it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {path} ({error.strerror}): choose another folder or mend its permissions")


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line; blank lines and lines that start with # are left out."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path} ({error}): give a UTF-8 text file, one a line") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UserError(f"no prompts in {path}: write one prompt a line")
    return prompts


def relative(path: str | Path, folder: Path) -> str:
    """The path as seen from a folder, when it lies in it."""
    path = Path(path).resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
