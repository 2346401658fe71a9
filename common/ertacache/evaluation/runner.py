"""Held-out measurements of one pipeline: quality, cost and interleaved latency of any method, a row each.

common/docs/rows.md says what a row holds.
"""

import time
from contextlib import nullcontext
from datetime import date
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ertacache.demos.model_folder import world
from ertacache.evaluation import metrics
from ertacache.evaluation.method import Candidate, Outcome, Run
from ertacache.numerics import ode
from ertacache.pipelines.uncached import stock_latents
from ertacache.plans.plan import Plan
from ertacache.utils import media, parallel
from ertacache.utils.devices import peak_memory, reset_peak_memory, synchronize
from ertacache.utils.files import relative
from ertacache.utils.ledger import digest
from ertacache.utils.provenance import fingerprint, library_versions, machine
from ertacache.utils.shelf import Shelf

RIVALS = ("uniform", "fewer-steps-ab2", "least-squares")  # schedules and solvers that run as plans
LATENCY = ("latency_s", "speedup_latency", "end_to_end_s", "speedup_end_to_end")


class Evaluation:
    """One program, pipeline and set of held-out prompts; the uncached run is made once.

    settings: keyword arguments of the folder's `prepare`. options: the command line. repeats: timed runs, 0 for none,
    of `timed` prompts. exact: measure the distance to the finely integrated solution too. samples: pictures kept of
    each row. clip: a CLIP model's id or directory. work: the folder where finished rows are kept.
    """

    def __init__(
        self, program, pipe, prompts, seeds, settings, options, *, work, repeats=0, timed=None, exact=False, samples=0,
        clip=None,
    ):  # fmt: skip
        self.program, self.pipe, self.prompts, self.seeds = program, pipe, list(prompts), list(seeds)
        self.settings, self.options, self.repeats, self.exact = settings, options, repeats, exact
        self.work, self.samples, self.timed = Path(work), samples, min(timed or options.batch_size, len(self.prompts))
        self.lpips, self.clip = metrics.Lpips(), metrics.Clip(clip)
        parts = [options.model, fingerprint(pipe), settings, self.prompts, self.seeds, options.batch_size]
        how = [exact, samples, clip, str(pipe.transformer.dtype), machine(), library_versions()]
        self.shelf = Shelf(self.work, ["rows, 1", program.FOLDER.name, *parts, *how])

    # --- ways to run -------------------------------------------------------------------------------------------------

    def inputs(self, part, settings=None, shift=None):
        """With a shift: settings["steps"] steps between the ends of the uncached run's grid."""
        settings = settings or self.settings
        steps = self.settings["steps"] if shift is not None else settings["steps"]
        inputs = self.program.prepare(self.pipe, self.prompts[part], self.seeds[part], **{**settings, "steps": steps})
        return inputs if shift is None else inputs.on(ode.shifted_grid(inputs.sigmas, settings["steps"], shift))

    def own(self, plan=None, settings=None, shift=None):
        """The folder's loop: with a plan, or the model's own solver at other settings or on a shifted grid."""

        def run(part, on_step=None) -> Run:
            inputs = self.inputs(part, settings, shift)
            start = time.perf_counter()
            latents = self.program.denoise(self.pipe, inputs, plan, on_step)
            synchronize(self.pipe)
            return Run(latents, inputs, time.perf_counter() - start)

        return run

    def stock(self, cached=nullcontext):
        """The stock pipeline's call, within the context that `cached` opens."""

        def run(part, on_step=None) -> Run:
            with cached():
                latents, seconds = stock_latents(self.pipe, self.prompts[part], self.seeds[part], self.settings)
            return Run(latents, None, seconds)

        return run

    def decode(self, run: Run, part) -> np.ndarray:
        inputs = run.inputs if run.inputs is not None else self.inputs(part)
        return self.program.decode(self.pipe, run.latents.to(inputs.latents.dtype), inputs)

    def outcome(self, run, on_step=None, count=True) -> Outcome:
        """All prompts; processes take the batches in turn. on_step sees the first batch, whose FLOPs are counted."""
        size, found = self.options.batch_size, []
        starts = range(0, len(self.prompts), size)
        for number in tqdm(parallel.mine(len(starts)), desc="prompts", leave=False, disable=None):
            part = slice(starts[number], starts[number] + size)
            flops = None
            if number == 0 and count:
                with FlopCounterMode(display=False) as counter:
                    made = run(part, on_step)
                name = type(self.pipe.transformer).__name__
                flops = sum(counter.get_flop_counts()[name].values()) / len(self.prompts[part])
            else:
                made = run(part)
            found.append((self.decode(made, part), made.latents.float().cpu().numpy(), flops))
        pictures, latents, flops = zip(*parallel.in_order(found), strict=True)
        return Outcome(np.concatenate(pictures), np.concatenate(latents), flops[0])

    # --- what others are compared with -------------------------------------------------------------------------------

    @cached_property
    def trajectory(self) -> dict[int, torch.Tensor]:
        """Latents of the uncached run's first prompt at each step; filled by `reference`."""
        return {}

    @cached_property
    def reference(self) -> Outcome:
        def on_step(i, x, v):
            self.trajectory[i] = x[0].float().cpu()

        return self.outcome(self.own(), on_step)

    @cached_property
    def solution(self) -> Outcome:
        """The exact solution, integrated with as many substeps as settle it for the first prompts."""

        def integrated():
            first = self.inputs(slice(0, ode.SETTLING_PROMPTS))
            grid = ode.candidate_grid(first.sigmas, ode.CANDIDATES * self.settings["steps"])
            rate = ode.rate_of(self.program, self.pipe, first)
            substeps = ode.settled_substeps(self.program, self.pipe, first, grid, rate)

            def run(part, on_step=None) -> Run:
                inputs = self.inputs(part)
                return Run(ode.integrate(self.program, self.pipe, inputs, grid, rate, substeps), inputs, 0.0)

            found = self.outcome(run, count=False)
            return {"pictures": found.pictures, "latents": found.latents}

        return Outcome(**self.shelf.keep_arrays("solution", integrated))

    # --- rows --------------------------------------------------------------------------------------------------------

    def row(self, candidate: Candidate, asked: float | None = None) -> dict:
        """The row of a method, measured or kept from an earlier run."""
        row = self.shelf.keep(candidate.key, lambda: self.measure(candidate))
        timed = self.shelf.keep([candidate.key, self.repeats, self.timed], lambda: self.latency(candidate))
        return {**row, **timed, "asked": asked}

    def uncached(self) -> Candidate:
        return Candidate("none", "none", "none", self.own(), self.own(), self.settings, self.settings["steps"])

    def planned(self, method: str, label: str, plan: Plan, path: Path | None = None) -> Candidate:
        """The folder's loop with a plan."""
        extra = {"threshold": plan.threshold, "site": plan.site} if plan.kind == "threshold" else {}
        ours = {"threshold": "ertacache", "budget": "budget"}[plan.kind]
        family = "steps" if method in RIVALS else ours
        run = self.own(plan)
        path = relative(path, self.program.FOLDER.parent) if path and path.exists() else None
        return Candidate(method, label, family, run, self.own(), self.settings, plan.nfe, plan, path, extra)

    def fewer_steps(self, method: str, label: str, steps: int, shift: float | None = None) -> Candidate:
        """The model's own solver with fewer steps."""
        settings, extra = {**self.settings, "steps": steps}, {} if shift is None else {"shift": shift}
        run = self.own(settings=settings, shift=shift)
        return Candidate(method, label, "steps", run, self.own(), settings, steps, extra=extra)

    def peer(self, method: str, label: str, value, cached) -> Candidate:
        """Another cache in the stock pipeline. cached(): the context in which its calls are cached."""
        run, extra = self.stock(cached), {"value": value}
        return Candidate(method, label, "peer", run, self.stock(), self.settings, extra=extra)

    def measure(self, candidate: Candidate) -> dict:
        reset_peak_memory(self.pipe._execution_device)
        seen: dict[int, torch.Tensor] = {}
        found = self.reference
        if candidate.method != "none":
            found = self.outcome(candidate.run, lambda i, x, v: seen.update({i: x[0].float().cpu()}))
        memory, saved = peak_memory(self.pipe._execution_device), self.reference.flops / found.flops
        nfe = candidate.nfe or self.settings["steps"] / saved
        return {
            "folder": self.program.FOLDER.name,
            "model": self.options.model,
            **{name: getattr(candidate, name) for name in ("method", "label", "family")},
            "asked": None,
            "settings": {**candidate.settings, **candidate.extra},
            "steps": self.settings["steps"],
            "nfe": nfe,
            "prompts": len(self.prompts),
            "seed": self.seeds[0],
            "batch_size": self.options.batch_size,
            "flops": found.flops,
            "speedup_flops": saved,
            "speedup_nfe": self.settings["steps"] / nfe,
            **dict.fromkeys(LATENCY),
            **self.distances(candidate, found),
            "prompt_accuracy": self.prompt_accuracy(found),
            "peak_memory_mib": memory,
            "plan": candidate.path,
            "timeline": self.timeline(candidate.plan, seen) if candidate.plan else None,
            **self.keep_samples(candidate, found),
            "machine": machine(),
            "libraries": library_versions(),
            "date": date.today().isoformat(),
        }

    def distances(self, candidate: Candidate, found: Outcome) -> dict[str, float | None]:
        """To the uncached run (which has none to itself), to the solution, and to the prompts."""
        row = dict.fromkeys((*metrics.METRICS, "latent_psnr", "clip_similarity"))
        if candidate.method != "none":
            row = metrics.quality(self.reference.pictures, found.pictures, self.lpips)
            row["latent_psnr"] = metrics.latent_psnr(self.reference.latents, found.latents)
            row["clip_similarity"] = self.clip.similarity(self.reference.pictures, found.pictures)
        row["clip_score"] = self.clip.score(self.prompts, found.pictures)
        row |= dict.fromkeys(("exact_psnr", "exact_ssim", "exact_latent_psnr"))
        if self.exact:
            row["exact_psnr"] = metrics.mean(metrics.psnr, self.solution.pictures, found.pictures)
            row["exact_ssim"] = metrics.mean(metrics.ssim, self.solution.pictures, found.pictures)
            row["exact_latent_psnr"] = metrics.latent_psnr(self.solution.latents, found.latents)
        return row

    def latency(self, candidate: Candidate) -> dict[str, float | None]:
        """Medians over runs that alternate with uncached ones (A B A B …), after one warm-up, on the first prompts."""
        if not self.repeats:
            return dict.fromkeys(LATENCY)
        medians = None
        if parallel.is_main():  # processes that share a machine would disturb each other
            part, runs = slice(0, self.timed), [candidate.run]
            if candidate.method != "none":
                runs = [candidate.against, candidate.run]
            inputs = self.inputs(part)  # for the stock pipeline, which does not hand out its own
            times = [[self.seconds(run, part, inputs) for run in runs] for _ in range(self.repeats + 1)][1:]
            medians = np.median(np.array(times), axis=0).tolist()  # [runs][loop, end to end]
        medians = parallel.share(medians)
        (a_loop, a_end), (b_loop, b_end) = medians[0], medians[-1]
        return dict(zip(LATENCY, (b_loop, a_loop / b_loop, b_end, a_end / b_end), strict=True))

    def seconds(self, run, part, inputs) -> tuple[float, float]:
        """Of the denoising loop, and from prompt to picture."""
        start = time.perf_counter()
        made = run(part)
        self.decode(made if made.inputs is not None else made._replace(inputs=inputs), part)
        synchronize(self.pipe)
        return made.seconds, time.perf_counter() - start

    def prompt_accuracy(self, found: Outcome) -> float | None:
        if self.options.model != "demo":
            return None
        pictures = [media.to_uint8(p) for p in found.pictures]
        return world(self.program).prompt_accuracy(self.prompts, pictures)

    def timeline(self, plan: Plan, seen: dict[int, torch.Tensor]) -> dict:
        """Which steps of which grid are computed, and how far the first prompt is from the uncached run there."""
        native = self.inputs(slice(0, 1)).sigmas
        grid = plan.grid(native)
        computed = plan.computed
        errors = None
        if torch.equal(grid, native) and seen:
            pairs = [(seen[i], self.trajectory[i]) for i in computed]
            errors = [((x - wanted).norm() / wanted.norm()).item() for x, wanted in pairs]
        return {"sigmas": grid.tolist(), "computed": list(computed), "error": errors}

    def keep_samples(self, candidate: Candidate, found: Outcome) -> dict:
        """The pictures of the first prompts, as files beside the kept rows; the paths are absolute."""
        folder, name = self.shelf.folder / "samples", digest(candidate.key)[:16]
        pictures = found.pictures[: self.samples]
        suffix = ".mp4" if found.pictures.ndim == 5 else ".png"
        if parallel.is_main() and self.samples:
            folder.mkdir(parents=True, exist_ok=True)
            media.save_results(folder, pictures, name, getattr(self.options, "fps", None))
        paths = [str((folder / f"{number:03d}-{name}{suffix}").resolve()) for number in range(len(pictures))]
        return {"samples": paths, "sample_prompts": self.prompts[: self.samples]}
