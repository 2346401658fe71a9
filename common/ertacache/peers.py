"""Other caches under one roof: each on the stock pipeline, with its own parameter swept from fine to fast.

diffusers' own through `enable_cache`, cache-dit's through its `enable_cache`, and those of `baselines/`. What a method
has to learn from the model (TeaCache's polynomial, MagCache's ratios) is learned on the calibration prompts.
"""

import ast
import contextlib
import io
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ertacache.baselines.delta_dit import delta_dit
from ertacache.baselines.profilingdit import Cadence, Profile, profilingdit
from ertacache.baselines.stack import blocks_of
from ertacache.baselines.teacache import Fitting, TeaCachePolicy, teacache
from ertacache.baselines.tgate import ATTENTIONS, Gate, tgate
from ertacache.stock import stock_latents


class Bench:
    """A pipeline at some settings, with calibration prompts; what methods learn is learned once."""

    def __init__(self, pipe, settings, prompts, batch_size):
        self.pipe, self.settings, self.prompts, self.batch_size = pipe, settings, list(prompts), batch_size
        self.model, self.steps = pipe.transformer, settings["steps"]
        self.first_block = type(blocks_of(self.model)[0]).__name__

    def calibrate(self) -> None:
        """The stock pipeline on the calibration prompts, for a method that watches."""
        for start in range(0, len(self.prompts), self.batch_size):
            part = self.prompts[start : start + self.batch_size]
            stock_latents(self.pipe, part, range(start, start + len(part)), self.settings)

    @cached_property
    def polynomial(self) -> tuple[float, ...]:
        """TeaCache's, fitted as its authors do."""
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

    def flops(self) -> int:
        """Of the transformer, in a run of one calibration prompt."""
        with FlopCounterMode(display=False) as counter:
            stock_latents(self.pipe, self.prompts[:1], [0], self.settings)
        return sum(counter.get_flop_counts()[type(self.model).__name__].values())


@contextmanager
def diffusers_cache(bench: Bench, config):
    bench.model.enable_cache(config)
    try:
        yield
    finally:
        bench.model.disable_cache()


@contextmanager
def cache_dit(bench: Bench, threshold=0.0, taylor=False, mask=None):
    """DBCache at its defaults but for the blocks that are always computed, of which small models have few."""
    import cache_dit as library

    fixed = min(8, max(1, len(blocks_of(bench.model)) // 4))
    options = {"Fn_compute_blocks": fixed, "residual_diff_threshold": threshold, "num_inference_steps": bench.steps}
    if mask is not None:
        masked = library.steps_mask(mask_policy=mask, total_steps=bench.steps)
        options |= {"steps_computation_mask": masked, "steps_computation_policy": "static"}
    calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    library.enable_cache(bench.pipe, library.DBCacheConfig(**options), calibrator_config=calibrator)
    try:
        yield
    finally:
        library.disable_cache(bench.pipe)


# Attention and feed-forward, as its authors do; diffusers' own patterns miss Wan's and CogVideoX's attn1 and attn2.
TAYLOR_MODULES = r".*blocks\.\d+\.(attn\d?|cross_attn|ff|ffn|ff_context|proj_mlp|proj_out)"


def taylorseer(bench: Bench, interval: int, lite: bool):
    from diffusers import TaylorSeerCacheConfig

    dtype = bench.model.dtype
    options = {"disable_cache_before_step": 3, "max_order": 1, "taylor_factors_dtype": dtype, "use_lite_mode": lite}
    if not lite:
        options["cache_identifiers"] = [TAYLOR_MODULES]
    return diffusers_cache(bench, TaylorSeerCacheConfig(cache_interval=interval, **options))


def first_block(bench: Bench, threshold: float):
    from diffusers import FirstBlockCacheConfig

    return diffusers_cache(bench, FirstBlockCacheConfig(threshold=threshold))


def magcache(bench: Bench, threshold: float):
    from diffusers import MagCacheConfig

    options = {"max_skip_steps": 5, "num_inference_steps": bench.steps, "mag_ratios": bench.mag_ratios}
    return diffusers_cache(bench, MagCacheConfig(threshold=threshold, **options))


def pyramid(bench: Bench, skip: int):
    from diffusers import PyramidAttentionBroadcastConfig

    spatial = ("^transformer_blocks",) if bench.first_block == "STDiT3Block" else ("blocks",)
    ranges = {"spatial_attention_block_skip_range": skip, "cross_attention_block_skip_range": 3 * skip}
    if bench.first_block == "STDiT3Block":
        ranges["temporal_attention_block_skip_range"] = 2 * skip
    return diffusers_cache(
        bench,
        PyramidAttentionBroadcastConfig(
            **ranges,
            spatial_attention_block_identifiers=spatial,
            current_timestep_callback=lambda: bench.pipe.current_timestep,
        ),
    )


@dataclass(frozen=True)
class Peer:
    """A cache: `apply(bench, value)` is a context in which the pipeline's calls are cached; `values` go fine to fast.

    label: how a value is written, with {}. blocks: the classes of first blocks that it works on; () for all.
    """

    apply: Callable[[Bench, Any], Any]
    values: tuple
    label: str
    blocks: tuple[str, ...] = ()
    package: str | None = None

    def unfit(self, bench: Bench) -> str | None:
        """Why the method cannot run on this pipeline, or None."""
        if self.package and find_spec(self.package) is None:
            return f"needs {self.package}: sh scripts/setup.sh peers"
        if self.blocks and bench.first_block not in self.blocks:
            return f"has no {bench.first_block} to work on"
        return None


CACHE_DIT = ("FluxTransformerBlock", "WanTransformerBlock", "CogVideoXBlock")  # it knows no Open-Sora
THRESHOLDS = (0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.8)
PEERS: dict[str, Peer] = {
    "first-block": Peer(first_block, THRESHOLDS, "τ = {:g}"),
    "taylorseer": Peer(lambda b, n: taylorseer(b, n, lite=False), tuple(range(2, 9)), "N = {}"),
    "taylorseer-lite": Peer(lambda b, n: taylorseer(b, n, lite=True), tuple(range(2, 9)), "N = {}"),
    "magcache": Peer(magcache, (0.01, *THRESHOLDS), "δ = {:g}"),
    "pab": Peer(pyramid, (2, 3, 4, 6, 8), "range {}"),
    "dbcache": Peer(cache_dit, THRESHOLDS, "R = {:g}", CACHE_DIT, "cache_dit"),
    "dbcache-taylorseer": Peer(partial(cache_dit, taylor=True), THRESHOLDS, "R = {:g}", CACHE_DIT, "cache_dit"),
    "dbcache-mask": Peer(
        lambda b, mask: cache_dit(b, 1.0, mask=mask), ("slow", "medium", "fast", "ultra"), "{}", CACHE_DIT, "cache_dit"
    ),
    "teacache": Peer(lambda b, t: teacache(b.model, TeaCachePolicy(t, b.polynomial, b.steps)), THRESHOLDS, "δ = {:g}"),
    "delta-dit": Peer(
        lambda b, p: delta_dit(b.model, b.steps, p[0], max(1, round(p[1] * len(blocks_of(b.model))))),
        ((2, 0.25), (2, 0.5), (2, 0.75), (2, 1.0), (3, 0.75), (3, 1.0), (4, 1.0), (6, 1.0)),
        "N = {0[0]}, {0[1]:.0%} of the blocks",
    ),
    "profilingdit": Peer(
        lambda b, p: profilingdit(b.model, b.profile.background(p[1]), Cadence(p[0])),
        ((2, 0.5), (4, 0.5), (6, 0.5), (4, 0.75), (6, 0.75), (6, 0.9), (8, 0.9)),
        "interval {0[0]}, {0[1]:.0%} of the blocks",
    ),
    "t-gate": Peer(
        lambda b, share: tgate(b.model, Gate(step=max(3, round(share * b.steps)))),
        (0.8, 0.6, 0.4, 0.25),
        "m = {:.0%} of the steps",
        blocks=tuple(ATTENTIONS),
    ),
}
