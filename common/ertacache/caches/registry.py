"""The other caches by name, each with the sweep of its parameter from the finest setting to the fastest.

They run on the stock pipeline: diffusers' caches through its `enable_cache`, cache-dit's through its own, and the
caches of this package through hooks. What a cache must learn from the model (TeaCache's polynomial, MagCache's ratios)
is learned on the calibration prompts. A sweep begins at the authors' recommendation and goes on until the cache's limit
or a speed-up of five.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

from ertacache.caches.delta_dit import delta_dit
from ertacache.caches.easycache import easycache
from ertacache.caches.fitting import PipelineUnderTest
from ertacache.caches.pab import Broadcast, pab
from ertacache.caches.profilingdit import Cadence, profilingdit
from ertacache.caches.teacache import TeaCachePolicy, teacache
from ertacache.caches.tgate import Gate, tgate
from ertacache.caches.third_party import (
    cache_dit,
    fastercache,
    first_block,
    magcache,
    seacache,
    taylorseer,
)
from ertacache.caches.tuning import midpoint
from ertacache.numerics.blocks import blocks_of


@dataclass(frozen=True)
class OtherCache:
    """A cache and the values of its parameter.

    Attributes:
        apply: apply(subject, value) returns a context manager; the pipeline's calls within it are cached.
        values: The sweep, from the finest setting to the fastest.
        label: How a value is written: a format string or a function.
        between: between(a, b) returns the value between two, or None.
        cannot_run: Why the cache cannot run on a model, by class name of the model's first block.
        package: The package that the cache needs, beyond diffusers.
    """

    apply: Callable[[PipelineUnderTest, Any], AbstractContextManager]
    values: tuple
    label: str | Callable[[Any], str]
    between: Callable[[Any, Any], Any] | None = midpoint
    cannot_run: dict[str, str] = field(default_factory=dict)
    package: str | None = None

    def written(self, value) -> str:
        """Return a value of the parameter as tables show it."""
        return self.label.format(value) if isinstance(self.label, str) else self.label(value)

    def reason_not_to_run(self, subject: PipelineUnderTest) -> str | None:
        """Return why the cache cannot run on this pipeline, or None if it can."""
        if subject.first_block in self.cannot_run:
            return self.cannot_run[subject.first_block]
        if self.package and find_spec(self.package) is None:
            return f"needs {self.package}: sh scripts/setup.sh peers"
        return None


THRESHOLDS = (0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.8)
INTERVALS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
DBCACHE = (  # (threshold, warm-up steps, most steps cached in a row; −1: no limit)
    *((threshold, 8, -1) for threshold in THRESHOLDS),  # the defaults
    *((threshold, 4, 6) for threshold in (0.25, 0.5, 0.8)),  # as in cache-dit's FLUX benchmark
    *((threshold, 2, -1) for threshold in (0.25, 0.35, 0.5, 0.8, 1.2)),  # with hardly any warm-up
)
NO_METADATA = "reads step and sigma from the cache context, where this pipeline does not put them"
MIXED = "counts a module's calls, of which a step of Wan makes two: it would mix the guidance branches"
SECOND_HALF = "takes a batch's second half for the conditional one, where Open-Sora's is the first"
UNKNOWN = {"STDiT3Block": "does not know Open-Sora"}
NO_CROSS = "freezes cross-attention, of which this model has none"


# --- caches with several parameters ------------------------------------------------------------------------------


def apply_magcache(subject: PipelineUnderTest, value: tuple[float, int, float]):
    return magcache(subject, *value)


def apply_seacache(subject: PipelineUnderTest, value: tuple[float, int]):
    return seacache(subject, *value)


def apply_fastercache(subject: PipelineUnderTest, value: tuple[int, int, int]):
    return fastercache(subject, *value)


def apply_pab(subject: PipelineUnderTest, value: tuple[int, tuple[float, float], int]):
    return pab(subject.model, Broadcast.pyramid(*value), lambda: subject.pipe.current_timestep)


def apply_teacache(subject: PipelineUnderTest, threshold: float):
    return teacache(subject.model, TeaCachePolicy(threshold, subject.polynomial, subject.steps))


def apply_easycache(subject: PipelineUnderTest, value: tuple[float, int]):
    threshold, retained = value
    return easycache(subject.model, subject.steps, threshold, retained)


def apply_delta_dit(subject: PipelineUnderTest, value: tuple[int, float]):
    interval, share = value
    count = max(1, round(share * len(blocks_of(subject.model))))
    return delta_dit(subject.model, subject.steps, interval, count)


def apply_profilingdit(subject: PipelineUnderTest, value: tuple[int, float, int]):
    interval, share, warmup = value
    return profilingdit(subject.model, subject.profile.background(share), Cadence(interval, warmup))


def apply_tgate(subject: PipelineUnderTest, share: float):
    return tgate(subject.model, Gate(step=max(3, round(share * subject.steps))))


# --- cache-dit's DBCache, by threshold and by mask ---------------------------------------------------------------


def dbcache(taylor: bool) -> OtherCache:
    """Return DBCache with a threshold, with or without its TaylorSeer calibrator."""

    def apply(subject: PipelineUnderTest, value: tuple[float, int, int]):
        return cache_dit(subject, *value, taylor=taylor)

    return OtherCache(apply, DBCACHE, dbcache_label, within_one_limit, UNKNOWN, "cache_dit")


def dbcache_label(value: tuple[float, int, int]) -> str:
    threshold, warmup, max_consecutive = value
    text = f"R = {threshold:g}, warm-up {warmup}"
    return text if max_consecutive < 0 else f"{text}, at most {max_consecutive} in a row"


def within_one_limit(a: tuple, b: tuple):
    """Return the setting between two settings of DBCache; only their thresholds may differ."""
    return midpoint(a, b) if a[1:] == b[1:] else None


def apply_mask(subject: PipelineUnderTest, mask: str | tuple[int, int]):
    return cache_dit(subject, 1.0, mask=mask)


def mask_label(mask: str | tuple[int, int]) -> str:
    return mask if isinstance(mask, str) else f"{mask[0]} first steps, then 1 of {mask[1] + 1}"


CACHES: dict[str, OtherCache] = {
    "first-block": OtherCache(first_block, (*THRESHOLDS, 1.2, 2.0), "τ = {:g}"),
    "taylorseer": OtherCache(partial(taylorseer, lite=False), INTERVALS, "N = {}"),
    "taylorseer-lite": OtherCache(partial(taylorseer, lite=True), INTERVALS, "N = {}"),
    "magcache": OtherCache(
        apply_magcache,
        (*((t, 5, 0.2) for t in (0.01, *THRESHOLDS)), (0.8, 8, 0.1), (1.6, 12, 0.1), (3.2, 20, 0.1), (6.4, 30, 0.05)),
        "δ = {0[0]:g}, K = {0[1]}, {0[2]:.0%} retained",
    ),
    "seacache": OtherCache(
        apply_seacache,
        (*((t, 2) for t in THRESHOLDS), (0.8, 3), (1.2, 4), (1.6, 6), (2.4, 8)),
        "δ = {0[0]:g}, at most {0[1]} in a row",
        cannot_run=dict.fromkeys(("FluxTransformerBlock", "CogVideoXBlock", "STDiT3Block"), NO_METADATA),
    ),
    "fastercache": OtherCache(
        apply_fastercache,
        ((2, 3, 641), (2, 5, 641), (3, 5, 641), (3, 5, 801), (3, 5, 1000), (4, 8, 1000), (8, 16, 1000)),
        "attention {0[0]}, unconditional {0[1]}, from {0[2]}",
        cannot_run={"WanTransformerBlock": MIXED, "STDiT3Block": SECOND_HALF},
    ),
    "pab": OtherCache(
        apply_pab,
        (
            *((n, (100, 800), 1) for n in (2, 3)),
            (2, (100, 800), 2),
            *((n, (0, 1000), n) for n in (2, 3, 4, 6, 10, 16)),
        ),
        "range {0[0]} in {0[1][0]}–{0[1][1]}, feed-forward {0[2]}",
    ),
    "dbcache": dbcache(taylor=False),
    "dbcache-taylorseer": dbcache(taylor=True),
    "dbcache-mask": OtherCache(
        apply_mask,
        ("slow", "medium", "fast", "ultra", (4, 6), (3, 9), (2, 14), (2, 24)),
        mask_label,
        cannot_run=UNKNOWN,
        package="cache_dit",
    ),
    "teacache": OtherCache(apply_teacache, THRESHOLDS, "δ = {:g}"),
    "easycache": OtherCache(
        apply_easycache,
        (*((t, 7) for t in THRESHOLDS), *((t, 4) for t in (0.35, 0.5, 0.8)), *((t, 2) for t in (0.5, 0.8, 1.2, 2.0))),
        "τ = {0[0]:g}, {0[1]} first steps",
    ),
    "delta-dit": OtherCache(
        apply_delta_dit,
        ((2, 0.25), (2, 0.5), (2, 0.75), (2, 1.0), (3, 0.75), (3, 1.0), (4, 1.0), (6, 1.0), (8, 1.0)),
        "N = {0[0]}, {0[1]:.0%} of the blocks",
    ),
    "profilingdit": OtherCache(
        apply_profilingdit,
        (
            *((2, 0.5, 6), (4, 0.5, 6), (6, 0.5, 6), (4, 0.75, 6), (6, 0.75, 6), (6, 0.9, 6), (8, 0.9, 6)),
            *((6, 1.0, 6), (8, 1.0, 4), (10, 1.0, 3), (15, 1.0, 2)),
        ),
        "interval {0[0]}, {0[1]:.0%} of the blocks, warm-up {0[2]}",
    ),
    "t-gate": OtherCache(
        apply_tgate,
        (0.8, 0.6, 0.4, 0.25, 0.1),
        "m = {:.0%} of the steps",
        cannot_run=dict.fromkeys(("FluxTransformerBlock", "CogVideoXBlock"), NO_CROSS),
    ),
}
