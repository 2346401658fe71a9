"""Caches of other packages, enabled around the calls of a stock pipeline: diffusers' and cache-dit's.

`subject` is a `PipelineUnderTest`. Every function returns a context manager.
"""

import os
from contextlib import contextmanager

from ertacache.numerics.blocks import blocks_of


@contextmanager
def diffusers_cache(subject, config):
    """Enable one of diffusers' own caches for the pipeline's calls within the context.

    Args:
        subject: The pipeline under test.
        config: A cache config of diffusers.
    """
    subject.model.enable_cache(config)
    try:
        yield
    finally:
        subject.model.disable_cache()


@contextmanager
def restored(model):
    """Restore a model after cache-dit, which leaves its own `forward` and reorders FLUX's block lists.

    diffusers' caches find a model's first block by the order of the lists.
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
def cache_dit(subject, threshold=0.0, warmup=8, max_consecutive=-1, taylor=False, mask=None):
    """Enable cache-dit's DBCache (github.com/vipshop/cache-dit).

    By default it always computes the first 8 blocks; here at most a quarter of a model's blocks, because small models
    have few.

    Args:
        subject: The pipeline under test.
        threshold: R, relative change of the first blocks' residual below which a step is cached.
        warmup: Number of first steps that are all computed.
        max_consecutive: Most steps cached in a row; −1 for no limit.
        taylor: Whether to extrapolate cached residuals by TaylorSeer of order 1.
        mask: In place of a threshold: one of cache-dit's mask policies, or (steps computed first, steps cached between
            two computed ones after them).
    """
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it writes to stdout
    import cache_dit as library

    fixed = min(8, max(1, len(blocks_of(subject.model)) // 4))
    options = {"Fn_compute_blocks": fixed, "residual_diff_threshold": threshold, "num_inference_steps": subject.steps}
    options |= {"max_warmup_steps": warmup, "max_continuous_cached_steps": max_consecutive}
    if mask is not None:
        policy = {"mask_policy": mask}
        if isinstance(mask, tuple):
            first, cached = mask
            policy = {"compute_bins": [first] + [1] * subject.steps, "cache_bins": [cached] * subject.steps}
        steps_mask = library.steps_mask(**policy, total_steps=subject.steps)
        options |= {"steps_computation_mask": steps_mask, "steps_computation_policy": "static"}
    calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    with restored(subject.model):
        library.enable_cache(subject.pipe, library.DBCacheConfig(**options), calibrator_config=calibrator)
        try:
            yield
        finally:
            library.disable_cache(subject.pipe)


# Attention and feed-forward, as TaylorSeer's authors do; diffusers' patterns miss Wan's and CogVideoX's attn1, attn2.
TAYLOR_MODULES = r".*blocks\.\d+\.(attn\d?|cross_attn|ff|ffn|ff_context|proj_mlp|proj_out)"


def taylorseer(subject, interval: int, lite: bool):
    """Return diffusers' TaylorSeer of order 1: after 3 computed steps, one step in `interval` is computed.

    Args:
        subject: The pipeline under test.
        interval: N ≥ 2.
        lite: Whether to use diffusers' lite mode, which extrapolates fewer modules and saves memory.
    """
    from diffusers import TaylorSeerCacheConfig

    dtype = subject.model.dtype
    options = {"disable_cache_before_step": 3, "max_order": 1, "taylor_factors_dtype": dtype, "use_lite_mode": lite}
    if not lite:
        options["cache_identifiers"] = [TAYLOR_MODULES]
    return diffusers_cache(subject, TaylorSeerCacheConfig(cache_interval=interval, **options))


def first_block(subject, threshold: float):
    """Return diffusers' first-block cache: a step is cached if the first block's residual changed by less than τ."""
    from diffusers import FirstBlockCacheConfig

    return diffusers_cache(subject, FirstBlockCacheConfig(threshold=threshold))


def magcache(subject, threshold: float, max_consecutive: int, retained: float):
    """Return diffusers' MagCache.

    Args:
        subject: The pipeline under test; its `mag_ratios` are measured once.
        threshold: δ, accumulated error at which a step is computed.
        max_consecutive: K, most steps cached in a row.
        retained: Share of first steps that are all computed, 0 to 1.
    """
    from diffusers import MagCacheConfig

    options = {"max_skip_steps": max_consecutive, "retention_ratio": retained, "num_inference_steps": subject.steps}
    return diffusers_cache(subject, MagCacheConfig(threshold=threshold, mag_ratios=subject.mag_ratios, **options))


def seacache(subject, threshold: float, max_consecutive: int):
    """Return diffusers' SeaCache (arXiv 2602.18993).

    Args:
        subject: The pipeline under test.
        threshold: δ, accumulated relative change of the indicator at which a step is computed.
        max_consecutive: Most steps cached in a row.
    """
    from diffusers import SeaCacheConfig

    return diffusers_cache(subject, SeaCacheConfig(threshold=threshold, max_consecutive_cached=max_consecutive))


def fastercache(subject, attention: int, unconditional: int, until: int):
    """Return diffusers' FasterCache.

    Without an unconditional branch (FLUX) it skips attention only. The weight 0.3 is the authors' for CogVideoX.

    Args:
        subject: The pipeline under test.
        attention: Attention is computed in one step of so many.
        unconditional: The unconditional branch is computed in one step of so many.
        until: Timestep, 1000 = noise … 0, from which on steps are skipped (the authors': 641).
    """
    from diffusers import FasterCacheConfig

    config = FasterCacheConfig(
        spatial_attention_block_skip_range=attention,
        spatial_attention_timestep_skip_range=(-1, until),
        unconditional_batch_skip_range=unconditional,
        unconditional_batch_timestep_skip_range=(-1, until),
        attention_weight_callback=lambda module: 0.3,
        tensor_format="BFCHW",
        is_guidance_distilled=not subject.guided,
        current_timestep_callback=lambda: subject.pipe.current_timestep,
    )
    return diffusers_cache(subject, config)
