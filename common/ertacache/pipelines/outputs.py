"""What a pipeline's denoisers returned last, for the steps on which they are not called."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map


class Outputs:
    """The outputs of the denoisers in the last computed step of a call, copied: the next call may overwrite them."""

    def __init__(self):
        self.step: int | None = None  # of the numbers below
        self.numbers: dict[Any, int] = {}  # calls of each kind in this step
        self.kept: dict[Any, list] = {}  # (rows, output) by kind and number

    def of(self, course, module, args: tuple, kwargs: dict):
        """Call a denoiser, or on a skipped step return what it returned for the same call in the last computed step.

        Calls are the same where model class and tensor shapes agree, in the order in which they are made. Where the
        last computed step made fewer, as when guidance begins in between, the last one stands for the others, with as
        many rows: nothing is made of an output on a skipped step but its shape.
        """
        if course.step != self.step:
            self.step, self.numbers = course.step, {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        kind = (module.__class__, kwargs.get("return_dict"), tuple(x.shape[1:] for x in tensors))
        rows = tensors[0].shape[:1] if tensors else ()
        number = self.numbers[kind] = self.numbers.get(kind, -1) + 1
        known = self.kept.setdefault(kind, [])
        if course.skips and known:
            rows_known, output = known[min(number, len(known) - 1)]
            return output if rows == rows_known else tree_map(lambda x: _with_rows(x, rows), output)
        output = module(*args, **kwargs)
        if course.skips or course.step is None or course.after(course.step) > course.step + 1:
            known[number:] = [(rows, tree_map(_copied, output))]
        return output


def _with_rows(value, rows: tuple[int, ...]):
    if not isinstance(value, torch.Tensor) or not rows:
        return value
    return value[torch.arange(rows[0], device=value.device) % len(value)]


def _copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value
