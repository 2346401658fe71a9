"""The transformer blocks of a model, and hooks on them by diffusers' own mechanism."""

import inspect
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as BLOCK_LISTS
from diffusers.hooks._helpers import TransformerBlockRegistry


def streams_of(block: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments that a block updates, in the order in which it returns them."""
    metadata = TransformerBlockRegistry.get(type(block))
    order = {
        metadata.hidden_states_argument_name: metadata.return_hidden_states_index or 0,
        metadata.encoder_hidden_states_argument_name: metadata.return_encoder_hidden_states_index,
    }
    return tuple(sorted((name for name, index in order.items() if index is not None), key=order.get))


def arguments_of(block: torch.nn.Module, args: tuple, kwargs: dict) -> dict:
    """Return a block's arguments by name."""
    return inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return a transformer's blocks in the order in which they run (Open-Sora: spatial and temporal ones alternate)."""
    lists = {name: list(m) for name, m in model.named_children() if name in BLOCK_LISTS}
    lists = dict(sorted(lists.items(), key=lambda item: item[0].startswith("single")))  # FLUX's come last
    if "temporal_transformer_blocks" in lists:
        pairs = zip(lists["transformer_blocks"], lists["temporal_transformer_blocks"], strict=True)
        return [block for pair in pairs for block in pair]
    return [block for blocks in lists.values() for block in blocks]


@contextmanager
def hooked(model: torch.nn.Module, hooks: Sequence[tuple[torch.nn.Module, ModelHook]]):
    """Register hooks on modules of a model for the context, and remove them in reverse order.

    Args:
        model: The model that contains the modules.
        hooks: (module, hook) pairs.
    """
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
