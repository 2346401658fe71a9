"""Several processes, one a GPU, that share the batches of one job. With one process nothing here does anything.

`accelerate launch` or torchrun starts them. All run the same program on the same folders, take turns with the batches,
and hand each other small arrays through main memory (gloo). What is gathered is in the order of batches, so that sums
come out bit for bit as in one process (on the CPU: one of as many threads). The first process, main, prints, and writes
the files that belong to no batch.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch

from ertacache.utils.errors import UserError

LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}  # what a launcher tells each process
PATIENCE = timedelta(days=1)  # that a process waits for the slowest one; a dead one ends all at once


class SharedError(UserError):
    """A UserError of any process, which all of them know of."""


def rank() -> int:
    """Which of the processes this is, from 0."""
    state = _state()
    return state.process_index if state else 0


def size() -> int:
    """How many processes there are."""
    state = _state()
    return state.num_processes if state else 1


def is_main() -> bool:
    return rank() == 0


def mine(count: int) -> list[int]:
    """This process's share of `count` batches: rank, rank + size, …"""
    return list(range(rank(), count, size()))


def gather(value: Any) -> list:
    """The values of all processes in rank order, in every process. All must call it, or one raise a UserError."""
    return [value] if size() == 1 else _exchange(value)


def in_order(values: list) -> list:
    """From one value for each batch of `mine(count)` in every process: all `count` of them, in the order of batches."""
    missing = object()
    rounds = zip_longest(*gather(values), fillvalue=missing)
    return [value for values in rounds for value in values if value is not missing]


def share(value: Any) -> Any:
    """Main's value, in every process."""
    return gather(value if is_main() else None)[0]


def barrier() -> None:
    """Wait until all processes are here."""
    gather(None)


def device(asked: str | None = None) -> str:
    """Where this process loads its model: "cuda" or "cpu", or what was asked for. Of several, each takes a GPU."""
    found = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if found != "cuda" or size() == 1 or not torch.cuda.is_available():
        return found
    index, count = _state().local_process_index, torch.cuda.device_count()
    if index >= count:
        raise UserError(f"--num_processes {index + 1} or more, but {count} GPUs here: start {count}, or give --device")
    torch.cuda.set_device(index)  # what says "cuda" means this one
    return f"cuda:{index}"


def together(main: Callable[[], None]) -> None:
    """Run a program's `main` in all processes: a UserError in one ends every one, with one line and exit code 2.

    The error travels with whatever the others gather next, so that none waits for a process that has given up.
    """
    if size() == 1:
        return main()
    try:
        _tell_errors(main)
    except SharedError as error:
        if is_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        barrier()  # the launcher stops all when the first one ends
        sys.exit(2)
    finally:
        _state().destroy_process_group()


def _tell_errors(main: Callable[[], None]) -> None:
    try:
        main()
        barrier()
    except SharedError:
        raise
    except UserError as error:
        _exchange(error=str(error))


def _exchange(value: Any = None, error: str | None = None) -> list:
    """All processes' values; an error in place of one is raised in all."""
    from accelerate.utils import gather_object

    answers = gather_object([(value, error)])
    for _, error in answers:
        if error is not None:
            raise SharedError(error)
    return [value for value, _ in answers]


def _state():
    """accelerate's PartialState, or None where no launcher started several processes.

    cpu: messages go by gloo, because the arrays are small, and more processes than GPUs can then be tried.
    """
    if not os.environ.keys() >= LAUNCHED or os.environ["WORLD_SIZE"] == "1":
        return None
    from accelerate import PartialState

    return PartialState(cpu=True, timeout=PATIENCE)
