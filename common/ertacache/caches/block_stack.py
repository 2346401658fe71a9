"""Reuse of a range of transformer blocks: its difference, output minus input, is cached. Most caches here are that.

On a step that a range's policy computes, its blocks run, and the difference of each stream (image tokens, and text
tokens where a model carries them through its blocks) is kept. On other steps its blocks return their inputs, and the
last block adds the difference. State is kept per guidance branch, as the pipeline's cache context names them, and is
dropped when the pipeline's call ends.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

from ertacache.numerics.blocks import arguments_of, hooked, streams_of


@dataclass
class BranchState(BaseState):
    """State of one guidance branch during a run.

    Attributes:
        step: i = 0 … T−1; −1 before the first call of the transformer.
        differences: The cached differences of each range's streams, by name of the range.
        entered: The streams that entered a range in this step.
        computing: Whether a range is computed in this step.
        memory: What policies and hooks keep from step to step.
    """

    step: int = -1
    differences: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    entered: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    computing: dict[str, bool] = field(default_factory=dict)
    memory: dict = field(default_factory=dict)

    def reset(self) -> None:
        self.__init__()


# Whether to compute a range in this step: (state of the branch, the range's first block, its arguments by name) → bool.
Policy = Callable[[BranchState, torch.nn.Module, dict], bool]


class Clock(ModelHook):
    """Hook on the transformer: counts the steps of each branch and clears the decisions of the previous step."""

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
    """Hook on a block of a range."""

    _is_stateful = True

    def __init__(self, manager: StateManager, name: str, policy: Policy, first: bool, last: bool):
        super().__init__()
        self.state_manager, self.name, self.policy, self.first, self.last = manager, name, policy, first, last

    def initialize_hook(self, module):
        self.streams = streams_of(module)
        return module

    def new_forward(self, module, *args, **kwargs):
        state, arguments = self.state_manager.get_state(), arguments_of(module, args, kwargs)
        streams = tuple(arguments[name] for name in self.streams)
        if self.first:
            compute = self.policy(state, module, arguments)  # called in every step: policies observe all of them
            state.computing[self.name] = compute or self.name not in state.differences
            state.entered[self.name] = streams
        if not state.computing.get(self.name, True):  # a range whose first block did not run is computed
            if self.last:
                streams = tuple(x + d for x, d in zip(streams, state.differences[self.name], strict=True))
            return streams if len(streams) > 1 else streams[0]
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.last and self.name in state.entered:
            outputs = output if isinstance(output, tuple) else (output,)
            entered = state.entered.pop(self.name)
            state.differences[self.name] = tuple(after - before for after, before in zip(outputs, entered, strict=True))
        return output

    def reset_state(self, module):
        self.state_manager.reset()
        return module


@contextmanager
def cached_ranges(model: torch.nn.Module, ranges: Sequence[tuple[Sequence[torch.nn.Module], Policy]]):
    """Reuse the differences of ranges of blocks in all calls within the context.

    Args:
        model: The transformer.
        ranges: (blocks, policy) pairs; the blocks of a range follow one another.

    Yields:
        The manager of the branches' states.
    """
    manager = StateManager(BranchState)
    hooks: list[tuple[torch.nn.Module, ModelHook]] = [(model, Clock(manager))]
    for number, (blocks, policy) in enumerate(ranges):
        last = len(blocks) - 1
        hooks += [(b, _InRange(manager, str(number), policy, i == 0, i == last)) for i, b in enumerate(blocks)]
    with hooked(model, hooks):
        yield manager
