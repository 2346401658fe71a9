"""How a demo's budget plans depend on their calibration: on the number of prompts, and on where they are used.

    .venv/bin/python scripts/bench/study.py ERTACache4FLUX prompts --counts 2,4,8,16,32
    .venv/bin/python scripts/bench/study.py ERTACache4FLUX transfer --guidances 2,7 --sizes 48x48,96x96
    .venv/bin/python scripts/bench/study.py ERTACache4FLUX drift --guidances 1.75,5.25,7 --speedups 2,3
    .venv/bin/python scripts/bench/study.py ERTACache4FLUX pictures --speedups 2 --count 3 --out exact-flux.png

`prompts` fits plans on that many captions of the demo's training part and measures them on held-out captions, with the
model calls and seconds that the calibration took. `transfer` uses plans that were fitted at the default settings at
other guidance scales and sizes (HEIGHTxWIDTH), and on prompts from outside the demo's grammar, beside plans that were
fitted there and fewer steps there. `drift` runs the stored plans in the stock pipeline, one prompt a call, and says how
well the drift of a sample ranks its error in the final latents (Spearman's ρ, in each condition and over all of them),
how many samples get a warning, and what computing more steps where a run drifts costs and brings. `pictures` draws the
exact solution, the uncached run and the stored plan with the exact target side by side, with their differences to the
solution. Distances are mean PSNR in dB to the uncached run under the same conditions.
"""

import itertools
import json
import time
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

import ertacache
from ertacache import BudgetPlan, UserError
from ertacache.calibration.budget import BudgetCalibration
from ertacache.cli import model_folder
from ertacache.demos.model_folder import load_program, world
from ertacache.evaluation import metrics
from ertacache.evaluation.runner import Evaluation
from ertacache.pipelines.uncached import stock_latents
from ertacache.plans.drift import Monitor
from ertacache.plans.names import budget_name, budget_of, check_speedups
from ertacache.utils import media
from ertacache.utils.errors import ArgumentParser, run_program
from ertacache.utils.files import read_prompts, write_atomically
from ertacache.utils.provenance import library_versions, machine

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = 8  # that the plans of `transfer` are fitted on


class Study:
    """One demo, its command line, and the budgets that are asked for."""

    def __init__(self, program, options, speedups, count):
        self.program, self.options, self.pipe = program, options, model_folder.load(program, options)
        self.settings = model_folder.checked_settings(program, self.pipe, options)
        self.budgets = [budget_of(self.settings["steps"], speedup) for speedup in speedups]
        self.world, self.count, self.calls = world(program), count, 0
        self.held_out = self.captions(count, seed=100, held_out=True)
        self.pipe.transformer.register_forward_pre_hook(self.tally)

    def tally(self, *_):
        self.calls += 1

    def captions(self, count, seed, held_out):
        return [scene.caption() for scene in self.world.sample_scenes(count, seed=seed, held_out=held_out)]

    def plans(self, prompts, settings):
        """A plan for each budget, fitted on these prompts at these settings."""
        options = {"settings": settings, "batch_size": self.options.batch_size, "model_id": self.options.model}
        options |= {"work": ROOT / "runs", "target": self.options.target}
        calibration = BudgetCalibration(self.program, self.pipe, prompts, range(len(prompts)), **options)
        plans = calibration.plans(self.budgets, self.options.search)
        calibration.finish()
        return plans

    def evaluation(self, prompts, settings):
        seeds = range(self.options.seed, self.options.seed + len(prompts))
        return Evaluation(self.program, self.pipe, prompts, seeds, settings, self.options, work=ROOT / "runs")

    def psnr(self, evaluation, plan=None, settings=None):
        """Mean over the prompts, dB; and of the latents."""
        found = evaluation.outcome(evaluation.own(plan, settings), count=False)
        reference = evaluation.reference
        return metrics.mean(metrics.psnr, reference.pictures, found.pictures), metrics.latent_psnr(
            reference.latents, found.latents
        )

    # --- the two tables ----------------------------------------------------------------------------------------------

    def prompts_needed(self, counts):
        """A row for each number of calibration prompts and each budget."""
        prompts = self.captions(max(counts), seed=7, held_out=False)
        evaluation = self.evaluation(self.held_out, self.settings)
        for count in counts:
            self.calls, start = 0, time.perf_counter()
            plans = self.plans(prompts[:count], self.settings)
            cost = {"transformer_calls": self.calls, "seconds": round(time.perf_counter() - start, 1)}
            for budget, plan in plans.items():
                psnr, latent_psnr = self.psnr(evaluation, plan)
                yield {"prompts": count, "nfe": budget, "psnr": psnr, "latent_psnr": latent_psnr, **cost}

    def transfer(self, guidances, sizes):
        """A row for each other condition and each budget."""
        captions, outside = (
            self.captions(CAPTIONS, seed=7, held_out=False),
            read_prompts(self.program.FOLDER / "prompts" / "calibration.txt"),
        )
        conditions = {"as calibrated": (captions, self.held_out, {})}
        conditions |= {f"guidance {g:g}": (captions, self.held_out, {"guidance": g}) for g in guidances}
        for height, width in sizes:
            conditions[f"{height}×{width}"] = (captions, self.held_out, {"height": height, "width": width})
        conditions["prompts from outside"] = (outside[:CAPTIONS], outside[CAPTIONS:], {})
        default = self.plans(captions, self.settings)
        for name, (fit, measure, changes) in conditions.items():
            settings = {**self.settings, **changes}
            own = self.plans(fit, settings) if name != "as calibrated" else default
            evaluation = self.evaluation(measure, settings)
            for budget in self.budgets:
                fewer, _ = self.psnr(evaluation, settings={**settings, "steps": budget})
                here, there = (self.psnr(evaluation, plans[budget])[0] for plans in (default, own))
                row = {"used at": name, "nfe": budget, "fewer steps": fewer, "plan": here, "fitted there": there}
                yield row | {"loss": there - here}

    def drift(self, guidances):
        """A row for each stored plan and condition, and one for all conditions of a plan together."""
        outside = read_prompts(self.program.FOLDER / "prompts" / "calibration.txt")[: self.count]
        conditions = {"held-out captions": (self.held_out, {}), "prompts from outside": (outside, {})}
        conditions |= {f"guidance {g:g}": (self.held_out, {"guidance": g}) for g in guidances}
        steps = self.settings["steps"]
        for budget in self.budgets:
            plan = BudgetPlan.load(self.program.FOLDER / "cache" / budget_name("demo", steps, budget))
            limit, everywhere = Monitor(plan).limit(), []
            for name, (prompts, changes) in conditions.items():
                samples = list(self.drift_samples(plan, prompts, {**self.settings, **changes}))
                everywhere += samples
                yield {"plan": plan.title, "run": name} | drift_row(samples, limit)
            yield {"plan": plan.title, "run": "all of these"} | drift_row(everywhere, limit)

    def drift_samples(self, plan, prompts, settings):
        """Of each prompt: the drift, the latents' mean squared error, that with extra steps, and how many they were."""
        for prompt, seed in zip(prompts, itertools.count(self.options.seed), strict=False):
            wanted, found = stock_latents(self.pipe, [prompt], [seed], settings)[0], {}
            for on_drift in ("ignore", "compute"):
                ertacache.enable(self.pipe, plan, on_drift=on_drift)
                latents = stock_latents(self.pipe, [prompt], [seed], settings)[0]
                told = ertacache.summary(self.pipe)
                found[on_drift] = (latents - wanted).double().square().mean().item(), told.computed - plan.nfe
                ertacache.disable(self.pipe)
                if on_drift == "ignore":
                    drift = told.drift[0].drift
            yield drift, found["ignore"][0], *found["compute"]

    def pictures(self, gain=50):
        """The sheet for the first budget; differences are shown `gain` times."""
        budget, steps = self.budgets[0], self.settings["steps"]
        plan = BudgetPlan.load(self.program.FOLDER / "cache" / budget_name("demo", steps, budget, "exact"))
        evaluation = self.evaluation(self.held_out, self.settings)
        exact, uncached = evaluation.solution.pictures, evaluation.reference.pictures
        cached = evaluation.outcome(evaluation.own(plan)).pictures
        columns = {"exact solution": exact, f"uncached, {steps} steps": uncached, f"plan, {budget} calls": cached}
        columns[f"uncached - exact, x{gain}"] = media.difference(uncached, exact, gain)
        columns[f"plan - exact, x{gain}"] = media.difference(cached, exact, gain)
        return media.sheet(self.held_out, columns)


def drift_row(samples, limit):
    """Of (drift, error, error with extra steps, extra steps) of each sample."""
    drift, error, corrected, extra = (np.array(column) for column in zip(*samples, strict=True))
    return {
        "samples": len(samples),
        "drift, median": float(np.median(drift)),
        "above the limit": float(np.mean(drift > limit)),
        "ρ(drift, error)": float(spearmanr(drift, error).statistic),
        "latent error, rms": f"{np.sqrt(np.mean(error)):.2g}",
        "with extra steps": f"{np.sqrt(np.mean(corrected)):.2g}",
        "extra steps, mean": float(np.mean(extra)),
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
    """Markdown."""
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder, for example ERTACache4FLUX")
    parser.add_argument("study", choices=("prompts", "transfer", "drift", "pictures"))
    parser.add_argument("--speedups", metavar="S,S,…", default="2,3,5")
    parser.add_argument("--counts", metavar="N,N,…", default="2,4,8,16,32", help="numbers of calibration prompts")
    parser.add_argument("--guidances", metavar="G,G,…", default="", help="scales to use the plans at")
    parser.add_argument("--sizes", metavar="HxW,HxW,…", default="", help="sizes to use the plans at")
    parser.add_argument("--count", type=int, default=32, help="held-out captions")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args, rest = parser.parse_known_args()
    program = load_program(args.folder)
    options = model_folder.parse_arguments(program, rest)
    if options.model != "demo":
        raise UserError(f"--model {options.model}: this study samples captions of the demo's grammar, use the demo")
    speedups, counts = model_folder.parse_list(args.speedups), [int(n) for n in model_folder.parse_list(args.counts)]
    check_speedups(speedups)
    guidances, sizes = model_folder.parse_list(args.guidances) if args.guidances else [], sizes_of(args.sizes)
    study = Study(program, options, speedups, args.count)
    found = {
        "prompts": lambda: study.prompts_needed(counts),
        "transfer": lambda: study.transfer(guidances, sizes),
        "drift": lambda: study.drift(guidances),
    }
    if args.study == "pictures":
        options.target = "exact"
        return media.save_png(Path(options.out), study.pictures())
    rows = []
    for row in found[args.study]():
        rows.append(row)
        print(json.dumps(row, ensure_ascii=False), flush=True)
        if args.json:
            write_atomically(args.json, (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"\n{table(rows)}\n\n{args.count} held-out captions, {machine()}, {library_versions()}")


if __name__ == "__main__":
    run_program(main)
