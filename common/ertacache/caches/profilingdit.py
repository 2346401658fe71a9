"""ProfilingDiT (Ma et al., 2025): blocks that mostly draw the background are reused, on a fixed cadence.

A profile taken offline says where each block acts. A block's action on a token is the length of its difference there,
summed over the steps; tokens are foreground where the hidden state before the head is farthest from the median token's
at the last step. Blocks with the least share of their action in the foreground are the background blocks: after a
warm-up they run in one of `interval` steps. The authors' code was not at hand; they profile attention maps, and this
is our reading of the method.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ertacache.caches.block_stack import BranchState, blocks_of, cached_ranges, streams_of

FOREGROUND = 1 / 3  # the share of tokens that counts as foreground


def foreground_share(action: torch.Tensor, hidden: torch.Tensor) -> float:
    """The share of action [B, L] on the tokens whose hidden state [B, L, C] is farthest from the median token's."""
    distance = (hidden - hidden.median(dim=1, keepdim=True).values).norm(dim=-1)
    count = max(1, round(FOREGROUND * distance.shape[1]))
    chosen = distance.topk(count, dim=1).indices
    return (action.gather(1, chosen).sum() / action.sum()).item()


@dataclass
class Profile:
    """Watches uncached runs of T steps. shares: a list a run, of each block's share of its action in the foreground."""

    steps: int
    shares: list[list[float]] = field(default_factory=list)

    @contextmanager
    def watch(self, model: torch.nn.Module):
        blocks = blocks_of(model)
        places = [streams_of(block).index("hidden_states") for block in blocks]
        last: list[torch.Tensor] = []

        def leaving_last(module, args, output):
            last[:] = [output[places[-1]] if isinstance(output, tuple) else output]

        with cached_ranges(model, [((block,), always) for block in blocks]) as manager:

            def leaving(module, args, output):
                state = manager.get_state()
                actions = state.memory.setdefault("actions", [0.0] * len(blocks))
                for number, place in enumerate(places):
                    difference = state.differences[str(number)][place]
                    actions[number] = actions[number] + difference.float().norm(dim=-1).flatten(1)
                if state.step == self.steps - 1:
                    hidden = last[0].float().flatten(1, -2)
                    self.shares.append([foreground_share(action, hidden) for action in actions])

            handles = [blocks[-1].register_forward_hook(leaving_last), model.register_forward_hook(leaving)]
            try:
                yield self
            finally:
                for handle in handles:
                    handle.remove()

    def background(self, share: float) -> list[int]:
        """Numbers of the blocks that act least in the foreground, `share` of all."""
        means = torch.tensor(self.shares).mean(0)
        return sorted(means.argsort()[: max(1, round(share * len(means)))].tolist())


def always(state: BranchState, block: torch.nn.Module, arguments: dict) -> bool:
    return True


@dataclass(frozen=True)
class Cadence:
    """Compute in the first `warmup` steps, then in one of `interval`."""

    interval: int = 6
    warmup: int = 6

    def __call__(self, state: BranchState, block: torch.nn.Module, arguments: dict) -> bool:
        return state.step < self.warmup or (state.step - self.warmup) % self.interval == 0


@contextmanager
def profilingdit(model: torch.nn.Module, background: list[int], cadence: Cadence):
    """ProfilingDiT on a stock transformer. background: numbers of the blocks to reuse, in the order they run."""
    blocks = blocks_of(model)
    with cached_ranges(model, [((blocks[number],), cadence) for number in background]):
        yield
