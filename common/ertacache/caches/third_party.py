"""Caches of other packages, switched on and off around calls of a stock pipeline: diffusers' own, and cache-dit's."""

import os
from contextlib import contextmanager

from ertacache.caches.block_stack import blocks_of


@contextmanager
def diffusers_cache(bench, config):
    """One of diffusers' own caches, for the pipeline's calls within the context."""
    bench.model.enable_cache(config)
    try:
        yield
    finally:
        bench.model.disable_cache()


@contextmanager
def left_alone(model):
    """Put back what cache-dit leaves changed: its own forward, and FLUX's block lists in another order.

    By that order diffusers' caches find a model's first block.
    """
    attributes, children = {module: dict(vars(module)) for module in model.modules()}, dict(model._modules)
    try:
        yield
    finally:
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)
        model._modules.clear()
        model._modules.update(children)


@contextmanager
def cache_dit(bench, threshold=0.0, warmup=8, in_a_row=-1, taylor=False, mask=None):
    """DBCache; small models have few blocks, so that fewer than its 8 are always computed.

    warmup: the first steps, all computed. in_a_row: the most steps cached one after another, -1 for no limit. mask: one
    of its policies, or (steps computed first, steps cached between two computed ones after them).
    """
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it writes to stdout
    import cache_dit as library

    fixed = min(8, max(1, len(blocks_of(bench.model)) // 4))
    options = {"Fn_compute_blocks": fixed, "residual_diff_threshold": threshold, "num_inference_steps": bench.steps}
    options |= {"max_warmup_steps": warmup, "max_continuous_cached_steps": in_a_row}
    if mask is not None:
        policy = {"mask_policy": mask}
        if isinstance(mask, tuple):
            first, cached = mask
            policy = {"compute_bins": [first] + [1] * bench.steps, "cache_bins": [cached] * bench.steps}
        masked = library.steps_mask(**policy, total_steps=bench.steps)
        options |= {"steps_computation_mask": masked, "steps_computation_policy": "static"}
    calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    with left_alone(bench.model):
        library.enable_cache(bench.pipe, library.DBCacheConfig(**options), calibrator_config=calibrator)
        try:
            yield
        finally:
            library.disable_cache(bench.pipe)


# Attention and feed-forward, as its authors do; diffusers' own patterns miss Wan's and CogVideoX's attn1 and attn2.
TAYLOR_MODULES = r".*blocks\.\d+\.(attn\d?|cross_attn|ff|ffn|ff_context|proj_mlp|proj_out)"


def taylorseer(bench, interval: int, lite: bool):
    from diffusers import TaylorSeerCacheConfig

    dtype = bench.model.dtype
    options = {"disable_cache_before_step": 3, "max_order": 1, "taylor_factors_dtype": dtype, "use_lite_mode": lite}
    if not lite:
        options["cache_identifiers"] = [TAYLOR_MODULES]
    return diffusers_cache(bench, TaylorSeerCacheConfig(cache_interval=interval, **options))


def first_block(bench, threshold: float):
    from diffusers import FirstBlockCacheConfig

    return diffusers_cache(bench, FirstBlockCacheConfig(threshold=threshold))


def magcache(bench, threshold: float, in_a_row: int, retained: float):
    """in_a_row: K, the most steps skipped one after another. retained: the share of first steps, all computed."""
    from diffusers import MagCacheConfig

    options = {"max_skip_steps": in_a_row, "retention_ratio": retained, "num_inference_steps": bench.steps}
    return diffusers_cache(bench, MagCacheConfig(threshold=threshold, mag_ratios=bench.mag_ratios, **options))


def seacache(bench, threshold: float, in_a_row: int):
    """in_a_row: the most steps cached one after another."""
    from diffusers import SeaCacheConfig

    return diffusers_cache(bench, SeaCacheConfig(threshold=threshold, max_consecutive_cached=in_a_row))


def fastercache(bench, attention: int, unconditional: int, until: int):
    """attention, unconditional: of so many steps one is computed, from timestep `until` (its authors' 641) to 0.

    Without an unconditional branch (FLUX) only attentions are skipped. The weight 0.3 is the authors' for CogVideoX.
    """
    from diffusers import FasterCacheConfig

    config = FasterCacheConfig(
        spatial_attention_block_skip_range=attention,
        spatial_attention_timestep_skip_range=(-1, until),
        unconditional_batch_skip_range=unconditional,
        unconditional_batch_timestep_skip_range=(-1, until),
        attention_weight_callback=lambda module: 0.3,
        tensor_format="BFCHW",
        is_guidance_distilled=not bench.guided,
        current_timestep_callback=lambda: bench.pipe.current_timestep,
    )
    return diffusers_cache(bench, config)
