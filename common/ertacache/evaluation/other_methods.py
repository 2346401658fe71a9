"""What other ways to spend as many model calls learn on calibration prompts, in a pipeline's own call.

Fewer steps learn a shift of their grid, OSS a schedule, and the caches of diffusers a setting with the FLOPs of a
target speed-up. Every result is a checkpoint, so that an interrupted search goes on.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ertacache.caches.registry import CACHES
from ertacache.caches.tuning import nearest_settings
from ertacache.calibration.choice import typical_error
from ertacache.calibration.from_pipeline import session_of_call
from ertacache.calibration.optimal_steps import optimal_steps, velocities_in_call
from ertacache.calibration.paused_call import PausedCalls, arguments_of_call
from ertacache.calibration.trajectories import SHIFTS, TargetTrajectories
from ertacache.numerics.schedulers import FlowMatching, solver_of
from ertacache.pipelines.enable import originals
from ertacache.plans import BudgetPlan
from ertacache.utils.denoisers import DENOISERS
from ertacache.utils.errors import UserError, reason_of
from ertacache.utils.progress import bar_options

FLOP_PROMPTS = 2  # on which the FLOPs of a cache's setting are counted


@dataclass(frozen=True)
class Cached:
    """A denoiser as caches/third_party.py takes it."""

    pipe: Any
    model: Any
    steps: int


class OtherMethods:
    """Fits other methods to a pipeline's call.

    Args:
        pipe: The pipeline; it follows no plan.
        prompts: Calibration prompts; prompt j starts from the noise of seed j.
        steps: T.
        batch_size: Prompts per call.
        call_kwargs: Arguments of the call.
        work: Folder for checkpoints.
    """

    def __init__(
        self, pipe, prompts: Sequence[str], steps: int, batch_size: int, call_kwargs: Mapping[str, Any], work: Path
    ):
        self.pipe, self.steps, self.call_kwargs = pipe, steps, dict(call_kwargs)
        self.session = session_of_call(pipe, prompts, steps, 0, batch_size, work, call_kwargs, progress=False)
        self.checkpoints = self.session.checkpoints("other methods")
        self.denoisers = {name: part for name, part in originals(pipe).items() if name in DENOISERS}

    @cached_property
    def uncached(self) -> TargetTrajectories:
        """The uncached runs of the calibration prompts: their latents at every step, on disk."""
        uncached = TargetTrajectories(self.session, around_pass=lambda: self.session.sampler)
        uncached.trajectories()
        return uncached

    def batches(self) -> Iterator[tuple[int, list, list[int]]]:
        """Yield number, prompts and seeds of each batch."""
        session = self.session
        for number, start in enumerate(session.starts):
            part = slice(start, start + session.batch_size)
            yield number, session.prompts[part], session.seeds[part]

    # --- fewer steps on a tuned grid ---------------------------------------------------------------------------------

    def reason_not_to_shift(self) -> str | None:
        """Return why the pipeline's grid cannot be shifted by its call; None where it can."""
        scheduler = originals(self.pipe)["scheduler"]
        if "sigmas" not in arguments_of_call(self.pipe)[0]:
            return f"{type(self.pipe).__name__}'s call takes no sigmas"
        if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
            return f"{type(scheduler).__name__} takes no sigmas"
        return None if isinstance(solver_of(scheduler), FlowMatching) else "its noise levels are not those of a flow"

    def tuned_shift(self, budget: int) -> float | None:
        """Return the shift in SHIFTS with which `budget` own steps come nearest to the uncached run; None: without."""

        def error(shift: float | None) -> float:
            errors = self.checkpoints.value(["grid", budget, shift], partial(self.errors_on, budget, shift))
            return typical_error(np.array(errors))

        return min((None, *SHIFTS), key=error)

    def errors_on(self, budget: int, shift: float | None) -> list[float]:
        """Return each prompt's mean squared error of the final latents, of fewer steps on a grid (`grid_call`)."""
        sampler, errors = PausedCalls(self.pipe, self.call_kwargs | grid_call(budget, shift)), []
        for number, prompts, seeds in self.batches():
            with sampler:
                call = sampler.prepare(self.pipe, prompts, seeds)
                final = sampler.denoise(self.pipe, call, None, lambda *_: None)
            errors += self.uncached.squared_errors(number, final)
        return errors

    # --- optimal stepsizes -------------------------------------------------------------------------------------------

    def optimal_steps_plan(self, budget: int) -> BudgetPlan:
        """Return the schedule of OSS with first-order jumps, as a plan that a pipeline follows."""
        found = self.checkpoints.value(["optimal steps", budget], partial(self.optimal_steps, budget))
        weights = tuple((weight,) for weight in found["weights"])
        options = {"native_sigmas": tuple(found["native_sigmas"]), "scale": tuple(found["scale"])}
        return BudgetPlan(self.session.requirements, tuple(found["computed"]), weights, **options)

    def optimal_steps(self, budget: int) -> dict[str, list]:
        """Return the arrays of the plan."""
        uncached, batches = self.uncached, list(self.batches())
        sizes = [len(uncached.target_latents(number, 0)) for number, *_ in batches]
        if uncached.begin or uncached.end != self.steps:
            raise UserError("a call that makes a part of its steps cannot be compared: leave strength and the like out")

        def target_latents(k: int) -> torch.Tensor:
            return torch.cat([uncached.target_latents(number, k) for number, *_ in batches])

        def velocities(states: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
            split = {step: x.split(sizes) for step, x in states.items()}
            parts = [
                velocities_in_call(self.session.sampler, prompts, seeds, {step: x[n] for step, x in split.items()})
                for n, prompts, seeds in batches
            ]
            return {step: torch.cat([part[step] for part in parts]) for step in states}

        options = {"noise": target_latents(0), "target_latents": target_latents, "steps": self.steps}
        computed = optimal_steps(velocities, uncached.first_order, budget=budget, **options)
        jumps = [uncached.first_order(i, k) for i, k in zip(computed, [*computed[1:], self.steps], strict=True)]
        scale, weights = (list(map(float, column)) for column in zip(*jumps, strict=True))
        native = uncached.native_sigmas.tolist()
        return {"computed": list(computed), "weights": weights, "scale": scale, "native_sigmas": native}

    # --- caches of diffusers -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def cached(self, name: str, value: Any) -> Iterator[None]:
        """Enable a cache of caches/registry.py on the denoisers. value: its setting."""
        with contextlib.ExitStack() as stack:
            for model in self.denoisers.values():
                stack.enter_context(CACHES[name].apply(Cached(self.pipe, model, self.steps), value))
            yield

    def reason_not_to_cache(self, name: str) -> str | None:
        """Return why a cache does not run on this pipeline; None where it does. It is tried once."""
        for model in self.denoisers.values():
            if not hasattr(model, "enable_cache"):
                return f"diffusers has no caches for {type(model).__name__}"
        return self.checkpoints.value(["cache", name, "problem"], partial(self.problem_of_cache, name))

    def problem_of_cache(self, name: str) -> str | None:
        if not self.uncached_flops:
            return "its FLOPs cannot be counted here"
        try:
            self.speedup_of_cache(name, CACHES[name].values[0])
        except Exception as error:  # whatever diffusers raises for a model that its cache does not know
            return reason_of(error)
        return None

    def caches_at(
        self, name: str, speedups: Sequence[float]
    ) -> dict[float, tuple[Any, str, Callable[[], AbstractContextManager]]]:
        """Return the setting whose FLOPs come nearest to each target speed-up, its label, and the context of calls."""
        cache, speedup_of = CACHES[name], partial(self.speedup_of_cache, name)
        tried, bar = [], bar_options(f"{name}, FLOPs", "setting")
        for value in tqdm(cache.values, **bar):  # from the finest setting on, until all targets are reached
            tried.append(value)
            if speedup_of(value) >= max(speedups):
                break
        found = nearest_settings(tried, cache.between, speedup_of, speedups)
        label = {speedup: f"{name} ({cache.written(value)})" for speedup, (value, _) in found.items()}
        return {s: (value, label[s], partial(self.cached, name, value)) for s, (value, _) in found.items()}

    def speedup_of_cache(self, name: str, value: Any) -> float:
        """Return the uncached FLOPs over those with a cache."""

        def measure() -> float:
            with self.cached(name, value):
                return self.uncached_flops / self.flops()

        return self.checkpoints.value(["cache", name, value], measure)

    @cached_property
    def uncached_flops(self) -> float:
        return self.checkpoints.value("uncached FLOPs", lambda: self.flops() or 0.0)

    def flops(self) -> float:
        """Return the denoisers' FLOPs on the first calibration prompts, as the pipeline is."""

        def run() -> None:
            self.pipe.set_progress_bar_config(disable=True)
            for _, prompts, seeds in self.batches():
                if seeds[0] < FLOP_PROMPTS:
                    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                    self.pipe(prompt=prompts, generator=generators, output_type="latent", **self.call_kwargs)

        return counted(self.pipe, run)[1] or 0.0


def grid_call(steps: int, shift: float | None) -> dict[str, Any]:
    """Return the arguments of a call with fewer steps: on its own grid, or on levels from 1 to 1/steps with a shift.

    The scheduler's own shift, if it has one, comes on top.
    """
    if shift is None:
        return {"num_inference_steps": steps}
    levels = np.linspace(1.0, 1 / steps, steps)
    return {"num_inference_steps": steps, "sigmas": (shift * levels / (1 + (shift - 1) * levels)).tolist()}


def counted(pipe, run: Callable[[], Any]) -> tuple[Any, float | None]:
    """Return the result of a function that runs a pipeline, and its denoisers' FLOPs; None where none are counted."""
    names = {type(part).__name__ for name, part in originals(pipe).items() if name in DENOISERS}
    with FlopCounterMode(display=False) as counter:
        result = run()
    counts = counter.get_flop_counts()
    return result, float(sum(sum(counts.get(name, {}).values()) for name in names)) or None
