"""Running sums on disk: what makes a calibration resumable and its memory independent of the number of prompts."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from ertacache.files import write_atomically

Sums = dict[str, np.ndarray]


class Ledger:
    """One small file a pass in `folder`, rewritten after each batch of prompts."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, key: str, batches: int, sums_of: Callable[[int], Sums]) -> Sums:
        """Sum `sums_of(batch)` over all batches in float64, from the first one that is not yet in the file."""
        path = self._path(key)
        total = dict(load_file(path)) if path.exists() else {}
        for batch in range(self.finished(key), batches):
            for name, value in sums_of(batch).items():
                total[name] = np.asarray(total.get(name, 0.0) + np.asarray(value, np.float64))
            total["finished"] = np.asarray(batch + 1)
            write_atomically(path, save(total))
        return total

    def finished(self, key: str) -> int:
        """How many batches of this pass are in the file."""
        path = self._path(key)
        return int(load_file(path)["finished"]) if path.exists() else 0

    def _path(self, key: str) -> Path:
        return self.folder / f"{digest(key)[:32]}.safetensors"


def digest(value: Any) -> str:
    """SHA-256 of a text, or of a value's canonical JSON."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
