"""Held-out measurements of one pipeline: quality against the uncached run, and interleaved latency."""

import statistics
import time
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from tqdm import tqdm

from ertacache import cli, exact
from ertacache.metrics import METRICS, Lpips, latent_psnr, quality
from ertacache.outputs import to_uint8
from ertacache.peers import PEERS
from ertacache.stock import stock_latents


@dataclass(frozen=True)
class Outcome:
    """What a method made of all prompts: pictures float [N, H, W, 3] or videos [N, F, H, W, 3], and latents [N, …]."""

    pictures: np.ndarray
    latents: np.ndarray

    def distances(self, reference: "Outcome", lpips: Lpips) -> dict[str, float | None]:
        """Of this outcome to a reference: the METRICS of the pictures, and the PSNR of the latents."""
        latents = latent_psnr(reference.latents, self.latents)
        return {**quality(reference.pictures, self.pictures, lpips), "latent_psnr": latents}


class Evaluation:
    """One program, pipeline and set of held-out prompts; the uncached run is made once.

    settings: keyword arguments of the folder's `prepare`. options: the command line. repeats: timed runs, 0 for none.
    With options.target "exact" the distance to the finely integrated solution is measured too.
    """

    def __init__(self, program, pipe, prompts, seeds, settings, options, repeats):
        self.program, self.pipe, self.prompts, self.seeds = program, pipe, prompts, seeds
        self.settings, self.options, self.repeats, self.lpips = settings, options, repeats, Lpips()
        self.reference = self.outcome(settings)

    def inputs(self, part, settings, shift=None):
        """With a shift: settings["steps"] steps between the ends of the uncached run's grid."""
        steps = self.settings["steps"] if shift is not None else settings["steps"]
        inputs = self.program.prepare(self.pipe, self.prompts[part], self.seeds[part], **{**settings, "steps": steps})
        return inputs if shift is None else inputs.on(exact.shifted_grid(inputs.sigmas, settings["steps"], shift))

    def outcome(self, settings, plan=None, shift=None) -> Outcome:
        return self.gather(
            lambda part: self.inputs(part, settings, shift),
            lambda inputs: self.program.denoise(self.pipe, inputs, plan),
        )

    def gather(self, inputs_of, denoise) -> Outcome:
        """inputs_of(part of the prompts) → inputs, denoise(inputs) → latents; without inputs_of, denoise(part)."""
        pictures, latents, size = [], [], self.options.batch_size
        for begin in tqdm(range(0, len(self.prompts), size), desc="prompts", leave=False, disable=None):
            part = slice(begin, begin + size)
            inputs = self.inputs(part, self.settings) if inputs_of is None else inputs_of(part)
            final = denoise(part if inputs_of is None else inputs)
            pictures.append(self.program.decode(self.pipe, final.to(inputs.latents.dtype), inputs))
            latents.append(final.float().cpu().numpy())
        return Outcome(np.concatenate(pictures), np.concatenate(latents))

    @cached_property
    def solution(self) -> Outcome | None:
        """The exact solution, integrated with as many substeps as settle it for the first prompts."""
        if self.options.target != "exact":
            return None
        first = self.inputs(slice(0, exact.SETTLING_PROMPTS), self.settings)
        grid = exact.candidate_grid(first.sigmas, exact.CANDIDATES * self.settings["steps"])
        rate = exact.rate_of(self.program, self.pipe, first)
        substeps = exact.settled_substeps(self.program, self.pipe, first, grid, rate)
        return self.gather(
            lambda part: self.inputs(part, self.settings),
            lambda inputs: exact.integrate(self.program, self.pipe, inputs, grid, rate, substeps),
        )

    def seconds(self, inputs, plan) -> float:
        start = time.perf_counter()
        self.program.denoise(self.pipe, inputs, plan)
        cli.synchronize(self.pipe)
        return time.perf_counter() - start

    def latency_ratio(self, *runs) -> float | None:
        """median(uncached) / median(method), of two functions that run the first batch and give the loop's seconds.

        They are measured in turn, after one warm-up.
        """
        if not self.repeats:
            return None
        times = [[run() for run in runs] for _ in range(self.repeats + 1)][1:]
        return statistics.median(t[0] for t in times) / statistics.median(t[1] for t in times)

    def row(self, method, plan=None, settings=None, threshold=None, shift=None) -> dict:
        """What a plan, or the model's own solver at other settings or on a shifted grid, costs and reaches."""
        settings = settings or self.settings
        reset_peak_memory()
        found = self.reference if method == "none" else self.outcome(settings, plan, shift)
        memory, ratio = peak_memory(), 1.0
        if method != "none" and self.repeats:
            part = slice(0, self.options.batch_size)
            pairs = ((self.inputs(part, self.settings), None), (self.inputs(part, settings, shift), plan))
            ratio = self.latency_ratio(*(partial(self.seconds, *pair) for pair in pairs))
        elif method != "none":
            ratio = None
        named = {"threshold": threshold, "site": getattr(plan, "site", None), "shift": shift, **settings}
        nfe = plan.nfe if plan else settings["steps"]
        return self.describe(method, found, named, nfe, ratio, memory)

    def peer_row(self, bench, name: str, value, saved: float) -> dict:
        """What another cache costs and reaches in the stock pipeline. saved: uncached FLOPs over its own."""
        peer, size = PEERS[name], self.options.batch_size

        def run(part=slice(0, size)):
            return stock_latents(self.pipe, self.prompts[part], self.seeds[part], self.settings)

        def cached():
            with peer.apply(bench, value):
                return run()[1]

        reset_peak_memory()
        with peer.apply(bench, value):
            found = self.gather(None, lambda part: run(part)[0])
        memory = peak_memory()
        ratio = self.latency_ratio(lambda: run()[1], cached)
        method = f"{name} ({peer.label.format(value)})"
        settings = {"value": value, **self.settings}
        return self.describe(method, found, settings, self.settings["steps"] / saved, ratio, memory)

    def describe(self, method, found: Outcome, settings, nfe: float, ratio: float | None, memory) -> dict:
        """The row of a table."""
        accuracy = None
        if self.options.model == "demo":
            accuracy = cli.world(self.program).prompt_accuracy(self.prompts, [to_uint8(p) for p in found.pictures])
        to_uncached = dict.fromkeys((*METRICS, "latent_psnr"))  # the uncached run has no distance to itself
        to_exact = {}
        if method != "none":
            to_uncached = found.distances(self.reference, self.lpips)
        if self.solution is not None:
            distances = found.distances(self.solution, self.lpips)
            to_exact = {f"exact_{name}": distances[name] for name in ("psnr", "ssim", "latent_psnr")}
        return {
            "folder": self.program.FOLDER.name,
            "method": method,
            "settings": settings,
            "steps": settings["steps"],
            "nfe": nfe,
            "speedup_nfe": self.settings["steps"] / nfe,
            "speedup_latency": ratio,
            **to_uncached,
            **to_exact,
            "prompt_accuracy": accuracy,
            "peak_memory_mib": memory,
        }


def nearest_values(bench, name: str, speedups: list[float]) -> dict[float, tuple]:
    """For each speed-up the (value, FLOPs saved) of a peer's sweep that is nearest to it, in the ratio."""
    peer, uncached, swept = PEERS[name], bench.flops(), []
    for value in peer.values:
        with peer.apply(bench, value):
            swept.append((value, uncached / bench.flops()))
    return {s: min(swept, key=lambda pair: abs(np.log(pair[1] / s))) for s in speedups}


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float | None:
    """MiB on the GPU, None without one."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
