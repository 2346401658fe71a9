"""How a demo's budget plans depend on their calibration: on the number of prompts, and on where they are used.

    .venv/bin/python scripts/bench/study.py ERTACache4FLUX prompts --counts 2,4,8,16,32
    .venv/bin/python scripts/bench/study.py ERTACache4FLUX draws --draws 4
    .venv/bin/python scripts/bench/study.py ERTACache4FLUX transfer --guidances 2,7 --sizes 48x48,96x96
    .venv/bin/python scripts/bench/study.py ERTACache4FLUX drift --guidances 1.75,5.25,7 --speedups 2,3
    .venv/bin/python scripts/bench/study.py ERTACache4FLUX images --speedups 2 --count 3 --out exact-flux.png

`prompts` fits plans on that many captions of the demo's training part and measures them on held-out captions, with
the model calls and seconds that the calibration took. `draws` calibrates again, at efforts quick and normal, on
several sets of 8 captions, half of them open, and compares them with the stored plan: how far plans depend on luck
and effort. `transfer` uses plans that were fitted at the default settings at other guidance scales and sizes
(HEIGHTxWIDTH), and on prompts from outside the demo's grammar, beside plans that were fitted there and fewer steps
there. `drift` runs the stored plans in the stock pipeline, one prompt a call, and says how well the drift of a sample
ranks its error in the final latents (Spearman's ρ, in each condition and over all of them), how many samples get a
warning, and what computing more steps where a run drifts costs and brings. `images` draws the exact solution, the
uncached run and the stored plan with the exact target side by side, with their differences to the solution. PSNRs are
to the uncached run in the same situation, in dB: mean / 10th percentile / worst of the captions.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts

import itertools
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import ertacache
from ertacache import BudgetPlan, UserError
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.session import CalibrationSession
from ertacache.cli import folder_command
from ertacache.cli.arguments import ArgumentParser, check_counts, parse_list
from ertacache.demos.model_folder import load_model_folder
from ertacache.evaluation import metrics
from ertacache.evaluation.runner import Evaluation
from ertacache.evaluation.table import facts
from ertacache.pipelines.uncached import uncached_latents
from ertacache.plans.drift import Monitor
from ertacache.plans.names import budget_name, budget_of, check_speedups
from ertacache.utils import media
from ertacache.utils.errors import run_program
from ertacache.utils.files import read_prompts, writable_files, write_atomically
from ertacache.utils.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = {*folder_command.OF_A_RUN, "prompt", "prompts", "fps", "site", "calibration_prompts"} - {"out"}
CAPTIONS = 8  # that the plans of `transfer` are fitted on


class Study:
    """One demo, its command line, and the budgets that are asked for."""

    def __init__(self, sampler, options, speedups, count):
        self.sampler, self.options, self.pipe = sampler, options, folder_command.open_pipeline(sampler, options)
        self.settings = folder_command.checked_settings(sampler, self.pipe, options)
        self.budgets = [budget_of(self.settings["steps"], speedup) for speedup in speedups]
        self.grammar, self.count, self.calls = sampler.grammar, count, 0
        self.held_out = self.captions(count, seed=100, held_out=True)
        self.pipe.transformer.register_forward_pre_hook(self.tally)

    def tally(self, *_):
        self.calls += 1

    def captions(self, count, seed, held_out, leave_open=False):
        return self.grammar.sample_captions(count, seed, held_out, leave_open)

    def stored(self, budget):
        """Return the stored plan for a number of computed steps."""
        return BudgetPlan.load(self.sampler.FOLDER / "cache" / budget_name("demo", self.settings["steps"], budget))

    def plans(self, prompts, settings, effort=None, first_seed=0):
        """Return a plan for each budget, fitted on these prompts at these settings."""
        options = {"settings": settings, "batch_size": self.options.batch_size, "model_id": self.options.model}
        seeds = range(first_seed, first_seed + len(prompts))
        session = CalibrationSession(self.sampler, self.pipe, prompts, seeds, work=ROOT / "runs", **options)
        calibration = BudgetCalibration(session, self.options.target or "reference")
        plans = calibration.plans(self.budgets, effort or self.options.effort)
        calibration.finish()
        return plans

    def evaluation(self, prompts, settings):
        seeds = range(self.options.seed, self.options.seed + len(prompts))
        options = {"model": self.options.model, "batch_size": self.options.batch_size, "work": ROOT / "runs"}
        return Evaluation(self.sampler, self.pipe, prompts, seeds, settings, **options)

    def psnr(self, evaluation, plan=None, settings=None):
        """Return mean, 10th percentile and worst of the PSNR over the prompts, in dB: [3]."""
        outcome = evaluation.outcome(evaluation.in_loop(plan, settings), count=False)
        each = metrics.each(metrics.psnr, evaluation.uncached_outcome.images, outcome.images)
        return np.array([each.mean(), np.quantile(each, 0.1), each.min()])

    # --- the tables --------------------------------------------------------------------------------------------------

    def prompts_needed(self, counts):
        """Yield one row per number of calibration prompts."""
        prompts = self.captions(max(counts), seed=7, held_out=False)
        evaluation = self.evaluation(self.held_out, self.settings)
        for count in counts:
            self.calls, start = 0, time.perf_counter()
            plans = self.plans(prompts[:count], self.settings)
            cost = {"transformer calls": self.calls, "seconds": round(time.perf_counter() - start)}
            psnr = {f"N = {budget}, dB": decibels(self.psnr(evaluation, plan)) for budget, plan in plans.items()}
            yield {"prompts": count, **psnr, **cost}

    def draws(self, count):
        """Yield one row per budget and effort: the stored plan, and plans on `count` sets of captions."""
        evaluation, half, found = self.evaluation(self.held_out, self.settings), CAPTIONS // 2, {}
        steps, self.calls = self.settings["steps"], 0
        evaluation.in_loop()(slice(0, self.options.batch_size))
        per_step = self.calls // steps * -(-CAPTIONS // self.options.batch_size)  # transformer calls of all captions
        for number in range(count):
            full, left_open = self.captions(half, 50 + number, False), self.captions(half, 150 + number, False, True)
            prompts = [caption for pair in zip(full, left_open, strict=True) for caption in pair]
            for effort in ("quick", "normal"):
                self.calls, start = 0, time.perf_counter()
                plans = self.plans(prompts, self.settings, effort, first_seed=10_000 * (number + 1))
                rollouts = [plan.nfe * plan.provenance["calibration"]["rollouts"] for plan in plans.values()]
                cost = self.calls, per_step * (steps + sum(rollouts)), time.perf_counter() - start
                for budget, plan in plans.items():
                    found.setdefault((budget, effort), []).append((self.psnr(evaluation, plan), *cost))
        for (budget, effort), draws in sorted(found.items(), reverse=True):
            psnr, calls, unshared, seconds = (np.array(values) for values in zip(*draws, strict=True))
            stored, means = self.psnr(evaluation, self.stored(budget)), psnr[:, 0]
            row = {"calls": budget, "stored plan, dB": decibels(stored), "effort": effort}
            row |= {
                "mean of the draws, dB": decibels(psnr.mean(axis=0)),
                "worst and best draw": decibels(np.sort(means)[[0, -1]]),
            }
            row |= {"transformer calls": round(calls.mean())}
            yield row | {"without sharing": round(unshared.mean()), "seconds": round(np.median(seconds))}

    def transfer(self, guidances, sizes):
        """Yield one row per other condition and budget."""
        captions, outside = (
            self.captions(CAPTIONS, seed=7, held_out=False),
            read_prompts(self.sampler.FOLDER / "prompts" / "calibration.txt"),
        )
        situations = {"as calibrated": (captions, self.held_out, {})}
        situations |= {f"guidance {g:g}": (captions, self.held_out, {"guidance": g}) for g in guidances}
        for height, width in sizes:
            situations[f"{height}×{width}"] = (captions, self.held_out, {"height": height, "width": width})
        situations["prompts outside the grammar"] = (outside[:CAPTIONS], outside[CAPTIONS:], {})
        self.check(changes for _, _, changes in situations.values())
        default = self.plans(captions, self.settings)
        for name, (fit, measure, changes) in situations.items():
            settings = {**self.settings, **changes}
            own = self.plans(fit, settings) if name != "as calibrated" else default
            evaluation = self.evaluation(measure, settings)
            for budget in self.budgets:
                fewer = self.psnr(evaluation, settings={**settings, "steps": budget})
                here, there = (self.psnr(evaluation, plans[budget]) for plans in (default, own))
                row = {"condition": name, "calls": budget, "fewer steps, dB": decibels(fewer)}
                row |= {"plan calibrated at the defaults, dB": decibels(here)}
                row |= {"plan calibrated for it, dB": decibels(there)}
                yield row | {"difference of the means": float(there[0] - here[0])}

    def drift(self, guidances):
        """Yield one row per stored plan and condition, and one for all conditions of a plan together."""
        outside = read_prompts(self.sampler.FOLDER / "prompts" / "calibration.txt")[: self.count]
        situations = {"held-out captions": (self.held_out, {}), "prompts outside the grammar": (outside, {})}
        situations |= {f"guidance {g:g}": (self.held_out, {"guidance": g}) for g in guidances}
        self.check(changes for _, changes in situations.values())
        steps = self.settings["steps"]
        for budget in self.budgets:
            plan = self.stored(budget)
            limits, everywhere = Monitor(plan).limits(), []
            for name, (prompts, changes) in situations.items():
                samples = list(self.drift_samples(plan, prompts, {**self.settings, **changes}))
                everywhere += samples
                yield {"calls": f"{budget} of {steps}", "runs": name} | drift_row(samples, limits)
            yield {"calls": f"{budget} of {steps}", "runs": "**all of these**"} | drift_row(everywhere, limits)

    def check(self, every: Iterable[Mapping[str, Any]]) -> None:
        """Refuse changes of settings that the model cannot take, before any of them takes time."""
        for changes in every:
            self.sampler.settings_of(self.pipe, **{**self.settings, **changes})

    def drift_samples(self, plan, prompts, settings):
        """Yield per prompt: drift, squared error of the latents without and with extra steps, extra steps."""
        for prompt, seed in zip(prompts, itertools.count(self.options.seed), strict=False):
            uncached, errors = uncached_latents(self.pipe, [prompt], [seed], settings)[0], {}
            for on_drift in ("ignore", "compute"):
                ertacache.enable(self.pipe, plan, on_drift=on_drift)
                latents = uncached_latents(self.pipe, [prompt], [seed], settings)[0]
                summary = ertacache.summary(self.pipe)
                errors[on_drift] = (latents - uncached).double().square().mean().item(), summary.computed - plan.nfe
                ertacache.disable(self.pipe)
                if on_drift == "ignore":
                    drift = summary.drift[0].drift
            yield drift, errors["ignore"][0], *errors["compute"]

    def images(self, gain=50):
        """Return the sheet for the first budget; differences are amplified by `gain`."""
        budget, steps = self.budgets[0], self.settings["steps"]
        plan = BudgetPlan.load(self.sampler.FOLDER / "cache" / budget_name("demo", steps, budget, "exact"))
        evaluation = self.evaluation(self.held_out, self.settings)
        exact, uncached = evaluation.solution.images, evaluation.uncached_outcome.images
        cached = evaluation.outcome(evaluation.in_loop(plan)).images
        columns = {"exact solution": exact, f"uncached, {steps} steps": uncached, f"plan, {budget} calls": cached}
        columns[f"uncached - exact, x{gain}"] = media.difference(uncached, exact, gain)
        columns[f"plan - exact, x{gain}"] = media.difference(cached, exact, gain)
        return media.sheet(self.held_out, columns)


def decibels(values) -> str:
    """Return PSNRs as one cell."""
    return " / ".join(f"{value:.1f}" for value in values)


def drift_row(samples, limits):
    """Summarise (drift, error, error with extra steps, extra steps) of each sample."""
    drift, error, corrected, extra = (np.array(column) for column in zip(*samples, strict=True))
    return {
        "samples": len(samples),
        "drift, median": float(np.median(drift)),
        "warned": f"{100 * np.mean((drift < limits[0]) | (drift > limits[1])):.0f} %",
        "ρ": float(spearmanr(drift, error).statistic),
        "error": f"{np.sqrt(np.mean(error)):.2g}",
        "error with extra steps": f"{np.sqrt(np.mean(corrected)):.2g}",
        "extra steps": f"{np.mean(extra):.1f}",
    }


def sizes_of(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(int(n) for n in part.split("x")) for part in text.split(",") if part]
        if all(len(pair) == 2 for pair in pairs):
            return pairs
    except ValueError:
        pass
    raise UserError(f"--sizes {text}: write HEIGHTxWIDTH with commas between, like 48x48,96x96")


def table(rows) -> str:
    """Return the rows as a Markdown table."""
    cells = [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    return markdown(list(rows[0]), cells)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder, for example ERTACache4FLUX")
    parser.add_argument("study", choices=("prompts", "draws", "transfer", "drift", "images"))
    parser.add_argument("--speedups", metavar="S,S,…", default="2,3,5", help="of the plans")
    parser.add_argument("--counts", metavar="N,N,…", default="2,4,8,16,32", help="numbers of calibration prompts")
    parser.add_argument("--draws", type=int, default=4, help="sets of calibration captions")
    parser.add_argument("--guidances", metavar="G,G,…", default="", help="scales to use the plans at")
    parser.add_argument("--sizes", metavar="HxW,HxW,…", default="", help="sizes to use the plans at")
    parser.add_argument("--count", type=int, default=32, help="held-out captions")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args, rest = parser.parse_known_args()
    check_counts(args, "draws", "count")
    sampler = load_model_folder(args.folder)
    options = folder_command.parse_arguments(sampler, rest, "normal", WITHOUT)
    if options.model != "demo":
        raise UserError(f"--model {options.model}: this study samples captions of the demo's grammar, use the demo")
    speedups, counts = parse_list(args.speedups, "--speedups", "2,3"), parse_list(args.counts, "--counts", "2,4", int)
    check_speedups(speedups)
    guidances = parse_list(args.guidances, "--guidances", "2,7") if args.guidances else []
    sizes = sizes_of(args.sizes)
    if args.study == "images":
        options.target = "exact"
        with writable_files(options.out):
            return media.save_png(options.out, Study(sampler, options, speedups, args.count).images())
    with writable_files(args.json):
        study, rows = Study(sampler, options, speedups, args.count), []
        studies = {
            "prompts": lambda: study.prompts_needed(counts),
            "draws": lambda: study.draws(args.draws),
            "transfer": lambda: study.transfer(guidances, sizes),
            "drift": lambda: study.drift(guidances),
        }
        for row in studies[args.study]():
            rows.append(row)
            print(json.dumps(row, ensure_ascii=False), flush=True)
            if args.json:
                write_atomically(args.json, (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"\n{table(rows)}\n\n{facts(f'{args.count} held-out captions')}")


if __name__ == "__main__":
    run_program(main)
