"""Result cache of a long computation: it can be interrupted after any piece and resumed by the same command."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ertacache.utils import parallel
from ertacache.utils.files import write_atomically

Arrays = dict[str, np.ndarray]


def digest(value: Any) -> str:
    """Return the SHA-256 of a text, or of a value's canonical JSON, as 64 hexadecimal digits."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Checkpoints:
    """Results by key, in one folder.

    Processes of one job share the folder: rank 0 decides whether a result exists and writes it, and all ranks see the
    same value. So an interrupted job can resume with any number of processes.

    Args:
        folder: Where the results lie; made when the first one is written.
        identity: Everything that the results depend on and that keys do not name. It becomes part of the folder's name.
        prefix, suffix: Of the folder's name, around the digest of the identity.
    """

    def __init__(self, folder: str | Path, identity: Any, prefix: str = "", suffix: str = ""):
        self.folder = Path(folder) / f"{prefix}{digest(identity)[:12]}{suffix}"

    def value(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return the JSON value stored under `key`, or compute and store it."""
        path = self.path(key, ".json")
        known = parallel.share(_read(lambda: [json.loads(path.read_text("utf-8"))]))
        if known:
            return known[0]
        value = parallel.share(compute())
        self._write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
        return value

    def of_this_rank(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return the JSON value stored under `key`, or compute and store it, whatever other ranks do meanwhile."""
        path = self.path(key, ".json")
        known = _read(lambda: [json.loads(path.read_text("utf-8"))])
        if known:
            return known[0]
        value = compute()
        write_atomically(path, json.dumps(value).encode())
        return value

    def arrays(self, key: Any, compute: Callable[[], Arrays]) -> Arrays:
        """Return the named arrays stored under `key`, or compute and store them. All ranks take part in `compute`."""
        path = self.path(key, ".safetensors")
        known = parallel.share(_read(lambda: load_file(path)))
        if known is not None:
            return known
        arrays = {name: np.asarray(array, order="C") for name, array in compute().items()}
        self._write(path, save(arrays))
        return arrays

    def sums(self, key: Any, batches: int, sums_of: Callable[[int], dict[str, Any]]) -> Arrays:
        """Sum `sums_of(batch)` over all batches, name by name in float64, resuming after the last stored batch.

        Processes take batches in turn; the sums are added in the order of batches, so that they do not depend on the
        number of processes. Memory does not grow with the number of batches.
        """
        total = parallel.share(self._stored_sums(key))
        for first in range(_finished(total), batches, parallel.size()):
            batch = first + parallel.rank()
            for sums in parallel.gather(sums_of(batch) if batch < batches else {}):
                for name, value in sums.items():
                    total[name] = np.asarray(total.get(name, 0.0) + np.asarray(value, np.float64))
            total["finished"] = np.asarray(min(first + parallel.size(), batches))
            if parallel.is_main():
                write_atomically(self.path(key, ".safetensors"), save(total))
        return {name: value for name, value in total.items() if name != "finished"}

    def finished(self, key: Any) -> int:
        """Return how many batches of `sums` are stored under `key`."""
        return _finished(self._stored_sums(key))

    def path(self, key: Any, suffix: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{digest(key)[:32]}{suffix}"

    def remove(self) -> None:
        """Delete the folder once every rank is done with it."""
        parallel.barrier()
        if parallel.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)
        parallel.barrier()

    def _write(self, path: Path, data: bytes) -> None:
        if parallel.is_main():
            write_atomically(path, data)
        parallel.barrier()

    def _stored_sums(self, key: Any) -> Arrays:
        return _read(lambda: load_file(self.path(key, ".safetensors"))) or {}

    def forget(self, key: Any) -> None:
        """Delete the sums stored under `key`."""
        parallel.barrier()
        if parallel.is_main():
            self.path(key, ".safetensors").unlink(missing_ok=True)
        parallel.barrier()


def _read(read: Callable[[], Any]) -> Any:
    """Return what is stored; None where there is nothing, or what a power failure has left of it."""
    try:
        return read()
    except (OSError, ValueError, SafetensorError):
        return None


def _finished(total: Arrays) -> int:
    return int(total.get("finished", 0))
