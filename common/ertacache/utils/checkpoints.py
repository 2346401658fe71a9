"""Result cache of a long computation: it can be interrupted after any piece and resumed by the same command.

Each file holds the SHA-256 of its content, so that whatever a power failure or a disk makes of it is found. A damaged
file is deleted, with a line, and what it held is computed anew.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ertacache.utils import parallel
from ertacache.utils.errors import printable
from ertacache.utils.files import write_atomically

Arrays = dict[str, np.ndarray]
Content = TypeVar("Content")


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
        known = self._stored_value(key)
        if known:
            return known[0]
        value = parallel.share(compute())
        self._write(self.path(key, ".json"), _value_file(value))
        return value

    def of_this_rank(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return the JSON value stored under `key`, or compute and store it, whatever other ranks do meanwhile."""
        path = self.path(key, ".json")
        known = _whole(path, _value_of)
        if known:
            return known[0]
        value = compute()
        write_atomically(path, _value_file(value))
        return value

    def has_value(self, key: Any) -> bool:
        """Return whether a JSON value is stored under `key`."""
        return self._stored_value(key) is not None

    def arrays(self, key: Any, compute: Callable[[], Arrays]) -> Arrays:
        """Return the named arrays stored under `key`, or compute and store them. All ranks take part in `compute`."""
        path = self.path(key, ".safetensors")
        known = parallel.share(_whole(path, read_arrays) if parallel.is_main() else None)
        if known is not None:
            return known
        arrays = {name: np.asarray(array, order="C") for name, array in compute().items()}
        self._write(path, arrays_file(arrays))
        return arrays

    def sums(self, key: Any, batches: int, sums_of: Callable[[int], dict[str, Any]]) -> Arrays:
        """Sum `sums_of(batch)` over all batches, name by name in float64, resuming after the last stored batch.

        Processes take batches in turn; the sums are added in the order of batches, so that they do not depend on the
        number of processes. Memory does not grow with the number of batches.
        """
        total = self._stored_sums(key)
        for first in range(_finished(total), batches, parallel.size()):
            batch = first + parallel.rank()
            for sums in parallel.gather(sums_of(batch) if batch < batches else {}):
                for name, value in sums.items():
                    total[name] = np.asarray(total.get(name, 0.0) + np.asarray(value, np.float64))
            total["finished"] = np.asarray(min(first + parallel.size(), batches))
            if parallel.is_main():
                write_atomically(self.path(key, ".safetensors"), arrays_file(total))
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

    def _stored_value(self, key: Any) -> list | None:
        return parallel.share(_whole(self.path(key, ".json"), _value_of) if parallel.is_main() else None)

    def _stored_sums(self, key: Any) -> Arrays:
        path = self.path(key, ".safetensors")
        return parallel.share(_whole(path, read_arrays) if parallel.is_main() else None) or {}

    def forget(self, key: Any) -> None:
        """Delete the sums stored under `key`."""
        parallel.barrier()
        if parallel.is_main():
            self.path(key, ".safetensors").unlink(missing_ok=True)
        parallel.barrier()


def arrays_file(arrays: Arrays) -> bytes:
    """Return the content of a safetensors file that holds the SHA-256 of its arrays."""
    arrays = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    return save(arrays, {"sha256": _hash_of(arrays.items())})


def read_arrays(path: Path) -> Arrays:
    """Return the arrays of such a file.

    Raises:
        ValueError: They have another SHA-256.
        OSError, SafetensorError: There is no such file, or it is cut off.
    """
    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        _check_hash(file, arrays.items())
    return arrays


def has_whole_arrays(path: Path) -> bool:
    """Return whether such a file is there and whole, with one array at a time in memory. A damaged one is deleted."""

    def check(path: Path) -> bool:
        with safe_open(path, "np") as file:
            _check_hash(file, ((name, file.get_tensor(name)) for name in sorted(file.keys())))
        return True

    return bool(_whole(path, check))


def _check_hash(file, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    if (file.metadata() or {}).get("sha256") != _hash_of(arrays):
        raise ValueError("the arrays have another SHA-256")


def _hash_of(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    hashed = hashlib.sha256()
    for name, array in arrays:
        hashed.update(f"{name} {array.dtype} {array.shape} ".encode())
        hashed.update(array.data)
    return hashed.hexdigest()


def _value_file(value: Any) -> bytes:
    """Return the content of a JSON file that holds the SHA-256 of its value."""
    content = {"sha256": digest([json.loads(json.dumps(value))]), "value": value}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _value_of(path: Path) -> list:
    """Return the value of such a file, in a list."""
    content = json.loads(path.read_text("utf-8"))
    if content["sha256"] != digest([content["value"]]):
        raise ValueError("the value has another SHA-256")
    return [content["value"]]


def _whole(path: Path, read: Callable[[Path], Content]) -> Content | None:
    """Return what a file holds; None where there is none, or a damaged one, which is deleted."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError):
        print(f"{printable(str(path))} is damaged: what it held is made anew", file=sys.stderr)
        with contextlib.suppress(OSError):
            path.unlink()
        return None


def _finished(total: Arrays) -> int:
    return int(total.get("finished", 0))
