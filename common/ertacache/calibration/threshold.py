"""Offline calibration: the paper's Algorithm 2, the coefficients φ (Eq. 13) and the K/B fit (Eq. 20–21).

Calibration is the inference loop, watched: `on_step` sees every (x_i, v_i) and hands back the velocity that a cached
run would have used. Prompts go through in batches. Only sums over elements and prompts are kept, so memory does not
grow with their number, and a killed calibration goes on after its last finished batch.

Algorithm 2 decides step by step for all prompts at once. To decide the same from batches, a whole pass is made under
a tentative S while the distances ‖r_i − r_c‖₁ of *all* pairs of steps are summed; S is then read off again, until it
no longer changes. Decisions depend only on earlier ones, so each pass settles at least one more step, and the fixed
point is the S of Algorithm 2 on the whole set. Two passes are usual.
"""

import json
import shutil
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save
from tqdm import tqdm

from ertacache import algorithm
from ertacache.plans.requirements import Conditions
from ertacache.plans.threshold import ThresholdPlan
from ertacache.utils import parallel
from ertacache.utils.errors import UserError
from ertacache.utils.files import write_atomically
from ertacache.utils.ledger import Ledger, Sums, digest
from ertacache.utils.provenance import fingerprint, library_versions

FIT_PASSES = 2  # K, B are refitted on the trajectory that they themselves rectify
LEAST_PHI = 0.01  # a multistep solver divides by the length of an interval, so that none may vanish


@dataclass(frozen=True)
class Schedule:
    """What a watched pass imitates: S, φ on it, and K, B of each step ([T] each, or empty)."""

    cached: tuple[int, ...] = ()
    phi: tuple[float, ...] = ()
    k: tuple[float, ...] = ()
    b: tuple[float, ...] = ()


class Watcher:
    """The `on_step` of one batch: imitates a cached run along the schedule and sums what it sees of the true model."""

    def __init__(self, site, times: torch.Tensor, schedule: Schedule, pairs: bool):
        steps = len(times)
        self.site, self.times, self.schedule, self.pairs = site, times, schedule, pairs
        self.sums = {name: np.zeros(steps) for name in ("norm", "error", "velocity", "change")}
        self.sums |= {"moments": np.zeros((steps, 5)), "distance": np.zeros((steps, steps) if pairs else (0, 0))}
        self.residuals, self.newest, self.previous = {}, 0, None  # r_c by step, newest computed step, v_{i−1}

    def __call__(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        r = self.site.residual(x, v)
        self.sums["norm"][i], self.sums["velocity"][i] = algorithm.l1_norm(r), algorithm.l1_norm(v)
        if self.pairs:
            for c, earlier in self.residuals.items():
                self.sums["distance"][c, i] = algorithm.l1_norm(r.float() - earlier.to(r.device).float())
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
        """ṽ_i, rectified when the schedule has K, B; its error against v_i goes into the sums."""
        tilde = self.site.reuse(x, self.times[i], self.residuals[self.newest].to(x.device))
        wide, error = tilde.float(), tilde.float() - v.float()
        self.sums["error"][i] = algorithm.l1_norm(error)
        self.sums["change"][i] = algorithm.l1_norm(v.float() - self.previous.float())
        moments = (wide, error, wide.square(), wide * error)
        self.sums["moments"][i] = [wide.numel(), *(m.sum(dtype=torch.float64).item() for m in moments)]
        return algorithm.rectify(tilde, self.schedule.k[i], self.schedule.b[i]) if self.schedule.k else tilde


class Calibration:
    """Algorithm 2 and the fits, for one program, pipeline, set of prompts and cache site.

    program: a model folder's `generate.py` (`prepare`, `denoise`, `open_site`). prompts, seeds: one seed a prompt.
    settings: keyword arguments of `prepare`, with `steps`. work: folder for the ledger, removed by `finish`.
    """

    purpose = "threshold"  # calibrations for different purposes keep different ledgers

    def __init__(self, program, pipe, prompts, seeds, *, settings, site, batch_size, work, model_id="", progress=True):
        if not prompts:
            raise UserError("no calibration prompts: give a file with one prompt a line")
        if len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} calibration prompts but {len(seeds)} seeds: give one seed a prompt")
        if settings["steps"] < 3:
            raise UserError(f"steps = {settings['steps']}: at least 3 are needed, the first and the last are computed")
        self.program, self.pipe, self.site = program, pipe, site
        self.prompts, self.seeds, self.settings = list(prompts), list(seeds), dict(settings)
        self.batch_size, self.model_id, self.progress = batch_size, model_id, progress
        self.steps = settings["steps"]
        self.starts = range(0, len(prompts), batch_size)
        recorded = {k: v for k, v in settings.items() if k != "steps"}
        recorded["dtype"] = str(pipe.transformer.dtype).removeprefix("torch.")
        self.conditions = Conditions.of(pipe, self.steps, recorded)
        self.identity = {
            "model": model_id,
            "weights": fingerprint(pipe),
            "prompts": {"count": len(prompts), "sha256": digest("\n".join(prompts))},
            "seeds": self.seeds,
            "batch_size": batch_size,
            "site": site,
        }
        bound = [self.steps, self.conditions.model, self.conditions.scheduler, self.conditions.settings]
        self.work = Path(work) / f"calibration-{digest([self.purpose, self.identity, bound])[:12]}.partial"
        self.ledger = Ledger(self.work)
        silent = not (progress and parallel.is_main())
        self.bar = tqdm(disable=silent or None, unit="call", desc="calibrate", total=0)

    # --- passes over the calibration set ---------------------------------------------------------------------

    def inputs(self, batch: int):
        part = slice(self.starts[batch], self.starts[batch] + self.batch_size)
        return self.program.prepare(self.pipe, self.prompts[part], self.seeds[part], **self.settings)

    def watch(self, schedule: Schedule, pairs: bool) -> Sums:
        """Imitate a cached run with the model computed at every step, and sum what is seen. Each [T] unless said:

        norm ‖r_i‖₁, error ‖ṽ_i − v_i‖₁, velocity ‖v_i‖₁, change ‖v_i − v_{i−1}‖₁, moments [T, 5] (n, Σṽ, Σε, Σṽ²,
        Σṽε), and with `pairs` distance [T, T], ‖r_i − r_c‖₁ for every c < i.
        """
        key = json.dumps(["watch", pairs, schedule.cached, schedule.phi, schedule.k, schedule.b])
        self.expect(key, self.steps)
        return self.ledger.run(key, len(self.starts), lambda batch: self.watch_batch(batch, schedule, pairs))

    def watch_batch(self, batch: int, schedule: Schedule, pairs: bool) -> Sums:
        inputs = self.inputs(batch)
        if schedule.phi:
            grid = algorithm.adjusted_sigmas(inputs.sigmas.cpu().numpy(), schedule.phi)
            inputs = inputs.on(torch.from_numpy(grid).to(inputs.sigmas.device))
        with self.program.open_site(self.pipe, inputs, self.site) as site:
            watcher = Watcher(site, inputs.times, schedule, pairs)

            def on_step(i, x, v):
                used = watcher(i, x, v)
                self.require_finite(watcher.sums["velocity"][i], batch, i)
                self.bar.update()
                return used

            final = self.program.denoise(self.pipe, inputs, None, on_step)
        if not schedule.cached:
            write_atomically(self.reference_path(batch), save({"latents": final.float().cpu().numpy()}))
        return watcher.sums

    def evaluate(self, plan: ThresholdPlan) -> float:
        """Mean squared error of the final latents against the uncached run, by real cached runs with this plan."""

        def sums_of(batch):
            def count(i, x, v):
                self.bar.update(i not in plan.cached)

            final = self.program.denoise(self.pipe, self.inputs(batch), plan, count).float().cpu().numpy()
            wanted = load_file(self.found(self.reference_path(batch)))["latents"]
            return {"squares": np.square(final - wanted, dtype=np.float64).sum(), "count": final.size}

        key = json.dumps(["evaluate", plan.cached, plan.phi, plan.k, plan.b, plan.rectified])
        self.expect(key, plan.nfe)
        sums = self.ledger.run(key, len(self.starts), sums_of)
        return float(sums["squares"] / sums["count"])

    def found(self, path: Path) -> Path:
        """A file of this calibration, which another one with the same ledger removes when it is finished."""
        if not path.exists():
            raise UserError(f"{self.work} vanished, another calibration of the same model used it: start again")
        return path

    # --- from sums to a plan ---------------------------------------------------------------------------------

    def plan(self, threshold: float) -> ThresholdPlan:
        """The plan for one λ: Algorithm 2 says how many calls, then the parts that lower the error are kept."""
        return self.choose(*self.candidates(threshold))

    def candidates(self, threshold: float) -> tuple[dict[str, ThresholdPlan], dict[str, float]]:
        """All plans for one λ, at equal NFE, and their errors: the rows of the paper's Table 3, and a uniform schedule
        with rectification, because a policy that is no better than the uniform schedule must be seen and not used."""
        if not (np.isfinite(threshold) and threshold > 0):
            raise UserError(f"threshold λ = {threshold}: give a finite number above 0, for example 0.1")
        self.bar.set_description(f"calibrate λ={threshold:g}")
        cached, seen = self.search_policy(self.watch(Schedule(), pairs=True), threshold)
        policy = ThresholdPlan(
            conditions=self.conditions,
            threshold=float(threshold),
            cached=cached,
            site=self.site,
            native_sigmas=tuple(self.inputs(0).sigmas.tolist()),
        )
        if not cached:
            return {"policy": policy}, {"policy": self.evaluate(policy)}
        plans = {"uniform": replace(policy, cached=algorithm.uniform_cached(self.steps, policy.nfe)), "policy": policy}
        for definition, measure in (("velocity", "velocity"), ("difference", "change")):
            phi = [1.0] * self.steps
            for i in cached:
                phi[i] = max(LEAST_PHI, algorithm.step_coefficient(seen["error"][i], seen[measure][i]))
            plans[f"policy + time ({definition})"] = replace(policy, phi=tuple(phi), phi_definition=definition)
        errors = {name: self.evaluate(plan) for name, plan in plans.items()}
        better_time = min((name for name in plans if "time" in name), key=errors.get)
        for name, watched in (("policy", seen), (better_time, None), ("uniform", None)):
            plans[f"{name} + rectification"] = self.fit(plans[name], watched)
            errors[f"{name} + rectification"] = self.evaluate(plans[f"{name} + rectification"])
        return plans, errors

    def choose(self, plans: dict[str, ThresholdPlan], errors: dict[str, float]) -> ThresholdPlan:
        """The plan with the least error, with the whole ablation in its provenance."""
        best = min(plans, key=errors.get)
        return replace(plans[best], provenance=self.provenance(best, errors))

    def threshold_for(self, nfe: int) -> float:
        """The roundest λ (at most two digits) whose policy on the uncached trajectory comes nearest to `nfe` calls."""
        reference = self.watch(Schedule(), pairs=True)
        grid = [digits * 10.0**power for power in (-4, -3, -2, -1) for digits in range(10, 100)]
        calls = {
            t: self.steps - len(algorithm.select_cached(reference["distance"], reference["norm"], t)) for t in grid
        }
        nearest = min(abs(n - nfe) for n in calls.values())
        hits = [float(f"{t:.2g}") for t, n in calls.items() if abs(n - nfe) == nearest]
        round_hits = [t for t in hits if t == float(f"{t:.1g}")] or hits
        return round_hits[len(round_hits) // 2]

    def search_policy(self, reference: Sums, threshold: float) -> tuple[tuple[int, ...], Sums]:
        """S of Algorithm 2 and the sums seen on its own cached trajectory."""
        cached = algorithm.select_cached(reference["distance"], reference["norm"], threshold)
        for _ in range(self.steps):
            seen = self.watch(Schedule(cached), pairs=True)
            again = algorithm.select_cached(seen["distance"], reference["norm"], threshold)
            if again == cached:
                break
            cached = again
        return cached, seen

    def fit(self, plan: ThresholdPlan, seen: Sums | None) -> ThresholdPlan:
        """K and B of every cached step (Eq. 20–21). seen: sums of the unrectified pass, when they are at hand."""
        for _ in range(FIT_PASSES):
            k, b = (plan.k, plan.b) if plan.rectified else ((), ())
            seen = seen or self.watch(Schedule(plan.cached, plan.phi, k, b), pairs=False)
            k, b = [0.0] * self.steps, [-2.0] * self.steps
            for i in plan.cached:
                k[i], b[i] = algorithm.fit_kb(*seen["moments"][i])
            plan, seen = replace(plan, k=tuple(k), b=tuple(b), rectified=True), None
        return plan

    def provenance(self, chosen: str, errors: dict[str, float]) -> dict[str, Any]:
        started = self.work / "started"
        if parallel.is_main() and not started.exists():
            write_atomically(started, date.today().isoformat().encode())
        parallel.barrier()
        return {
            **self.identity,
            "libraries": library_versions(),
            "date": started.read_text(),
            "calibration": {"metric": "mean squared error of the final latents", "chosen": chosen, "errors": errors},
        }

    # --- small things ----------------------------------------------------------------------------------------

    def reference_path(self, batch: int) -> Path:
        return self.work / f"reference-{batch:04d}.safetensors"

    def expect(self, key: str, calls: int) -> None:
        self.bar.total += calls * len(parallel.mine(len(self.starts) - self.ledger.finished(key)))
        self.bar.refresh()

    def require_finite(self, value: float, batch: int, step: int) -> None:
        if not np.isfinite(value):
            first = self.prompts[self.starts[batch]]
            raise UserError(
                f"the model gave a non-finite value at step {step}, batch of {first!r}: try --dtype float32"
            )

    def finish(self) -> None:
        """Close the progress bar and remove the ledger; call it once the plans are saved."""
        self.bar.close()
        parallel.barrier()
        if parallel.is_main():
            shutil.rmtree(self.work, ignore_errors=True)
        parallel.barrier()
