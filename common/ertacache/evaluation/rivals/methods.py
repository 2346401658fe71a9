"""The rivals as methods of scripts/evaluate.py: each chooses steps or weights for the same number of model calls.

Caches that predict outputs on a fixed schedule run as budget plans whose jumps are those of the model's own solver with
the predicted outputs (numerics/multistep.py). Grids run through the model's solver. A search may make as many model
calls as the effort gives that for a budget plan (calibration/effort.py); what it finds is kept with the rows.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ertacache.calibration.effort import effort_of
from ertacache.calibration.planner import Schedule
from ertacache.calibration.released import released_steps
from ertacache.evaluation.method import Method
from ertacache.evaluation.rivals import grids, rollouts, search
from ertacache.numerics import ode
from ertacache.numerics.multistep import Predictor, chebyshev_ridge, extrapolated, predicted_jumps, reused
from ertacache.plans import BudgetPlan
from ertacache.utils import parallel
from ertacache.utils.words import counted

if TYPE_CHECKING:
    from ertacache.evaluation.methods import MethodRows

DPCACHE_FIRST, DPCACHE_GAP = 3, 8  # first steps that are computed, largest gap
SPECTRUM_DEGREE, SPECTRUM_RIDGE = 4, 0.1
SPECTRUM_GROWTHS = tuple(round(0.05 * number, 2) for number in range(61))
BLEND = 0.5  # share of Spectrum's prediction beside linear extrapolation, as its README recommends


class Rivals:
    """The rivals at one number of computed steps.

    Args:
        rows: Of the model folder.
        budget: N.
    """

    def __init__(self, rows: "MethodRows", budget: int):
        self.rows, self.evaluation, self.budget, self.steps = rows, rows.evaluation, budget, rows.steps
        self.calibration = rows.budgets_for("reference")
        self.denoiser = type(self.evaluation.pipe.transformer).__name__

    def methods(self, name: str) -> Iterator[Method]:
        """Yield the methods of a name in RIVALS."""
        yield from RIVALS[name](self)

    # --- what all use ------------------------------------------------------------------------------------------------

    @property
    def prompts(self) -> int:
        """Number of calibration prompts."""
        return len(self.rows.session.prompts)

    @property
    def limit(self) -> int:
        """Model calls that a search may make, over all prompts."""
        return effort_of(self.rows.options.effort).search * self.steps * self.prompts

    def leave_out(self, name: str, reason: str) -> None:
        """Say why there is no row."""
        if parallel.is_main():
            folder = self.evaluation.sampler.FOLDER.name
            print(f"{name} is left out on {folder} at N = {self.budget}: {reason}", file=sys.stderr)

    def kept(self, name: str, *key: Any, compute: Callable[[], Any]) -> Any:
        """Return the result of a search that was made before, or make it; the same on all ranks."""
        key = ["rival", name, *key, self.rows.learned_on, self.rows.options.effort]
        return self.evaluation.checkpoints.value(key, compute)

    @property
    def solver(self) -> np.ndarray:
        """The solver matrix, [T+1, 1+T]."""
        matrix = self.kept("solver", compute=lambda: rollouts.matrix_of(self.calibration).tolist())
        return np.array(matrix)

    def cache(self, name: str, label: str, schedule: Sequence[int], predictor: Predictor = reused) -> Method:
        """Return a cache that predicts the outputs of skipped steps, with the model's own solver."""
        plan = self.rows.weighted(schedule, *predicted_jumps(self.solver, schedule, predictor))
        return self.evaluation.planned(name, label, plan, family="peer")

    def on_grid(self, name: str, label: str, sigmas: Sequence[float]) -> Method:
        """Return the model's own solver on a grid [N+1]."""
        return self.evaluation.fewer_steps(name, label, len(sigmas) - 1, sigmas=tuple(map(float, sigmas)))

    # --- grids and solvers -------------------------------------------------------------------------------------------

    def oss_schedule(self) -> tuple[Schedule, int]:
        """Return OSS's steps, and on how many prompts they were found."""
        calls = max(1, self.budget * (self.steps - self.budget))
        prompts = min(self.prompts, max(1, self.limit // calls))
        search = partial(rollouts.optimal_steps, self.calibration, self.budget, prompts)
        return tuple(self.kept("oss", self.budget, compute=search)), prompts

    def oss(self) -> Iterator[Method]:
        """Yield Euler, or the solver's first-order steps, on OSS's grid."""
        schedule, prompts = self.oss_schedule()
        pairs = [self.calibration.first_order(i, k) for i, k in zip(schedule, [*schedule[1:], self.steps], strict=True)]
        plan = self.rows.weighted(schedule, [[w] for _, w in pairs], [a for a, _ in pairs])
        label = f"OSS, first order ({self.budget} steps found on {counted(prompts, 'prompt')})"
        yield self.evaluation.planned("oss", label, plan, family="steps")

    def oss_solver(self) -> Iterator[Method]:
        """Yield the model's own solver on OSS's grid."""
        schedule, prompts = self.oss_schedule()
        native = self.calibration.native_sigmas.tolist()
        label = f"OSS, model's solver ({self.budget} steps found on {counted(prompts, 'prompt')})"
        yield self.on_grid("oss-solver", label, [native[i] for i in (*schedule, self.steps)])

    def published_grids(self) -> Iterator[Method]:
        """Yield the model's own solver on ComfyUI's fixed grids."""
        first = float(self.calibration.native_sigmas[0])
        published = grids.published_grids(self.denoiser, self.calibration.scaled, self.budget)
        for name, sigmas in published.items():
            sigmas[0] = first  # of the pure noise that the run starts from
            yield self.on_grid(f"ays: {name}", f"fixed grid, {name} ({self.budget})", sigmas)

    def neural_solver(self) -> Iterator[Method]:
        """Yield NeuralSolver's published solver with a number of steps near N."""
        count = grids.nearest_published(self.steps, self.budget)
        if self.calibration.scaled:
            self.leave_out("neuralsolver", "its steps are x' = x + w v, this model's are rotations")
        elif count is None:
            known = ", ".join(map(str, grids.NEURAL_SOLVER))
            self.leave_out("neuralsolver", f"it is published for {known} steps, none within a tenth of the speed-up")
        else:
            shift = grids.shift_of(self.calibration.native_sigmas.cpu().numpy())
            sigmas, weights = grids.neural_solver(count, shift)
            session = self.rows.session
            rate = ode.rate_of(session.sampler, session.pipe, self.calibration.first)
            plan = self.rows.weighted(range(count), weights * rate, sigmas=sigmas)
            label = f"NeuralSolver ({count} steps, shift {shift:.2g})"
            yield self.evaluation.planned("neuralsolver", label, plan, family="steps")

    # --- caches ------------------------------------------------------------------------------------------------------

    def lemica(self) -> Iterator[Method]:
        """Yield LeMiCa on the path found here, and on the released list nearest to N where there is one."""
        schedule = self.kept(
            "lemica", self.budget, compute=lambda: search.minimax_path(self.final_errors(), self.budget)
        )
        yield self.cache("lemica", f"LeMiCa, minimax path ({self.budget}), output reused", schedule)
        released = released_steps(self.denoiser, self.steps, self.budget)
        if released is None:
            self.leave_out("lemica's released list", "none is released for this model near this speed-up")
        else:
            schedule, text = released
            yield self.cache("lemica: released list", f"LeMiCa, {text}, output reused", schedule)

    def final_errors(self) -> np.ndarray:
        """Return LeMiCa's edges: root mean square error of the final latents when v_i is reused up to step k.

        It is split into the error in the latents at k, which is known for all edges without a model call, and its
        growth from there to the end, which a rollout measures for one edge per k, of the typical length T/N.
        """
        steps, length = self.steps, max(2, round(self.steps / self.budget))
        self.calibration.trajectories()
        grams = self.calibration.grams
        prompts = max(1, min(len(grams), 2 * self.limit // steps**2))
        errors = np.sqrt(rollouts.segment_errors(sum(g.matrix for g in grams), self.solver) / elements(grams))
        some = np.sqrt(
            rollouts.segment_errors(sum(g.matrix for g in grams[:prompts]), self.solver) / elements(grams[:prompts])
        )
        runs = rollouts.Rollouts(self.calibration, prompts, self.solver)
        for k in range(2, steps):
            i = max(0, k - length)
            schedule = (*range(i + 1), *range(k, steps))
            growth = np.sqrt(runs.error(schedule, uncached=i + 1)) / max(some[i, k], 1e-30)
            errors[:, k] *= growth
        return errors

    def dpcache(self) -> Iterator[Method]:
        """Yield DPCache: linear extrapolation, schedule by dynamic programming over pairs of steps."""
        first = min(DPCACHE_FIRST, self.budget - 1)
        if first < 2:
            self.leave_out("dpcache", "it computes the first two steps and the last one at least")
            return
        longest = max(DPCACHE_GAP, search.least_gap(self.steps, self.budget, first))
        costs = search.pair_costs(self.extrapolation_errors(longest))
        schedule = search.pair_schedule(costs, self.budget, first, longest)
        wider = f", gaps up to {longest}" if longest > DPCACHE_GAP else ""
        yield self.cache("dpcache", f"DPCache, order 1 ({self.budget}{wider})", schedule, extrapolated)

    def extrapolation_errors(self, longest: int) -> np.ndarray:
        """Return E[i, j, t] of rollouts.py summed over all calibration prompts."""

        def compute() -> dict[str, np.ndarray]:
            total = np.zeros((self.steps,) * 3)
            for part in rollouts.parts(self.calibration):
                velocities = rollouts.uncached_velocities(self.calibration, part)
                total += rollouts.extrapolation_errors(velocities, longest)
            return {"errors": total}

        return self.evaluation.checkpoints.arrays(["dpcache", longest, self.rows.learned_on], compute)["errors"]

    def budcache(self) -> Iterator[Method]:
        """Yield BudCache's mask, found on one prompt as by its authors, and on all calibration prompts."""
        prefix = max(1, self.budget // 4)
        for name, prompts in (("budcache", 1), ("budcache: all prompts", self.prompts)):

            def compute(prompts: int = prompts) -> list:
                runs = rollouts.Rollouts(self.calibration, prompts, self.solver)
                return search.anneal(runs.error, self.steps, self.budget, prefix, lambda: runs.calls / self.limit)

            schedule, _, made = self.kept(name, self.budget, compute=compute)
            found = f"{counted(made, 'rollout')} on {counted(prompts, 'prompt')}"
            yield self.cache(name, f"BudCache ({self.budget}, {found}), output reused", schedule)

    def spectrum(self, share: float = 1.0) -> Iterator[Method]:
        """Yield Spectrum on its own schedule, with the growth that is best on the calibration prompts.

        Args:
            share: Of its prediction; the rest is linear extrapolation.
        """
        name = "spectrum" if share == 1 else "spectrum-blend"
        settings = search.spectrum_settings(self.steps, self.budget, SPECTRUM_GROWTHS)
        if not settings:
            self.leave_out(name, "no warm-up, window and growth of its schedule compute so many steps")
            return

        def predictor(computed: tuple[int, ...], t: int) -> np.ndarray:
            ridge = chebyshev_ridge(computed, t, self.steps, SPECTRUM_DEGREE, SPECTRUM_RIDGE)
            return share * ridge + (1 - share) * np.array(extrapolated(computed, t))

        def plan(setting: tuple[int, int, float]) -> BudgetPlan:
            schedule = search.spectrum_schedule(self.steps, *setting)
            return self.rows.weighted(schedule, *predicted_jumps(self.solver, schedule, predictor))

        def run(batch: int, setting: tuple[int, int, float]) -> torch.Tensor:
            session = self.calibration.session
            return session.sampler.denoise(session.pipe, session.inputs(batch), plan(setting))

        nearest = partial(self.calibration.nearest, f"{name}, {self.budget} steps", settings, run)
        warmup, window, growth = setting = self.kept(name, self.budget, compute=nearest)
        blend = "" if share == 1 else f", {share:g} beside linear"
        label = f"Spectrum{blend} ({self.budget}; warm-up {warmup}, window {window}, growth {growth:g})"
        yield self.evaluation.planned(name, label, plan(setting), family="peer")


RIVALS: dict[str, Callable[[Rivals], Iterator[Method]]] = {
    "oss": Rivals.oss,
    "oss-solver": Rivals.oss_solver,
    "lemica": Rivals.lemica,
    "dpcache": Rivals.dpcache,
    "budcache": Rivals.budcache,
    "spectrum": Rivals.spectrum,
    "spectrum-blend": partial(Rivals.spectrum, share=BLEND),
    "neuralsolver": Rivals.neural_solver,
    "ays": Rivals.published_grids,
}


def elements(grams: Sequence) -> int:
    """Return the number of elements of a latent, summed over the Gram matrices."""
    return sum(gram.elements for gram in grams)
