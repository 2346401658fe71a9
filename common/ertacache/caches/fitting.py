"""What other caches run on and learn from: a stock pipeline with settings and calibration prompts."""

import ast
import contextlib
import io
from functools import cached_property

import torch
from torch.utils.flop_counter import FlopCounterMode

from ertacache.caches.profilingdit import Profile
from ertacache.caches.teacache import COEFFICIENTS, Fitting
from ertacache.caches.third_party import diffusers_cache
from ertacache.numerics.blocks import blocks_of
from ertacache.pipelines.uncached import uncached_latents


class PipelineUnderTest:
    """A stock pipeline on which caches are fitted and measured.

    The constructor runs nothing. What a cache learns is learned when it is first used, and kept.

    Args:
        pipe: The pipeline.
        settings: As `settings_of` of a model folder returns them.
        prompts: Calibration prompts.
        batch_size: Prompts per call in the calibration runs.
        name: Hub id of the checkpoint, for which constants may be published.
    """

    def __init__(self, pipe, settings, prompts, batch_size, name: str = ""):
        self.pipe, self.settings, self.name = pipe, settings, name
        self.prompts, self.batch_size = list(prompts), batch_size
        self.model, self.steps = pipe.transformer, settings["steps"]

    @cached_property
    def first_block(self) -> str:
        """Class name of the transformer's first block; caches recognise the model by it."""
        return type(blocks_of(self.model)[0]).__name__

    @property
    def guided(self) -> bool:
        """Whether a step computes an unconditional branch too (FLUX is distilled and has none)."""
        return self.first_block != "FluxTransformerBlock" and self.settings["guidance"] > 1

    def calibrate(self) -> None:
        """Run the pipeline on the calibration prompts, for a cache that observes it."""
        for start in range(0, len(self.prompts), self.batch_size):
            batch = self.prompts[start : start + self.batch_size]
            uncached_latents(self.pipe, batch, range(start, start + len(batch)), self.settings)

    @cached_property
    def polynomial(self) -> tuple[float, ...]:
        """TeaCache's coefficients, highest power first: published ones, or else fitted as its authors do."""
        if self.name in COEFFICIENTS:
            return COEFFICIENTS[self.name]
        with Fitting().watch(self.model) as fitting:
            self.calibrate()
        return fitting.coefficients()

    @cached_property
    def profile(self) -> Profile:
        """ProfilingDiT's profile: where each block acts."""
        with Profile(self.steps).watch(self.model) as profile:
            self.calibrate()
        return profile

    @cached_property
    def mag_ratios(self) -> list[float]:
        """MagCache's ratios, [T]: the mean of the lists that diffusers' calibration mode prints, one per branch."""
        from diffusers import MagCacheConfig

        output = io.StringIO()
        config = MagCacheConfig(num_inference_steps=self.steps, calibrate=True)
        with diffusers_cache(self, config), contextlib.redirect_stdout(output):
            self.calibrate()
        lists = [ast.literal_eval(line) for line in output.getvalue().splitlines() if line.startswith("[1")]
        return torch.tensor(lists, dtype=torch.float64).mean(0).tolist()

    def flops(self, count: int = 1) -> float:
        """Return the transformer's FLOPs per prompt, with whatever cache is enabled on it.

        Args:
            count: So many of the first calibration prompts are run, as one batch.
        """
        prompts = self.prompts[:count]
        with FlopCounterMode(display=False) as counter:
            uncached_latents(self.pipe, prompts, range(len(prompts)), self.settings)
        return sum(counter.get_flop_counts()[type(self.model).__name__].values()) / len(prompts)
