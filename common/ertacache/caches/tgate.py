"""T-GATE (Liu et al., 2025; HaozheLiu-ST/T-GATE): cross-attention converges early, so it is frozen at a gate step m.

Before the gate, self-attention is computed in every `interval`-th step after a warm-up, and reused in between. From the
gate on, self-attention is computed in every step, cross-attention returns the mean of its outputs for both guidance
branches at the last step before the gate, and the unconditional branch is dropped. It needs cross-attention modules
and classifier-free guidance, as in Wan and Open-Sora; FLUX and CogVideoX attend to text and image tokens jointly.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager

from ertacache.caches.block_stack import BranchState, Clock
from ertacache.numerics.blocks import blocks_of, hooked

ATTENTIONS = {"WanTransformerBlock": ("attn1", "attn2"), "STDiT3Block": ("attn", "cross_attn")}  # (self, cross)


@dataclass(frozen=True)
class Gate:
    """The gate and the cadence before it.

    Attributes:
        step: m, the first step after the gate.
        interval: Before the gate, self-attention is computed in one of so many steps.
        warmup: Number of first steps in which it is always computed.
    """

    step: int = 10
    interval: int = 5
    warmup: int = 2

    def self_attention_runs(self, step: int) -> bool:
        """Return whether self-attention is computed in a step i = 0 … T−1."""
        return step < self.warmup or step >= self.step or (step - self.warmup) % self.interval == 0


class _Attention(ModelHook):
    """Hook on an attention module: reuses an earlier output where the gate asks for it."""

    _is_stateful = True

    def __init__(self, manager: StateManager, gate: Gate, cross: bool):
        super().__init__()
        self.state_manager, self.gate, self.cross = manager, gate, cross

    def new_forward(self, module, *args, **kwargs):
        state = self.state_manager.get_state()
        if self.cross and state.step >= self.gate.step:
            return self.frozen(module)
        if not self.cross and not self.gate.self_attention_runs(state.step):
            return state.memory[module]
        state.memory[module] = output = self.fn_ref.original_forward(*args, **kwargs)
        return output

    def frozen(self, module) -> torch.Tensor:
        """Return the mean output over branches, which are separate states or the two halves of a batch."""
        branches = [s.memory[module] for s in self.state_manager._state_cache.values() if module in s.memory]
        if len(branches) == 1:
            branches = branches[0].chunk(2)
        return sum(branches) / len(branches)

    def reset_state(self, module):
        self.state_manager.reset()
        return module


class _OneBranch(ModelHook):
    """Hook on the transformer: after the gate only the conditional branch runs, and its output serves for both."""

    _is_stateful = True

    def __init__(self, manager: StateManager, gate: Gate):
        super().__init__()
        self.state_manager, self.gate = manager, gate

    def new_forward(self, module, *args, **kwargs):
        state, name = self.state_manager.get_state(), self.state_manager.context.name
        forward = self.fn_ref.original_forward
        if state.step < self.gate.step:
            return forward(*args, **kwargs)
        if name == "uncond":
            return self.state_manager._state_cache["cond"].memory["output"]
        if name == "cond_uncond":  # one batch [cond; uncond]
            size = len(args[0] if args else kwargs["hidden_states"])
            args = [first_half(value, size) for value in args]
            kwargs = {key: first_half(value, size) for key, value in kwargs.items()}
            return tuple(torch.cat([output, output]) for output in forward(*args, **kwargs))
        state.memory["output"] = output = forward(*args, **kwargs)
        return output

    def reset_state(self, module):
        self.state_manager.reset()
        return module


def first_half(value, size: int):
    """Return the first half of a tensor whose first axis is the batch of this size; anything else unchanged."""
    return value[: size // 2] if isinstance(value, torch.Tensor) and value.ndim and len(value) == size else value


@contextmanager
def tgate(model: torch.nn.Module, gate: Gate):
    """Apply T-GATE to a stock transformer, for the pipeline's calls within the context.

    Raises:
        ValueError: A model without cross-attention.
    """
    manager, blocks = StateManager(BranchState), blocks_of(model)
    name = type(blocks[0]).__name__
    if name not in ATTENTIONS:
        raise ValueError(f"T-GATE freezes cross-attention, and a {name} has none")
    hooks = [(model, _OneBranch(manager, gate)), (model, Clock(manager))]
    for block in blocks:
        self_attention, cross_attention = (getattr(block, attribute) for attribute in ATTENTIONS[name])
        hooks.append((self_attention, _Attention(manager, gate, cross=False)))
        hooks.append((cross_attention, _Attention(manager, gate, cross=True)))
    with hooked(model, hooks):
        yield
