"""Calibration of threshold plans: Algorithm 2, the coefficients φ (Eq. 13) and the K/B fit (Eq. 20–21).

Calibration is the inference loop, watched: `on_step` sees every (x_i, v_i) and returns the velocity that a cached run
would have used. Prompts go through in batches, and only sums over elements and prompts are kept. So memory does not
grow with the number of prompts, and an interrupted calibration resumes after its last finished batch.

Algorithm 2 decides step by step for all prompts at once. To decide the same from batches, a whole pass is made under
a tentative S while the distances ‖r_i − r_c‖₁ of *all* pairs of steps are summed; S is then read off again, until it
no longer changes. Decisions depend only on earlier ones, so each pass settles at least one more step, and the fixed
point is the S of Algorithm 2 on the whole set. Two passes are usual.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch

from ertacache import algorithm
from ertacache.calibration.choice import typical_error
from ertacache.calibration.effort import effort_of
from ertacache.calibration.session import CalibrationSession, existing
from ertacache.plans.threshold import ThresholdPlan, check_threshold
from ertacache.utils import parallel
from ertacache.utils.checkpoints import arrays_file, has_whole_arrays, read_arrays
from ertacache.utils.devices import available_memory
from ertacache.utils.errors import UserError
from ertacache.utils.files import gibibytes, write_atomically

FIT_PASSES = 2  # K, B are refitted on the trajectory that they themselves rectify
LEAST_PHI = 0.01  # a multistep solver divides by the length of an interval, so that none may vanish


@dataclass(frozen=True)
class WatchedSchedule:
    """What a watched pass imitates: S, and φ, K and B of each step ([T] each, or empty)."""

    cached: tuple[int, ...] = ()
    phi: tuple[float, ...] = ()
    k: tuple[float, ...] = ()
    b: tuple[float, ...] = ()


@dataclass
class PassSums:
    """Running sums of a watched pass, over elements and prompts, in float64.

    Attributes:
        norm: ‖r_i‖₁, [T].
        error: ‖ṽ_i − v_i‖₁, [T], 0 on computed steps.
        velocity: ‖v_i‖₁, [T].
        change: ‖v_i − v_{i−1}‖₁, [T], 0 on computed steps.
        moments: n, Σṽ, Σε, Σṽ² and Σṽε, [T, 5], 0 on computed steps.
        distance: ‖r_i − r_c‖₁ at (c, i) for every c < i, [T, T]; [0, 0] in a pass without pairs.
    """

    norm: np.ndarray
    error: np.ndarray
    velocity: np.ndarray
    change: np.ndarray
    moments: np.ndarray
    distance: np.ndarray

    @classmethod
    def zeros(cls, steps: int, pairs: bool) -> "PassSums":
        distance = np.zeros((steps, steps) if pairs else (0, 0))
        return cls(*(np.zeros(steps) for _ in range(4)), np.zeros((steps, 5)), distance)

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Watcher:
    """The `on_step` of one batch: imitates a cached run along the schedule and sums the true model's outputs.

    Args:
        site: An open cache site.
        times: The model's times, [T].
        schedule: What to imitate.
        pairs: Whether to sum the distances of all pairs of steps.
    """

    def __init__(self, site, times: torch.Tensor, schedule: WatchedSchedule, pairs: bool):
        self.site, self.times, self.schedule, self.pairs = site, times, schedule, pairs
        self.sums = PassSums.zeros(len(times), pairs)
        self.residuals: dict[int, torch.Tensor] = {}  # r_c by step c
        self.newest = 0  # the newest computed step
        self.previous: torch.Tensor | None = None  # v_{i−1}

    def __call__(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        r = self.site.residual(x, v)
        if self.pairs and i == 0:
            check_memory(r.nbytes * len(self.times))
        self.sums.norm[i] = algorithm.l1_norm(r)
        self.sums.velocity[i] = algorithm.l1_norm(v)
        if self.pairs:
            for c, earlier in self.residuals.items():
                self.sums.distance[c, i] = algorithm.l1_norm(r.float() - earlier.to(r.device).float())
        used = v
        if i in self.schedule.cached:
            used = self.reuse(i, x, v)
        else:
            self.newest = i
            if not self.pairs:
                self.residuals.clear()
        if self.pairs or i == self.newest:
            self.residuals[i] = r.cpu() if self.pairs else r  # T of them fill a GPU, and wait in main memory
        self.previous = v
        return used

    def reuse(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return ṽ_i, rectified where the schedule has K, B, and sum its error against v_i."""
        tilde = self.site.reuse(x, self.times[i], self.residuals[self.newest].to(x.device))
        wide, error = tilde.float(), tilde.float() - v.float()
        self.sums.error[i] = algorithm.l1_norm(error)
        self.sums.change[i] = algorithm.l1_norm(v.float() - self.previous.float())
        moments = (wide, error, wide.square(), wide * error)
        self.sums.moments[i] = [wide.numel(), *map(algorithm.total, moments)]
        return algorithm.rectify(tilde, self.schedule.k[i], self.schedule.b[i]) if self.schedule.k else tilde


def check_memory(needed: int) -> None:
    """Refuse a pass that keeps more bytes of residuals in main memory than are available, before it fills it.

    Raises:
        UserError: It would.
    """
    available = available_memory()
    if available is not None and needed > available:
        text = (
            f"the residuals of one batch take {gibibytes(needed)} of main memory, {gibibytes(available)} are available"
        )
        raise UserError(f"{text}: give a smaller batch size, the site output, or a budget plan")


class ThresholdCalibration:
    """Algorithm 2 and the fits, at one cache site.

    Args:
        session: Sampler, pipeline and prompts.
        site: "output" or "blocks".
    """

    def __init__(self, session: CalibrationSession, site: str = "output"):
        self.session, self.site, self.steps = session, site, session.steps
        self.checkpoints = session.checkpoints(["threshold", site])

    # --- passes over the calibration set ---------------------------------------------------------------------

    def watch(self, schedule: WatchedSchedule, pairs: bool) -> PassSums:
        """Imitate a cached run with the model computed at every step, T calls per batch.

        Args:
            schedule: What to imitate.
            pairs: Whether to sum the distances of all pairs of steps.
        """
        key = json.dumps(["watch", pairs, schedule.cached, schedule.phi, schedule.k, schedule.b])
        if not schedule.cached:
            done = map(self.uncached_path, range(self.checkpoints.finished(key)))
            if not parallel.share(all(map(has_whole_arrays, done)) if parallel.is_main() else None):
                self.checkpoints.forget(key)  # it wrote them

        def sums_of(batch: int) -> dict[str, np.ndarray]:
            return self.watch_batch(batch, schedule, pairs).arrays()

        return PassSums(**self.session.run(self.checkpoints, key, self.steps, sums_of))

    def watch_batch(self, batch: int, schedule: WatchedSchedule, pairs: bool) -> PassSums:
        session, inputs = self.session, self.session.inputs(batch)
        if schedule.phi:
            grid = algorithm.adjusted_sigmas(inputs.sigmas.cpu().numpy(), schedule.phi)
            inputs = inputs.on(torch.from_numpy(grid).to(inputs.sigmas.device))
        with session.sampler.open_site(session.pipe, inputs, self.site) as site:
            watcher = Watcher(site, inputs.times, schedule, pairs)

            def on_step(i, x, v):
                session.require_finite(v, batch, i)
                used = watcher(i, x, v)
                session.called()
                return used

            final = session.sampler.denoise(session.pipe, inputs, None, on_step)
        if not schedule.cached:
            write_atomically(self.uncached_path(batch), arrays_file({"latents": final.float().cpu().numpy()}))
        return watcher.sums

    def evaluate(self, plan: ThresholdPlan) -> float:
        """Return the error of the final latents to the uncached run (choice.py), by real runs with this plan."""
        session = self.session

        def sums_of(batch):
            def on_step(i, x, v):
                if i not in plan.cached:
                    session.called()

            final = session.sampler.denoise(session.pipe, session.inputs(batch), plan, on_step).float().cpu().numpy()
            uncached = read_arrays(existing(self.uncached_path(batch)))["latents"]
            errors, start = np.zeros(len(session.prompts)), session.starts[batch]
            squares = np.square(final - uncached, dtype=np.float64).reshape(len(final), -1)
            errors[start : start + len(final)] = squares.mean(1)
            return {"errors": errors}

        key = json.dumps(["errors", plan.cached, plan.phi, plan.k, plan.b, plan.rectified])
        return typical_error(session.run(self.checkpoints, key, plan.nfe, sums_of)["errors"])

    def uncached_path(self, batch: int):
        """Return the file of a batch's final latents in the uncached run."""
        return self.checkpoints.folder / f"uncached-{batch:04d}.safetensors"

    # --- from sums to a plan ---------------------------------------------------------------------------------

    def plan(self, threshold: float, effort: str | float = "normal") -> ThresholdPlan:
        """Return the plan for one λ."""
        return next(self.plans([threshold], effort))

    def plans(self, thresholds: Sequence[float], effort: str | float = "normal") -> Iterator[ThresholdPlan]:
        """Return the plan for each λ > 0: Algorithm 2 decides how many calls, the parts that lower the error stay.

        Args:
            thresholds: λ of each plan.
            effort: quick, normal, thorough or a number of minutes, in which all parts are tried if they fit.
        """
        for threshold in thresholds:
            check_threshold(threshold)
        limits, steps, count = effort_of(effort), self.steps, len(thresholds)
        short, whole = steps * (1 + 3), steps * (2 + FIT_PASSES * 3 - 1 + 7)  # passes and evaluations, for each λ
        most = whole if limits.whole_ablation else short
        self.session.announce(steps + most * count, limits, least=steps + short * count)
        self.uncached  # noqa: B018 (shows how long a model call takes)
        for place, threshold in enumerate(thresholds):
            calls, _ = self.session.allowance(most, count - place)
            yield self.choose(*self.candidates(threshold, calls >= whole))

    @cached_property
    def uncached(self) -> PassSums:
        """The sums of the uncached run."""
        return self.watch(WatchedSchedule(), pairs=True)

    def candidates(self, threshold: float, whole: bool = True) -> tuple[dict[str, ThresholdPlan], dict[str, float]]:
        """Return the plans for one λ at equal NFE, by name, and their errors.

        They are the rows of the paper's Table 3, and a uniform schedule with rectification: a policy that is no better
        than the uniform schedule must show, and must not be used.

        Args:
            threshold: λ.
            whole: If not, S is that of the uncached run, K and B are fitted in one pass along it, and only the policy,
                time adjustment and rectification are tried.
        """
        self.session.progress.begin(f"calibration, λ = {threshold:g}")
        cached, sums = self.search_policy(self.uncached, threshold, whole)
        policy = ThresholdPlan(
            requirements=self.session.calibrated,
            threshold=float(threshold),
            cached=cached,
            site=self.site,
            native_sigmas=tuple(self.session.inputs(0).sigmas.tolist()),
        )
        if not cached:
            return {"policy": policy}, {"policy": self.evaluate(policy)}
        plans = {"policy": policy}
        if whole:
            plans["uniform"] = replace(policy, cached=algorithm.uniform_cached(self.steps, policy.nfe))
        for definition, reference in (("velocity", sums.velocity), ("difference", sums.change))[: 2 if whole else 1]:
            phi = [1.0] * self.steps
            for i in cached:
                phi[i] = max(LEAST_PHI, algorithm.step_coefficient(sums.error[i], reference[i]))
            plans[f"policy + time ({definition})"] = replace(policy, phi=tuple(phi), phi_definition=definition)
        errors = {name: self.evaluate(plan) for name, plan in plans.items()}
        if not whole:
            plans["policy + rectification"] = self.fit(policy, sums, passes=1)
            errors["policy + rectification"] = self.evaluate(plans["policy + rectification"])
            return plans, errors
        better_time = min((name for name in plans if "time" in name), key=errors.get)
        for name, watched in (("policy", sums), (better_time, None), ("uniform", None)):
            plans[f"{name} + rectification"] = self.fit(plans[name], watched)
            errors[f"{name} + rectification"] = self.evaluate(plans[f"{name} + rectification"])
        return plans, errors

    def choose(self, plans: dict[str, ThresholdPlan], errors: dict[str, float]) -> ThresholdPlan:
        """Return the plan with the least error, with the whole ablation in its provenance."""
        best = min(plans, key=errors.get)
        provenance = self.session.provenance(self.checkpoints, best, errors)
        return replace(plans[best], provenance=provenance | {"site": self.site})

    def threshold_for(self, nfe: int) -> float:
        """Return the λ of at most two digits whose policy on the uncached run is nearest to `nfe` calls."""
        uncached = self.uncached
        grid = [digits * 10.0**power for power in (-4, -3, -2, -1) for digits in range(10, 100)]
        calls = {t: self.steps - len(algorithm.select_cached(uncached.distance, uncached.norm, t)) for t in grid}
        nearest = min(abs(n - nfe) for n in calls.values())
        hits = [float(f"{t:.2g}") for t, n in calls.items() if abs(n - nfe) == nearest]
        round_hits = [t for t in hits if t == float(f"{t:.1g}")] or hits
        return round_hits[len(round_hits) // 2]

    def search_policy(
        self, uncached: PassSums, threshold: float, settle: bool = True
    ) -> tuple[tuple[int, ...], PassSums]:
        """Return S of Algorithm 2, and the sums on its own cached trajectory. settle: if not, S of the uncached run."""
        cached = algorithm.select_cached(uncached.distance, uncached.norm, threshold)
        if not settle:
            return cached, self.watch(WatchedSchedule(cached), pairs=False)
        for _ in range(self.steps):
            sums = self.watch(WatchedSchedule(cached), pairs=True)
            again = algorithm.select_cached(sums.distance, uncached.norm, threshold)
            if again == cached:
                break
            cached = again
        return cached, sums

    def fit(self, plan: ThresholdPlan, sums: PassSums | None, passes: int = FIT_PASSES) -> ThresholdPlan:
        """Fit K and B of every cached step (Eq. 20–21). sums: of the unrectified pass, where they are known."""
        for _ in range(passes):
            k, b = (plan.k, plan.b) if plan.rectified else ((), ())
            sums = sums or self.watch(WatchedSchedule(plan.cached, plan.phi, k, b), pairs=False)
            k, b = [0.0] * self.steps, [-2.0] * self.steps
            for i in plan.cached:
                k[i], b[i] = algorithm.fit_kb(*sums.moments[i])
            plan, sums = replace(plan, k=tuple(k), b=tuple(b), rectified=True), None
        return plan

    def finish(self) -> None:
        """Delete the checkpoints; call it once the plans are saved."""
        self.session.finish(self.checkpoints)
