"""Measure caching methods against the uncached run: quality on held-out prompts, NFE, and interleaved latency.

    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods fewer-steps,ablation --speedups 2 --json ablation.json
    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods fewer-steps,least-squares,budget --speedups 2,3,5
    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods ertacache --thresholds 0.02,0.05,0.1,0.2 --site blocks

Every number is measured by the run that prints it: quality against the uncached run with the same seeds, latency of
the denoising loop as the ratio of medians of alternating runs (A B A B …) on one batch. Plans are calibrated on the
calibration prompts, never on the evaluation prompts; a plan stored in cache/ is used as it is. Further flags are those
of generate.py.
"""

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ertacache import BudgetPlan, ThresholdPlan, UserError, cli
from ertacache.algorithm import uniform_cached
from ertacache.budget import BudgetCalibration, budget_of
from ertacache.errors import ArgumentParser, run_program
from ertacache.files import read_prompts, write_atomically
from ertacache.metrics import METRICS, Lpips, quality
from ertacache.outputs import to_uint8
from ertacache.planner import adams_bashforth_weights, offline_weights, predictor_weights
from ertacache.programs import load_program
from ertacache.provenance import library_versions, machine
from ertacache.store import budget_name, check_speedups, open_calibration, plan_name

ROOT = Path(__file__).resolve().parents[1]
THRESHOLD_METHODS = {"fewer-steps", "uniform", "ertacache", "ablation"}
BUDGET_METHODS = {"fewer-steps-ab2", "least-squares", "budget", "budget-ablation"}
METHODS = (*sorted(THRESHOLD_METHODS), *sorted(BUDGET_METHODS))
COLUMNS = ["method", "threshold", "steps", "nfe", "speedup_nfe", "speedup_latency", "psnr", "ssim", "lpips"]
COLUMNS += ["temporal_psnr", "prompt_accuracy"]


class Evaluation:
    """One program, pipeline and set of held-out prompts; the uncached run is made once."""

    def __init__(self, program, pipe, prompts, seeds, settings, options, repeats):
        self.program, self.pipe, self.prompts, self.seeds = program, pipe, prompts, seeds
        self.settings, self.options, self.repeats, self.lpips = settings, options, repeats, Lpips()
        self.reference = self.pictures(settings, None)

    def inputs(self, part, settings):
        return self.program.prepare(self.pipe, self.prompts[part], self.seeds[part], **settings)

    def pictures(self, settings, plan) -> np.ndarray:
        """float [N, H, W, 3] of all prompts."""
        found, size = [], self.options.batch_size
        for begin in tqdm(range(0, len(self.prompts), size), desc="pictures", leave=False, disable=None):
            inputs = self.inputs(slice(begin, begin + size), settings)
            found.append(self.program.decode(self.pipe, self.program.denoise(self.pipe, inputs, plan), inputs))
        return np.concatenate(found)

    def seconds(self, inputs, plan) -> float:
        start = time.perf_counter()
        self.program.denoise(self.pipe, inputs, plan)
        cli.synchronize(self.pipe)
        return time.perf_counter() - start

    def latency_ratio(self, settings, plan) -> float | None:
        """median(uncached) / median(method) of the denoising loop, measured in turn on the first batch."""
        if not self.repeats:
            return None
        part = slice(0, self.options.batch_size)
        pairs = ((self.inputs(part, self.settings), None), (self.inputs(part, settings), plan))
        times = [[self.seconds(*pair) for pair in pairs] for _ in range(self.repeats + 1)][1:]
        return statistics.median(t[0] for t in times) / statistics.median(t[1] for t in times)

    def row(self, method, plan=None, settings=None, threshold=None) -> dict:
        settings = settings or self.settings
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        pictures = self.pictures(settings, plan)
        memory = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
        nfe = plan.nfe if plan else settings["steps"]
        accuracy = None
        if self.options.model == "demo":
            accuracy = cli.world(self.program).prompt_accuracy(self.prompts, [to_uint8(p) for p in pictures])
        same = dict.fromkeys(METRICS)  # the uncached run has no distance to itself
        return {
            "folder": self.program.FOLDER.name,
            "method": method,
            "settings": {"threshold": threshold, "site": getattr(plan, "site", None), **settings},
            "steps": settings["steps"],
            "nfe": nfe,
            "speedup_nfe": self.settings["steps"] / nfe,
            "speedup_latency": self.latency_ratio(settings, plan) if method != "none" else 1.0,
            **(same if method == "none" else quality(self.reference, pictures, self.lpips)),
            "prompt_accuracy": accuracy,
            "peak_memory_mib": memory,
        }


def threshold_rows(evaluation, calibration, methods, threshold, store=False):
    """The rows of the asked methods at the NFE that one λ gives; store: keep a plan that is calibrated here."""
    options, steps = evaluation.options, evaluation.settings["steps"]
    name = plan_name(options.model, steps, threshold, options.site)
    stored = evaluation.program.FOLDER / "cache" / name
    if "ablation" not in methods and stored.exists():
        plans, chosen = {}, ThresholdPlan.load(stored)
        chosen.check(calibration.conditions, remedy=f"delete {stored}")
        if "uniform" in methods:
            neutral = {"phi": (), "k": (), "b": (), "rectified": False, "phi_definition": "none"}
            plans["uniform"] = replace(chosen, cached=uniform_cached(steps, chosen.nfe), **neutral)
    else:
        plans, errors = calibration.candidates(threshold)
        chosen = calibration.choose(plans, errors)
        if store:
            chosen.save(stored)
    if "fewer-steps" in methods and not BUDGET_METHODS & set(methods):
        yield evaluation.row("fewer-steps", settings={**evaluation.settings, "steps": chosen.nfe})
    for name in list(plans) if "ablation" in methods else [n for n in plans if n in methods]:
        yield evaluation.row(name, plans[name], threshold=threshold)
    if "ertacache" in methods:
        best = chosen.provenance["calibration"]["chosen"]
        yield evaluation.row(f"ertacache ({best})", chosen, threshold=threshold)


def budget_rows(evaluation, calibration, methods, budget, store=False):
    """The rows of the asked methods with exactly `budget` computed steps."""
    options, settings = evaluation.options, evaluation.settings
    steps, gram = settings["steps"], calibration.reference()
    stored = evaluation.program.FOLDER / "cache" / budget_name(options.model, steps, budget)
    plan = BudgetPlan.load(stored) if stored.exists() else calibration.plans([budget], options.search)[budget]
    plan.check(calibration.conditions, remedy=f"delete {stored}")
    if store:
        plan.save(stored)
    uniform = tuple(i for i in range(steps) if i not in uniform_cached(steps, budget))

    def weighted(schedule, weights, scale=()):
        return replace(plan, computed=schedule, weights=as_tuples(weights), scale=tuple(scale))

    def solver_jumps(schedule):
        pairs = [calibration.first_jump(i, k) for i, k in zip(schedule, [*schedule[1:], steps], strict=True)]
        return weighted(schedule, [[w] for _, w in pairs], [a for a, _ in pairs])

    def replayed(schedule):
        found = calibration.replay(schedule, plan.anchors)
        return weighted(schedule, found.weights, found.scale)

    if "fewer-steps" in methods:
        yield evaluation.row("fewer-steps", settings={**settings, "steps": budget})
    if "fewer-steps-ab2" in methods:
        sigmas = np.linspace(1, 0, budget + 1)
        weights = adams_bashforth_weights(sigmas) * calibration.derivative
        ab2 = replace(weighted(tuple(range(budget)), weights), sigmas=tuple(sigmas.tolist()))
        yield evaluation.row("fewer-steps-ab2", ab2)
    if "least-squares" in methods:
        solver = [calibration.first_jump(i, i + 1) for i in range(steps)]
        yield evaluation.row("least-squares", weighted(uniform, *predictor_weights(gram, solver, uniform, anchors=3)))
    if "budget-ablation" in methods:
        yield evaluation.row("uniform, solver's jumps", solver_jumps(uniform))
        yield evaluation.row("uniform, fitted on the plan's trajectory", replayed(uniform))
        yield evaluation.row("planned, solver's jumps", solver_jumps(plan.computed))
        weights = offline_weights(gram, plan.computed, plan.anchors, calibration.scaled)
        yield evaluation.row("planned, fitted on the reference", weighted(plan.computed, *weights))
    if "budget" in methods:
        yield evaluation.row(f"budget (H = {plan.anchors})", plan)


def as_tuples(weights) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(w) for w in row) for row in weights)


def table(rows) -> str:
    """Markdown."""

    def cell(row, name):
        value = row["settings"]["threshold"] if name == "threshold" else row[name]
        digits = {"psnr": 2, "temporal_psnr": 2, "speedup_nfe": 2, "speedup_latency": 2, "prompt_accuracy": 3}.get(
            name, 4
        )
        return "–" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    body = ["| " + " | ".join(cell(row, name) for name in COLUMNS) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *body])


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder, for example ERTACache4FLUX")
    parser.add_argument("--methods", default="fewer-steps,uniform,ertacache", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--thresholds", metavar="λ,λ,…")
    parser.add_argument("--speedups", metavar="S,S,…", help="choose λ so that NFE is nearest to T/S")
    parser.add_argument("--count", type=int, default=64, help="held-out captions, when --prompts is not given")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--latency-repeats", type=int, default=5, help="alternating runs; 0 leaves the latency out")
    parser.add_argument("--store", action="store_true", help="keep the plans that are calibrated here in cache/")
    args, rest = parser.parse_known_args()
    program = load_program(args.folder)
    options = cli.parse_arguments(program, rest)
    methods = args.methods.split(",")
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise UserError(f"--methods {','.join(unknown)}: choose from {', '.join(METHODS)}")
    if bool(args.thresholds) == bool(args.speedups):
        raise UserError("give either --thresholds λ,λ,… or --speedups S,S,…")
    if args.thresholds and BUDGET_METHODS & set(methods):
        raise UserError(f"--thresholds has no meaning for {', '.join(BUDGET_METHODS & set(methods))}: give --speedups")
    if not options.prompts and options.model != "demo":
        raise UserError("--prompts FILE is needed for a model other than the demo: one evaluation prompt a line")
    values = cli.parse_list(args.thresholds or args.speedups)
    check_speedups(values if args.speedups else [])
    pipe = cli.load(program, options)
    settings = cli.checked_settings(program, pipe, options)
    held_out = [s.caption() for s in cli.world(program).sample_scenes(args.count, seed=100, held_out=True)]
    prompts = read_prompts(options.prompts) if options.prompts else held_out
    seeds = range(options.seed, options.seed + len(prompts))
    common = (program, pipe, options, settings, ROOT / "runs")
    evaluation = Evaluation(program, pipe, prompts, seeds, settings, options, args.latency_repeats)
    rows = [evaluation.row("none")]

    def add(found):
        for row in found:
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)

    budgeted = BUDGET_METHODS & set(methods)
    if budgeted:
        calibration = open_calibration(*common, kind=BudgetCalibration)
        for speedup in values:
            add(budget_rows(evaluation, calibration, methods, budget_of(settings["steps"], speedup), args.store))
        calibration.finish()
    if {"uniform", "ertacache", "ablation"} & set(methods) or not budgeted:
        calibration = open_calibration(*common, site=options.site)
        for value in values:
            threshold = value if args.thresholds else calibration.threshold_for(round(settings["steps"] / value))
            add(threshold_rows(evaluation, calibration, methods, threshold, args.store))
        calibration.finish()
    print(table(rows))
    print(f"\n{len(prompts)} prompts, {machine()}, {library_versions()}")
    if args.json:
        write_atomically(args.json, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    run_program(main)
