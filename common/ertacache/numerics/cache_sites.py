"""Cache sites: where the residual is taken, at the model's output or around its transformer blocks.

A site is a context manager with two methods. `residual(x, v)` returns what the network added to its input, right after
the model calls of a step. `reuse(x, t, r)` returns the velocity of a cached step from that residual. Nothing is
patched: `BlocksSite` reads hidden states through hooks, which are removed when the run ends, also after an error.
"""

from collections.abc import Callable
from typing import Any

import torch

from ertacache import algorithm


class OutputSite:
    """Eq. 5–6 as printed: the residual of the velocity, after guidance. A cached step costs one addition."""

    def __enter__(self) -> "OutputSite":
        return self

    def __exit__(self, *_) -> None:
        pass

    def residual(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return r̃ = v − x (Eq. 5), [B, …]."""
        return algorithm.residual(v, x)

    def reuse(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """Return ṽ = x + r̃ (Eq. 6), [B, …]."""
        return algorithm.reuse(x, r)


class BlocksSite:
    """Eq. 5–6 on hidden states: after the block stack minus before it.

    A cached step runs the model's layers outside the block stack. The residual holds one chunk per guidance branch, in
    the order of the calls, joined along the batch: [branches · B, L, D].

    Args:
        model: The transformer.
        embed: Its module whose output enters the first block.
        head: Its module whose first input is the hidden state after the last block.
        around: around(x, t, add) runs the model without its blocks and returns the velocity; it calls
            add(name, embedded) in place of the blocks, once for each branch.
        tokens: Brings the output of `embed` into the layout of the hidden state, [B, L, D].
        branch_of: branch_of(kwargs) returns the name of the guidance branch that a model call with these keyword
            arguments computes.
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
        self._reset()

    def _reset(self) -> None:
        self._handles, self._branch, self._before, self._after = [], None, {}, {}

    def __enter__(self) -> "BlocksSite":
        def note_branch(module, args, kwargs):
            self._branch = self._branch_of(kwargs)

        def keep_input(module, args, output):
            self._before[self._branch] = self._tokens(output)

        def keep_output(module, args):
            self._after[self._branch] = args[0]

        self._handles = [
            self._model.register_forward_pre_hook(note_branch, with_kwargs=True),
            self._embed.register_forward_hook(keep_input),
            self._head.register_forward_pre_hook(keep_output),
        ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._reset()

    def residual(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the residual of the block stack in the newest model calls, [branches · B, L, D], in the model's dtype.

        Wan2.1's head is given the hidden state in float32 in any dtype; it was in the model's before.
        """
        both = ((self._after[name].to(before.dtype), before) for name, before in self._before.items())
        return torch.cat([algorithm.residual(after, before) for after, before in both])

    def reuse(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """Return the velocity at latents x and time t, with the residual r added in place of the blocks."""
        residuals = dict(zip(self._before, r.chunk(len(self._before)), strict=True))
        return self._around(x, t, lambda name, embedded: algorithm.reuse(self._tokens(embedded), residuals[name]))
