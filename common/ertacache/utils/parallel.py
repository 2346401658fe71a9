"""Processes that share the batches of one job, one process per GPU. In a single process no function here has an effect.

`accelerate launch` or torchrun starts them. All ranks run the same program on the same folders, take batches in turn,
and exchange small arrays through main memory (gloo). Gathered values are in the order of batches, so that sums equal
those of one process bit for bit (on the CPU: of one process with as many threads). Rank 0, main, prints, and writes the
files that belong to no batch.
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch

from ertacache.utils.devices import default_device
from ertacache.utils.errors import UserError

LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}  # environment variables that a launcher sets
TIMEOUT = timedelta(days=1)  # of a rank that waits for the slowest one; a rank that dies ends all at once


class SharedError(UserError):
    """A UserError of any rank, raised in all of them."""


def rank() -> int:
    """Return the number of this process, from 0."""
    state = _state()
    return state.process_index if state else 0


def size() -> int:
    """Return the number of processes."""
    state = _state()
    return state.num_processes if state else 1


def is_main() -> bool:
    """Return whether this process is rank 0."""
    return rank() == 0


def mine(count: int) -> list[int]:
    """Return this process's batches of `count`: rank, rank + size, …"""
    return list(range(rank(), count, size()))


def gather(value: Any) -> list:
    """Return the values of all ranks, in rank order, on every rank.

    All ranks must call it.

    Args:
        value: Of this rank; picklable.

    Raises:
        SharedError: A rank has raised a UserError instead of calling it.
    """
    return [value] if size() == 1 else _exchange(value)


def in_order(values: Sequence) -> list:
    """Return the values of all ranks in the order of batches, on every rank.

    Args:
        values: One per batch of `mine(count)`.

    Returns:
        All `count` values.
    """
    missing = object()
    rounds = zip_longest(*gather(values), fillvalue=missing)
    return [value for values in rounds for value in values if value is not missing]


def share(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    return gather(value if is_main() else None)[0]


def barrier() -> None:
    """Wait until all ranks have called it."""
    gather(None)


def device(requested: str | None = None) -> str:
    """Return the device that this process loads its model on; of several processes each takes its own GPU.

    Args:
        requested: "cpu", "cuda", "cuda:N" or "mps"; by default a GPU where there is one.

    Raises:
        UserError: More processes than GPUs.
    """
    name = default_device() if requested is None else requested
    if name != "cuda" or size() == 1 or not torch.cuda.is_available():
        return name
    index, count = _state().local_process_index, torch.cuda.device_count()
    if index >= count:
        raise UserError(f"--num_processes {index + 1} or more, but {count} GPUs here: start {count}, or give --device")
    torch.cuda.set_device(index)  # "cuda" without a number now means this GPU
    return f"cuda:{index}"


def run_on_all_ranks(main: Callable[[], None]) -> None:
    """Run a program's `main` on all ranks; a UserError on one ends all of them, with one line and exit code 2.

    The error takes the place of the rank's next exchanged value, so that no rank blocks on one that has failed.
    """
    if size() == 1:
        return main()
    try:
        _run_and_share_error(main)
    except SharedError as error:
        if is_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        barrier()  # the launcher stops all ranks when the first one ends
        sys.exit(2)
    finally:
        _state().destroy_process_group()


def _run_and_share_error(main: Callable[[], None]) -> None:
    """Run `main`; its UserError becomes a SharedError on every rank."""
    try:
        main()
        barrier()
    except SharedError:
        raise
    except UserError as error:
        _exchange(error=str(error))


def _exchange(value: Any = None, error: str | None = None) -> list:
    """Return the values of all ranks; an error of any rank is raised on all of them."""
    from accelerate.utils import gather_object

    pairs = gather_object([(value, error)])
    for _, error in pairs:
        if error is not None:
            raise SharedError(error)
    return [value for value, _ in pairs]


def _state():
    """Return accelerate's PartialState, or None where no launcher has started several processes.

    cpu=True selects gloo: the arrays are small, and more processes than GPUs can be tested.
    """
    if not os.environ.keys() >= LAUNCHER_VARIABLES or os.environ["WORLD_SIZE"] == "1":
        return None
    from accelerate import PartialState

    return PartialState(cpu=True, timeout=TIMEOUT)
