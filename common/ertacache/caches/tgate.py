"""T-GATE (Liu et al., 2025; HaozheLiu-ST/T-GATE): cross-attention settles early, so it is frozen at a gate step m.

Before the gate, self-attention is computed in every `interval`-th step (after a warm-up) and reused between. From the
gate on, self-attention runs again in every step, cross-attention gives the mean of what it gave to both guidance
branches in the last step before the gate, and the unconditional branch is dropped. For models with cross-attention and
classifier-free guidance: Wan and Open-Sora; FLUX and CogVideoX have neither the one nor the other apart.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager

from ertacache.caches.block_stack import BranchState, Clock, blocks_of, hooked

ATTENTIONS = {"WanTransformerBlock": ("attn1", "attn2"), "STDiT3Block": ("attn", "cross_attn")}  # self, cross


@dataclass(frozen=True)
class Gate:
    """step: m, the first step behind the gate. interval: of so many steps before it, self-attention runs in one.

    warmup: the first steps, in which it always runs.
    """

    step: int = 10
    interval: int = 5
    warmup: int = 2

    def self_attention_runs(self, step: int) -> bool:
        return step < self.warmup or step >= self.step or (step - self.warmup) % self.interval == 0


class _Attention(ModelHook):
    """On an attention module: hands out an earlier output where the gate says so."""

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
        """The mean over branches: they are separate states, or the two halves of a batch."""
        branches = [s.memory[module] for s in self.state_manager._state_cache.values() if module in s.memory]
        if len(branches) == 1:
            branches = branches[0].chunk(2)
        return sum(branches) / len(branches)

    def reset_state(self, module):
        self.state_manager.reset()
        return module


class _OneBranch(ModelHook):
    """On the transformer: behind the gate only the conditional branch runs, and stands for both."""

    _is_stateful = True

    def __init__(self, manager: StateManager, gate: Gate):
        super().__init__()
        self.state_manager, self.gate = manager, gate

    def new_forward(self, module, *args, **kwargs):
        state, name = self.state_manager.get_state(), self.state_manager.context.name
        run = self.fn_ref.original_forward
        if state.step < self.gate.step:
            return run(*args, **kwargs)
        if name == "uncond":
            return self.state_manager._state_cache["cond"].memory["output"]
        if name == "cond_uncond":  # one batch [cond; uncond]
            rows = len(args[0] if args else kwargs["hidden_states"])
            args = [first_half(value, rows) for value in args]
            kwargs = {key: first_half(value, rows) for key, value in kwargs.items()}
            return tuple(torch.cat([part, part]) for part in run(*args, **kwargs))
        state.memory["output"] = output = run(*args, **kwargs)
        return output

    def reset_state(self, module):
        self.state_manager.reset()
        return module


def first_half(value, rows: int):
    """The first half of a tensor that has a row for each of the batch; anything else as it is."""
    return value[: rows // 2] if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows else value


@contextmanager
def tgate(model: torch.nn.Module, gate: Gate):
    """T-GATE on a stock transformer, for the pipeline's calls within the context."""
    manager, blocks = StateManager(BranchState), blocks_of(model)
    name = type(blocks[0]).__name__
    if name not in ATTENTIONS:
        raise ValueError(f"T-GATE freezes cross-attention, and a {name} has none")
    pairs = [(model, _OneBranch(manager, gate)), (model, Clock(manager))]
    for block in blocks:
        own, cross = (getattr(block, attribute) for attribute in ATTENTIONS[name])
        pairs += [(own, _Attention(manager, gate, cross=False)), (cross, _Attention(manager, gate, cross=True))]
    with hooked(model, pairs):
        yield
