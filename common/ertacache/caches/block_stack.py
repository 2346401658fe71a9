"""Ranges of transformer blocks whose difference, output minus input, is reused: the common part of these caches.

On a step that a range's policy lets pass, its blocks run and the difference of each stream (image tokens, and text
tokens where a model carries them through its blocks) is kept; on the others the blocks hand on what they are given and
the last one adds the difference. State is kept for each guidance branch, as the pipeline's cache context names them,
and ends with the pipeline's call.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.hooks import BaseState, StateManager


@dataclass
class BranchState(BaseState):
    """What is known of one guidance branch: its step i = 0 … T−1, and what ranges and policies remember."""

    step: int = -1
    differences: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    entered: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    computing: dict[str, bool] = field(default_factory=dict)
    memory: dict = field(default_factory=dict)

    def reset(self) -> None:
        self.__init__()


# Says whether a range is computed now: (state of the branch, the range's first block, its arguments by name) → bool.
Policy = Callable[[BranchState, torch.nn.Module, dict], bool]


class Clock(ModelHook):
    """On the transformer: counts the steps of each branch, and forgets what was decided in the last one."""

    _is_stateful = True

    def __init__(self, manager: StateManager):
        super().__init__()
        self.state_manager = manager

    def pre_forward(self, module, *args, **kwargs):
        state = self.state_manager.get_state()
        state.step += 1
        state.entered.clear()
        state.computing.clear()
        return args, kwargs

    def reset_state(self, module):
        self.state_manager.reset()
        return module


class _InRange(ModelHook):
    """On a block of a range."""

    _is_stateful = True

    def __init__(self, manager: StateManager, name: str, policy: Policy, first: bool, last: bool):
        super().__init__()
        self.state_manager, self.name, self.policy, self.first, self.last = manager, name, policy, first, last

    def initialize_hook(self, module):
        self.streams = streams_of(module)
        return module

    def new_forward(self, module, *args, **kwargs):
        state, named = self.state_manager.get_state(), arguments_of(module, args, kwargs)
        given = tuple(named[stream] for stream in self.streams)
        if self.first:
            wanted = self.policy(state, module, named)  # asked in every step, because policies look at all of them
            state.computing[self.name] = wanted or self.name not in state.differences
            state.entered[self.name] = given
        if not state.computing.get(self.name, True):  # a range that another one jumped into is just computed
            if self.last:
                given = tuple(x + d for x, d in zip(given, state.differences[self.name], strict=True))
            return given if len(given) > 1 else given[0]
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.last and self.name in state.entered:
            made = output if isinstance(output, tuple) else (output,)
            entered = state.entered.pop(self.name)
            state.differences[self.name] = tuple(after - before for after, before in zip(made, entered, strict=True))
        return output

    def reset_state(self, module):
        self.state_manager.reset()
        return module


def streams_of(block: torch.nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a block returns changed, in the order in which it returns them."""
    metadata = TransformerBlockRegistry.get(type(block))
    order = {
        metadata.hidden_states_argument_name: metadata.return_hidden_states_index or 0,
        metadata.encoder_hidden_states_argument_name: metadata.return_encoder_hidden_states_index,
    }
    return tuple(sorted((name for name, index in order.items() if index is not None), key=order.get))


def arguments_of(block: torch.nn.Module, args: tuple, kwargs: dict) -> dict:
    """A block's arguments by name."""
    import inspect

    return inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """A transformer's blocks in the order in which they run (Open-Sora's take turns: in a frame, along time)."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as NAMES

    lists = {name: list(m) for name, m in model.named_children() if name in NAMES}
    lists = dict(sorted(lists.items(), key=lambda item: item[0].startswith("single")))  # FLUX's come last
    if "temporal_transformer_blocks" in lists:
        pairs = zip(lists["transformer_blocks"], lists["temporal_transformer_blocks"], strict=True)
        return [block for pair in pairs for block in pair]
    return [block for blocks in lists.values() for block in blocks]


@contextmanager
def hooked(model: torch.nn.Module, hooks: Sequence[tuple[torch.nn.Module, ModelHook]]):
    """Register hooks on modules of a model, (module, hook) each, and take them off at the end, in reverse order."""
    names = []
    try:
        for number, (module, hook) in enumerate(hooks):
            name = f"ertacache_{number}"
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
            names.append((module, name))
        HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
        yield
    finally:
        for module, name in reversed(names):
            module._diffusers_hook.remove_hook(name, recurse=False)
        HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()


@contextmanager
def cached_ranges(model: torch.nn.Module, ranges: Sequence[tuple[Sequence[torch.nn.Module], Policy]]):
    """Reuse the differences of these ranges of blocks, (blocks, policy) each, in all calls within the context."""
    manager = StateManager(BranchState)
    hooks: list[tuple[torch.nn.Module, ModelHook]] = [(model, Clock(manager))]
    for number, (blocks, policy) in enumerate(ranges):
        ends = (0, len(blocks) - 1)
        hooks += [(b, _InRange(manager, str(number), policy, i == ends[0], i == ends[1])) for i, b in enumerate(blocks)]
    with hooked(model, hooks):
        yield manager
