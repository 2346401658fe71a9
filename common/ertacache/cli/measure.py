"""Quality and seconds of calls, piece by piece: what is finished is not measured again after an interruption."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ertacache.cli.calls import Call, Calls
from ertacache.evaluation.metrics import quality
from ertacache.evaluation.other_methods import counted
from ertacache.utils import media, parallel
from ertacache.utils.checkpoints import Checkpoints, digest

FPS = 8  # of sample videos


class Measurement:
    """Measures calls against the first of them, which is uncached.

    Args:
        calls: The pipeline and its prompts.
        finished: Holds the pieces: one for each call and batch, and one for each round of seconds.
        samples: Results of the first batch that are kept as files; with any, the FLOPs of that batch are counted.
    """

    def __init__(self, calls: Calls, finished: Checkpoints, samples: int = 0):
        self.calls, self.finished, self.samples = calls, finished, samples

    def quality(self, methods: Sequence[Call]) -> list[list[dict[str, Any]]]:
        """Return the pieces of each method, in the order of batches: "distances" of its results, and "flops".

        Processes take batches in turn. The uncached run of a batch is made where one of its pieces is missing.
        """
        mine = [self._batch(methods, number) for number in parallel.mine(len(self.calls.batches))]
        return [list(pieces) for pieces in zip(*parallel.in_order(mine), strict=True)]

    def _batch(self, methods: Sequence[Call], number: int) -> list[dict[str, Any]]:
        uncached = cache(lambda: self._run(methods[0], number))

        def piece(method: Call) -> dict[str, Any]:
            reference, flops = uncached()
            if method is methods[0]:
                return {"distances": [], "flops": flops}
            images, flops = self._run(method, number)
            pairs = zip(reference, images, strict=True)
            return {"distances": [quality(a[None], b[None]) for a, b in pairs], "flops": flops}

        needed = methods if self.samples and number == 0 else methods[1:]
        pieces = [self.finished.of_this_rank([method.key, number], partial(piece, method)) for method in needed]
        return [{"distances": [], "flops": None}] * (len(methods) - len(needed)) + pieces

    def _run(self, method: Call, number: int) -> tuple[np.ndarray, float | None]:
        """Return images and FLOPs per prompt."""
        part = self.calls.batches[number]
        if not (self.samples and number == 0):
            return self.calls.run(method, part)[0], None
        (images, _), flops = counted(self.calls.pipe, lambda: self.calls.run(method, part))
        self.finished.folder.mkdir(parents=True, exist_ok=True)
        media.save_results(self.finished.folder, images[: self.samples], self._name(method), FPS)
        return images, flops and flops / len(images)

    def sample_paths(self, method: Call) -> list[Path]:
        """Return the files of a method's first results."""
        return sorted(self.finished.folder.glob(f"*-{self._name(method)}.*"))

    @staticmethod
    def _name(method: Call) -> str:
        return digest(method.key)[:16]

    def seconds(self, methods: Sequence[Call], repeats: int) -> list[list[float]]:
        """Return the seconds of the first batch's call end to end, [methods][repeats]; methods take turns."""
        keys = [method.key for method in methods]

        def round_of_all() -> list[float]:
            for method in methods:
                if method.name not in self.calls.made:  # its first call warms up
                    self.calls.run(method, self.calls.batches[0])
            return [self.calls.run(method, self.calls.batches[0])[1] for method in methods]

        rounds = [self.finished.of_this_rank(["seconds", keys, n], round_of_all) for n in range(repeats)]
        return [list(times) for times in zip(*rounds, strict=True)]
