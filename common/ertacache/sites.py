"""Where the residual is cached: at the model's output, or around its transformer blocks.

A site is a context manager with two methods: `residual(x, v)` is asked right after a model call and returns what the
network added; `reuse(x, s, r)` gives the velocity of a cached step from it. Nothing is patched: the `blocks` site
listens through two hooks that are removed when the run ends, also when it ends by an error.
"""

from collections.abc import Callable

import torch

from ertacache import algorithm


class OutputSite:
    """Eq. 5–6 as printed: the residual of the model's output. A cached step costs one addition."""

    def __enter__(self) -> "OutputSite":
        return self

    def __exit__(self, *_) -> None:
        pass

    def residual(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return algorithm.residual(v, x)

    def reuse(self, x: torch.Tensor, s: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return algorithm.reuse(x, r)


class BlocksSite:
    """Eq. 5–6 on hidden states: after the block stack minus before it. A cached step runs what lies around the stack.

    embed: module whose output enters the first block. head: module whose first input leaves the last block.
    around(x, s, add): runs the model without its blocks, with `add` applied to the hidden state in their place.
    """

    def __init__(self, embed: torch.nn.Module, head: torch.nn.Module, around: Callable):
        self._embed, self._head, self._around = embed, head, around
        self._handles, self._before, self._after = [], None, None

    def __enter__(self) -> "BlocksSite":
        def entering(module, args, output):
            self._before = output

        def leaving(module, args):
            self._after = args[0]

        self._handles = [
            self._embed.register_forward_hook(entering),
            self._head.register_forward_pre_hook(leaving),
        ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._before, self._after = [], None, None

    def residual(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return algorithm.residual(self._after, self._before)

    def reuse(self, x: torch.Tensor, s: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return self._around(x, s, lambda hidden: algorithm.reuse(hidden, r))
