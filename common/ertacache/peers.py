"""Other caches under one roof: each on the stock pipeline, with its own parameter swept from fine to fast.

diffusers' own through `enable_cache`, cache-dit's through its `enable_cache`, and those of `baselines/`. What a method
has to learn from the model (TeaCache's polynomial, MagCache's ratios) is learned on the calibration prompts. Sweeps
begin at what the authors recommend and go on, past it, until the method's limit or a speed-up of five.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

from ertacache.baselines.delta_dit import delta_dit
from ertacache.baselines.pab import Broadcast, pab
from ertacache.baselines.profilingdit import Cadence, profilingdit
from ertacache.baselines.stack import blocks_of
from ertacache.baselines.teacache import TeaCachePolicy, teacache
from ertacache.baselines.tgate import Gate, tgate
from ertacache.bench import Bench, diffusers_cache
from ertacache.sweep import midpoint


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
def cache_dit(bench: Bench, threshold=0.0, warmup=8, in_a_row=-1, taylor=False, mask=None):
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


def magcache(bench: Bench, threshold: float, in_a_row: int, retained: float):
    """in_a_row: K, the most steps skipped one after another. retained: the share of first steps, all computed."""
    from diffusers import MagCacheConfig

    options = {"max_skip_steps": in_a_row, "retention_ratio": retained, "num_inference_steps": bench.steps}
    return diffusers_cache(bench, MagCacheConfig(threshold=threshold, mag_ratios=bench.mag_ratios, **options))


def seacache(bench: Bench, threshold: float, in_a_row: int):
    """in_a_row: the most steps cached one after another."""
    from diffusers import SeaCacheConfig

    return diffusers_cache(bench, SeaCacheConfig(threshold=threshold, max_consecutive_cached=in_a_row))


def fastercache(bench: Bench, attention: int, unconditional: int, until: int):
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


@dataclass(frozen=True)
class Peer:
    """A cache: `apply(bench, value)` is a context in which the pipeline's calls are cached; `values` go fine to fast.

    label: how a value is written: with {}, or a function. between(a, b): the value between two, or None. lacking: why
    it does not run on a model, by the class of the first block. package: that it needs.
    """

    apply: Callable[[Bench, Any], Any]
    values: tuple
    label: str | Callable[[Any], str]
    between: Callable[[Any, Any], Any] | None = midpoint
    lacking: dict[str, str] = field(default_factory=dict)
    package: str | None = None

    def written(self, value) -> str:
        return self.label.format(value) if isinstance(self.label, str) else self.label(value)

    def unfit(self, bench: Bench) -> str | None:
        """Why the method cannot run on this pipeline, or None."""
        if bench.first_block in self.lacking:
            return self.lacking[bench.first_block]
        if self.package and find_spec(self.package) is None:
            return f"needs {self.package}: sh scripts/setup.sh peers"
        return None


THRESHOLDS = (0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.8)
INTERVALS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
DBCACHE = (  # threshold, warm-up, most cached in a row: its defaults, its FLUX benchmark's, and hardly a limit
    *((threshold, 8, -1) for threshold in THRESHOLDS),
    *((threshold, 4, 6) for threshold in (0.25, 0.5, 0.8)),
    *((threshold, 2, -1) for threshold in (0.25, 0.35, 0.5, 0.8, 1.2)),
)
NO_METADATA = "reads step and sigma from the cache context, where this pipeline does not put them"
MIXED = "counts a module's calls, of which a step of Wan makes two: it would mix the guidance branches"
SECOND_HALF = "takes a batch's second half for the conditional one, where Open-Sora's is the first"
UNKNOWN = {"STDiT3Block": "does not know Open-Sora"}
NO_CROSS = "freezes cross-attention, of which this model has none"


def within_one_limit(a: tuple, b: tuple):
    """Between two settings of DBCache: only thresholds have something between them."""
    return midpoint(a, b) if a[1:] == b[1:] else None


def dbcache(taylor: bool) -> Peer:
    def apply(bench: Bench, value: tuple):
        return cache_dit(bench, *value, taylor=taylor)

    def label(value: tuple) -> str:
        threshold, warmup, in_a_row = value
        text = f"R = {threshold:g}, warm-up {warmup}"
        return text if in_a_row < 0 else f"{text}, at most {in_a_row} in a row"

    return Peer(apply, DBCACHE, label, within_one_limit, UNKNOWN, "cache_dit")


PEERS: dict[str, Peer] = {
    "first-block": Peer(first_block, (*THRESHOLDS, 1.2, 2.0), "τ = {:g}"),
    "taylorseer": Peer(partial(taylorseer, lite=False), INTERVALS, "N = {}"),
    "taylorseer-lite": Peer(partial(taylorseer, lite=True), INTERVALS, "N = {}"),
    "magcache": Peer(
        lambda bench, value: magcache(bench, *value),
        (*((t, 5, 0.2) for t in (0.01, *THRESHOLDS)), (0.8, 8, 0.1), (1.6, 12, 0.1), (3.2, 20, 0.1), (6.4, 30, 0.05)),
        "δ = {0[0]:g}, K = {0[1]}, {0[2]:.0%} retained",
    ),
    "seacache": Peer(
        lambda bench, value: seacache(bench, *value),
        (*((t, 2) for t in THRESHOLDS), (0.8, 3), (1.2, 4), (1.6, 6), (2.4, 8)),
        "δ = {0[0]:g}, at most {0[1]} in a row",
        lacking=dict.fromkeys(("FluxTransformerBlock", "CogVideoXBlock", "STDiT3Block"), NO_METADATA),
    ),
    "fastercache": Peer(
        lambda bench, value: fastercache(bench, *value),
        ((2, 3, 641), (2, 5, 641), (3, 5, 641), (3, 5, 801), (3, 5, 1000), (4, 8, 1000), (8, 16, 1000)),
        "attention {0[0]}, unconditional {0[1]}, from {0[2]}",
        lacking={"WanTransformerBlock": MIXED, "STDiT3Block": SECOND_HALF},
    ),
    "pab": Peer(
        lambda bench, value: pab(bench.model, Broadcast.pyramid(*value), lambda: bench.pipe.current_timestep),
        (
            *((n, (100, 800), 1) for n in (2, 3)),
            (2, (100, 800), 2),
            *((n, (0, 1000), n) for n in (2, 3, 4, 6, 10, 16)),
        ),
        "range {0[0]} in {0[1][0]}–{0[1][1]}, feed-forward {0[2]}",
    ),
    "dbcache": dbcache(taylor=False),
    "dbcache-taylorseer": dbcache(taylor=True),
    "dbcache-mask": Peer(
        lambda bench, mask: cache_dit(bench, 1.0, mask=mask),
        ("slow", "medium", "fast", "ultra", (4, 6), (3, 9), (2, 14), (2, 24)),
        lambda mask: mask if isinstance(mask, str) else f"{mask[0]} first steps, then 1 of {mask[1] + 1}",
        lacking=UNKNOWN,
        package="cache_dit",
    ),
    "teacache": Peer(lambda b, t: teacache(b.model, TeaCachePolicy(t, b.polynomial, b.steps)), THRESHOLDS, "δ = {:g}"),
    "delta-dit": Peer(
        lambda b, p: delta_dit(b.model, b.steps, p[0], max(1, round(p[1] * len(blocks_of(b.model))))),
        ((2, 0.25), (2, 0.5), (2, 0.75), (2, 1.0), (3, 0.75), (3, 1.0), (4, 1.0), (6, 1.0), (8, 1.0)),
        "N = {0[0]}, {0[1]:.0%} of the blocks",
    ),
    "profilingdit": Peer(
        lambda b, p: profilingdit(b.model, b.profile.background(p[1]), Cadence(p[0], p[2])),
        (
            *((2, 0.5, 6), (4, 0.5, 6), (6, 0.5, 6), (4, 0.75, 6), (6, 0.75, 6), (6, 0.9, 6), (8, 0.9, 6)),
            *((6, 1.0, 6), (8, 1.0, 4), (10, 1.0, 3), (15, 1.0, 2)),
        ),
        "interval {0[0]}, {0[1]:.0%} of the blocks, warm-up {0[2]}",
    ),
    "t-gate": Peer(
        lambda b, share: tgate(b.model, Gate(step=max(3, round(share * b.steps)))),
        (0.8, 0.6, 0.4, 0.25, 0.1),
        "m = {:.0%} of the steps",
        lacking=dict.fromkeys(("FluxTransformerBlock", "CogVideoXBlock"), NO_CROSS),
    ),
}
