"""One process at a time."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ertacache.utils import parallel


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[bool]:
    """Hold a lock, of which rank 0 takes care for all ranks; a process that ends in any way lets go of it.

    Args:
        path: Of the lock's file, which is there as long as it is held.
        what: Only one process may do, for the line that says that this one waits.

    Yields:
        Whether it had to wait.
    """
    if not parallel.is_main():
        yield parallel.share(False)
        return
    lock, waited = FileLock(path), False
    try:
        _acquire(lock, path, timeout=0)
    except Timeout:
        waited = True
        print(f"another process is {what}: waiting for it", file=sys.stderr)
        _acquire(lock, path)
    try:
        yield parallel.share(waited)
    finally:
        with contextlib.suppress(OSError):  # on Windows, where it is open
            path.unlink()
        lock.release()


def _acquire(lock: FileLock, path: Path, **options) -> None:
    """Take a lock whose folder may go meanwhile: a process whose work fails takes away the folders that it made."""
    while not lock.is_locked:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock.acquire(**options)
