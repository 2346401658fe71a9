"""Δ-DiT (Chen et al., 2024): reuse the difference that a part of the blocks makes, and change the part half-way.

Early steps settle outlines, to which the front blocks matter, so the back blocks are reused; late steps settle details,
and the front blocks are reused. There is no official code; this is the paper's description.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ertacache.caches.block_stack import BranchState, blocks_of, cached_ranges


@dataclass(frozen=True)
class DeltaPolicy:
    """Of the steps begin ≤ i < end, compute every `interval`-th one; of all others, every one."""

    interval: int
    begin: int
    end: int

    def __call__(self, state: BranchState, block: torch.nn.Module, arguments: dict) -> bool:
        return not self.begin <= state.step < self.end or (state.step - self.begin) % self.interval == 0


@contextmanager
def delta_dit(model: torch.nn.Module, steps: int, interval: int, count: int, boundary: int | None = None):
    """Δ-DiT on a stock transformer.

    steps: T. interval: N, of N steps one is computed. count: N_c, how many blocks are reused. boundary: the first step
    of the late stage (default: T/2).
    """
    blocks, boundary = blocks_of(model), steps // 2 if boundary is None else boundary
    if not 1 <= count <= len(blocks):
        raise ValueError(f"{count} blocks to reuse, the model has {len(blocks)}")
    back = (blocks[-count:], DeltaPolicy(interval, 0, boundary))
    front = (blocks[:count], DeltaPolicy(interval, boundary, steps))
    with cached_ranges(model, [back, front]):
        yield
