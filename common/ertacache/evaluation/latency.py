"""Cost of caching on a pipeline with random weights: latency, computed steps, peak memory.

Plans are made from the schedule alone: every second step computed, K, B and φ neutral, first-order weights. A run does
all that it does with a calibrated plan. Plans run in the folder's `denoise`, other caches in the stock pipeline, and
each is timed in turn with the uncached run of its own kind (A B C A B C …). The cost of a jump or of a rectified step
does not depend on its numbers; the decisions of another cache do, so its threshold is searched for.
"""

import gc
import statistics
import textwrap
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps

import torch

from ertacache.algorithm import uniform_cached
from ertacache.caches import registry, third_party
from ertacache.caches.fitting import PipelineUnderTest
from ertacache.caches.teacache import TeaCachePolicy, teacache
from ertacache.calibration.search import HISTORY_LENGTHS
from ertacache.numerics.blocks import blocks_of
from ertacache.pipelines.uncached import uncached_latents
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.names import budget_of
from ertacache.plans.requirements import Requirements
from ertacache.plans.threshold import ThresholdPlan
from ertacache.utils.devices import peak_memory, reset_peak_memory, synchronize
from ertacache.utils.errors import UserError

SPEEDUP = 2  # T/N of every method
PLANS = ("baseline", "threshold", "threshold-blocks", "budget")
SEARCHED = {
    "first-block": third_party.first_block,
    "dbcache": third_party.cache_dit,
}  # their threshold decides how many steps
METHODS = (*PLANS, "teacache", *SEARCHED)
PROMPT = "a red circle"  # text states have full length for any prompt (Open-Sora: the prompt's own)
NUMBERS = ("computed", "latency_s", "baseline_latency_s", "speedup_latency", "speedup_nfe", "overhead")


# --- plans from the schedule alone -------------------------------------------------------------------------------


def computed_steps(steps: int) -> tuple[int, ...]:
    """Return T/SPEEDUP evenly spread steps, with the first and the last."""
    cached = uniform_cached(steps, budget_of(steps, SPEEDUP))
    return tuple(i for i in range(steps) if i not in cached)


def neutral_threshold_plan(pipe, settings, sigmas: torch.Tensor, site: str = "output") -> ThresholdPlan:
    """Return a plan that reuses the other steps and rectifies by nothing (K = 0, B = −2)."""
    steps = settings["steps"]
    return ThresholdPlan(
        requirements=Requirements.of(pipe, steps, settings),
        threshold=1.0,
        cached=uniform_cached(steps, budget_of(steps, SPEEDUP)),
        site=site,
        native_sigmas=tuple(sigmas.tolist()),
        rectified=True,
    )


def first_order_budget_plan(sampler, pipe, settings, inputs) -> BudgetPlan:
    """Return a plan with the same steps and the solver's own jumps, with the least history length of a fitted plan."""
    steps, computed = settings["steps"], computed_steps(settings["steps"])
    jumps = [sampler.first_order(pipe, inputs, i, k) for i, k in zip(computed, [*computed[1:], steps], strict=True)]
    return BudgetPlan(
        requirements=Requirements.of(pipe, steps, settings),
        computed=computed,
        weights=tuple((w, *[0.0] * (HISTORY_LENGTHS[0] - 1)) for _, w in jumps),
        scale=tuple(a for a, _ in jumps),
        native_sigmas=tuple(inputs.sigmas.tolist()),
    )


# --- other caches at half of the steps ---------------------------------------------------------------------------


def fixed_share(policy: TeaCachePolicy, computed: tuple[int, ...]):
    """Return a TeaCache policy that does all of its work, and then computes at exactly these steps."""

    def decide(state, block, arguments) -> bool:
        policy(state, block, arguments)
        return state.step in computed

    return decide


def bisect_threshold(count: Callable[[float], float], target: float, tolerance: float = 0, tries: int = 10) -> float:
    """Return the threshold whose `count` is nearest to the target, by bisection of its logarithm from 1e-5 to 10.

    count(threshold): of computed steps, falls as the threshold rises. Stops once it is within the tolerance.
    """
    low, high, tried = 1e-5, 10.0, {}
    for _ in range(tries):
        middle = (low * high) ** 0.5
        tried[middle] = count(middle)
        if abs(tried[middle] - target) <= tolerance:
            break
        low, high = (middle, high) if tried[middle] > target else (low, middle)
    return min(tried, key=lambda threshold: abs(tried[threshold] - target))


# --- counting and compiling --------------------------------------------------------------------------------------


class Passes:
    """Counter of the passes through the last blocks."""

    total = 0

    def counting(self, forward):
        @wraps(forward)
        def counted(*args, **kwargs):
            self.total += 1
            return forward(*args, **kwargs)

        return counted


@contextmanager
def observed(model: torch.nn.Module, backend: str | None = None):
    """Counts passes through the last block of each class, and with a backend compiles each block, in this context.

    A block's own `forward` is wrapped, inside of what other caches hang around it. So a skipped block is not counted,
    and their decisions stay outside of the compiled part: compiled with it, they would make torch compile anew at
    every step, and beyond its limit run uncompiled without a word. That limit is an error here.
    """
    passes, blocks = Passes(), blocks_of(model)
    for block in blocks if backend else ():
        block.forward = torch.compile(block.forward, backend=backend)
    for block in {type(block): block for block in blocks}.values():
        block.forward = passes.counting(block.forward)
    strict = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True) if backend else nullcontext()
    try:
        with strict:
            yield passes
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
        if backend:
            torch._dynamo.reset()


# --- measuring ---------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """Results of a method's runs; the first one, which warms up, is not in `seconds`."""

    run: Callable[[], float] | None = None
    seconds: list[float] = field(default_factory=list)
    passes: int = 0
    memory: float | None = None
    error: str | None = None


class Latency:
    """One pipeline on one prompt.

    settings: of the folder's `prepare`. repeats: timed runs of each method; the median counts.
    """

    def __init__(self, sampler, pipe, settings, repeats: int):
        self.sampler, self.pipe, self.settings, self.repeats = sampler, pipe, settings, repeats
        self.steps, self.model, self.device = settings["steps"], pipe.transformer, pipe._execution_device
        self.subject = PipelineUnderTest(pipe, settings, [PROMPT], 1)
        self.passes, self.uncached = Passes(), 0
        self.thresholds: dict[str, float] = {}

    @cached_property
    def inputs(self):
        return self.sampler.prepare(self.pipe, [PROMPT], [0], **self.settings)

    def rows(self, methods: list[str], backend: str | None = None) -> list[dict]:
        """Return one row per method, in their order; with a backend the transformer's blocks are compiled by it."""
        records = {}
        with observed(self.model, backend) as self.passes:
            for uncached, names in ((self.loop, PLANS), (self.stock, [m for m in METHODS if m not in PLANS])):
                names = [name for name in names if name in methods]
                if names:
                    records |= self.measure(names, uncached)
        return [self.row(name, *records[name], backend) for name in methods]

    def measure(self, names: list[str], uncached: Callable[[], float]) -> dict[str, tuple[Record, Record]]:
        """Return each method's record, with that of the uncached run, which begins each round."""
        first = Record(uncached)
        records = {"baseline": first} | {name: Record() for name in names if name != "baseline"}
        for number in range(self.repeats + 1):
            for name, record in records.items():
                if first.error is None and record.error is None:
                    self.attempt(name, record, warm=number > 0)
        for record in records.values():
            record.error = record.error or first.error
        return {name: (records[name], first) for name in names}

    def attempt(self, name: str, record: Record, warm: bool) -> None:
        """Run a method once; an error ends up in its record, so that the other methods continue."""
        try:
            record.run = record.run or self.run_of(name)
            reset_peak_memory(self.device)
            before = self.passes.total
            seconds = record.run()
            record.passes = self.passes.total - before
            record.memory = peak_memory(self.device)
            record.seconds += [seconds] if warm else []
            if name == "baseline":
                self.uncached = record.passes
        except Exception as error:  # of torch, its compiler, and of other people's caches
            record.error = describe(error)
        if record.error:
            release_memory()

    def run_of(self, name: str) -> Callable[[], float]:
        """Return a function that runs a method once and returns the seconds of its denoising loop."""
        if name in ("threshold", "threshold-blocks"):
            site = "blocks" if name == "threshold-blocks" else "output"
            return partial(self.loop, neutral_threshold_plan(self.pipe, self.settings, self.inputs.sigmas, site))
        if name == "budget":
            return partial(self.loop, first_order_budget_plan(self.sampler, self.pipe, self.settings, self.inputs))
        if name == "teacache":
            policy = fixed_share(TeaCachePolicy(1.0, (1.0, 0.0), self.steps), computed_steps(self.steps))
            return partial(self.stock, lambda: teacache(self.model, policy))
        reason = registry.CACHES[name].reason_not_to_run(self.subject)
        if reason:
            raise UserError(f"{name} {reason}")
        return partial(self.stock, partial(SEARCHED[name], self.subject, self.threshold_of(name)))

    def loop(self, plan=None) -> float:
        inputs = self.inputs
        synchronize(self.device)
        start = time.perf_counter()
        self.sampler.denoise(self.pipe, inputs, plan)
        synchronize(self.device)
        return time.perf_counter() - start

    def stock(self, cache=nullcontext) -> float:
        with cache():
            return uncached_latents(self.pipe, [PROMPT], [0], self.settings)[1]

    def threshold_of(self, name: str) -> float:
        """Return the threshold at which a cache computes about T/SPEEDUP steps, if possible within a twentieth of T."""

        def count(threshold: float) -> float:
            before = self.passes.total
            self.stock(partial(SEARCHED[name], self.subject, threshold))
            return self.steps * (self.passes.total - before) / self.uncached

        if name not in self.thresholds:
            self.thresholds[name] = bisect_threshold(count, budget_of(self.steps, SPEEDUP), self.steps // 20)
        return self.thresholds[name]

    def row(self, name: str, record: Record, first: Record, backend: str | None) -> dict:
        row = empty_row(name, self.settings, backend)
        row |= {"threshold": self.thresholds.get(name), "error": record.error}
        if record.error is None:
            latency, baseline = statistics.median(record.seconds), statistics.median(first.seconds)
            computed = self.steps * record.passes / first.passes
            numbers = (computed, latency, baseline, baseline / latency, self.steps / computed)
            row |= zip(NUMBERS, (*numbers, latency * self.steps / (computed * baseline) - 1), strict=True)
            row["peak_memory_mib"] = record.memory
        return row


def empty_row(name: str, settings: dict, backend: str | None, error: str | None = None) -> dict:
    """Return the row of a method without its numbers, for a model that could not be made."""
    row = {"method": name, "compile": backend or "no", "steps": settings["steps"]}
    nothing = dict.fromkeys((*NUMBERS, "peak_memory_mib", "threshold"))
    return {**row, **nothing, "settings": dict(settings), "error": error}


def describe(error: Exception) -> str:
    """Return an error as one line."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return textwrap.shorten(f"{kind}{error}", 200, placeholder=" …")


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
