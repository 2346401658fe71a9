"""Other caches under one roof: each on the stock pipeline, with its own parameter swept from fine to fast.

diffusers' own through `enable_cache`, cache-dit's through its `enable_cache`, and those of `baselines/`. What a method
has to learn from the model (TeaCache's polynomial, MagCache's ratios) is learned on the calibration prompts. Sweeps
begin at what the authors recommend and go on, past it, until the method's limit or a speed-up of five.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

from ertacache.caches.block_stack import blocks_of
from ertacache.caches.delta_dit import delta_dit
from ertacache.caches.fitting import Bench
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
