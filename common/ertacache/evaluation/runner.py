"""Held-out measurements of one pipeline: quality, cost and interleaved latency of any method, one row each."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ertacache.demos.model_folder import OnStep, Sampler, draws_captions
from ertacache.evaluation import metrics
from ertacache.evaluation.method import Method, MethodRun, Outcome, Runner
from ertacache.evaluation.rows import LATENCY, Row, Timeline
from ertacache.numerics import ode
from ertacache.pipelines.uncached import uncached_latents
from ertacache.plans import Plan
from ertacache.utils import media, parallel
from ertacache.utils.checkpoints import Checkpoints, digest
from ertacache.utils.devices import peak_memory, reset_peak_memory, synchronize
from ertacache.utils.files import relative
from ertacache.utils.progress import bar_options
from ertacache.utils.provenance import fingerprint, library_versions, machine

SOLVER_METHODS = ("uniform", "fewer-steps-ab2", "least-squares")  # schedules and solvers that run as plans


class Evaluation:
    """One sampler, pipeline and set of held-out prompts; the uncached run is made once.

    Args:
        sampler: The model folder.
        pipe: Its pipeline.
        prompts: Held-out prompts, one seed each.
        seeds: Of the prompts.
        settings: Keyword arguments of `sampler.prepare`.
        model: "demo", a directory or a Hub id, for the rows.
        captions: What the prompts are, for the rows: "full" or "open" captions of the demo.
        batch_size: Prompts per call.
        work: Folder for finished rows.
        repeats: Timed runs; 0 for none.
        timed: Prompts of the timed batch; default: batch_size.
        exact: Whether to measure the distance to the ODE's solution too.
        samples: Images kept of each row.
        clip: Hub id or directory of a CLIP model.
        fps: Frames per second of kept videos.
    """

    def __init__(
        self,
        sampler: Sampler,
        pipe,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: dict[str, Any],
        *,
        model: str,
        captions: str | None = None,
        batch_size: int,
        work: str | Path,
        repeats: int = 0,
        timed: int | None = None,
        exact: bool = False,
        samples: int = 0,
        clip: str | None = None,
        fps: int | None = None,
    ):
        self.sampler, self.pipe, self.settings, self.model = sampler, pipe, settings, model
        self.captions = captions
        self.prompts, self.seeds, self.batch_size = list(prompts), list(seeds), batch_size
        self.work, self.repeats, self.exact, self.samples, self.fps = Path(work), repeats, exact, samples, fps
        self.timed = min(timed or batch_size, len(self.prompts))
        self.lpips, self.clip = metrics.Lpips(), metrics.Clip(clip)
        if self.lpips.problem and parallel.is_main():
            print(self.lpips.problem, file=sys.stderr)
        self.uncached_trajectory: dict[int, torch.Tensor] = {}  # latents of the first prompt, by step
        measured = [model, fingerprint(pipe), settings, self.prompts, self.seeds, batch_size, exact, samples, clip]
        machines = [str(pipe.transformer.dtype), machine(), library_versions()]
        self.checkpoints = Checkpoints(self.work, ["rows, 4", sampler.FOLDER.name, *measured, *machines])

    # --- ways to run -------------------------------------------------------------------------------------------------

    def inputs(
        self,
        part: slice,
        settings: dict[str, Any] | None = None,
        shift: float | None = None,
        sigmas: Sequence[float] | None = None,
    ):
        """Return the inputs of some prompts.

        Args:
            part: Of the prompts.
            settings: Other settings.
            shift: Puts settings["steps"] steps between the ends of the uncached run's grid, shifted by it.
            sigmas: Puts the steps on this grid.
        """
        settings, native = settings or self.settings, shift is None and sigmas is None
        steps = settings["steps"] if native else self.settings["steps"]
        inputs = self.sampler.prepare(self.pipe, self.prompts[part], self.seeds[part], **{**settings, "steps": steps})
        if native:
            return inputs
        if sigmas is not None:
            return inputs.on(torch.tensor(sigmas).to(inputs.sigmas))
        return inputs.on(ode.shifted_grid(inputs.sigmas, settings["steps"], shift))

    def in_loop(
        self,
        plan: Plan | None = None,
        settings: dict[str, Any] | None = None,
        shift: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Runner:
        """Run the folder's loop: with a plan, or the model's solver at other settings or on another grid."""

        def run(part: slice, on_step: OnStep | None = None) -> MethodRun:
            inputs = self.inputs(part, settings, shift, sigmas)
            start = time.perf_counter()
            latents = self.sampler.denoise(self.pipe, inputs, plan, on_step)
            synchronize(self.pipe._execution_device)
            return MethodRun(latents, inputs, time.perf_counter() - start)

        return run

    def in_pipeline(self, cached: Callable[[], AbstractContextManager] = nullcontext) -> Runner:
        """Run the stock pipeline's call, within the context that `cached` opens."""

        def run(part: slice, on_step: OnStep | None = None) -> MethodRun:
            with cached():
                latents, seconds = uncached_latents(self.pipe, self.prompts[part], self.seeds[part], self.settings)
            return MethodRun(latents, None, seconds)

        return run

    def decode(self, run: MethodRun, part: slice) -> np.ndarray:
        """Return the images of a run's latents."""
        inputs = run.inputs if run.inputs is not None else self.inputs(part)
        return self.sampler.decode(self.pipe, run.latents.to(inputs.latents.dtype), inputs)

    def outcome(self, run: Runner, on_step: OnStep | None = None, count: bool = True) -> Outcome:
        """Run all prompts; processes take batches in turn.

        Args:
            run: On a part of the prompts.
            on_step: Sees the first batch.
            count: Whether to count the first batch's FLOPs.
        """
        results = []
        starts = range(0, len(self.prompts), self.batch_size)
        bar = bar_options("evaluation", "batch", silent=not parallel.is_main())
        for number in tqdm(parallel.mine(len(starts)), **bar):
            part = slice(starts[number], starts[number] + self.batch_size)
            flops = None
            if number == 0 and count:
                with FlopCounterMode(display=False) as counter:
                    batch = run(part, on_step)
                name = type(self.pipe.transformer).__name__
                flops = sum(counter.get_flop_counts()[name].values()) / len(self.prompts[part])
            else:
                batch = run(part)
            results.append((self.decode(batch, part), batch.latents.float().cpu().numpy(), flops))
        images, latents, flops = zip(*parallel.in_order(results), strict=True)
        return Outcome(np.concatenate(images), np.concatenate(latents), flops[0])

    # --- what methods are compared with ------------------------------------------------------------------------------

    @cached_property
    def uncached_outcome(self) -> Outcome:
        """The uncached run; also fills `uncached_trajectory`."""

        def on_step(i: int, x: torch.Tensor, v: torch.Tensor) -> None:
            self.uncached_trajectory[i] = x[0].float().cpu()

        return self.outcome(self.in_loop(), on_step)

    @cached_property
    def solution(self) -> Outcome:
        """The ODE's solution, with as many substeps as settle it for the first prompts."""

        def integrate() -> dict[str, np.ndarray]:
            first = self.inputs(slice(0, ode.SETTLING_PROMPTS))
            grid = ode.candidate_grid(first.sigmas, ode.CANDIDATES * self.settings["steps"])
            rate = ode.rate_of(self.sampler, self.pipe, first)
            substeps = ode.settled_substeps(self.sampler, self.pipe, first, grid, rate)

            def run(part: slice, on_step: OnStep | None = None) -> MethodRun:
                inputs = self.inputs(part)
                return MethodRun(ode.integrate(self.sampler, self.pipe, inputs, grid, rate, substeps), inputs, 0.0)

            outcome = self.outcome(run, count=False)
            return {"images": outcome.images, "latents": outcome.latents}

        return Outcome(**self.checkpoints.arrays("solution", integrate))

    # --- methods -----------------------------------------------------------------------------------------------------

    def uncached(self) -> Method:
        """Return the uncached run as a method."""
        run = self.in_loop()
        return Method("none", "none", "none", run, run, self.settings, self.settings["steps"])

    def planned(self, name: str, label: str, plan: Plan, path: Path | None = None, family: str = "") -> Method:
        """Return the folder's loop with a plan as a method. family: by default that of the plan, or of a solver."""
        extra = {"threshold": plan.threshold, "site": plan.site} if plan.kind == "threshold" else {}
        family = family or ("steps" if name in SOLVER_METHODS else plan.method)
        path = relative(path, self.sampler.FOLDER.parent) if path and path.exists() else None
        run, reference = self.in_loop(plan), self.in_loop()
        return Method(name, label, family, run, reference, self.settings, plan.nfe, plan, path, extra)

    def fewer_steps(
        self, name: str, label: str, steps: int, shift: float | None = None, sigmas: Sequence[float] | None = None
    ) -> Method:
        """Return the model's own solver with fewer steps as a method, on its own grid, a shifted one, or `sigmas`."""
        settings, choices = {**self.settings, "steps": steps}, {"shift": shift, "sigmas": sigmas}
        extra = {name: value for name, value in choices.items() if value is not None}
        run, reference = self.in_loop(settings=settings, **choices), self.in_loop()
        return Method(name, label, "steps", run, reference, settings, steps, extra=extra)

    def other_cache(self, name: str, label: str, value: Any, cached: Callable[[], AbstractContextManager]) -> Method:
        """Return another cache in the stock pipeline as a method. cached(): the context in which calls are cached."""
        run, reference = self.in_pipeline(cached), self.in_pipeline()
        return Method(name, label, "peer", run, reference, self.settings, extra={"value": value})

    # --- rows --------------------------------------------------------------------------------------------------------

    def row(self, method: Method, target: float | None = None) -> Row:
        """Return the row of a method, measured or stored by an earlier run. target: its target speed-up."""
        row = self.checkpoints.value(method.key, lambda: self.measure(method))
        timed = self.checkpoints.value([method.key, self.repeats, self.timed], lambda: self.latency(method))
        return {**row, **timed, "asked": target}

    def measure(self, method: Method) -> Row:
        """Measure quality and cost of a method."""
        device = self.pipe._execution_device
        reset_peak_memory(device)
        trajectory: dict[int, torch.Tensor] = {}
        outcome = self.uncached_outcome
        if not method.is_uncached:
            outcome = self.outcome(method.run, lambda i, x, v: trajectory.update({i: x[0].float().cpu()}))
        memory, speedup = peak_memory(device), self.uncached_outcome.flops / outcome.flops
        nfe = method.nfe or self.settings["steps"] / speedup
        return {
            "folder": self.sampler.FOLDER.name,
            "model": self.model,
            "method": method.name,
            "label": method.label,
            "family": method.family,
            "asked": None,
            "settings": {**method.settings, **method.extra},
            "steps": self.settings["steps"],
            "nfe": nfe,
            "captions": self.captions,
            "prompts": len(self.prompts),
            "seed": self.seeds[0],
            "batch_size": self.batch_size,
            "flops": outcome.flops,
            "speedup_flops": speedup,
            "speedup_nfe": self.settings["steps"] / nfe,
            **dict.fromkeys(LATENCY),
            **self.distances(method, outcome),
            "prompt_accuracy": self.prompt_accuracy(outcome),
            "peak_memory_mib": memory,
            "plan": method.path,
            "timeline": self.timeline(method.plan, trajectory) if method.plan else None,
            **self.keep_samples(method, outcome),
            "machine": machine(self.pipe._execution_device),
            "libraries": library_versions(),
            "date": date.today().isoformat(),
        }

    def distances(self, method: Method, outcome: Outcome) -> dict[str, float | None]:
        """Return distances to the uncached run (which has none to itself), to the solution, and to the prompts."""
        distances = dict.fromkeys((*metrics.METRICS, "latent_psnr", "latents_below_30db", "clip_similarity"))
        if not method.is_uncached:
            uncached = self.uncached_outcome
            distances = metrics.quality(uncached.images, outcome.images, self.lpips)
            latents = metrics.latent_psnrs(uncached.latents, outcome.latents)
            distances["latent_psnr"] = metrics.finite(latents.mean())
            distances["latents_below_30db"] = metrics.share_below(latents)
            distances["clip_similarity"] = self.clip.similarity(uncached.images, outcome.images)
        distances["clip_score"] = self.clip.score(self.prompts, outcome.images)
        distances |= dict.fromkeys(("exact_psnr", "exact_ssim", "exact_latent_psnr"))
        if self.exact:
            distances["exact_psnr"] = metrics.mean(metrics.psnr, self.solution.images, outcome.images)
            distances["exact_ssim"] = metrics.mean(metrics.ssim, self.solution.images, outcome.images)
            latents = metrics.latent_psnrs(self.solution.latents, outcome.latents)
            distances["exact_latent_psnr"] = metrics.finite(latents.mean())
        return distances

    def latency(self, method: Method) -> dict[str, float | None]:
        """Return medians over runs that alternate with uncached ones (A B A B …), after one warm-up."""
        if not self.repeats:
            return dict.fromkeys(LATENCY)
        medians = None
        if parallel.is_main():  # processes that share a machine would disturb each other
            part = slice(0, self.timed)
            runs = [method.run] if method.is_uncached else [method.reference, method.run]
            inputs = self.inputs(part)  # to decode what the stock pipeline made
            times = [[self.seconds(run, part, inputs) for run in runs] for _ in range(self.repeats + 1)][1:]
            medians = np.median(np.array(times), axis=0).tolist()  # [runs][loop, end to end]
        medians = parallel.share(medians)
        (a_loop, a_end), (b_loop, b_end) = medians[0], medians[-1]
        return dict(zip(LATENCY, (b_loop, a_loop / b_loop, b_end, a_end / b_end), strict=True))

    def seconds(self, run: Runner, part: slice, inputs) -> tuple[float, float]:
        """Return the seconds of the denoising loop, and from prompt to image."""
        start = time.perf_counter()
        batch = run(part)
        self.decode(batch if batch.inputs is not None else batch._replace(inputs=inputs), part)
        synchronize(self.pipe._execution_device)
        return batch.seconds, time.perf_counter() - start

    def prompt_accuracy(self, outcome: Outcome) -> float | None:
        """Return the share of images that show what the prompt asks for; None where one cannot be judged."""
        if not draws_captions(self.sampler, self.model):
            return None
        images = [media.to_uint8(image) for image in outcome.images]
        return self.sampler.grammar.prompt_accuracy(self.prompts, images, self.pipe)

    def timeline(self, plan: Plan, trajectory: dict[int, torch.Tensor]) -> Timeline:
        """Return which steps of which grid are computed, and the first prompt's distance to the uncached run there."""
        native = self.inputs(slice(0, 1)).sigmas
        grid, errors = plan.grid(native), None
        if torch.equal(grid, native) and trajectory:
            pairs = [(trajectory[i], self.uncached_trajectory[i]) for i in plan.computed]
            errors = [((x - uncached).norm() / uncached.norm()).item() for x, uncached in pairs]
        return {"sigmas": grid.tolist(), "computed": list(plan.computed), "error": errors}

    def keep_samples(self, method: Method, outcome: Outcome) -> dict[str, list[str]]:
        """Save the images of the first prompts next to the stored rows; their paths are absolute."""
        folder, name = self.checkpoints.folder / "samples", digest(method.key)[:16]
        images = outcome.images[: self.samples]
        suffix = ".mp4" if outcome.images.ndim == 5 else ".png"
        if parallel.is_main() and self.samples:
            folder.mkdir(parents=True, exist_ok=True)
            media.save_results(folder, images, name, self.fps)
        paths = [str((folder / f"{number:03d}-{name}{suffix}").resolve()) for number in range(len(images))]
        return {"samples": paths, "sample_prompts": self.prompts[: self.samples]}
