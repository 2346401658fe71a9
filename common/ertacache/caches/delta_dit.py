"""Δ-DiT (Chen et al., 2024): reuse the difference of the back blocks in early steps, of the front blocks in late ones.

Early steps form outlines, for which the front blocks matter, so the back blocks are reused; late steps form details,
so the front blocks are reused. There is no official code; this follows the paper's description.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ertacache.caches.block_stack import BranchState, cached_ranges
from ertacache.numerics.blocks import blocks_of


@dataclass(frozen=True)
class DeltaPolicy:
    """Compute every `interval`-th of the steps begin ≤ i < end, and all other steps."""

    interval: int
    begin: int
    end: int

    def __call__(self, state: BranchState, block: torch.nn.Module, arguments: dict) -> bool:
        return not self.begin <= state.step < self.end or (state.step - self.begin) % self.interval == 0


@contextmanager
def delta_dit(model: torch.nn.Module, steps: int, interval: int, count: int, boundary: int | None = None):
    """Apply Δ-DiT to a stock transformer, for the pipeline's calls within the context.

    Args:
        model: The transformer.
        steps: T, steps of the run.
        interval: N: one of N steps is computed.
        count: N_c, number of blocks that are reused.
        boundary: First step of the late stage; None for T/2.

    Raises:
        ValueError: A count below 1 or above the number of blocks.
    """
    blocks, boundary = blocks_of(model), steps // 2 if boundary is None else boundary
    if not 1 <= count <= len(blocks):
        raise ValueError(f"{count} blocks to reuse, the model has {len(blocks)}")
    back = (blocks[-count:], DeltaPolicy(interval, 0, boundary))
    front = (blocks[:count], DeltaPolicy(interval, boundary, steps))
    with cached_ranges(model, [back, front]):
        yield
