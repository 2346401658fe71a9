"""Pyramid Attention Broadcast (Zhao et al., ICLR 2025; NUS-HPC-AI-Lab/VideoSys): reuse the outputs of single modules.

Within a window of timesteps, an attention module is computed in one of n steps and its output is reused in the others.
The less an attention changes, the larger its n: spatial attention n, temporal 2n, cross-attention 3n. Feed-forward
modules may be reused in the same way. diffusers has the attention part, with one counter per module; a pipeline that
calls the two guidance branches separately (Wan's) would mix their outputs there. Here each branch has its own state.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager

from ertacache.caches.block_stack import BranchState, Clock
from ertacache.numerics.blocks import blocks_of, hooked

MODULES = {  # attribute of a block → the field of `Broadcast` that governs its reuse
    "FluxTransformerBlock": {"attn": "spatial", "ff": "mlp", "ff_context": "mlp"},
    "FluxSingleTransformerBlock": {"attn": "spatial", "proj_mlp": "mlp"},  # its proj_out mixes both
    "WanTransformerBlock": {"attn1": "spatial", "attn2": "cross", "ffn": "mlp"},
    "CogVideoXBlock": {"attn1": "spatial", "ff": "mlp"},
    "STDiT3Block": {"attn": "spatial", "cross_attn": "cross", "ff": "mlp"},
}


@dataclass(frozen=True)
class Broadcast:
    """How often each kind of module is computed: in one of so many steps (1: in all).

    Attributes:
        spatial: For spatial attention, and attention over all tokens.
        temporal: For temporal attention.
        cross: For cross-attention.
        mlp: For feed-forward modules.
        window: (low, high): modules are reused where low < timestep < high, 1000 = noise … 0.
    """

    spatial: int = 2
    temporal: int = 4
    cross: int = 6
    mlp: int = 1
    window: tuple[float, float] = (100, 800)

    @classmethod
    def pyramid(cls, spatial: int, window: tuple[float, float], mlp: int = 1) -> "Broadcast":
        """Return the authors' choice: spatial, temporal and cross-attention as 1 : 2 : 3."""
        return cls(spatial, 2 * spatial, 3 * spatial, mlp, window)


class _Module(ModelHook):
    """Hook on a module: reuses its output of an earlier step of the same branch."""

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
    """Apply PAB to a stock transformer, for the pipeline's calls within the context.

    Args:
        model: The transformer.
        broadcast: How often modules are computed.
        timestep: Returns the current timestep, 1000 = noise … 0.
    """
    manager, (low, high) = StateManager(BranchState), broadcast.window
    hooks: list[tuple[torch.nn.Module, ModelHook]] = [(model, Clock(manager))]
    for block in blocks_of(model):
        for attribute, kind in MODULES[type(block).__name__].items():
            temporal = kind == "spatial" and getattr(block, "temporal", False)
            every = getattr(broadcast, "temporal" if temporal else kind)
            if every > 1:
                hooks.append((getattr(block, attribute), _Module(manager, every, lambda: low < timestep() < high)))
    with hooked(model, hooks):
        yield
