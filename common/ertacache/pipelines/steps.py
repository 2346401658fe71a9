"""How a run steps: by the pipeline's own solver, by a budget plan's jumps, or with a threshold plan's velocities.

Each class has step(i, x, v, options) → the latents before step i + 1, and end(x).
"""

import torch

from ertacache.algorithm import rectify, residual, reuse
from ertacache.numerics.jump import adams_bashforth, jump
from ertacache.plans.drift import LIMITS, Monitor
from ertacache.utils.errors import PlanError, UserError

HARMLESS = ("generator", "return_dict")  # options of a scheduler's step; no solver that plans know draws noise
PER_TOKEN = "per_token_timesteps"  # LTXConditionPipeline: a time for each token, and the negative velocity


def steps_of(run):
    """Return how a run follows its plan."""
    if run.shows_own_grid and all(map(run.course.computes, range(run.course.begin, run.course.end))):
        return OwnSteps(run)
    return BudgetSteps(run) if run.plan.kind == "budget" else ThresholdSteps(run)


class OwnSteps:
    """The uncached run, for plans that skip nothing."""

    def __init__(self, run):
        self.run = run

    def step(self, i: int, x: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
        return self.run.solver.step(i, x, v, **options)

    def end(self, x: torch.Tensor) -> None:
        pass


class ThresholdSteps(OwnSteps):
    """All steps by the pipeline's own solver, cached ones with the velocity that the last residual gives."""

    def __init__(self, run):
        super().__init__(run)
        self.plan, self.residual = run.plan, None

    def step(self, i: int, x: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
        refuse_options(self.run, options)
        computes = self.run.course.computes(i)
        if self.plan.site == "output":
            if computes:
                self.residual = residual(v, x)  # Eq. 5
            else:
                v = reuse(x, self.residual)  # Eq. 6
        if not computes and self.plan.rectified:
            v = rectify(v, self.plan.k[i], self.plan.b[i])  # Eq. 15
        return self.run.solver.step(i, x, v)

    def end(self, x: torch.Tensor) -> None:
        self.residual = None


class BudgetSteps(OwnSteps):
    """Jumps from each computed step to the next, handed out in shares over the steps in between.

    At a computed step c the jump gives the latents of the next computed step k. Each step i of c … k − 1 hands out its
    share of x_k − x_c, (s_{i+1} − s_i) / (s_k − s_c). Whatever the pipeline changes in the latents in between stays.
    """

    def __init__(self, run):
        super().__init__(run)
        self.plan, self.course = run.plan, run.course
        self.history: list[tuple[int, torch.Tensor]] = []  # the newest computed steps and velocities, newest first
        self.jumps = 0  # made so far
        self.jump = None  # in progress: (c, k, x_c, x_k)
        self.prepare()

    def prepare(self) -> None:
        """Make ready what depends on the plan."""
        run, plan = self.run, self.plan
        self.row_of = {step: row for row, step in enumerate(run.planned)}
        self.calibrated = plan.calibrated_levels()
        self.starts = plan.start_weights[self.course.begin] if plan.start_weights else ()
        self.history_length = max(plan.history_length, len(self.starts))
        if plan.has_drift and run.leads:
            self.course.monitor = Monitor(plan)
        compute = run.enabled.on_drift == "compute" and plan.has_drift
        self.shadow, self.done = run.solver.shadow() if compute else None, []
        factor = run.enabled.drift_limit
        self.limit = LIMITS["compute"] if factor is None else factor

    def step(self, i: int, x: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
        if i < self.run.planned[0]:
            return super().step(i, x, v, options)
        refuse_options(self.run, options, PER_TOKEN)
        computes = self.course.computes(i)
        new = self.compute(i, x, velocity_of(v, options)) if computes else self.share(i, x)
        if self.goes_through_own_step(options):
            return self.by_own_step(i, x, new, v, options)
        return new.to(torch.promote_types(x.dtype, v.dtype))  # as schedulers do: the latents of images may be bfloat16

    # --- computed steps ----------------------------------------------------------------------------------------------

    def compute(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the latents after a computed step."""
        target, k = self.jump_from(i, x, v), self.course.after(i)
        if k == i + 1:
            return target
        self.jump = (i, k, x.clone(), target)
        return self.point(i + 1)

    def jump_from(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the latents at the computed step after step i, from latents and velocity there."""
        if self.history and v.shape != self.history[0][1].shape:
            shapes = f"{tuple(self.history[0][1].shape)} to {tuple(v.shape)}"
            raise UserError(f"the latents change their shape during the call, from {shapes}: disable the plan")
        if i in self.row_of or i == self.course.begin:
            self.see(i, v)
            # a copy, since models may overwrite their outputs
            self.history = [(i, v.clone()), *self.history][: self.history_length]
            self.jumps += 1
        k = self.course.after(i)
        if self.shadow:
            if self.course.drifting and not self.course.drifted and i in self.row_of:
                row = self.row_of[i]
                x = jump(x, self.velocities, self.plan.repair[row], self.plan.repair_scale[row])
            stepped = self.shadow(self.done, i, k, x, v)
            self.done = [*self.done, i]
            if self.course.drifting:
                return stepped
        return self.target(i, k, x)

    def target(self, i: int, k: int, x: torch.Tensor) -> torch.Tensor:
        """Return the latents that the jump from step i leads to at step k."""
        scale, weights = self.weights(i, k, x)
        return jump(x, self.velocities, weights, scale)

    @property
    def velocities(self) -> list[torch.Tensor]:
        return [v for _, v in self.history]

    def see(self, i: int, v: torch.Tensor) -> None:
        """Compare a planned step's velocity with its prediction; decide whether the steps after it are computed."""
        row = self.row_of.get(i)
        if row is None:
            return
        monitor = self.course.monitor
        if self.run.leads and monitor:
            monitor.see(row, v, [v for step, v in self.history if step in self.row_of])
            if self.shadow:
                self.course.note_drift(i, monitor.beyond(self.limit))

    def weights(self, i: int, k: int, x: torch.Tensor) -> tuple[float, list[float]]:
        """Return (a, w) of the jump from step i to step k: the plan's, or where the history is short those for it."""
        row, plan = self.row_of.get(i), self.plan
        planned = sum(step in self.row_of for step, _ in self.history)
        if row is not None and not any(plan.weights[row][planned:]):
            ratio, scale = self.stretch(i, k), plan.scale[row]
            weights = [ratio * w for w in plan.weights[row]]
            if self.course.drifted:  # these latents need no correction: take it out of the jump
                scale = scale / plan.repair_scale[row]
                weights = [w - scale * r for w, r in zip(weights, plan.repair[row], strict=True)]
            return scale, weights
        if self.jumps <= len(self.starts) and any(self.starts[self.jumps - 1]):
            ratio, scale = self.stretch(i, k), plan.start_scale[self.course.begin][self.jumps - 1]
            return scale, [ratio * w for w in self.starts[self.jumps - 1]]
        return adams_bashforth(self.run.solver.first_order, self.run.levels, [step for step, _ in self.history], k)

    def stretch(self, i: int, k: int) -> float:
        """Return the length of a jump on this run's grid, relative to the calibration's: its weights grow with it."""
        here = self.run.levels[k] - self.run.levels[i]
        there = self.calibrated[k] - self.calibrated[i]
        if there == 0 and here != 0:
            raise PlanError(
                f"the plan has no length for the step {i} of this run: calibrate one for these noise levels"
            )
        return here / there if there else 1.0

    # --- shares ------------------------------------------------------------------------------------------------------

    def share(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Return the latents before step i + 1 of a jump, with what the pipeline has changed since it began."""
        point = self.point(i + 1) + (x - self.point(i))  # the second term is 0 where nothing was changed
        if i + 1 == self.jump[1]:
            self.jump = None
        return point

    def point(self, i: int) -> torch.Tensor:
        """Return the latents before step i on the line of the jump in progress."""
        start, end, x, target = self.jump
        if i in (start, end):
            return x if i == start else target
        levels = self.run.levels
        whole = levels[end] - levels[start]
        share = (levels[i] - levels[start]) / whole if whole else 1.0
        return torch.lerp(x.float(), target.float(), share).to(x.dtype)

    # --- the scheduler's own step ------------------------------------------------------------------------------------

    def goes_through_own_step(self, options: dict) -> bool:
        """Whether the latents are to be handed out by the scheduler's own step: one that was replaced, or per token."""
        return "step" in vars(self.run.scheduler) or options.get(PER_TOKEN) is not None

    def by_own_step(self, i: int, x, new, v, options: dict) -> torch.Tensor:
        """Return what the scheduler's Euler step makes of the velocity that leads from x to the new latents."""
        length = self.run.levels[i + 1] - self.run.levels[i]
        rate = (new.float() - x.float()) / length if length else torch.zeros_like(x)
        return self.run.solver.step(i, x, velocity_of(rate, options).to(v.dtype), **options)

    def end(self, x: torch.Tensor) -> None:
        self.history, self.jump, self.shadow = [], None, None


def velocity_of(output: torch.Tensor, options: dict) -> torch.Tensor:
    """Return the velocity that a model output means to the scheduler, and the reverse."""
    return output if options.get(PER_TOKEN) is None else -output


def refuse_options(run, options: dict, *known: str) -> None:
    """Refuse options of the scheduler's step that a plan cannot follow.

    Args:
        run: The run.
        options: Those given, without defaults.
        known: Names of those that it can.
    """
    for name in options:
        if name not in (*HARMLESS, *known):
            text = f"the pipeline gives its scheduler's step {name} = {options[name]!r:.40}, which a plan cannot follow"
            raise UserError(f"{text}: leave it out, or use no plan")
