"""Threshold plans at site `blocks` in pipelines: on cached steps a model runs without its transformer blocks.

diffusers' own hooks on the blocks keep, at a computed step, what the stack has added to its streams (Eq. 5 on hidden
states). At a cached step the blocks return their inputs, and the last one adds that again (Eq. 6).
"""

from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook

from ertacache.algorithm import residual, reuse
from ertacache.numerics.blocks import arguments_of, blocks_of, streams_of
from ertacache.utils.errors import PlanError

NAME = "ertacache"  # of the hooks


class BlockResiduals:
    """The residuals of the block stacks in the last computed step of a call.

    Attributes:
        call: The model call under way; None outside of one.
        entered: The streams that entered its first block.
        kept: Residual of each stream, by call.
    """

    def __init__(self):
        self.step: int | None = None
        self.numbers: dict[int, int] = {}  # calls of each model in this step
        self.kept: dict[Any, tuple[torch.Tensor, ...]] = {}
        self.call, self.entered, self.reused = None, (), None

    def of(self, course, module, args: tuple, kwargs: dict):
        """Call a denoiser; at a cached step with the residuals of the same call in the last computed step, if known."""
        if course.step != self.step:
            self.step, self.numbers = course.step, {}
        number = self.numbers[id(module)] = self.numbers.get(id(module), -1) + 1
        self.call = (id(module), number)
        self.reused = self.kept.get(self.call) if course.skips else None
        try:
            return module(*args, **kwargs)
        finally:
            self.call = None


class StackHook(ModelHook):
    """Hook on one of the blocks of a model.

    Args:
        enabled: Knows the call under way.
        first, last: Whether the block is the stack's first, its last.
    """

    def __init__(self, enabled, first: bool, last: bool):
        super().__init__()
        self.enabled, self.first, self.last = enabled, first, last

    def initialize_hook(self, module):
        self.streams = streams_of(module)
        return module

    def new_forward(self, module, *args, **kwargs):
        course = self.enabled.course
        stack = None if course is None else course.outputs
        if stack is None or stack.call is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        arguments = arguments_of(module, args, kwargs)
        streams = tuple(arguments[name] for name in self.streams)
        if self.first:
            stack.entered = streams
        if stack.reused is not None:
            if self.last:
                streams = tuple(reuse(x, r) for x, r in zip(streams, stack.reused, strict=True))
            return streams if len(streams) > 1 else streams[0]
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.last:
            outputs = output if isinstance(output, tuple) else (output,)
            stack.kept[stack.call] = tuple(residual(y, x) for y, x in zip(outputs, stack.entered, strict=True))
        return output


def check_blocks(model) -> None:
    """Refuse a model whose blocks are not known."""
    blocks = blocks_of(model)
    try:
        known = bool([streams_of(block) for block in blocks])
    except ValueError:  # of diffusers' registry of blocks
        known = False
    if not known:
        text = f"the blocks of a {type(model).__name__} are not known, and the plan caches around them"
        raise PlanError(f"{text}: calibrate one at site output, or a budget plan")


def hook_blocks(model, enabled) -> None:
    """Put the hooks on a model's blocks."""
    blocks = blocks_of(model)
    for i, block in enumerate(blocks):
        hook = StackHook(enabled, i == 0, i == len(blocks) - 1)
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, NAME)


def unhook_blocks(model) -> None:
    """Take the hooks off a model's blocks; a model without them is left as it is."""
    for block in blocks_of(model):
        registry = getattr(block, "_diffusers_hook", None)
        if registry is not None and registry.get_hook(NAME) is not None:
            registry.remove_hook(NAME, recurse=False)
