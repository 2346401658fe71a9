"""A stock pipeline at some settings with calibration prompts: what other caches run on, and learn from."""

import ast
import contextlib
import io
from functools import cached_property

import torch
from torch.utils.flop_counter import FlopCounterMode

from ertacache.caches.block_stack import blocks_of
from ertacache.caches.profilingdit import Profile
from ertacache.caches.teacache import COEFFICIENTS, Fitting
from ertacache.caches.third_party import diffusers_cache
from ertacache.pipelines.uncached import stock_latents


class Bench:
    """Nothing is run when it is made; what methods learn is learned once, when it is first asked for.

    settings: as a model folder's `settings_of` returns them. batch_size: of the runs that methods watch. name: the
    hub id of the checkpoint, for which there may be published constants.
    """

    def __init__(self, pipe, settings, prompts, batch_size, name: str = ""):
        self.pipe, self.settings, self.name = pipe, settings, name
        self.prompts, self.batch_size = list(prompts), batch_size
        self.model, self.steps = pipe.transformer, settings["steps"]

    @cached_property
    def first_block(self) -> str:
        """The class of the transformer's first block: by it methods know the model."""
        return type(blocks_of(self.model)[0]).__name__

    @property
    def guided(self) -> bool:
        """Whether a step computes an unconditional branch too (FLUX is distilled to do without)."""
        return self.first_block != "FluxTransformerBlock" and self.settings["guidance"] > 1

    def calibrate(self) -> None:
        """The stock pipeline on the calibration prompts, for a method that watches."""
        for start in range(0, len(self.prompts), self.batch_size):
            part = self.prompts[start : start + self.batch_size]
            stock_latents(self.pipe, part, range(start, start + len(part)), self.settings)

    @cached_property
    def polynomial(self) -> tuple[float, ...]:
        """TeaCache's: as published for this checkpoint, or else fitted as its authors do."""
        if self.name in COEFFICIENTS:
            return COEFFICIENTS[self.name]
        with Fitting().watch(self.model) as fitting:
            self.calibrate()
        return fitting.coefficients()

    @cached_property
    def profile(self) -> Profile:
        """ProfilingDiT's: where each block acts."""
        with Profile(self.steps).watch(self.model) as profile:
            self.calibrate()
        return profile

    @cached_property
    def mag_ratios(self) -> list[float]:
        """MagCache's, [T], from diffusers' calibration mode, which prints a list for each branch: their mean."""
        from diffusers import MagCacheConfig

        said = io.StringIO()
        config = MagCacheConfig(num_inference_steps=self.steps, calibrate=True)
        with diffusers_cache(self, config), contextlib.redirect_stdout(said):
            self.calibrate()
        lists = [ast.literal_eval(line) for line in said.getvalue().splitlines() if line.startswith("[1")]
        return torch.tensor(lists, dtype=torch.float64).mean(0).tolist()

    def flops(self, count: int = 1) -> float:
        """Of the transformer, a prompt, in a run of the first `count` calibration prompts as one batch."""
        prompts = self.prompts[:count]
        with FlopCounterMode(display=False) as counter:
            stock_latents(self.pipe, prompts, range(len(prompts)), self.settings)
        return sum(counter.get_flop_counts()[type(self.model).__name__].values()) / len(prompts)
