"""What a run turns out to be, by its first model call: a plan records it, and a run is compared with it.

Settings that a call is given do not tell: most have defaults, which differ between pipelines and model folders.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ertacache.plans.requirements import transformer_of

REMEDIES = {
    "latents": "give the call the same size",
    "text_length": "give the call the same max_sequence_length",
    "guidance_scale": "give the call the same guidance_scale",
}


def conditions_of(args: tuple, kwargs: Mapping[str, Any], pipe=None) -> dict[str, Any]:
    """Return what a model call says of its run.

    Args:
        args, kwargs: Of the call.
        pipe: The pipeline that makes it.

    Returns:
        "latents", their shape without the batch; "text_length", tokens of the prompt with their padding, where no mask
        tells the model which are padding; "guidance_scale". Only what is there.
    """
    found: dict[str, Any] = {}
    latents = kwargs.get("hidden_states", kwargs.get("sample", args[0] if args else None))
    if isinstance(latents, torch.Tensor) and latents.ndim > 1:
        found["latents"] = list(latents.shape[1:])
    text = kwargs.get("encoder_hidden_states")
    masked = any("mask" in name and value is not None for name, value in kwargs.items())
    if isinstance(text, torch.Tensor) and text.ndim == 3 and not masked:
        found["text_length"] = text.shape[1]
    scale = getattr(pipe, "_guidance_scale", None)
    if isinstance(scale, int | float):
        found["guidance_scale"] = scale
    return found


@contextlib.contextmanager
def watching(pipe) -> Iterator[dict[str, Any]]:
    """Yield a dictionary that the first call of a pipeline's transformer fills with its conditions."""
    found, transformer = {}, transformer_of(pipe)
    if not isinstance(transformer, torch.nn.Module):
        yield found
        return

    def see(module, args, kwargs):
        if not found:
            found.update(conditions_of(args, kwargs))

    handle = transformer.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def difference(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> str | None:
    """Return how a run differs from the conditions that a plan has recorded, with what to do."""
    recorded = {"guidance_scale": recorded.get("guidance"), **recorded}
    others = [name for name in REMEDIES if name in present and recorded.get(name) not in (None, present[name])]
    if not others:
        return None
    pairs = ", ".join(f"{name} {recorded[name]}, now {present[name]}" for name in others)
    return f"the plan was calibrated at {pairs}; quality may be lower: {', '.join(REMEDIES[name] for name in others)}"
