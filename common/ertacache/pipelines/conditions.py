"""What a run turns out to be, by its first model call: a plan records it, and a run is compared with it.

Settings that a call is given do not tell: most have defaults, which differ between pipelines and model folders.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from ertacache.pipelines.uncached import CALL_NAMES
from ertacache.utils.denoisers import denoiser_of

REMEDIES = {"latents": "the same size", "text_length": "the same max_sequence_length"}  # what to give the call
SIZES = ("height", "width", "num_frames")  # the shape of the latents, as the call knows it
IN_TEXT_LENGTH = "max_sequence_length"  # which matters as far as the model sees it
UNRELATED = ("num_inference_steps", "num_images_per_prompt", "num_videos_per_prompt")  # compared elsewhere
WITHOUT = {"true_cfg_scale": 1}  # by name, what says that a call is made without it
TAKES_EFFECT = {"true_cfg_scale": "do_true_cfg"}  # by name, the variable of the call that says whether it does anything


def conditions_of(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model call says of its run.

    Args:
        args, kwargs: Of the call.

    Returns:
        "latents", their shape without the batch; "text_length", tokens of the prompt with their padding, where no mask
        tells the model which are padding. Only what is there.
    """
    found: dict[str, Any] = {}
    latents = kwargs.get("hidden_states", kwargs.get("sample", args[0] if args else None))
    if isinstance(latents, torch.Tensor) and latents.ndim > 1:
        found["latents"] = list(latents.shape[1:])
    text = kwargs.get("encoder_hidden_states")
    masked = any("mask" in name and value is not None for name, value in kwargs.items())
    if isinstance(text, torch.Tensor) and text.ndim == 3 and not masked:
        found["text_length"] = text.shape[1]
    return found


def arguments_under_way(pipe) -> dict[str, int | float]:
    """Return the numbers among the arguments of the call of such a pipeline that is under way in this thread.

    They are read from its frame, for they are what the call uses, defaults and corrections included; no pipeline keeps
    all of them. One that has no effect is what says so: `true_cfg_scale` is 1 without a negative prompt.
    """
    frame = _call_under_way(pipe)
    if frame is None:
        return {}
    code, known = frame.f_code, frame.f_locals
    names = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]).difference(UNRELATED)
    found = {name: known[name] for name in sorted(names) if type(known.get(name)) in (int, float)}
    idle = {name: WITHOUT[name] for name in found if known.get(TAKES_EFFECT.get(name)) is False}
    return {**found, **idle}


def steps_under_way(pipe, times: Sequence[float]) -> int:
    """Return how many steps the call that is under way makes: fewer than there are times with `denoising_end` < 1.

    Args:
        pipe: The pipeline.
        times: Of the scheduler's steps from the one at which the call begins.
    """
    frame = _call_under_way(pipe)
    listed = None if frame is None else frame.f_locals.get("timesteps")
    listed = listed.tolist() if isinstance(listed, torch.Tensor) else []
    return len(listed) if listed and listed == list(times[: len(listed)]) else len(times)


def _call_under_way(pipe):
    """Return the frame of the call of such a pipeline that is under way in this thread; None outside of one."""
    frame, kind = sys._getframe(), type(pipe)
    while frame and not (frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), kind)):
        frame = frame.f_back
    return frame


@contextlib.contextmanager
def watching(pipe) -> Iterator[dict[str, Any]]:
    """Yield a dictionary that the first call of a pipeline's denoiser fills: conditions, and numbers of the call."""
    found, denoiser = {}, denoiser_of(pipe)
    if not isinstance(denoiser, torch.nn.Module):
        yield found
        return

    def see(module, args, kwargs):
        if not found:
            found.update(arguments_under_way(pipe) | conditions_of(args, kwargs))

    handle = denoiser.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def defaults_of(pipe) -> dict[str, int | float]:
    """Return what a pipeline's call takes for arguments that plans of model folders do not record."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {name: parameters[name].default for name in WITHOUT if name in parameters}


def difference(
    recorded: Mapping[str, Any], present: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})
) -> str | None:
    """Return how a run differs from the conditions that a plan has recorded, with what to do.

    Plans of model folders record no `true_cfg_scale`: their loops make calls by the default. The length of a text that
    is not padded to the call's `max_sequence_length` is that of its prompt, and may differ.

    Args:
        recorded: Settings of a plan.
        present: Conditions of the run, and arguments of the call.
        defaults: Of the pipeline's call.
    """
    length, longest = recorded.get("text_length"), recorded.get(IN_TEXT_LENGTH)
    is_padded = not (isinstance(length, int) and isinstance(longest, int) and length < longest)
    left_out = (IN_TEXT_LENGTH,) if is_padded else (IN_TEXT_LENGTH, "text_length")
    named = {CALL_NAMES.get(name, name): value for name, value in recorded.items() if name not in left_out}
    missing = [name for name, value in WITHOUT.items() if name not in named and present.get(name, value) != value]
    recorded = {**{name: defaults.get(name, WITHOUT[name]) for name in missing}, **named}
    others = [name for name, value in recorded.items() if name in present and present[name] != value]
    if any(name in others for name in SIZES):
        others = [name for name in others if name != "latents"]
    if not others:
        return None
    pairs = ", ".join(f"{name} {recorded[name]}, now {present[name]}" for name in others)
    remedies = " and ".join(dict.fromkeys(REMEDIES.get(name, f"the same {name}") for name in others))
    return f"the plan was calibrated at {pairs}; quality may be lower: give the call {remedies}"
