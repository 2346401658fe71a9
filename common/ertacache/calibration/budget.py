"""The calibration of budget plans: weights for the schedules of planner.py, on the plan's own trajectory.

Calibration runs the uncached model once over the prompts (T calls each), which gives the Gram matrix and the latents to
aim at. A replay then walks all prompts through a schedule together (N calls each): at every computed step the weights
of the next jump are fitted, by least squares over all prompts, from where the plan has led to where the reference is.
Errors of early jumps are thus partly repaired by later ones.

What is aimed at, the target, is the uncached run ("reference"), or the solution that this run itself approximates
("exact", ode.py): then the steps to choose from are CANDIDATES equal intervals a step, and not the pipeline's grid.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors

from ertacache.calibration import planner
from ertacache.calibration.gram import Gram, products
from ertacache.calibration.planner import Schedule
from ertacache.calibration.threshold import Calibration
from ertacache.numerics import ode
from ertacache.numerics.jump import jump
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.plan import as_tuples
from ertacache.utils import parallel
from ertacache.utils.errors import UserError
from ertacache.utils.files import write_atomically
from ertacache.utils.ledger import digest

ANCHORS = (3, 5)  # numbers of anchors H that calibration tries
SHIFTS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)  # of the grids that fewer steps are tuned over


@dataclass(frozen=True)
class Replay:
    """A schedule, what was fitted on it, and the mean squared error of the final latents that it leads to.

    arrays: those of a `BudgetPlan`, by name. error: on the prompts of the fit; held_out: on those that were left out.
    """

    schedule: Schedule
    arrays: dict[str, np.ndarray]
    error: float
    held_out: float | None


class BudgetCalibration(Calibration):
    """Reference pass, candidate schedules, on-policy weights, for one program, pipeline and set of prompts.

    A quarter of the prompts (none of fewer than four) is held out of the fit and measures the plan. Arguments as
    for `Calibration`, without a site. target: "reference" or "exact".
    """

    def __init__(self, *arguments, target="reference", **options):
        self.target, self.grid, self.purpose = target, None, f"budget, {target}"
        super().__init__(*arguments, site="output", **options)
        self.fitted = len(self.prompts) - len(self.prompts) // 4
        self.first = self.inputs(0)
        self.native = self.first.sigmas
        if target == "exact":
            self.grid = ode.candidate_grid(self.native, ode.CANDIDATES * self.steps)
            self.first = self.inputs(0)
        first, self.end = self.first, len(self.first.times)
        self.scaled = self.first_jump(0, 1)[0] != 1.0
        needed = 10 * (max(ANCHORS) + self.scaled)
        if self.fitted * first.latents[0].numel() < needed:
            found = f"{self.fitted} calibration prompts of {first.latents[0].numel()} numbers each"
            raise UserError(f"{found} are too few to fit the weights: give more prompts, or larger latents")

    def inputs(self, batch: int):
        """On the grid that the steps of the plan count on."""
        inputs = super().inputs(batch)
        return inputs if self.grid is None else inputs.on(self.grid)

    # --- the reference -----------------------------------------------------------------------------------------------

    def reference(self) -> Gram:
        """The target's trajectory for every prompt; afterwards its latents are on disk.

        The uncached run takes T calls a prompt, the exact solution 3 calls for each substep of each candidate.
        """
        self.expect(self.target, self.end * (3 * self.substeps if self.target == "exact" else 1))
        sums = self.ledger.run(self.target, len(self.starts), self.reference_batch)
        return Gram(sums["matrix"], int(sums["elements"]), int(sums["prompts"]))

    def reference_batch(self, batch: int):
        latents, velocities = [], []

        def on_step(i, x, v):
            self.require_finite_rows(v, batch, i)
            latents.append(x.float().cpu())
            velocities.append(v.float().cpu())
            self.bar.update(3 * self.substeps if self.target == "exact" else 1)

        inputs = self.inputs(batch)
        if self.target == "exact":
            options = {"rate": self.rate, "substeps": self.substeps, "on_step": on_step}
            final = ode.integrate(self.program, self.pipe, inputs, inputs.sigmas, **options)
        else:
            final = self.program.denoise(self.pipe, inputs, None, on_step)
        latents.append(final.float().cpu())
        named = {str(i): x.contiguous() for i, x in enumerate(latents)}
        write_atomically(self.trajectory_path(batch), save_tensors(named))
        part = self.fit_rows(batch)
        gram = Gram.of([x[part] for x in latents], [v[part] for v in velocities])
        return {"matrix": gram.matrix, "elements": gram.elements, "prompts": gram.prompts}

    def trajectory_path(self, batch: int):
        return self.work / f"{self.target}-{batch:04d}.safetensors"

    @cached_property
    def substeps(self) -> int:
        """Of a candidate interval, so that the exact solution has settled; found on the first prompts."""

        def settled(batch):
            first = self.prompts[: ode.SETTLING_PROMPTS], self.seeds[: ode.SETTLING_PROMPTS]
            inputs = self.program.prepare(self.pipe, *first, **self.settings)
            return {
                "substeps": ode.settled_substeps(self.program, self.pipe, inputs.on(self.grid), self.grid, self.rate)
            }

        return int(self.ledger.run("substeps", 1, settled)["substeps"])

    def wanted(self, batch: int, i: int) -> torch.Tensor:
        """The target's latents x_i of a batch."""
        with safe_open(self.found(self.trajectory_path(batch)), "pt") as file:
            return file.get_tensor(str(i))

    def fit_rows(self, batch: int) -> slice:
        """The prompts of a batch that the weights are fitted on."""
        return slice(0, max(0, min(self.batch_size, self.fitted - self.starts[batch])))

    def require_finite_rows(self, v: torch.Tensor, batch: int, step: int) -> None:
        finite = v.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            prompt = self.prompts[self.starts[batch] + finite.index(False)]
            raise UserError(f"the model gave a non-finite value at step {step} of {prompt!r}: try --dtype float32")

    def first_jump(self, i: int, k: int) -> tuple[float, float]:
        """(a, w) of the solver's own first-order jump x_k = a x_i + w v_i."""
        return self.program.first_order(self.pipe, self.first, i, k)

    @property
    def rate(self) -> float:
        return ode.rate_of(self.program, self.pipe, self.first)

    # --- replays -----------------------------------------------------------------------------------------------------

    def replay(self, schedule: Schedule, anchors: int) -> Replay:
        """Walk all prompts through a schedule and fit its weights on the way: N calls a prompt. Kept on disk."""
        path = self.work / f"replay-{digest(['with repair', self.target, schedule, anchors])[:16]}.safetensors"
        found = parallel.share(load_file(path) if path.exists() else None)
        if found is None:
            found = self.walk(schedule, anchors)
            if parallel.is_main():
                write_atomically(path, save_arrays(found))
        error, held_out = float(found.pop("error")), float(found.pop("held_out"))
        return Replay(schedule, found, error, None if np.isnan(held_out) else held_out)

    @torch.no_grad()
    def walk(self, schedule: Schedule, anchors: int) -> dict[str, np.ndarray]:
        """The arrays and errors of a replay. A process walks its own batches; their equations are added in order."""
        runs = {batch: _Run(self.inputs_over(batch, schedule)) for batch in parallel.mine(len(self.starts))}
        self.bar.total += len(schedule) * len(runs)
        rows = []
        for i, target in zip(schedule, [*schedule[1:], self.end], strict=True):
            grams = parallel.in_order([self.compute(batch, run, i, target, anchors) for batch, run in runs.items()])
            rows.append(parallel.share(self.fit(np.concatenate(grams), anchors, self.first_jump(i, target))))
            for run in runs.values():
                run.x = jump(run.x, run.history, rows[-1]["weights"], rows[-1]["scale"])
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        arrays["prediction_errors"] = arrays["prediction_errors"].T.copy()  # [P, N]
        return arrays | dict(zip(("error", "held_out"), map(np.array, self.errors_of(runs)), strict=True))

    def compute(self, batch: int, run: "_Run", i: int, target: int, anchors: int) -> np.ndarray:
        """A computed step of one batch: scalar products [B, R, R] of what the jump from i to target is fitted with.

        Rows: the outputs, newest first; the latent where it has a weight; what it lacks to the target at i, and there.
        """
        v = self.program.velocity(self.pipe, run.inputs, run.x, run.inputs.times[i])
        self.require_finite_rows(v, batch, i)
        run.history = [v, *run.history][:anchors]
        lacks = [self.wanted(batch, k).to(run.x.device) - run.x.float() for k in (i, target)]
        self.bar.update()
        return products([*run.history, *([run.x] if self.scaled else []), *lacks])

    def fit(self, grams: np.ndarray, anchors: int, own: tuple[float, float]) -> dict[str, np.ndarray]:
        """Of each array of a plan what belongs to one computed step. grams: [P, R, R] of `compute`; own: first_jump."""
        total, end = grams[: self.fitted].sum(0), grams.shape[1] - 2
        outputs = end - self.scaled
        prior, none = np.zeros(end), np.zeros(end)
        prior[0], prior[outputs:] = own[1], own[0] - 1
        found = {}
        for name, scale, column, start in (("weights", "scale", -1, prior), ("repair", "repair_scale", -2, none)):
            solved = planner.solve_weights(total[:end, :end], total[:end, column], start)
            found[name], found[scale] = np.pad(solved[:outputs], (0, anchors - outputs)), 1 + solved[outputs:].sum()
        found["predictor"], squares = planner.fit_predictor(grams[:, :outputs, :outputs], anchors - 1, self.fitted)
        return found | {"prediction_errors": np.sqrt(squares / self.first.latents[0].numel())}

    def inputs_over(self, batch: int, schedule: Schedule):
        """What a batch's walk through these steps starts from."""
        return self.inputs(batch)

    def errors_of(self, runs) -> tuple[float, float]:
        """Mean squared errors of final latents on the fitted and on the held-out prompts (nan where there are none)."""
        errors = [self.squared_errors(batch, run.x) for batch, run in runs.items()]
        squares = [e for batch in parallel.in_order(errors) for e in batch]
        held_out = squares[self.fitted :]
        return float(np.mean(squares[: self.fitted])), float(np.mean(held_out)) if held_out else float("nan")

    def squared_errors(self, batch: int, final: torch.Tensor) -> list[float]:
        """Mean squared error of each prompt's final latents."""
        return (final.double().cpu() - self.wanted(batch, self.end)).square().flatten(1).mean(1).tolist()

    def tuned_shift(self, steps: int) -> float:
        """The shift in SHIFTS with which `steps` of the model's own solver come nearest to the target: a rival."""
        self.reference()

        def sums_of(batch):
            inputs, errors = super(BudgetCalibration, self).inputs(batch), []
            for shift in SHIFTS:
                final = self.program.denoise(self.pipe, inputs.on(ode.shifted_grid(self.native, steps, shift)))
                errors.append(sum(self.squared_errors(batch, final)))
            return {"errors": errors}

        errors = self.ledger.run(f"{self.target}, {steps} steps, shifts", len(self.starts), sums_of)["errors"]
        return SHIFTS[int(np.argmin(errors))]

    # --- plans -------------------------------------------------------------------------------------------------------

    def plans(self, budgets: list[int], search: int = 0) -> dict[int, BudgetPlan]:
        """A plan for each budget. search: how many more replays a local search may spend on each."""
        for budget in budgets:
            if not 2 <= budget <= self.steps:
                raise UserError(f"--budget {budget}: give a number of computed steps from 2 to {self.steps}")
        gram = self.reference()
        candidates = parallel.share(planner.candidate_schedules(gram, budgets, self.scaled))
        return {budget: self.plan(gram, candidates[budget], search) for budget in budgets}

    def plan(self, gram: Gram, candidates: dict[str, Schedule], search: int = 0) -> BudgetPlan:
        """The best of the candidate schedules by replay, then the best number of anchors, then local search."""
        budget = len(next(iter(candidates.values())))
        self.bar.set_description(f"calibrate N={budget}")
        tried = {name: self.replay(schedule, ANCHORS[0]) for name, schedule in candidates.items()}
        name = min(tried, key=lambda n: tried[n].error)
        for anchors in ANCHORS[1:]:
            tried[f"{name}, H = {anchors}"] = self.replay(tried[name].schedule, anchors)
        name = min(tried, key=lambda n: tried[n].error)
        best = self.search(tried[name], search)
        errors = {n: replayed.error for n, replayed in tried.items()} | {"after local search": best.error}
        bound = planner.projection_bound(gram, best.schedule, self.scaled)
        return BudgetPlan(
            conditions=self.conditions,
            computed=best.schedule,
            native_sigmas=tuple(self.native.tolist()),
            target=self.target,
            sigmas=() if self.grid is None else tuple(self.grid.tolist()),
            predicted_error=best.error,
            held_out_error=best.held_out,
            provenance=self.budget_provenance(name, errors, bound),
            **{name: as_tuples(array.tolist()) for name, array in best.arrays.items()},
        )

    def search(self, best: Replay, evaluations: int) -> Replay:
        """Move one computed step by one place as long as that lowers the error on the calibration prompts."""
        anchors, tried = best.arrays["weights"].shape[1], {best.schedule}
        while True:
            options = [s for s in planner.neighbours(best.schedule, self.end) if s not in tried]
            for schedule in options[:evaluations]:
                evaluations -= 1
                tried.add(schedule)
                found = self.replay(schedule, anchors)
                if found.error < best.error:
                    best = found
                    break
            else:
                return best

    def budget_provenance(self, chosen: str, errors: dict[str, float], bound: float):
        found = self.provenance(chosen, errors)
        found.pop("site")
        found["prompts"]["fitted"] = self.fitted
        found["calibration"]["projection_bound"] = bound
        if self.target == "exact":
            found["calibration"]["substeps"] = self.substeps
        return found


class _Run:
    """A batch on its way through a plan."""

    def __init__(self, inputs):
        self.inputs, self.x, self.history = inputs, inputs.latents, []
