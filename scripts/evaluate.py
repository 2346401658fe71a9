"""Measure caching methods against the uncached run: quality on held-out prompts, NFE, and interleaved latency.

    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods fewer-steps,ablation --speedups 2 --json ablation.json
    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods fewer-steps,least-squares,budget --speedups 2,3,5
    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods ertacache --thresholds 0.02,0.05,0.1,0.2 --site blocks
    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods fewer-steps-tuned,budget --speedups 1,2 --target exact
    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods teacache,magcache,first-block,budget --speedups 2,3

Every number is measured by the run that prints it: quality against the uncached run with the same seeds (with --target
exact also against the finely integrated solution), latency of the denoising loop as the ratio of medians of
alternating runs (A B A B …) on one batch. Plans are calibrated on the calibration prompts, never on the evaluation
prompts; a plan stored in cache/ is used as it is. Other caches run in the stock pipeline, each at the value of its own
parameter whose FLOPs come nearest to the speed-up. Further flags are those of generate.py.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from ertacache import BudgetPlan, ThresholdPlan, UserError, cli
from ertacache.algorithm import uniform_cached
from ertacache.budget import BudgetCalibration, budget_of
from ertacache.errors import ArgumentParser, run_program
from ertacache.evaluation import Evaluation, nearest_values
from ertacache.files import read_prompts, write_atomically
from ertacache.peers import PEERS, Bench
from ertacache.planner import adams_bashforth_weights, offline_weights, predictor_weights
from ertacache.programs import load_program
from ertacache.provenance import library_versions, machine
from ertacache.store import budget_name, check_speedups, open_calibration, plan_name

ROOT = Path(__file__).resolve().parents[1]
THRESHOLD_METHODS = {"fewer-steps", "uniform", "ertacache", "ablation"}
BUDGET_METHODS = {"fewer-steps-tuned", "fewer-steps-ab2", "least-squares", "budget", "budget-ablation"}
METHODS = (*sorted(THRESHOLD_METHODS), *sorted(BUDGET_METHODS), *PEERS)
COLUMNS = ["method", "threshold", "steps", "nfe", "speedup_nfe", "speedup_latency", "psnr", "latent_psnr", "ssim"]
COLUMNS += ["lpips", "temporal_psnr", "exact_psnr", "exact_latent_psnr", "prompt_accuracy"]


def plans_folder(evaluation) -> Path:
    return evaluation.options.plans or evaluation.program.FOLDER / "cache"


def threshold_rows(evaluation, calibration, methods, threshold, store=False):
    """The rows of the asked methods at the NFE that one λ gives; store: keep a plan that is calibrated here."""
    options, steps = evaluation.options, evaluation.settings["steps"]
    stored = plans_folder(evaluation) / plan_name(options.model, steps, threshold, options.site)
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
    steps = settings["steps"]
    stored = plans_folder(evaluation) / budget_name(options.model, steps, budget, calibration.target)
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
    if "fewer-steps-tuned" in methods:
        shift = calibration.tuned_shift(budget)
        yield evaluation.row(f"fewer-steps, shift {shift:g}", settings={**settings, "steps": budget}, shift=shift)
    if "fewer-steps-ab2" in methods:
        sigmas = np.linspace(1, 0, budget + 1)
        weights = adams_bashforth_weights(sigmas) * calibration.rate
        ab2 = replace(weighted(tuple(range(budget)), weights), sigmas=tuple(sigmas.tolist()))
        yield evaluation.row("fewer-steps-ab2", ab2)
    if "least-squares" in methods:
        solver = [calibration.first_jump(i, i + 1) for i in range(steps)]
        predicted = predictor_weights(calibration.reference(), solver, uniform, anchors=3)
        yield evaluation.row("least-squares", weighted(uniform, *predicted))
    if "budget-ablation" in methods:
        yield evaluation.row("uniform, solver's jumps", solver_jumps(uniform))
        yield evaluation.row("uniform, fitted on the plan's trajectory", replayed(uniform))
        yield evaluation.row("planned, solver's jumps", solver_jumps(plan.computed))
        weights = offline_weights(calibration.reference(), plan.computed, plan.anchors, calibration.scaled)
        yield evaluation.row("planned, fitted on the reference", weighted(plan.computed, *weights))
    if "budget" in methods:
        exact = ", exact" if plan.target == "exact" else ""
        yield evaluation.row(f"budget (H = {plan.anchors}{exact})", plan)
        imitating = plans_folder(evaluation) / budget_name(options.model, steps, budget)
        if exact and imitating.exists():
            yield evaluation.row("budget (reference)", BudgetPlan.load(imitating))


def peer_rows(evaluation, calibration, methods, speedups):
    """The rows of other caches, each at the setting whose FLOPs come nearest to an asked speed-up."""
    bench = Bench(evaluation.pipe, evaluation.settings, calibration.prompts, evaluation.options.batch_size)
    for name in [name for name in PEERS if name in methods]:
        reason = PEERS[name].unfit(bench)
        if reason:
            print(f"{name} is left out, it {reason}", file=sys.stderr)
            continue
        for value, saved in dict.fromkeys(nearest_values(bench, name, speedups).values()):
            yield evaluation.peer_row(bench, name, value, saved)


def as_tuples(weights) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(w) for w in row) for row in weights)


def table(rows) -> str:
    """Markdown."""

    def cell(row, name):
        value = row["settings"].get("threshold") if name == "threshold" else row[name]
        digits = 2 if name.endswith("psnr") or name.startswith("speedup") else 4
        return "–" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    columns = [name for name in COLUMNS if name == "threshold" or name in rows[0]]
    body = ["| " + " | ".join(cell(row, name) for name in columns) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *body])


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder, for example ERTACache4FLUX")
    parser.add_argument("--methods", default="fewer-steps,uniform,ertacache", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--thresholds", metavar="λ,λ,…")
    parser.add_argument("--speedups", metavar="S,S,…", help="choose λ so that NFE is nearest to T/S")
    parser.add_argument("--count", type=int, default=64, help="held-out captions, when --prompts is not given")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--latency-repeats", type=int, default=5, help="alternating runs; 0 leaves the latency out")
    parser.add_argument("--plans", type=Path, help="folder of the stored plans (default: cache/ of the model folder)")
    parser.add_argument("--store", action="store_true", help="keep the plans that are calibrated here in cache/")
    args, rest = parser.parse_known_args()
    program = load_program(args.folder)
    options = cli.parse_arguments(program, rest)
    options.plans = args.plans
    methods = args.methods.split(",")
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise UserError(f"--methods {','.join(unknown)}: choose from {', '.join(METHODS)}")
    if bool(args.thresholds) == bool(args.speedups):
        raise UserError("give either --thresholds λ,λ,… or --speedups S,S,…")
    swept = (BUDGET_METHODS | set(PEERS)) & set(methods)
    if args.thresholds and swept:
        raise UserError(f"--thresholds has no meaning for {', '.join(sorted(swept))}: give --speedups")
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
        calibration = open_calibration(*common, kind=BudgetCalibration, target=options.target)
        for speedup in values:
            add(budget_rows(evaluation, calibration, methods, budget_of(settings["steps"], speedup), args.store))
        calibration.finish()
    peers = set(PEERS) & set(methods)
    if peers:
        add(peer_rows(evaluation, open_calibration(*common, site="output"), methods, values))
    if {"uniform", "ertacache", "ablation"} & set(methods) or not (budgeted or peers):
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
