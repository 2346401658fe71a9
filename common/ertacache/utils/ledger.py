"""Running sums on disk: what makes a calibration resumable and its memory independent of the number of prompts."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from ertacache.utils import parallel
from ertacache.utils.files import write_atomically

Sums = dict[str, np.ndarray]


class Ledger:
    """One small file a pass in `folder`, rewritten after each batch of prompts.

    Of several processes each takes one batch of a round, and main keeps the file: any number of them may go on with it.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, key: str, batches: int, sums_of: Callable[[int], Sums]) -> Sums:
        """Sum `sums_of(batch)` over all batches in float64, from the first one that is not yet in the file."""
        total = parallel.share(self._load(key))
        for first in range(_finished(total), batches, parallel.size()):
            batch = first + parallel.rank()
            for sums in parallel.gather(sums_of(batch) if batch < batches else {}):
                for name, value in sums.items():
                    total[name] = np.asarray(total.get(name, 0.0) + np.asarray(value, np.float64))
            total["finished"] = np.asarray(min(first + parallel.size(), batches))
            if parallel.is_main():
                write_atomically(self._path(key), save(total))
        return total

    def finished(self, key: str) -> int:
        """How many batches of this pass are in the file."""
        return _finished(self._load(key))

    def _load(self, key: str) -> Sums:
        path = self._path(key)
        return load_file(path) if path.exists() else {}

    def _path(self, key: str) -> Path:
        return self.folder / f"{digest(key)[:32]}.safetensors"


def _finished(total: Sums) -> int:
    return int(total.get("finished", 0))


def digest(value: Any) -> str:
    """SHA-256 of a text, or of a value's canonical JSON."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
