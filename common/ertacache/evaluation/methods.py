"""The methods that scripts/evaluate.py compares: each makes candidates at an asked speed-up, which become rows."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ertacache import BudgetPlan, ThresholdPlan
from ertacache.algorithm import uniform_cached
from ertacache.caches.fitting import Bench
from ertacache.caches.registry import PEERS
from ertacache.caches.tuning import nearest_settings
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.from_folder import open_calibration
from ertacache.calibration.planner import adams_bashforth_weights, offline_weights, predictor_weights
from ertacache.evaluation.runner import Candidate, Evaluation
from ertacache.plans.names import budget_name, budget_of, plan_name

THRESHOLD_METHODS = ("uniform", "ertacache", "ablation")
BUDGET_METHODS = ("fewer-steps-tuned", "fewer-steps-ab2", "least-squares", "budget", "budget-exact", "budget-ablation")
SWEPT = 2  # calibration prompts that the FLOPs of a setting are counted on
METHODS = ("none", "fewer-steps", *THRESHOLD_METHODS, *BUDGET_METHODS, *PEERS)


class Comparison:
    """The rows of one model folder. plans: folder of the stored plans; store: keep those that are calibrated here."""

    def __init__(self, evaluation: Evaluation, sites: list[str], plans: Path, store: bool = False):
        self.evaluation, self.sites, self.plans, self.store = evaluation, sites, plans, store
        self.options, self.settings = evaluation.options, evaluation.settings
        self.steps = self.settings["steps"]
        self.opened: dict = {}

    def calibration(self, **options):
        """A calibration on the calibration prompts, which are never those of the evaluation; opened once."""
        key = tuple(options.values())
        if key not in self.opened:
            place = self.evaluation.program, self.evaluation.pipe, self.options, self.settings, self.evaluation.work
            self.opened[key] = open_calibration(*place, **options)
        return self.opened[key]

    def budget_calibration(self, target: str) -> BudgetCalibration:
        return self.calibration(kind=BudgetCalibration, target=target)

    def finish(self) -> None:
        """Close the calibrations and remove what they kept for a rerun."""
        for calibration in self.opened.values():
            calibration.finish()

    # --- rows --------------------------------------------------------------------------------------------------------

    def rows(self, methods: list[str], speedups: list[float] = (), thresholds: list[float] = ()) -> Iterator[dict]:
        """All rows of these methods, at each speed-up or λ. Groups of finished rows need no calibration again."""
        yield self.evaluation.row(self.evaluation.uncached())
        for speedup in speedups:
            if "fewer-steps" in methods:
                steps = budget_of(self.steps, speedup)
                candidate = self.evaluation.fewer_steps("fewer-steps", f"fewer steps ({steps})", steps)
                yield self.evaluation.row(candidate, speedup)
            for method in (m for m in BUDGET_METHODS if m in methods):
                yield from self.group([method, speedup], partial(self.budgeted, method, speedup), speedup)
        asked = [m for m in THRESHOLD_METHODS if m in methods]
        for site in self.sites if asked else []:
            for speedup in speedups:
                yield from self.group(
                    [*asked, site, speedup], partial(self.threshold_rows, asked, site, speedup), speedup
                )
            for threshold in thresholds:
                methods_here = [*asked, *(m for m in methods if m == "fewer-steps")]
                make = partial(self.threshold_rows, methods_here, site, None, threshold)
                yield from self.group([*methods_here, site, "λ", threshold], make)
        for method in (m for m in PEERS if m in methods):
            yield from self.peer_rows(method, list(speedups))

    def group(self, key: list, candidates, asked: float | None = None) -> list[dict]:
        """The rows of some candidates, which are not even made when all of them are finished."""
        stored = (
            {str(p.name): p.stat().st_mtime_ns for p in sorted(self.plans.glob("*.json"))}
            if self.plans.is_dir()
            else {}
        )
        evaluation = self.evaluation
        how = [self.options.search, self.options.calibration_prompts, stored, evaluation.repeats, evaluation.timed]
        return evaluation.shelf.keep(
            ["group", key, how], lambda: [evaluation.row(candidate, asked) for candidate in candidates()]
        )

    def threshold_rows(self, methods, site: str, speedup, threshold=None) -> Iterator[Candidate]:
        """At the NFE that one λ gives: the stored plan, or one calibrated now, and the parts that it is made of."""
        calibration, evaluation = self.calibration(site=site), self.evaluation
        threshold = threshold or calibration.threshold_for(round(self.steps / speedup))
        stored = self.plans / plan_name(self.options.model, self.steps, threshold, site)
        if "ablation" not in methods and stored.exists():
            plans, chosen = {}, ThresholdPlan.load(stored)
            chosen.check(calibration.conditions, remedy=f"delete {stored}")
            if "uniform" in methods:
                neutral = {"phi": (), "k": (), "b": (), "rectified": False, "phi_definition": "none"}
                plans["uniform"] = replace(chosen, cached=uniform_cached(self.steps, chosen.nfe), **neutral)
        else:
            plans, errors = calibration.candidates(threshold)
            chosen = calibration.choose(plans, errors)
            if self.store:
                chosen.save(stored)
        if "fewer-steps" in methods:
            yield evaluation.fewer_steps("fewer-steps", f"fewer steps ({chosen.nfe})", chosen.nfe)
        for name in list(plans) if "ablation" in methods else [n for n in plans if n in methods]:
            yield evaluation.planned(name, f"{name}, {site}", plans[name])
        if "ertacache" in methods:
            best = chosen.provenance["calibration"]["chosen"]
            label = f"ertacache, {site}, λ = {threshold:g} ({best})"
            yield evaluation.planned("ertacache", label, chosen, stored)

    def budgeted(self, method: str, speedup: float) -> Iterator[Candidate]:
        """With exactly T/speedup computed steps."""
        return Budgeted(self, speedup).candidates(method)

    def peer_rows(self, method: str, speedups: list[float]) -> Iterator[dict]:
        """Another cache, at the value of its parameter whose FLOPs come nearest to each speed-up."""
        peer, shelf = PEERS[method], self.evaluation.shelf
        reason = peer.unfit(self.bench)
        if reason:
            print(f"{method} is left out on {self.evaluation.program.FOLDER.name}: it {reason}", file=sys.stderr)
            return
        uncached = shelf.keep(["flops"], lambda: self.bench.flops(SWEPT))

        def saved_of(value) -> float:
            def measured():
                with peer.apply(self.bench, value):
                    return uncached / self.bench.flops(SWEPT)

            return shelf.keep(["sweep", method, value], measured)

        for speedup, (value, _) in nearest_settings(peer.values, peer.between, saved_of, speedups).items():
            cached = partial(peer.apply, self.bench, value)
            label = f"{method} ({peer.written(value)})"
            yield self.evaluation.row(self.evaluation.peer(method, label, value, cached), speedup)

    @cached_property
    def bench(self) -> Bench:
        calibration = self.calibration(site="output")
        return Bench(
            self.evaluation.pipe, self.settings, calibration.prompts, self.options.batch_size, self.options.model
        )


class Budgeted:
    """Methods that are given the number of computed steps, at one speed-up."""

    def __init__(self, comparison: Comparison, speedup: float):
        self.comparison, self.evaluation, self.steps = comparison, comparison.evaluation, comparison.steps
        self.options, self.budget = comparison.options, budget_of(comparison.steps, speedup)
        self.uniform = tuple(i for i in range(self.steps) if i not in uniform_cached(self.steps, self.budget))

    def calibration(self, target: str) -> BudgetCalibration:
        return self.comparison.budget_calibration(target)

    def plan(self, target: str) -> tuple[BudgetPlan, Path]:
        """The stored plan, or one calibrated now."""
        path = self.comparison.plans / budget_name(self.options.model, self.steps, self.budget, target)
        calibration = self.calibration(target)
        plan = (
            BudgetPlan.load(path)
            if path.exists()
            else calibration.plans([self.budget], self.options.search)[self.budget]
        )
        plan.check(calibration.conditions, remedy=f"delete {path}")
        if self.comparison.store:
            plan.save(path)
        return plan, path

    def candidates(self, method: str) -> Iterator[Candidate]:
        if method in ("budget", "budget-exact"):
            plan, path = self.plan("exact" if method == "budget-exact" else "reference")
            label = (
                f"budget plan (H = {plan.anchors})"
                if method == "budget"
                else f"budget plan, exact target (H = {plan.anchors})"
            )
            yield self.evaluation.planned(method, label, plan, path)
        elif method == "fewer-steps-tuned":
            shift = self.calibration(self.options.target).tuned_shift(self.budget)
            label = f"fewer steps ({self.budget}), tuned shift ({shift:g})"
            yield self.evaluation.fewer_steps(method, label, self.budget, shift)
        elif method == "fewer-steps-ab2":
            yield self.adams_bashforth(method)
        elif method == "least-squares":
            yield self.least_squares(method)
        else:
            yield from self.ablation()

    def weighted(self, schedule, weights, scale=()) -> BudgetPlan:
        """A budget plan by hand, on the uncached run's grid."""
        calibration = self.calibration("reference")
        weights = tuple(tuple(float(w) for w in row) for row in weights)
        native = tuple(calibration.native.tolist())
        return BudgetPlan(calibration.conditions, tuple(schedule), weights, native, scale=tuple(scale))

    def adams_bashforth(self, method: str) -> Candidate:
        """Fewer steps on a grid uniform in the noise level, by the two-step Adams–Bashforth method."""
        sigmas = np.linspace(1, 0, self.budget + 1)
        weights = adams_bashforth_weights(sigmas) * self.calibration("reference").rate
        plan = replace(self.weighted(range(self.budget), weights), sigmas=tuple(sigmas.tolist()))
        return self.evaluation.planned(method, f"Adams–Bashforth 2, uniform grid ({self.budget})", plan)

    def least_squares(self, method: str) -> Candidate:
        """Each skipped output predicted from the last three computed ones, by least squares on the reference."""
        calibration = self.calibration("reference")
        solver = [calibration.first_jump(i, i + 1) for i in range(self.steps)]
        predicted = predictor_weights(calibration.reference(), solver, self.uniform, anchors=3)
        label = "least-squares prediction per step, uniform schedule"
        return self.evaluation.planned(method, label, self.weighted(self.uniform, *predicted))

    def ablation(self) -> Iterator[Candidate]:
        """The plan's two parts alone and together: which steps, and how the jumps are weighted."""
        calibration, (plan, _) = self.calibration("reference"), self.plan("reference")

        def solver_jumps(schedule):
            pairs = [calibration.first_jump(i, k) for i, k in zip(schedule, [*schedule[1:], self.steps], strict=True)]
            return self.weighted(schedule, [[w] for _, w in pairs], [a for a, _ in pairs])

        found = calibration.replay(self.uniform, plan.anchors)
        offline = offline_weights(calibration.reference(), plan.computed, plan.anchors, calibration.scaled)
        parts = {
            "uniform, solver's jumps": solver_jumps(self.uniform),
            "uniform, fitted on the plan's trajectory": self.weighted(
                self.uniform, found.arrays["weights"], found.arrays["scale"]
            ),
            "planned, solver's jumps": solver_jumps(plan.computed),
            "planned, fitted on the reference": self.weighted(plan.computed, *offline),
        }
        for name, part in parts.items():
            yield self.evaluation.planned(f"budget: {name}", name, part)
