"""ProfilingDiT (Ma et al., 2025): reuse the blocks that act mostly on the background, on a fixed cadence.

A profile taken offline shows where each block acts. A block's action on a token is the norm of its difference (output
minus input) at that token, summed over the steps. Foreground tokens are those whose hidden state before the head is
farthest from the median token's at the last step. The blocks with the least share of their action in the foreground
are the background blocks: after a warm-up they are computed in one of `interval` steps.

The authors' code was not available. They profile attention maps; this is our reading of the method.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ertacache.caches.block_stack import BranchState, cached_ranges
from ertacache.numerics.blocks import blocks_of, streams_of

FOREGROUND = 1 / 3  # the share of tokens that counts as foreground


def foreground_share(action: torch.Tensor, hidden: torch.Tensor) -> float:
    """Return the share of action [B, L] on the tokens whose hidden state [B, L, C] is farthest from the median."""
    distance = (hidden - hidden.median(dim=1, keepdim=True).values).norm(dim=-1)
    count = max(1, round(FOREGROUND * distance.shape[1]))
    foreground = distance.topk(count, dim=1).indices
    return (action.gather(1, foreground).sum() / action.sum()).item()


@dataclass
class Profile:
    """Observer of uncached runs that measures where each block acts.

    Attributes:
        steps: T, steps of a run.
        shares: One list per run and guidance branch: each block's share of its action in the foreground.
    """

    steps: int
    shares: list[list[float]] = field(default_factory=list)

    @contextmanager
    def watch(self, model: torch.nn.Module):
        """Observe the model's calls within the context."""
        blocks = blocks_of(model)
        streams = [streams_of(block).index("hidden_states") for block in blocks]  # index of the image tokens
        last: list[torch.Tensor] = []

        def keep_last_hidden(module, args, output):
            last[:] = [output[streams[-1]] if isinstance(output, tuple) else output]

        with cached_ranges(model, [((block,), always) for block in blocks]) as manager:

            def record(module, args, output):
                state = manager.get_state()
                actions = state.memory.setdefault("actions", [0.0] * len(blocks))
                for number, stream in enumerate(streams):
                    difference = state.differences[str(number)][stream]
                    actions[number] = actions[number] + difference.float().norm(dim=-1).flatten(1)
                if state.step == self.steps - 1:
                    hidden = last[0].float().flatten(1, -2)
                    self.shares.append([foreground_share(action, hidden) for action in actions])

            handles = [blocks[-1].register_forward_hook(keep_last_hidden), model.register_forward_hook(record)]
            try:
                yield self
            finally:
                for handle in handles:
                    handle.remove()

    def background(self, share: float) -> list[int]:
        """Return the background blocks.

        Args:
            share: Share of all blocks, 0 to 1.

        Returns:
            Numbers of the blocks that act least in the foreground, in the order in which they run; at least one.
        """
        means = torch.tensor(self.shares).mean(0)
        return sorted(means.argsort()[: max(1, round(share * len(means)))].tolist())


def always(state: BranchState, block: torch.nn.Module, arguments: dict) -> bool:
    """Compute every step."""
    return True


@dataclass(frozen=True)
class Cadence:
    """Compute the first `warmup` steps, then one of `interval`."""

    interval: int = 6
    warmup: int = 6

    def __call__(self, state: BranchState, block: torch.nn.Module, arguments: dict) -> bool:
        return state.step < self.warmup or (state.step - self.warmup) % self.interval == 0


@contextmanager
def profilingdit(model: torch.nn.Module, background: list[int], cadence: Cadence):
    """Apply ProfilingDiT to a stock transformer, for the pipeline's calls within the context.

    Args:
        model: The transformer.
        background: Numbers of the blocks to reuse, in the order in which they run.
        cadence: The steps in which these blocks are computed.
    """
    blocks = blocks_of(model)
    with cached_ranges(model, [((blocks[number],), cadence) for number in background]):
        yield
