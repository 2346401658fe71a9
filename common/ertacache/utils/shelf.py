"""Finished pieces of a long measurement on disk: a rerun of the same command goes on after the last of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ertacache.utils import parallel
from ertacache.utils.files import write_atomically
from ertacache.utils.ledger import digest


class Shelf:
    """A folder of results by key. identity: everything that the results depend on and that keys do not name.

    Several processes see the same: whether a piece is there is decided by the main one, and what it made counts.
    """

    def __init__(self, folder: Path, identity: Any):
        self.folder = Path(folder) / digest(identity)[:12]

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """The JSON value that is kept under this key, or else what make() returns, which is then kept."""
        path = self.path(key, ".json")
        if parallel.share(path.exists()):
            return json.loads(path.read_text("utf-8"))
        value = parallel.share(make())
        if parallel.is_main():
            write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
        parallel.barrier()
        return value

    def keep_arrays(self, key: Any, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The same for named arrays."""
        path = self.path(key, ".npz")
        if not parallel.share(path.exists()):
            arrays = make()
            if parallel.is_main():
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(".part.npz")
                np.savez(part, **arrays)
                part.replace(path)
            parallel.barrier()
            return arrays
        with np.load(path) as file:
            return dict(file)

    def path(self, key: Any, suffix: str) -> Path:
        return self.folder / f"{digest(key)[:24]}{suffix}"
