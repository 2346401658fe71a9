"""The methods that scripts/evaluate.py compares: each is measured at a target speed-up and becomes rows."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ertacache.algorithm import uniform_cached
from ertacache.caches.fitting import PipelineUnderTest
from ertacache.caches.registry import CACHES
from ertacache.caches.tuning import nearest_settings
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.effort import effort_of
from ertacache.calibration.from_folder import CalibrationOptions, open_session
from ertacache.calibration.planner import adams_bashforth_weights, fitted_predictor, offline_weights
from ertacache.calibration.threshold import ThresholdCalibration
from ertacache.calibration.trajectories import grid_name
from ertacache.evaluation.method import Method
from ertacache.evaluation.rivals.methods import RIVALS, Rivals
from ertacache.evaluation.rows import Row
from ertacache.evaluation.runner import Evaluation
from ertacache.numerics import ode
from ertacache.numerics.multistep import predicted_jumps
from ertacache.plans import BudgetPlan, ThresholdPlan
from ertacache.plans.names import budget_name, budget_of, threshold_name
from ertacache.utils import parallel
from ertacache.utils.errors import UserError
from ertacache.utils.progress import bar_options

THRESHOLD_METHODS = ("uniform", "ertacache", "ablation")
BUDGET_METHODS = ("fewer-steps-tuned", "fewer-steps-ab2", "least-squares", "budget", "budget-exact", "budget-ablation")
OWN_SOLVER = ("fewer-steps", "fewer-steps-tuned", "oss-solver", "ays")  # N steps of the model's own solver
SEVERAL = {"ablation": 7, "budget-ablation": 4, "budcache": 2}  # rows of the methods that have more than one
FLOP_PROMPTS = 2  # calibration prompts on which the FLOPs of a setting are counted
METHODS = ("none", "fewer-steps", *THRESHOLD_METHODS, *BUDGET_METHODS, *RIVALS, *CACHES)


class MethodRows:
    """The rows of one model folder.

    Args:
        evaluation: Measures.
        options: How plans are calibrated that are not stored.
        sites: Cache sites of threshold plans.
        plans: Folder of the stored plans.
        target: Of the grids that fewer steps are tuned for, "reference" or "exact".
        store: Whether to store the plans that are calibrated here.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        options: CalibrationOptions,
        sites: Sequence[str],
        plans: Path,
        target: str = "reference",
        store: bool = False,
    ):
        self.evaluation, self.options, self.sites = evaluation, options, sites
        self.plans, self.target, self.store = plans, target, store
        self.steps = evaluation.settings["steps"]
        self.open: dict[str, Any] = {}  # calibrations by site or target
        self.held = ExitStack()  # the lock of their checkpoints

    @cached_property
    def session(self):
        """A session on the calibration prompts, which are never those of the evaluation."""
        e = self.evaluation
        return open_session(e.sampler, e.pipe, e.settings, e.model, self.options, e.work)

    @property
    def learned_on(self) -> str:
        """A hash of the calibration prompts, for what is stored."""
        return self.session.identity["prompts"]["sha256"]

    def thresholds_at(self, site: str) -> ThresholdCalibration:
        """Return the calibration of threshold plans at a cache site."""
        return self.opened(f"site {site}", ThresholdCalibration, site)

    def budgets_for(self, target: str) -> BudgetCalibration:
        """Return the calibration of budget plans for a target."""
        return self.opened(target, BudgetCalibration, target)

    def opened(self, name: str, kind: type, argument: str):
        """Return a calibration, opened once. No other process uses its checkpoints before the rows are made."""
        if not self.open:
            self.held.enter_context(self.session.exclusive())
        if name not in self.open:
            self.open[name] = kind(self.session, argument)
        return self.open[name]

    # --- rows --------------------------------------------------------------------------------------------------------

    def rows(
        self, methods: Sequence[str], speedups: Sequence[float] = (), thresholds: Sequence[float] = ()
    ) -> Iterator[Row]:
        """Yield all rows of these methods, at each speed-up or λ. Stored groups of rows need no calibration again.

        At the end the checkpoints of the calibrations are deleted.
        """
        with self.held:
            yield from self.each_row(methods, speedups, thresholds)
            for calibration in self.open.values():
                calibration.finish()
            self.open = {}

    def each_row(self, methods: Sequence[str], speedups: Sequence[float], thresholds: Sequence[float]) -> Iterator[Row]:
        evaluation = self.evaluation
        yield evaluation.row(evaluation.uncached())
        for speedup in speedups:
            steps = budget_of(self.steps, speedup)
            taken = [name for name in methods if name not in OWN_SOLVER or self.takes(name, steps)]
            if "fewer-steps" in taken:
                yield evaluation.row(evaluation.fewer_steps("fewer-steps", f"fewer steps ({steps})", steps), speedup)
            for name in (name for name in (*BUDGET_METHODS, *RIVALS) if name in taken):
                yield from self.group([name, speedup], partial(self.budget_methods, name, speedup), speedup)
        asked = [name for name in THRESHOLD_METHODS if name in methods]
        for site in self.sites if asked else []:
            for speedup in speedups:
                make = partial(self.threshold_methods, asked, site, speedup=speedup)
                yield from self.group([*asked, site, speedup], make, speedup)
            for threshold in thresholds:
                names = [*asked, *(name for name in methods if name == "fewer-steps")]
                make = partial(self.threshold_methods, names, site, threshold=threshold)
                yield from self.group([*names, site, "λ", threshold], make)
        for name in (name for name in CACHES if name in methods):
            yield from self.rows_of_cache(name, list(speedups))

    def takes(self, name: str, steps: int) -> bool:
        """Return whether the model folder runs with so few steps; where not, say that a method has no row."""
        evaluation = self.evaluation
        try:
            evaluation.sampler.settings_of(evaluation.pipe, **{**evaluation.settings, "steps": steps})
        except UserError as reason:
            if parallel.is_main():
                folder = evaluation.sampler.FOLDER.name
                print(f"{name} is left out on {folder} at N = {steps}: {reason}", file=sys.stderr)
            return False
        return True

    def group(self, key: list, methods: Callable[[], Iterator[Method]], target: float | None = None) -> list[Row]:
        """Return the rows of some methods, which are not even made when all their rows are stored."""
        files = sorted(self.plans.glob("*.json")) if self.plans.is_dir() else []
        stored = {path.name: path.stat().st_mtime_ns for path in files}
        options = [self.options.effort, self.learned_on, self.target, stored]
        key = ["group", key, options, self.evaluation.repeats, self.evaluation.timed]
        return self.evaluation.checkpoints.value(
            key, lambda: [self.evaluation.row(method, target) for method in methods()]
        )

    def threshold_methods(
        self, names: Sequence[str], site: str, speedup: float | None = None, threshold: float | None = None
    ) -> Iterator[Method]:
        """Yield methods at the NFE that one λ gives: the stored plan, or one calibrated now, and its parts."""
        calibration, evaluation = self.thresholds_at(site), self.evaluation
        threshold = threshold or calibration.threshold_for(round(self.steps / speedup))
        stored = self.plans / threshold_name(evaluation.model, self.steps, threshold, site)
        if "ablation" not in names and stored.exists():
            plans, chosen = {}, ThresholdPlan.load(stored)
            chosen.check(self.session.requirements, remedy="give another folder with --plans")
            if "uniform" in names:
                neutral = {"phi": (), "k": (), "b": (), "rectified": False, "phi_definition": "none"}
                plans["uniform"] = replace(chosen, cached=uniform_cached(self.steps, chosen.nfe), **neutral)
        else:
            whole = not {"uniform", "ablation"}.isdisjoint(names) or effort_of(self.options.effort).whole_ablation
            plans, errors = calibration.candidates(threshold, whole)
            chosen = calibration.choose(plans, errors)
            if self.store:
                chosen.save(stored)
        if "fewer-steps" in names and self.takes("fewer-steps", chosen.nfe):
            yield evaluation.fewer_steps("fewer-steps", f"fewer steps ({chosen.nfe})", chosen.nfe)
        for name in list(plans) if "ablation" in names else [name for name in plans if name in names]:
            yield evaluation.planned(name, f"{name}, {site}", plans[name])
        if "ertacache" in names:
            best = chosen.provenance["calibration"]["chosen"]
            label = f"ertacache, {site}, λ = {threshold:g} ({best})"
            yield evaluation.planned("ertacache", label, chosen, stored)

    def budget_methods(self, name: str, speedup: float) -> Iterator[Method]:
        """Yield methods with exactly T/speedup computed steps."""
        if name in RIVALS:
            return Rivals(self, budget_of(self.steps, speedup)).methods(name)
        return BudgetMethods(self, speedup).methods(name)

    def weighted(self, schedule: Sequence[int], weights, scale=(), sigmas=()) -> BudgetPlan:
        """Return a budget plan with these weights, on the uncached run's grid or on one of its own."""
        native = tuple(self.budgets_for("reference").native_sigmas.tolist())
        weights = tuple(tuple(float(w) for w in row) for row in weights)
        grid = tuple(float(sigma) for sigma in sigmas)
        requirements, scale = self.session.requirements, tuple(float(a) for a in scale)
        return BudgetPlan(requirements, tuple(schedule), weights, native, sigmas=grid, scale=scale)

    def rows_of_cache(self, name: str, speedups: list[float]) -> Iterator[Row]:
        """Yield rows of another cache, at the setting whose FLOPs come nearest to each speed-up."""
        cache, checkpoints = CACHES[name], self.evaluation.checkpoints
        reason = cache.reason_not_to_run(self.subject)
        if reason:
            print(f"{name} is left out on {self.evaluation.sampler.FOLDER.name}: it {reason}", file=sys.stderr)
            return
        uncached = checkpoints.value(["flops", self.learned_on], lambda: self.subject.flops(FLOP_PROMPTS))

        def speedup_of(value) -> float:
            def measure() -> float:
                with cache.apply(self.subject, value):
                    return uncached / self.subject.flops(FLOP_PROMPTS)

            return checkpoints.value(["sweep", name, value, self.learned_on], measure)

        bar = bar_options(f"{name}, FLOPs", "setting", silent=not parallel.is_main())
        for value in tqdm(cache.values if speedups else (), **bar):
            speedup_of(value)
        for speedup, (value, _) in nearest_settings(cache.values, cache.between, speedup_of, speedups).items():
            cached = partial(cache.apply, self.subject, value)
            label = f"{name} ({cache.written(value)})"
            method = self.evaluation.other_cache(name, label, value, cached)
            yield self.evaluation.row(replace(method, learned_on=self.learned_on), speedup)

    @cached_property
    def subject(self) -> PipelineUnderTest:
        """The stock pipeline with the calibration prompts, on which other caches run and are fitted."""
        e = self.evaluation
        return PipelineUnderTest(e.pipe, e.settings, self.session.prompts, e.batch_size, e.model)


class BudgetMethods:
    """Methods that are given the number of computed steps, at one speed-up."""

    def __init__(self, rows: MethodRows, speedup: float):
        self.rows, self.evaluation, self.steps = rows, rows.evaluation, rows.steps
        self.budget = budget_of(rows.steps, speedup)
        cached = uniform_cached(self.steps, self.budget)
        self.uniform = tuple(i for i in range(self.steps) if i not in cached)

    def plan(self, target: str) -> tuple[BudgetPlan, Path]:
        """Return the stored plan, or one calibrated now, and its path."""
        path = self.rows.plans / budget_name(self.evaluation.model, self.steps, self.budget, target)
        if path.exists():
            plan = BudgetPlan.load(path)
        else:
            plan = self.rows.budgets_for(target).plans([self.budget], self.rows.options.effort)[self.budget]
        plan.check(self.rows.session.requirements, remedy="give another folder with --plans")
        if self.rows.store:
            plan.save(path)
        return plan, path

    def methods(self, name: str) -> Iterator[Method]:
        """Yield the methods of a name in BUDGET_METHODS."""
        if name in ("budget", "budget-exact"):
            plan, path = self.plan("exact" if name == "budget-exact" else "reference")
            aim = ", exact target" if name == "budget-exact" else ""
            yield self.evaluation.planned(name, f"budget plan{aim} (H = {plan.history_length})", plan, path)
        elif name == "fewer-steps-tuned":
            shift = self.rows.budgets_for(self.rows.target).tuned_shift(self.budget)
            label = f"fewer steps ({self.budget}), {grid_name(shift)}"
            yield self.evaluation.fewer_steps(name, label, self.budget, shift)
        elif name == "fewer-steps-ab2":
            yield self.adams_bashforth(name)
        elif name == "least-squares":
            yield self.least_squares(name)
        else:
            yield from self.ablation()

    def adams_bashforth(self, name: str) -> Method:
        """Return fewer steps on a grid uniform in the noise level, by the two-step Adams–Bashforth method."""
        sigmas = np.linspace(1, 0, self.budget + 1)
        calibration = self.rows.budgets_for("reference")
        session = calibration.session
        weights = adams_bashforth_weights(sigmas) * ode.rate_of(session.sampler, session.pipe, calibration.first)
        plan = self.rows.weighted(range(self.budget), weights, sigmas=sigmas)
        return self.evaluation.planned(name, f"Adams–Bashforth 2, uniform grid ({self.budget})", plan)

    def least_squares(self, name: str) -> Method:
        """Return the model's own solver with each skipped velocity predicted from the last three computed ones."""
        predictor = fitted_predictor(self.rows.budgets_for("reference").trajectories(), history_length=3)
        jumps = predicted_jumps(Rivals(self.rows, self.budget).solver, self.uniform, predictor)
        label = "least-squares prediction per step, uniform schedule"
        return self.evaluation.planned(name, label, self.rows.weighted(self.uniform, *jumps))

    def ablation(self) -> Iterator[Method]:
        """Yield the plan's two parts alone and together: which steps, and how the jumps are weighted."""
        calibration, (plan, _) = self.rows.budgets_for("reference"), self.plan("reference")

        def solver_jumps(schedule: Sequence[int]) -> BudgetPlan:
            pairs = [calibration.first_order(i, k) for i, k in pairwise([*schedule, self.steps])]
            return self.rows.weighted(schedule, [[w] for _, w in pairs], [a for a, _ in pairs])

        gram = calibration.trajectories()  # a rollout needs its latents
        rollout = calibration.rollout(self.uniform, plan.history_length)
        offline = offline_weights(gram, plan.computed, plan.history_length, calibration.scaled)
        fitted = self.rows.weighted(self.uniform, rollout.arrays["weights"], rollout.arrays["scale"])
        parts = {
            "uniform, solver's jumps": solver_jumps(self.uniform),
            "uniform, fitted on the plan's trajectory": fitted,
            "planned, solver's jumps": solver_jumps(plan.computed),
            "planned, fitted on the reference": self.rows.weighted(plan.computed, *offline),
        }
        for name, part in parts.items():
            yield self.evaluation.planned(f"budget: {name}", name, part)
