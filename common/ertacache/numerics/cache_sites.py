"""Where the residual is cached: at the model's output, or around its transformer blocks.

A site is a context manager with two methods: `residual(x, v)` is asked right after the model calls of a step and
returns what the network added; `reuse(x, t, r)` gives the velocity of a cached step from it. Nothing is patched: the
`blocks` site listens through hooks that are removed when the run ends, also when it ends by an error.
"""

from collections.abc import Callable
from typing import Any

import torch

from ertacache import algorithm


class OutputSite:
    """Eq. 5–6 as printed: the residual of the model's output, after guidance. A cached step costs one addition."""

    def __enter__(self) -> "OutputSite":
        return self

    def __exit__(self, *_) -> None:
        pass

    def residual(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return algorithm.residual(v, x)

    def reuse(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return algorithm.reuse(x, r)


class BlocksSite:
    """Eq. 5–6 on hidden states: after the block stack minus before it. A cached step runs what lies around the stack.

    model: the transformer. embed: its module whose output, brought into the layout of the hidden state by `tokens`,
    enters the first block. head: its module whose first input leaves the last block. branch_of(kwargs): the name of
    the guidance branch that a model call with these keyword arguments computes. around(x, t, add): runs the model
    without its blocks; `add(name, embedded)` stands in their place, once for each branch.

    The residual holds one part a branch, in the order of the calls, joined along the batch: [branches · B, L, D].
    """

    def __init__(
        self,
        model: torch.nn.Module,
        embed: torch.nn.Module,
        head: torch.nn.Module,
        around: Callable,
        tokens: Callable[[torch.Tensor], torch.Tensor] = lambda embedded: embedded,
        branch_of: Callable[[dict[str, Any]], str] = lambda kwargs: "cond",
    ):
        self._model, self._embed, self._head = model, embed, head
        self._around, self._tokens, self._branch_of = around, tokens, branch_of
        self._forget()

    def _forget(self) -> None:
        self._handles, self._branch, self._before, self._after = [], None, {}, {}

    def __enter__(self) -> "BlocksSite":
        def calling(module, args, kwargs):
            self._branch = self._branch_of(kwargs)

        def entering(module, args, output):
            self._before[self._branch] = self._tokens(output)

        def leaving(module, args):
            self._after[self._branch] = args[0]

        self._handles = [
            self._model.register_forward_pre_hook(calling, with_kwargs=True),
            self._embed.register_forward_hook(entering),
            self._head.register_forward_pre_hook(leaving),
        ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._forget()

    def residual(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([algorithm.residual(self._after[name], before) for name, before in self._before.items()])

    def reuse(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        parts = dict(zip(self._before, r.chunk(len(self._before)), strict=True))
        return self._around(x, t, lambda name, embedded: algorithm.reuse(self._tokens(embedded), parts[name]))
