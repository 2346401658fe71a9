"""Pyramid Attention Broadcast (Zhao et al., ICLR 2025; NUS-HPC-AI-Lab/VideoSys): reuse the outputs of single modules.

Within a window of timesteps an attention is computed in one of n steps, and its output is handed out in the others; the
less an attention changes, the wider its range: attention in a frame n, along time 2 n, to the text 3 n. Feed-forwards
may be reused alike. diffusers has the attention part, with one counter a module, so that a pipeline which calls the two
guidance branches apart (Wan's) would be given the other branch's output; here each branch has its own.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager

from ertacache.caches.block_stack import BranchState, Clock, blocks_of, hooked

MODULES = {  # of a block: what is reused, and by which of the ranges
    "FluxTransformerBlock": {"attn": "spatial", "ff": "mlp", "ff_context": "mlp"},
    "FluxSingleTransformerBlock": {"attn": "spatial", "proj_mlp": "mlp"},  # its proj_out mixes both
    "WanTransformerBlock": {"attn1": "spatial", "attn2": "cross", "ffn": "mlp"},
    "CogVideoXBlock": {"attn1": "spatial", "ff": "mlp"},
    "STDiT3Block": {"attn": "spatial", "cross_attn": "cross", "ff": "mlp"},
}


@dataclass(frozen=True)
class Broadcast:
    """In one of so many steps is each kind of module computed (1: in all), where low < timestep < high.

    window: (low, high), training timesteps from 1000 (noise) to 0.
    """

    spatial: int = 2
    temporal: int = 4
    cross: int = 6
    mlp: int = 1
    window: tuple[float, float] = (100, 800)

    @classmethod
    def pyramid(cls, spatial: int, window: tuple[float, float], mlp: int = 1) -> "Broadcast":
        """As the authors choose the ranges: 1 : 2 : 3."""
        return cls(spatial, 2 * spatial, 3 * spatial, mlp, window)


class _Module(ModelHook):
    """On a module: hands out its output of an earlier step of the same branch."""

    _is_stateful = True

    def __init__(self, manager: StateManager, every: int, in_window: Callable[[], bool]):
        super().__init__()
        self.state_manager, self.every, self.in_window = manager, every, in_window

    def new_forward(self, module, *args, **kwargs):
        state = self.state_manager.get_state()
        if module in state.memory and state.step % self.every and self.in_window():
            return state.memory[module]
        state.memory[module] = output = self.fn_ref.original_forward(*args, **kwargs)
        return output

    def reset_state(self, module):
        self.state_manager.reset()
        return module


@contextmanager
def pab(model: torch.nn.Module, broadcast: Broadcast, timestep: Callable[[], float]):
    """PAB on a stock transformer, for the pipeline's calls within the context. timestep: tells the current one."""
    manager, (low, high) = StateManager(BranchState), broadcast.window
    hooks: list[tuple[torch.nn.Module, ModelHook]] = [(model, Clock(manager))]
    for block in blocks_of(model):
        for attribute, kind in MODULES[type(block).__name__].items():
            along_time = kind == "spatial" and getattr(block, "temporal", False)
            every = getattr(broadcast, "temporal" if along_time else kind)
            if every > 1:
                hooks.append((getattr(block, attribute), _Module(manager, every, lambda: low < timestep() < high)))
    with hooked(model, hooks):
        yield
