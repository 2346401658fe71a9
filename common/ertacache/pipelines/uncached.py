"""The stock pipeline's own call: other caches run in it, and `denoise` without a plan equals it bit for bit."""

import inspect
import time

import torch

NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale", "frames": "num_frames"}


class Stopwatch:
    """Seconds of the denoising loop of a pipeline's call: from the first call of the transformer to the last step."""

    def __init__(self, pipe):
        self.pipe, self.start, self.seconds = pipe, None, None
        self.handle = pipe.transformer.register_forward_pre_hook(self.begin)

    def begin(self, *_):
        if self.start is None:
            self.start = self.now()

    def end_of_step(self, pipe, step, timestep, tensors):
        self.seconds = self.now() - self.start
        return tensors

    def now(self) -> float:
        if self.pipe._execution_device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def text_length(pipe) -> int:
    """Text tokens of the pipeline's main encoder, as the model folders count them."""
    limit = getattr(pipe.transformer.config, "max_text_seq_length", None)
    tokenizer = getattr(pipe, "tokenizer_2", None) or pipe.tokenizer
    return limit or min(512, tokenizer.model_max_length)


@torch.no_grad()
def stock_latents(pipe, prompts, seeds, settings) -> tuple[torch.Tensor, float]:
    """Final latents of `pipe(prompts, …)` and the seconds of its denoising loop.

    seeds: one a prompt. settings: as a model folder's `settings_of` returns them.
    """
    options = {NAMES.get(name, name): value for name, value in settings.items()}
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
