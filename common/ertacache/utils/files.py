"""Atomic writes, and checks of input files and output folders."""

import contextlib
import errno
import glob
import json
import os
import platform
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ertacache.utils.errors import UserError, printable, reason_of, shown

Found = TypeVar("Found")
LONGEST_PATH = 200  # characters of a path in a message
REMEDIES = {  # of what keeps a file from being written
    errno.ENOSPC: "make room on the disk, or choose another folder",
    errno.EDQUOT: "make room in your quota, or choose another folder",
    errno.EACCES: "choose another folder, or fix its permissions",
    errno.EPERM: "choose another folder, or fix its permissions",
}


def path_of(value: object, name: str) -> Path:
    """Return the path that an argument gives. Refuses what is none, and an empty text. name: of the argument."""
    if not isinstance(value, str | os.PathLike) or value == "":
        raise UserError(f"{name} = {shown(value)}: give a path")
    return Path(value)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file under a temporary name in the same folder, then rename it, so that no reader sees half of it.

    Args:
        path: The file; missing folders are created.
        data: Its whole content.

    Raises:
        UserError: The folder is not writable, the disk is full, or the path is a device, a pipe or a folder.
    """
    path = Path(path)
    check_regular(path)
    mine = f"{platform.node()}-{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{mine}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the name, so that no power failure leaves an empty file
        os.replace(temporary, path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def check_regular(path: Path) -> None:
    """Refuse what is there but is no file: a renamed file would take the place of a device or a pipe."""
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError):  # nothing is there
        return
    if not stat.S_ISREG(kind):
        what = "a folder" if stat.S_ISDIR(kind) else "a device or a pipe"
        raise UserError(f"cannot write to {path}, which is {what}: name a file")


def _remove_leftovers(path: Path) -> None:
    """Delete what processes of this machine that were killed in the middle of a write have left beside a file."""
    if os.name != "posix":
        return
    for other in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(platform.node())}-*-*.tmp"):
        try:
            os.kill(int(other.name.split("-")[-2]), 0)  # only asks
        except ProcessLookupError:
            other.unlink(missing_ok=True)
        except (PermissionError, ValueError):
            pass


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
    except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
        raise unwritable(folder, error) from error
    return folder


@contextlib.contextmanager
def writable(folder: str | Path) -> Iterator[Path]:
    """Check a folder as `ensure_writable` does; at the end folders that were made for it go, if nothing is in them.

    Args:
        folder: For what the block writes.

    Raises:
        UserError: The folder is not writable.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        yield ensure_writable(folder)
    finally:
        for path in missing:
            with contextlib.suppress(OSError, ValueError):  # not made, or not empty
                path.rmdir()


@contextlib.contextmanager
def writable_files(*paths: Path | None) -> Iterator[None]:
    """Refuse files that cannot be written, before the work whose results they are to hold.

    Args:
        paths: Of the files, whose folders are treated as `writable` does; None for a file that is not asked for.
    """
    with contextlib.ExitStack() as stack:
        for path in filter(None, paths):
            stack.enter_context(writable(path.parent))
            check_regular(path)
        yield


def check_room(folder: str | Path, needed: int, purpose: str, remedy: str) -> None:
    """Refuse work whose files the disk of a folder cannot hold, before it begins.

    Args:
        folder: Of the files; it may be still to come.
        needed: Bytes.
        purpose: What keeps them, for the message.
        remedy: Likewise.

    Raises:
        UserError: There is less room.
    """
    path = Path(folder).resolve()
    free = shutil.disk_usage(next(existing for existing in (path, *path.parents) if existing.exists())).free
    if needed > free:
        raise UserError(f"{purpose} keeps {gibibytes(needed)} in {folder}, where {gibibytes(free)} are free: {remedy}")


def gibibytes(size: int) -> str:
    """Return bytes as a text in GiB, with two digits."""
    return f"{size / 2**30:.2g} GiB" if size < 100 * 2**30 else f"{size / 2**30:.0f} GiB"


def unwritable(path: Path, error: Exception) -> UserError:
    """Return the UserError for a path that cannot be written."""
    number, path = getattr(error, "errno", None), printable(str(path), LONGEST_PATH)
    remedy = REMEDIES.get(number, "choose another folder")
    return UserError(f"cannot write to {path} ({getattr(error, 'strerror', None) or error}): {remedy}")


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a UTF-8 text file, one per line, without blank lines and lines that start with #.

    Raises:
        UserError: The file cannot be read, or holds no prompts.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name that no file can have
        path, reason = printable(str(path), LONGEST_PATH), getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"cannot read prompts from {path} ({reason}): give a UTF-8 text file, one per line") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UserError(f"no prompts in {path}: write one prompt a line")
    return prompts


def of_earlier_run(path: Path, read: Callable[[Any], Found], nothing: Found) -> Found:
    """Return what a file has that an earlier run of the same program has written.

    Args:
        path: Of a JSON file.
        read: read(value) takes it out of the file's value.
        nothing: For a file that is not there.

    Raises:
        UserError: Something else is in the file.
    """
    if not path.exists():
        return nothing
    try:
        return read(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError, TypeError, LookupError) as error:
        raise UserError(f"{path} was not written by an earlier run ({reason_of(error)}): name another file") from error


def relative(path: str | Path, folder: Path) -> str:
    """Return a path relative to a folder that contains it; other paths become absolute."""
    path = Path(path).resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
