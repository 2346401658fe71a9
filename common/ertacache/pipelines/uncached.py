"""The stock pipeline's own call: other caches run in it, and `denoise` without a plan equals it bit for bit."""

import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ertacache.utils.devices import synchronize

CALL_NAMES = {  # settings of a model folder, by the name of the pipeline's argument where that is another
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "frames": "num_frames",
}


class Stopwatch:
    """Seconds of the denoising loop of a pipeline's call: from the first call of the transformer to the last step."""

    def __init__(self, pipe):
        self.start, self.seconds = None, None
        self.device = pipe._execution_device  # once: it goes through all modules
        self.handle = pipe.transformer.register_forward_pre_hook(self.begin)

    def begin(self, *_):
        if self.start is None:
            self.start = self.now()

    def end_of_step(self, pipe, step, timestep, tensors):
        self.seconds = self.now() - self.start
        return tensors

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def text_length(pipe) -> int:
    """Return the number of text tokens of the pipeline's main encoder, as the model folders count them."""
    limit = getattr(pipe.transformer.config, "max_text_seq_length", None)
    tokenizer = getattr(pipe, "tokenizer_2", None) or pipe.tokenizer
    return limit or min(512, tokenizer.model_max_length)


@torch.no_grad()
def uncached_latents(
    pipe, prompts: Sequence[str], seeds: Sequence[int], settings: Mapping[str, Any]
) -> tuple[torch.Tensor, float]:
    """Run `pipe(prompts, …)` as it is, with whatever cache or plan is enabled on it.

    Args:
        pipe: The stock pipeline.
        prompts: B texts.
        seeds: One per prompt.
        settings: Of a model folder's `settings_of`.

    Returns:
        The final latents [B, …] and the seconds of the denoising loop.
    """
    options = {CALL_NAMES.get(name, name): value for name, value in settings.items()}
    if "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters:
        options["max_sequence_length"] = text_length(pipe)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    watch = Stopwatch(pipe)
    try:
        result = pipe(
            list(prompts),
            generator=generators,
            output_type="latent",
            callback_on_step_end=watch.end_of_step,
            **options,
        )
    finally:
        watch.handle.remove()
    return (result.images if hasattr(result, "images") else result.frames), watch.seconds
